"""FP8 and NVFP4 with TST: what a run is refused or warned of before training (docs/precision.md).

Both phases have the same number of positions L, so each rule holds in both or in neither: bags
change no shape inside the model. Outside of it, embedding, bag mean, router, norms, output layer
and loss are bf16 or fp32 whatever the recipe. Rules: Transformer Engine 2.20, megatron-core 0.19.2.
"""

from __future__ import annotations

import argparse

from megatron_tst.config import TSTConfig
from megatron_tst.errors import refuse, warn
from megatron_tst.hardware import LOW_PRECISION, recipes, why_not
from megatron_tst.model_size import query_groups


def check_precision(
    config: TSTConfig, args: argparse.Namespace, gpu: tuple[tuple[int, int], str] | None
) -> None:
    """Refuse a recipe that cannot run here or shapes that its GEMMs do not take; warn of state that
    does not survive the boundary.

    Args:
        config: the TST settings.
        args: Megatron's arguments after its own validation.
        gpu: (compute capability, torch's CUDA version); None on CPU.

    Raises:
        TSTError: with the flag, what was expected, what was got, what to do.
    """
    recipe = recipe_of(args)
    if not config.enabled or recipe not in LOW_PRECISION:  # none, or the user's own
        return
    flag = "--fp4-format" if recipe == "nvfp4" else f"--fp8-recipe {recipe}"
    if gpu is None:
        refuse(
            flag,
            "an NVIDIA GPU and Transformer Engine",
            "training on CPU",
            "Drop it, or train on a GPU.",
        )
    if expected := why_not(recipe, *gpu):
        do = f"Use one that runs: {', '.join(recipes(*gpu)) or 'none does; train in bf16'}."
        refuse(flag, expected, f"sm_{gpu[0][0]}{gpu[0][1]} with CUDA {gpu[1]}", do)
    _check_shapes(flag, recipe, args)
    if recipe == "delayed":
        warn(
            "--fp8-recipe delayed (Megatron's default) keeps scales of earlier steps, also over "
            "the boundary, and newer Transformer Engines refuse "
            "to load them from a checkpoint (NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1, or "
            "`megatron-tst boundary --drop-fp8-state`). "
            "tensorwise, blockwise and mxfp8 have no state"
        )
    elif not getattr(args, "first_last_layers_bf16", False):
        warn(
            f"{flag}: the first layer sees means of embeddings, then single ones; "
            f"--first-last-layers-bf16 keeps it out of {flag}"
        )


def recipe_of(args: argparse.Namespace) -> str | None:
    """The recipe that a run's GEMMs use: one of Megatron's names, "nvfp4", or None for 16 bit."""
    if getattr(args, "fp4", None):
        return str(getattr(args, "fp4_recipe", None) or "nvfp4")
    return (
        str(getattr(args, "fp8_recipe", None) or "delayed") if getattr(args, "fp8", None) else None
    )


def tokens_of_a_rank(args: argparse.Namespace) -> int:
    """Positions of one micro-batch that one rank quantises: L / CP, / TP with sequence parallelism,
    x micro-batch size.
    """
    tp = args.tensor_model_parallel_size if args.sequence_parallel else 1
    return args.seq_length // (args.context_parallel_size * tp) * args.micro_batch_size


def _check_shapes(flag, recipe, args):
    def of(name):
        return getattr(args, name, None)

    tokens, tp, cp = (
        tokens_of_a_rank(args),
        args.tensor_model_parallel_size,
        args.context_parallel_size,
    )
    needs = LOW_PRECISION[recipe]
    multiple, flags = needs.tokens, flag
    if recipe == "mxfp8" and of("tp_comm_overlap"):
        multiple, flags = 128, f"{flag} --tp-comm-overlap"
    elif recipe == "blockwise" and args.sequence_parallel:
        # each rank quantises its positions before they are gathered
        multiple, flags = 128, f"{flag} --sequence-parallel"
    why = f"--seq-length {args.seq_length} / CP {cp}"
    why += f" / TP {tp}" if args.sequence_parallel else ""
    if tokens % multiple:
        do = (
            f"{why} x --micro-batch-size {args.micro_batch_size}, in both phases: change one of "
            f"them."
        )
        refuse(f"{flags}: tokens of a rank", f"a multiple of {multiple}", tokens, do)
    if tokens % needs.faster_tokens:
        warn(
            f"{flag}: {tokens} tokens of a rank ({why} x {args.micro_batch_size}); whole blocks "
            f"need a multiple of {needs.faster_tokens}"
        )
    for what, size in _widths(args, tp).items():
        if size % needs.widths:
            refuse(
                f"{flag}: {what}",
                f"a multiple of {needs.widths}",
                size,
                "Use another recipe or another layout.",
            )
    if recipe == "mxfp8" and (of("fp8_dot_product_attention") or of("fp8_multi_head_attention")):
        positions = args.seq_length // cp
        if positions % 128:
            refuse(
                f"{flag} in attention: positions of a rank",
                "a multiple of 128",
                positions,
                "Change --seq-length, or leave attention in bf16.",
            )
    # None until Megatron has built the tokenizer; megatron-tst's dry run and plan know it
    rows = of("padded_vocab_size")
    if of("fp8_output_proj") and rows and rows // tp % 32:
        refuse(
            "--fp8-output-proj: vocabulary / TP",
            "a multiple of 32",
            rows // tp,
            "Drop the flag, or change --make-vocab-size-divisible-by.",
        )


def _widths(args, tp) -> dict[str, int]:
    """Widths of the quantised weights of a rank, by what they follow from."""
    heads, channels = args.num_attention_heads, args.kv_channels
    queries_keys_values = heads + 2 * query_groups(args)
    widths = {
        "--hidden-size": args.hidden_size,
        "queries, keys and values of a rank": queries_keys_values * channels // tp,
        "--num-attention-heads x --kv-channels of a rank": heads * channels // tp,
    }
    if args.num_experts:
        width = args.moe_ffn_hidden_size // args.expert_tensor_parallel_size
        return widths | {"--moe-ffn-hidden-size of a rank": width}
    return widths | {"--ffn-hidden-size of a rank": args.ffn_hidden_size // tp}
