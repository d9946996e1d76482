"""python export_by_modelopt.py OURS THEIRS FLAGS: loads a checkpoint into Megatron's model;
ModelOpt's exporter writes it to THEIRS.

OURS is our export of the same checkpoint, whose config.json says the architecture.
"""

import sys

import megatron.training.training as loop
import torch
from megatron.core.utils import unwrap_model

from megatron_tst import pretrain_gpt as script


def export(forward_step, model, *rest, **named):
    from modelopt.torch.export import export_mcore_gpt_to_hf

    (loaded,) = unwrap_model(model)
    export_mcore_gpt_to_hf(loaded, ours, dtype=torch.float32, export_dir=theirs)
    sys.exit(0)


if __name__ == "__main__":
    ours, theirs = sys.argv.pop(1), sys.argv.pop(1)
    loop.train = export
    script.main()
