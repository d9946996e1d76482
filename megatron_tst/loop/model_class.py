"""A run that goes on with another class of model than its checkpoint has: GPTModel's weights and
optimizer in a HybridModel, which Megatron translates on load (from 0.19 on: checkpointing.py,
_maybe_setup_gpt_to_hybrid_load). What it does not translate ends there in a traceback, or is left
out without a word, and is looked at here.
"""

from __future__ import annotations

import argparse

from megatron_tst import compat
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.inspect import layer_pattern, parameter_of
from megatron_tst.errors import refuse, warn

_FLAG = "--hybrid-layer-pattern"
_LEFT_OUT = "its layers of multi-token prediction are left out"
_STAY = "Go on with GPTModel: leave the flag out."
# The layers' optimizer state by parameter (checkpointing.py, load_checkpoint).
_BY_PARAMETER = "fully_reshardable", "fully_sharded_model_space"
# Megatron's local layer spec names the norm before experts so; HybridModel's own specs do not.
_LOCAL_NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight"


def check_model_class(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Refuse a model whose layers are not the checkpoint's; warn of heads that are left behind.

    Args:
        args: Megatron's of this run.
        checkpoint: the one that it goes on from.

    Raises:
        TSTError: naming the pattern of layers, or what Megatron does not translate.
    """
    theirs = checkpoint.common.get("args")
    if theirs is None:  # weights that no run of Megatron's has saved
        return
    before, now = (
        pattern and pattern.replace("|", "") for pattern in map(layer_pattern, (theirs, args))
    )
    if before:
        if now not in (before, before.split("/")[0]):
            do = "Megatron reads a HybridModel's layers into the same layers alone."
            refuse(_FLAG, f"{before}, as in the checkpoint", now or "none", do)
        if now != before and args.rank == 0:
            warn(f"{_FLAG} without the checkpoint's {before[len(now) :]}: {_LEFT_OUT}")
        return
    if now:
        _check_translation(args, theirs, checkpoint)


def _check_translation(args, theirs, checkpoint):
    """Of a GPTModel's checkpoint into a HybridModel."""
    try:
        from megatron.core.dist_checkpointing.gpt_checkpoint_interop import (
            gpt_compatible_layer_maps,
        )
    except ImportError:
        got = f"megatron-core {compat.megatron_version()}"
        refuse(f"{_FLAG} over a GPTModel's checkpoint", "megatron-core >= 0.19", got, _STAY)
    pattern = layer_pattern(args)
    try:
        layers = gpt_compatible_layer_maps(pattern).num_gpt_layers
    except ValueError as error:
        expected = "a pattern of * with one of - or E each, without heads (/)"
        do = f"Megatron: {str(error).split('. ')[0].rstrip('.')}. {_STAY}"
        refuse(f"{_FLAG} over a GPTModel's checkpoint", expected, pattern, do)
    if layers != theirs.num_layers:
        refuse(
            f"{_FLAG} over a GPTModel's checkpoint",
            f"{theirs.num_layers} times * and - or E, as many as it has layers",
            pattern,
            "Correct the pattern.",
        )
    names = {parameter_of(name) for name in checkpoint.tensors}
    if any(name.startswith("decoder.layers.0.") for name in names):
        expected, got = "layers of one kind", "dense layers beside experts"
        refuse(f"{_FLAG} over a GPTModel's checkpoint", expected, got, _STAY)
    if any("linear_kv_up_proj" in name for name in names):
        expected, got = "attention with keys and values of its own", "multi-latent attention"
        refuse(f"{_FLAG} over a GPTModel's checkpoint", expected, got, _STAY)
    spec = getattr(args, "spec", None) or ["megatron.core"]  # another one may name it as it likes
    local = "decoder.layers.mlp.router.weight" in names and _LOCAL_NORM in names
    if local and str(spec[0]).startswith("megatron."):
        refuse(
            f"{_FLAG} over a GPTModel's checkpoint",
            "the norm before experts as Transformer Engine's layers name it",
            "Megatron's local layers' name",
            "Write it for them with megatron-tst boundary --layer-spec transformer_engine.",
        )
    kept = not (getattr(args, "no_load_optim", False) or getattr(theirs, "no_save_optim", False))
    if kept and getattr(args, "use_distributed_optimizer", False):
        about = checkpoint.common.get("content_metadata") or {}
        sharding = about.get("distrib_optim_sharding_type")
        if sharding not in _BY_PARAMETER:
            refuse(
                f"{_FLAG} over a GPTModel's checkpoint with --use-distributed-optimizer",
                "optimizer state by parameter",
                f"the sharding {sharding}",
                "Save the GPTModel with --dist-ckpt-optim-fully-reshardable, or add "
                "--no-load-optim.",
            )
    if any(name.startswith("mtp.") for name in names) and args.rank == 0:
        warn(f"{_FLAG} over a GPTModel's checkpoint: {_LEFT_OUT}")
