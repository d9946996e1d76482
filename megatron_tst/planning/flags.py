"""The flags of a plan: read into Megatron's arguments, and given back for Megatron. No torch, but
for --hf-config.
"""

from __future__ import annotations

import argparse
import ast
import math
import re
import shlex
import warnings
from pathlib import Path

from megatron_tst import model_size
from megatron_tst.config import TSTConfig, add_tst_arguments
from megatron_tst.errors import TSTError, refuse
from megatron_tst.hardware import GPUS
from megatron_tst.json_file import read_json
from megatron_tst.planning import arithmetic, hf_shapes, launch_line, paper, recipes

LARGEST = 10**12
LEAST_SHARE = 1e-6  # of the peak: below it the days of a run are no figures
UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# Megatron's flags that change the shape, beside those that it has with a value each below.
_SHAPE_NUMBERS = (
    *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
    *("moe_shared_expert_intermediate_size", "moe_latent_size"),
)
_SHAPE_SWITCHES = (
    *("multi_latent_attention", "add_qkv_bias", "attention_output_gate", "quick_geglu"),
    *("moe_shared_expert_gate", "mtp_use_repeated_layer"),
)
_LAYOUT_NUMBERS = (
    *("moe_router_num_groups", "moe_router_group_topk"),
    *("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"),
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
)
_LAYOUT_SWITCHES = (
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
)
# What Megatron takes for an absent --kv-lora-rank and so on (training/arguments.py).
_LATENT = {"kv_lora_rank": 32, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128}
_MODEL = (
    *(*_SHAPE_NUMBERS, *_SHAPE_SWITCHES, "moe_layer_freq", "mtp_num_layers", "softmax_type"),
    "hybrid_layer_pattern",
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
_RUN = ("seq_length", "train_iters", "global_batch_size")


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


def counted(text: str) -> int:
    """A whole number from 0 to LARGEST.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    return 0 if text == "0" else whole(text)


def frequency(text: str) -> int | list[int]:
    """--moe-layer-freq as Megatron takes it: n, or 1 for each layer with experts and 0 for each
    without, as [0,1,1] or ([0]*3+[1]*58).

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    if "[" not in text:
        return whole(text)
    try:
        if len(text) > 1 << 18 or re.search(r"[^,\d\[\]()+*]", text):
            raise ValueError(text)
        found = _pattern(ast.parse(text, mode="eval").body)
        if not isinstance(found, list) or set(found) - {0, 1}:
            raise ValueError(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise argparse.ArgumentTypeError(
            f"expected n, or 0 or 1 for each layer as ([0]*3+[1]*58), got {text[:80]!r}. Correct it"
        ) from None
    return found


def _pattern(node: ast.AST) -> list[int] | int:
    """A sum or a product of lists and numbers, no longer than a model has layers."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        values = [_pattern(one) for one in node.elts]
        if not all(isinstance(value, int) for value in values):
            raise ValueError("no list of layers")
        return values
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _pattern(node.left), _pattern(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int):
            if len(left) * right <= 1 << 16:
                return left * right
    raise ValueError("no list of layers")


def add_arguments(p: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Give a parser the flags of a plan; of Megatron's and TST's own --help says names alone."""
    group = p.add_argument_group("what to plan")
    group.add_argument(
        "--preset",
        choices=recipes.NAMES,
        metavar="NAME",
        help=f"a run of the paper: {', '.join(recipes.RECIPES)}; or a larger one: "
        f"{', '.join(recipes.LARGE)}",
    )
    group.add_argument(
        "--hf-config",
        metavar="FILE",
        help="or the shape of a Hugging Face config.json: Llama, Qwen3, and mixtures of experts "
        "as DeepSeek-V3, Qwen3-MoE, GLM-4.5, gpt-oss, Mixtral",
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
        *_SHAPE_NUMBERS,
        *_LAYOUT_NUMBERS,
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
    theirs.add_argument("--mtp-num-layers", type=counted)
    theirs.add_argument("--moe-layer-freq", type=frequency, default=1)
    theirs.add_argument("--softmax-type", choices=("vanilla", "off-by-one", "learnable"))
    theirs.add_argument("--hybrid-layer-pattern")
    theirs.add_argument("--pipeline-model-parallel-layout")
    theirs.add_argument("--split")
    for name in (
        "swiglu",
        "group_query_attention",
        "untie_embeddings_and_output_weights",
        "qk_layernorm",
        "sequence_parallel",
        *_SHAPE_SWITCHES,
        *_LAYOUT_SWITCHES,
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
    notes: list[str] = []
    line = launch_line.read(argv, p)
    argv = line.argv if line.gpus is None else ["--gpus", str(line.gpus), *line.argv]
    given = p.parse_args(argv)
    if given.preset and given.hf_config is not None:
        refuse("--preset and --hf-config", "one of the two", "both", "Leave one out.")
    if given.preset:
        gpu, recipe = given.gpu or "b200", recipes.of(given.preset)
        groups = recipes.groups(given.preset, {"GPU": gpu})
        base = [
            flag for name in ("model", "training", "parallel", "precision") for flag in groups[name]
        ]
        namespace, _ = p.parse_known_args([*groups["tst"], *base])
        namespace.vocab_size = recipe.vocabulary
        ratio = namespace.tst_iters / namespace.train_iters
        namespace.tst_iters, namespace.tst_step_ratio = (
            None,
            None if given.tst_iters is not None else ratio,
        )
        namespace.lr_decay_iters = namespace.lr_wsd_decay_iters = (
            namespace.max_position_embeddings
        ) = None
        namespace.gpu = "b200"
        namespace.gpus = paper.GPUS.get(given.preset, recipe.fit(gpu).gpus)
    elif given.hf_config is not None:
        shape = _of_hugging_face(Path(given.hf_config))
        base, notes = shape.flags, shape.notes
        namespace, _ = p.parse_known_args(base)
        namespace.vocab_size, namespace.add_bias_linear = shape.vocabulary, shape.biases
    before = dict(vars(namespace))
    args = p.parse_args(argv, namespace)
    args.not_used, args.notes = line.not_used, notes
    for name, value in line.values.items():  # the rules for layouts and TST look at more of them
        setattr(args, name, value)
    if given.hf_config is not None:
        notes += _assume_a_run(given, args)
    _complete_model(args)
    _steps_of_samples(given, args)
    if given.preset and any(getattr(args, name) != before[name] for name in _MODEL):
        args.preset = None  # another model: nothing of it was measured
    for name in _SHAPE:
        if getattr(args, name) is None:
            do = "Give it, or a shape by --preset or --hf-config."
            if given.hf_config is not None:
                do = "Give it: a config.json does not say it."
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
    if model_size.uncounted(args):
        do = "A plan has no formula for them."
        refuse(
            "the model",
            "GPTModel's layers, or HybridModel's of * + - E",
            " and ".join(model_size.uncounted(args)),
            do,
        )
    _check_layers(args)
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


def _assume_a_run(given, args) -> list[str]:
    """The paper's steps of its dense runs, where a config.json alone is given. -> notes"""
    if any(getattr(given, name) is not None for name in (*_RUN, "train_samples")):
        return []
    seq = min(recipes.SEQ, args.max_position_embeddings or recipes.SEQ)
    paper = recipes.RECIPES["600m"]
    for name, value in zip(_RUN, (seq, paper.steps, paper.batch_tokens // seq)):
        setattr(args, name, value)
    said = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in _RUN)
    return [f"{said} assumed: config.json says nothing of a run"]


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


def _complete_model(args):
    """What follows from others of Megatron's arguments."""
    old = getattr(args, "hybrid_override_pattern", None)  # its former name
    args.hybrid_layer_pattern = args.hybrid_layer_pattern or old
    if args.multi_latent_attention or "+" in (args.hybrid_layer_pattern or ""):
        args.multi_latent_attention = True
        for name, value in _LATENT.items():
            setattr(args, name, getattr(args, name) or value)
        args.kv_channels = args.kv_channels or args.v_head_dim
    if args.hybrid_layer_pattern:  # Megatron counts them there too
        main, *heads = args.hybrid_layer_pattern.split("/")
        args.num_layers = len(main.replace("|", "")) or None
        args.mtp_num_layers = len(heads) or None
    args.mtp_num_layers = args.mtp_num_layers or None


def _check_layers(args):
    """Flags that say of each layer what it is."""
    frequency, pattern = args.moe_layer_freq, args.hybrid_layer_pattern or ""
    if args.num_experts and isinstance(frequency, list) and len(frequency) != args.num_layers:
        expected = f"a value for each of the {args.num_layers} layers"
        refuse("--moe-layer-freq", expected, len(frequency), "Correct it.")
    if "E" in pattern and not args.num_experts:
        refuse("--hybrid-layer-pattern with E", "--num-experts", "none", "Give it.")
    if "*" in pattern and "+" in pattern:
        do = "Megatron takes one of them."
        refuse("--hybrid-layer-pattern", "* or + for all attention", pattern, do)
    if len({*pattern.split("/")[1:]}) > 1:
        do = "Give each layer of multi-token prediction the same."
        refuse("--hybrid-layer-pattern", "one pattern behind all /", pattern, do)


def _of_hugging_face(file: Path) -> hf_shapes.Shape:
    file = file / "config.json" if file.is_dir() else file
    do = "Give the config.json that lies beside a model's weights."
    config = read_json(file, do=do)
    from megatron_tst.export import hf_config

    kind = config.get("model_type")
    if kind not in (*hf_config.DEFAULTS,):
        return hf_shapes.read(config, file, hf_config.DEFAULTS)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            args = hf_config.arguments(config, file)
    except TSTError as error:
        if kind not in (*hf_shapes.KINDS,):
            raise
        # its sizes at least, if they are right: what Megatron computes otherwise changes none
        shape = hf_shapes.read(config, file, hf_config.DEFAULTS)
        shape.notes.append(f"import-hf and export-hf refuse it: {error}")
        return shape
    flags = shlex.split(" ".join(hf_config.flags(args)))
    notes = [str(warning.message).removeprefix("megatron_tst: ") for warning in caught]
    return hf_shapes.Shape(flags, args.vocab_size, False, notes)


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
        (not args.hybrid_layer_pattern, ["num_layers", "mtp_num_layers"]),
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
            value = hf_shapes.runs(value) if isinstance(value, list) else value
            value = 0 if value is None else value  # --mtp-num-layers, taken back
            words += [action.option_strings[0]] + ([str(value)] if value is not True else [])
    tst = vars(config) | {"step_ratio": None, "iters": tuple(superposed)}
    for name, default in vars(TSTConfig()).items():
        if tst[name] != default:
            values = tst[name] if isinstance(tst[name], tuple) else (tst[name],)
            words += [f"--tst-{name.replace('_', '-')}"] + (
                [",".join(map(str, values))] if values != (True,) else []
            )
    return [*base, *words]
