"""The flags of a plan: read into Megatron's arguments, and given back for Megatron. No torch, but
for --hf-config.
"""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path

from megatron_tst.config import TSTConfig, add_tst_arguments
from megatron_tst.errors import refuse
from megatron_tst.hardware import GPUS
from megatron_tst.json_file import read_json
from megatron_tst.model_size import LLAMA_3_VOCABULARY
from megatron_tst.planning import arithmetic, launch_line, paper, recipes

LARGEST = 10**12
LEAST_SHARE = 1e-6  # of the peak: below it the days of a run are no figures
UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_MODEL = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "num_query_groups",
    "num_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "vocab_size",
    "untie_embeddings_and_output_weights",
    "group_query_attention",
    "swiglu",
    "qk_layernorm",
)
_SHAPE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "vocab_size",
    "seq_length",
    "train_iters",
    "global_batch_size",
)


def whole(text: str) -> int:
    """A whole number from 1 to LARGEST, 1_000 too.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        number = int(text.replace("_", ""))
    except ValueError:
        number = 0
    if not 1 <= number <= LARGEST:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 1 to 10^12, got {text!r}. Correct it"
        )
    return number


def positive(text: str) -> float:
    """A number above 0, with or without K, M, B, T: 105B, 105 B, 105b.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    unit = UNITS.get(text[-1:].upper(), 1)
    try:
        number = float(text if unit == 1 else text[:-1]) * unit
    except ValueError:
        number = math.nan
    if not 0 < number <= 1e18:
        raise argparse.ArgumentTypeError(
            f"expected a number above 0, as 0.4 or 105B, got {text!r}. Correct it"
        )
    return number


