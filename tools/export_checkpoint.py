"""Export the model of a torch_dist checkpoint of Megatron-Core (0.18, 0.19), and import one. No
GPU, no Transformer Engine.

    python tools/export_checkpoint.py hf CHECKPOINT TARGET --tokenizer FOLDER    a folder that transformers loads: Llama, Qwen3, Qwen3-MoE
    python tools/export_checkpoint.py nemo CHECKPOINT TARGET --tokenizer FOLDER  a checkpoint of
    Megatron-Bridge, optimizer state included
    python tools/export_checkpoint.py import-hf FOLDER TARGET                    the way back: weights to pre-train further, and their flags
    python tools/export_checkpoint.py quantize CHECKPOINT TARGET --recipe fp8 --data-path PREFIX    the first in FP8 or NVFP4, by ModelOpt

CHECKPOINT is an iteration's folder, or that of --save (then its latest iteration).
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from convert_checkpoint import progress_bar

from megatron_tst.checkpoint.boundary import EXPERT_NORM
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.errors import TSTError
from megatron_tst.export import hf, nemo
from megatron_tst.export.hf import DTYPES
from megatron_tst.export.import_hf import LOAD, import_
from megatron_tst.export.quantize import RECIPES, quantize


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        return options.run(options)
    except TSTError as error:
        print(f"export_checkpoint: error: {error}", file=sys.stderr)
    except ImportError as error:
        print(
            f"export_checkpoint: error: expected safetensors (import-hf) and tokenizers, got "
            f"{error}. pip install 'megatron-tst[hf]'.",
            file=sys.stderr,
        )
    return 2


def _parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = _export_verb(verbs, "hf", "to Hugging Face")
    verb.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    verb.set_defaults(run=_hf)
    verb = _export_verb(verbs, "nemo", "to Megatron-Bridge (NeMo)")
    verb.add_argument(
        "--layer-spec",
        choices=EXPERT_NORM,
        help="of the Bridge run that is to load it; default: this run's own",
    )
    verb.add_argument("--drop-optimizer", action="store_true", help="weights alone")
    verb.set_defaults(run=_nemo)
    verb = verbs.add_parser("import-hf", help="from Hugging Face")
    verb.add_argument(
        "folder", type=Path, help="config.json and safetensors of a Llama, Qwen3 or Qwen3-MoE"
    )
    verb.add_argument("target", type=Path, help="a new folder, for --load")
    verb.add_argument(
        "--layer-spec",
        choices=EXPERT_NORM,
        default="transformer_engine",
        help="of the run that is to load it",
    )
    verb.add_argument("--force", action="store_true", help="replace TARGET")
    verb.set_defaults(run=_import)
    verb = _export_verb(verbs, "quantize", "to Hugging Face in FP8 or NVFP4")
    verb.add_argument("--recipe", choices=RECIPES, required=True, help="nvfp4 needs a GPU")
    verb.add_argument(
        "--data-path",
        required=True,
        metavar="PREFIX",
        help="indexed dataset: calibration from its start, perplexity on its end",
    )
    verb.add_argument(
        "--samples",
        type=int,
        default=512,
        help="to calibrate on, and as many to measure perplexity on",
    )
    verb.add_argument(
        "--sequence-length", type=int, help="tokens of a sample; default: the run's --seq-length"
    )
    verb.add_argument("--device", help="cpu, cuda, cuda:1; default: the GPU where there is one")
    verb.set_defaults(run=_quantize)
    return parser


def _export_verb(verbs, name, about):
    verb = verbs.add_parser(name, help=about)
    verb.add_argument("checkpoint", type=Path)
    verb.add_argument("target", type=Path, help="a new folder")
    verb.add_argument(
        "--tokenizer",
        type=Path,
        help="tokenizer.json or a folder of tokenizer files; default: the run's own",
    )
    verb.add_argument(
        "--vocab-size", type=int, help="ids of the tokenizer; the rows above them are padding"
    )
    verb.add_argument(
        "--allow-superposition", action="store_true", help="export although recovery has not begun"
    )
    verb.add_argument("--force", action="store_true", help="replace TARGET")
    return verb


def _given(options):
    """What every export takes."""
    names = ("tokenizer", "vocab_size", "allow_superposition", "force")
    return {name: getattr(options, name) for name in names}


def _quantize(options):
    source = Checkpoint(options.checkpoint)
    with progress_bar("samples", unit="") as progress:
        folder, before, after = quantize(
            source,
            options.target,
            recipe=options.recipe,
            data=options.data_path,
            samples=options.samples,
            sequence_length=options.sequence_length,
            device=options.device,
            progress=progress,
            **_given(options),
        )
    for when, value in ("before", before), ("after", after):
        print(f"perplexity {when:6s} {value:.4f} ({math.log(value):.5f} nats)")
    print(f"{folder}: written from {source.path}")
    return 0


def _import(options):
    with progress_bar("writing") as progress:
        flags = import_(
            options.folder,
            options.target,
            layer_spec=options.layer_spec,
            force=options.force,
            progress=progress,
        )
    print(
        f"{options.target}: weights alone. Load them with --load {options.target} "
        f"{' '.join(LOAD)} and"
    )
    print("  " + " ".join(flags))
    return 0


def _hf(options):
    source = Checkpoint(options.checkpoint)
    with progress_bar("writing") as progress:
        folder = hf.export(
            source, options.target, dtype=options.dtype, progress=progress, **_given(options)
        )
    print(f"{folder}: written from {source.path}")
    return 0


def _nemo(options):
    source = Checkpoint(options.checkpoint)
    with progress_bar("writing") as progress:
        folder = nemo.export(
            source,
            options.target,
            layer_spec=options.layer_spec,
            drop_optimizer=options.drop_optimizer,
            progress=progress,
            **_given(options),
        )
    print(
        f"{folder}: written from {source.path}. To Hugging Face by Bridge: "
        f"AutoBridge.from_hf_config(AutoConfig.from_pretrained('{folder}/hf'))"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
