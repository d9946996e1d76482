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

# The product into the latent of keys and values. It is 576 wide in DeepSeek-V3, whose published
# runs on H100 are in blockwise: there a partial block is taken.
_DOWN = "--kv-lora-rank + --qk-pos-emb-head-dim"
_DOWN_BLOCKWISE = 16


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
        partial = what == _DOWN and recipe == "blockwise"
        wanted = _DOWN_BLOCKWISE if partial else needs.widths
        if size % wanted:
            refuse(
                f"{flag}: {what}",
                f"a multiple of {wanted}",
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
    """Widths of the quantised weights of a rank, by what they follow from. All of them: a layer
    whose MLP is dense has another than one with experts.
    """

    def of(name):
        return getattr(args, name, None)

    widths = {"--hidden-size": args.hidden_size}
    if of("mtp_num_layers"):  # its product of the two hidden states
        widths["--hidden-size of a rank, in multi-token prediction"] = args.hidden_size // tp
    if of("multi_latent_attention"):
        widths |= _of_latent_attention(args, tp)
    else:
        heads, channels = args.num_attention_heads, args.kv_channels
        all_heads = heads + 2 * query_groups(args) + (heads if of("attention_output_gate") else 0)
        widths["queries, keys and values of a rank"] = all_heads * channels // tp
        widths["--num-attention-heads x --kv-channels of a rank"] = heads * channels // tp
    if _has_dense(args):
        widths["--ffn-hidden-size of a rank"] = args.ffn_hidden_size // tp
    if args.num_experts:
        width = args.moe_ffn_hidden_size // args.expert_tensor_parallel_size
        widths["--moe-ffn-hidden-size of a rank"] = width
        if shared := of("moe_shared_expert_intermediate_size"):
            widths["--moe-shared-expert-intermediate-size of a rank"] = shared // tp
        if latent := of("moe_latent_size"):
            widths["--moe-latent-size"] = latent
    return widths


def _of_latent_attention(args, tp) -> dict[str, int]:
    """Of multi-latent attention's products; each rank has the latents whole."""
    heads, rope = args.num_attention_heads, args.qk_pos_emb_head_dim
    widths = {
        "--num-attention-heads x (--qk-head-dim + --qk-pos-emb-head-dim) of a rank": heads
        * (args.qk_head_dim + rope)
        // tp,
        "--num-attention-heads x (--qk-head-dim + --v-head-dim) of a rank": heads
        * (args.qk_head_dim + args.v_head_dim)
        // tp,
        "--num-attention-heads x --v-head-dim of a rank": heads * args.v_head_dim // tp,
        "--kv-lora-rank": args.kv_lora_rank,
        _DOWN: args.kv_lora_rank + rope,
    }
    return widths | ({"--q-lora-rank": args.q_lora_rank} if args.q_lora_rank else {})


def _has_dense(args) -> bool:
    """Whether some layer has an MLP that every token goes through."""
    if pattern := getattr(args, "hybrid_layer_pattern", None):
        return "-" in pattern
    frequency = getattr(args, "moe_layer_freq", 1)
    mixed = frequency > 1 if isinstance(frequency, int) else not all(frequency)
    return not args.num_experts or mixed