def add_arguments(p: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Give a parser the flags of a plan; of Megatron's and TST's own --help says names alone."""
    group = p.add_argument_group("what to plan")
    group.add_argument(
        "--preset",
        choices=recipes.RECIPES,
        metavar="NAME",
        help=f"a run of the paper: {', '.join(recipes.RECIPES)}",
    )
    group.add_argument(
        "--hf-config",
        metavar="FILE",
        help="or the shape of a Hugging Face config.json: Llama, Qwen3, Qwen3-MoE",
    )
    group.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="raw tokens that you have, as 105B or 1.5T",
    )
    group.add_argument(
        "--data-path",
        nargs="+",
        metavar=("PREFIX", "..."),
        help="or count them in Megatron's dataset, say how often each corpus is read, and time it",
    )
    group.add_argument(
        "--gpus", type=whole, metavar="N", help="GPUs (default: the paper's, else 8)"
    )
    group.add_argument(
        "--gpu",
        choices=GPUS,
        metavar="KIND",
        help=f"their kind: {', '.join(GPUS)} (default: b200 with --preset, else h100)",
    )
    group.add_argument(
        "--mfu",
        type=positive,
        metavar="X",
        help="share of the dense bf16 peak that your steps reach, in (0, 1]",
    )
    group.add_argument(
        "--tflops",
        type=positive,
        metavar="X",
        help="or TFLOP/s a GPU, as Megatron's --log-throughput prints it",
    )
    group.add_argument(
        "--sweep", action="store_true", help="text and the paper's loss for a grid over s and r"
    )
    group.add_argument("--json", action="store_true", help="one JSON object in place of the screen")
    theirs = p.add_argument_group("Megatron's")
    for name in (
        *_SHAPE,
        "ffn_hidden_size",
        "kv_channels",
        "num_query_groups",
        "num_experts",
        "moe_router_topk",
        "moe_ffn_hidden_size",
        "expert_tensor_parallel_size",
        "max_position_embeddings",
        "micro_batch_size",
        "lr_decay_iters",
        "lr_wsd_decay_iters",
        "train_samples",
    ):
        theirs.add_argument(f"--{name.replace('_', '-')}", type=whole)
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
    ):
        theirs.add_argument(f"--{name.replace('_', '-')}", type=whole, default=1)
    theirs.add_argument("--make-vocab-size-divisible-by", type=whole, default=128)
    theirs.add_argument("--split")
    for name in (
        "swiglu",
        "group_query_attention",
        "untie_embeddings_and_output_weights",
        "qk_layernorm",
        "sequence_parallel",
    ):
        theirs.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    theirs.add_argument("--fp8-format", dest="fp8", choices=("e4m3", "hybrid"))
    theirs.add_argument(
        "--fp8-recipe", choices=("delayed", "tensorwise", "blockwise", "mxfp8"), default="delayed"
    )
    theirs.add_argument("--fp4-format", dest="fp4", choices=("e2m1",))
    own = len(p._actions)
    add_tst_arguments(p).set_defaults(tst_bag_size=None)
    for action in [*theirs._group_actions, *p._actions[own:]]:
        action.help = argparse.SUPPRESS  # sixty lines that Megatron's --help has too
    return p


def parser() -> argparse.ArgumentParser:
    """Of the flags alone; a mistake is a TSTError."""
    return add_arguments(launch_line.Flags(allow_abbrev=False))


def read(
    argv: list[str], p: argparse.ArgumentParser | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """The run that the flags describe, completed, and the flags of its preset or config.json. The
    run has `not_used` beside Megatron's arguments: flags that say nothing to a plan.

    Args:
        argv: the command line, or the one that starts the run.
        p: the parser of a verb, after add_arguments; none: of the flags alone.

    Raises:
        TSTError: a value that makes no sense, or one that is missing.
    """
    p, base, namespace = p or parser(), [], argparse.Namespace()
    line = launch_line.read(argv, p)
    argv = line.argv if line.gpus is None else ["--gpus", str(line.gpus), *line.argv]
    given = p.parse_args(argv)
    if given.preset and given.hf_config is not None:
        refuse("--preset and --hf-config", "one of the two", "both", "Leave one out.")
    if given.preset:
        groups = recipes.groups(given.preset, {"GPU": given.gpu or "b200"})
        base = [
            flag for name in ("model", "training", "parallel", "precision") for flag in groups[name]
        ]
        namespace, _ = p.parse_known_args([*groups["tst"], *base])
        namespace.vocab_size = LLAMA_3_VOCABULARY
        ratio = namespace.tst_iters / namespace.train_iters
        namespace.tst_iters, namespace.tst_step_ratio = (
            None,
            None if given.tst_iters is not None else ratio,
        )
        namespace.lr_decay_iters = namespace.lr_wsd_decay_iters = (
            namespace.max_position_embeddings
        ) = None
        namespace.gpu, namespace.gpus = "b200", paper.GPUS[given.preset]
    elif given.hf_config is not None:
        base, vocabulary = _of_hugging_face(Path(given.hf_config))
        namespace, _ = p.parse_known_args(base)
        namespace.vocab_size = vocabulary
    before = dict(vars(namespace))
    args = p.parse_args(argv, namespace)
    args.not_used = line.not_used
    for name, value in line.values.items():  # the rules for layouts and TST look at more of them
        if not hasattr(args, name):
            setattr(args, name, value)
    _steps_of_samples(given, args)
    if given.preset and any(getattr(args, name) != before[name] for name in _MODEL):
        args.preset = None  # another model: nothing of it was measured
    for name in _SHAPE:
        if getattr(args, name) is None:
            do = "Give it, or a shape by --preset or --hf-config."
            refuse(f"--{name.replace('_', '-')}", "a value", "none", do)
    args.micro_batch_size = args.micro_batch_size or 1
    args.gpu, args.gpus = args.gpu or "h100", args.gpus or 8
    if args.mfu and not LEAST_SHARE <= args.mfu <= 1:
        refuse("--mfu", "a share in (0, 1]", f"{args.mfu:g}", "Give 0.4 for 40 %.")
    peak = GPUS[args.gpu].peak_tflops
    if args.tflops and not LEAST_SHARE <= args.tflops / peak <= 8:  # 4 bits: up to 8 times bf16's
        expected = f"what {args.gpu} reaches, whose bf16 peak is {peak:g} TFLOP/s"
        refuse("--tflops", expected, f"{args.tflops:g}", "Give what Megatron prints.")
    if args.mfu and args.tflops:
        refuse("--mfu and --tflops", "one of the two", "both", "Leave one out.")
    if not args.kv_channels and args.hidden_size % args.num_attention_heads:
        refuse(
            "--hidden-size",
            f"a multiple of --num-attention-heads = {args.num_attention_heads}",
            args.hidden_size,
            "Or give --kv-channels.",
        )
    if args.num_experts and (args.moe_router_topk or 2) > args.num_experts:
        refuse(
            "--moe-router-topk",
            f"at most --num-experts = {args.num_experts}",
            args.moe_router_topk or 2,
            "Lower it.",
        )
    args.moe_router_topk = args.moe_router_topk or 2  # Megatron's default
    if args.tokens:
        args.tokens = int(args.tokens) or refuse(
            "--tokens", "a token at least", f"{args.tokens:g}", "Give what you have, as 105B."
        )
    if args.tst_bag_size is None:
        args.tst_bag_size = 6  # the paper's dense runs, and r = 0.3
    if args.tst_step_ratio is None and args.tst_iters is None:
        args.tst_step_ratio = 0.3
    args.max_position_embeddings = args.max_position_embeddings or args.seq_length
    if args.max_position_embeddings < args.seq_length:
        refuse(
            "--seq-length",
            f"at most --max-position-embeddings = {args.max_position_embeddings}",
            args.seq_length,
            "Change one of them.",
        )
    arithmetic.complete(args)
    if not args.ffn_hidden_size:
        do = "Give --ffn-hidden-size, or a larger --hidden-size."
        refuse("--hidden-size", "a model with an MLP", f"{args.hidden_size} with --swiglu", do)
    if given.preset:
        args.lr_decay_iters, args.lr_wsd_decay_iters = (
            args.lr_decay_iters or args.train_iters,
            args.lr_wsd_decay_iters or max(1, args.train_iters // 10),
        )
    return args, base


def _steps_of_samples(given, args):
    """--train-samples in place of --train-iters, as Megatron has them."""
    if given.train_samples is None:
        return
    both = "--train-iters and --train-samples"
    if given.train_iters is not None:
        refuse(both, "one of the two", "both", "Leave one out.")
    batch = args.global_batch_size
    if batch is not None and given.train_samples < batch:
        expected = f"at least a step of --global-batch-size {batch}"
        refuse("--train-samples", expected, given.train_samples, "Raise it.")
    args.train_iters = given.train_samples // batch if batch else None


def _of_hugging_face(file: Path) -> tuple[list[str], int]:
    """-> flags of a config.json, rows of its embedding"""
    from megatron_tst.export import hf_config

    do = "Give the config.json that lies beside a model's weights."
    config = read_json(file, do=do)
    args = hf_config.arguments(config, file)
    if not all(args.moe_layer_freq) and args.num_experts:
        refuse(
            "--hf-config",
            "experts in every layer, or in none",
            "some layers without",
            "Plan it by flags, as if every layer had them.",
        )
    return shlex.split(" ".join(hf_config.flags(args))), args.vocab_size


def paste(
    args: argparse.Namespace, config: TSTConfig, superposed: list[int], base: list[str]
) -> list[str]:
    """The flags of the run for Megatron: its preset's or config.json's, and what differs from them
    (the last of a kind wins).
    """
    p, words = parser(), []
    before, _ = p.parse_known_args(base)
    unprinted = [
        "help",
        "preset",
        "hf_config",
        "tokens",
        "data_path",
        "gpus",
        "gpu",
        "mfu",
        "tflops",
        "sweep",
        "json",
        "print",
        "vocab_size",
        "split",
        "train_samples",
    ]
    for needed, names in (
        (args.group_query_attention, ["num_query_groups"]),
        (args.fp8, ["fp8_recipe"]),
        (
            args.num_experts,
            ["moe_ffn_hidden_size", "moe_router_topk", "expert_tensor_parallel_size"],
        ),
    ):
        unprinted += [] if needed else names
    for action in p._actions:
        value = getattr(args, action.dest, None)
        if (
            action.dest not in unprinted
            and not action.dest.startswith("tst_")
            and value != getattr(before, action.dest)
        ):
            words += [action.option_strings[0]] + ([str(value)] if value is not True else [])
    tst = vars(config) | {"step_ratio": None, "iters": tuple(superposed)}
    for name, default in vars(TSTConfig()).items():
        if tst[name] != default:
            values = tst[name] if isinstance(tst[name], tuple) else (tst[name],)
            words += [f"--tst-{name.replace('_', '-')}"] + (
                [",".join(map(str, values))] if values != (True,) else []
            )
    return [*base, *words]
