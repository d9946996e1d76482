"""Flags of Megatron that TST cannot be combined with."""

from __future__ import annotations

import argparse

from megatron_tst.errors import refuse

_ONE_DOCUMENT = (
    "Bags would mix documents that must not see each other. Drop the flag: TST packs documents as "
    "plain pre-training does."
)
_CONSTANT = (
    "The boundary is a number of samples of one batch size. Use a constant --global-batch-size."
)
_PRE_TRAINING = "Use TST for pre-training alone."
# Refused where it has a value: (what is expected, what to do). "unset" is of a flag without value.
_NOT_WITH_TST = {
    "reset_position_ids": ("unset", _ONE_DOCUMENT),
    "reset_attention_mask": ("unset", _ONE_DOCUMENT),
    "dataloader_inter_document_masking": ("unset", _ONE_DOCUMENT),
    "rampup_batch_size": ("none", _CONSTANT),
    "step_batch_size_schedule": ("none", _CONSTANT),
    "decrease_batch_size_if_needed": ("unset", _CONSTANT),
    "hybrid_context_parallel": ("unset", "Use --context-parallel-size alone."),
    "fim_data": (
        "unset",
        "Fill-in-the-middle rearranges samples of ordinary length. Drop the flag.",
    ),
    "perform_rl_step": ("unset", _PRE_TRAINING),
    "logits_load_dir": ("none", "Distillation needs one label a position."),
    "phase_transition_iterations": (
        "none",
        "The run has two phases already. Use --tst-exit-at-boundary.",
    ),
}
# MuP scales logits between the output layer and the loss, and multi-token prediction counts right
# guesses from them. The others take the output layer, its precision or its gradient elsewhere.
_NOT_WITH_FUSED_LINEAR_LOSS = (
    "use_mup",
    "mtp_num_layers",
    "defer_embedding_wgrad_compute",
    "overlap_moe_expert_parallel_comm",
    "use_megatron_fsdp",
    "use_torch_fsdp2",
    "fp8_output_proj",
)


def check_conflicts(args: argparse.Namespace) -> None:
    """Refuse what TST does not work with.

    Args:
        args: Megatron's arguments; a flag that this version does not have is not asked.

    Raises:
        TSTError: with the first flag, what was expected, what was got, what to do.
    """
    for name, (expected, do) in _NOT_WITH_TST.items():
        if value := getattr(args, name, None):
            got = "set" if expected == "unset" else value
            refuse(f"{_flag(name)} with TST", expected, got, do)
    for what, wrong, expected, got, do in _others(args):
        if wrong:
            refuse(f"{what} with TST", expected, got, do)


def check_fused_linear_loss(args: argparse.Namespace) -> None:
    """Refuse what `--tst-fused-linear-loss` does not work with.

    Raises:
        TSTError: with the first flag, what was expected, what was got, what to do.
    """
    for name in _NOT_WITH_FUSED_LINEAR_LOSS:
        if getattr(args, name, None):
            do = "It needs the output layer's own forward. Drop one of the two."
            refuse(f"{_flag(name)} with --tst-fused-linear-loss", "unset", "set", do)
    logits, hidden = getattr(args, "logit_dtype", None), getattr(args, "params_dtype", None)
    if logits not in (None, hidden):
        do = "Its logits have the hidden states' type; their sums are fp32. Drop one of the two."
        refuse("--output-logit-dtype with --tst-fused-linear-loss", hidden, logits, do)


def captures_whole_steps(args: argparse.Namespace) -> bool:
    """Whether Megatron captures whole training steps in CUDA graphs.

    Args:
        args: Megatron's, after its validation, which turns --cuda-graph-scope full_iteration into
            this implementation.
    """
    return getattr(args, "cuda_graph_impl", None) == "full_iteration"


def routers_in_graphs(args: argparse.Namespace) -> bool:
    """Whether CUDA graphs run the routers of experts, so that Python, and with it every hook, sees
    the captured steps alone.

    Args:
        args: Megatron's.
    """
    if captures_whole_steps(args):
        return True
    if getattr(args, "cuda_graph_impl", None) not in ("local", "transformer_engine"):
        return False
    modules = _graph_modules(args)
    return not modules or not {"moe", "moe_router", "moe_preprocess"}.isdisjoint(modules)


def _graph_modules(args):
    """Names of the modules that are captured one by one; none named: whole layers."""
    return [
        str(getattr(part, "name", part)) for part in getattr(args, "cuda_graph_modules", None) or ()
    ]


def _flag(name):
    return f"--{name.replace('_', '-')}"


def _others(args):
    """(what, whether it is wrong, expected, got, what to do) of all that takes more than a look at
    one flag.
    """

    def of(name):
        return getattr(args, name, None)

    yield "--sft", of("sft"), "plain pre-training data", "packed sequences", _PRE_TRAINING
    # "native" and "te" are computed inside compute_language_model_loss, which bags do not reach
    fusion = of("cross_entropy_fusion_impl") if of("cross_entropy_loss_fusion") else None
    yield (
        "--cross-entropy-fusion-impl",
        fusion == "linear",
        "native",
        fusion,
        "It takes one label a position, and the output layer's work with it. Drop it, or use "
        "--tst-fused-linear-loss.",
    )
    steps = of("cuda_graph_warmup_steps")
    yield (
        "--cuda-graph-warmup-steps of --cuda-graph-impl full_iteration",
        captures_whole_steps(args) and steps == 0,
        "at least 1",
        steps,
        "The first step of each phase makes what its graph reads. Leave it at Megatron's 3.",
    )
    loader = of("dataloader_type")
    yield (
        "--dataloader-type",
        loader not in (None, "single"),
        "single",
        loader,
        "A sample's index says its phase, so samples must come in order. Use --dataloader-type "
        "single.",
    )
    quantised = "Quantise or distil after recovery, without the --tst- flags."
    yield "ModelOpt", of("modelopt_enabled"), "off", "on", quantised
    for tensor in "tensor_model_parallel_size", "expert_tensor_parallel_size":
        flag = f"{tensor.replace('model_', '').removesuffix('size')}num_weight_shards"
        shards, ranks = of(flag), of(tensor)
        yield (
            _flag(flag),
            shards not in (None, ranks),
            f"{ranks} ({_flag(tensor)})",
            shards,
            "Generalised tensor parallelism is not verified with bags. Drop the flag.",
        )
