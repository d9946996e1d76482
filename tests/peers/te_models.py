"""Small models by Megatron's own flags, in either layer spec, and their checkpoints
(test_transformer_engine.py, ask_transformer_engine.py).
"""

import io
import zlib
from contextlib import redirect_stdout
from pathlib import Path

import torch
from support.runs import TINY, TST
from support.trained import GQA, MOE, NORM, VOCAB

MODELS = {
    "llama": [],
    "qwen3, gqa": [*GQA, *NORM],
    "qwen3 moe, grouped": [*GQA, *NORM, *MOE, "--moe-grouped-gemm"],
    "qwen3 moe, sequential": [*GQA, *NORM, *MOE],
    "qwen3 moe, a dense layer": [*NORM, *MOE, "--moe-layer-freq", "[0,1]"],
    "moe, shared experts, multi-token prediction": [
        *MOE,
        "--moe-shared-expert-intermediate-size",
        "48",
        "--mtp-num-layers",
        "1",
    ],
}
EXPORTED = [
    name for name in MODELS if "multi-token" not in name
]  # the other has no counterpart in Hugging Face
ITERATION = 10  # of a run with TST's phases, in recovery


def arguments(name: str, spec: str):
    """Megatron's validated arguments of a run of this model with layer spec "local" or
    "transformer_engine", with TST's phases.
    """
    from megatron_tst.checkpoint.phases import store
    from megatron_tst.checks import dry_run
    from megatron_tst.config import TSTConfig

    flags = [
        flag for flag in MODELS[name] if spec != "local" or flag != "--moe-grouped-gemm"
    ]  # which is Transformer Engine's
    at = TINY.index("--transformer-impl") + 1
    args = dry_run.validate(
        [
            *TINY[:at],
            spec,
            *TINY[at + 1 :],
            *flags,
            *TST,
            "--mock-data",
            "--vocab-size",
            str(VOCAB),
        ],
        1,
        "h100",
    )
    schedule = TSTConfig.from_args(args).schedule(args)
    store(args, schedule, schedule)
    args.consumed_train_samples = ITERATION * args.global_batch_size
    return args


def built(args):
    """The model as Megatron's training loop builds it in one process, in fp32."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    config = gpt_config_from_args(args)
    with redirect_stdout(io.StringIO()):
        return GPTModelBuilder(config).build_model(
            ProcessGroupCollection.use_mpu_process_groups(), True, True
        )


def fill(model) -> None:
    """Made-up weights, another seed for each; norms around one, so that two swapped ones show."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        torch.nn.init.normal_(parameter, float(parameter.dim() == 1), 0.1, generator=generator)


def state_of(args, model) -> tuple[dict, dict]:
    """(state to save or to load into, its metadata), by Megatron's functions."""
    from megatron.core import mpu
    from megatron.training import checkpointing

    metadata = checkpointing._build_sharded_state_dict_metadata(args)
    group = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    state = checkpointing.generate_state_dict(
        args,
        [model],
        None,
        None,
        None,
        iteration=ITERATION,
        model_sd_kwargs={"metadata": metadata | group},
    )
    return state, metadata


def save(args, model, folder: Path) -> None:
    """A torch_dist checkpoint as --save would write it, without optimizer."""
    from megatron.core import dist_checkpointing

    state, metadata = state_of(args, model)
    iteration = folder / f"iter_{ITERATION:07d}"
    iteration.mkdir(parents=True)
    dist_checkpointing.save(state, str(iteration), content_metadata=metadata)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


def load(args, model, folder: Path, strictness: str) -> None:
    """A checkpoint into the model as --load and --dist-ckpt-strictness do it; nothing but extra
    states may be missing.
    """
    from megatron.core import dist_checkpointing

    wanted, _ = state_of(args, model)
    (iteration,) = folder.glob("iter_*")
    state = dist_checkpointing.load({"model": wanted["model"]}, str(iteration), strict=strictness)
    left = model.load_state_dict(state["model"], strict=False)
    assert not left.unexpected_keys and all(
        key.endswith("_extra_state") for key in left.missing_keys
    ), left
