"""What Megatron computes otherwise in some parallel layouts than in one process, with and without
TST: warned of, with the remedy that helps.

docs/parallelism.md has every row of it, its size and its test
(tests/distributed/test_megatron_faults.py), also of what is too small for a warning, or reaches no
run of megatron.training.
"""

from __future__ import annotations

import argparse

from megatron_tst.errors import warn


def warn_of_faults(args: argparse.Namespace) -> None:
    """Warn of what bites this run.

    Args:
        args: Megatron's, validated.
    """
    if _spread(args, "context_parallel"):
        _warn_of_unequal_ranks(args)
    tied = not getattr(args, "untie_embeddings_and_output_weights", True)
    if tied and _spread(args, "pipeline_model_parallel") and getattr(args, "mtp_num_layers", None):
        warn(
            "--mtp-num-layers with --pipeline-model-parallel-size and tied embeddings: Megatron "
            "ends in an assertion where it saves or loads a checkpoint. Add "
            "--untie-embeddings-and-output-weights"
        )
    if _spread(args, "tensor_model_parallel") and not getattr(args, "sequence_parallel", False):
        _warn_of_replicated_weights(args)


def _spread(args, kind):
    return getattr(args, f"{kind}_size", None) not in (None, 1)


def _warn_of_unequal_ranks(args):
    """Megatron averages each context-parallel rank's own labels and then the ranks: the same only
    where their numbers are.
    """
    per_token = getattr(args, "calculate_per_token_loss", False)
    heads = getattr(args, "mtp_num_layers", None)
    if getattr(args, "eod_mask_loss", False) and not per_token:
        warn(
            "--context-parallel-size with --eod-mask-loss: Megatron weighs a label by how many "
            "its rank has. Add --calculate-per-token-loss to weigh all alike"
            + (", those of the heads nearly" if heads else "")
        )
    if heads:
        # the k-th head has k labels fewer: (L - k) / (L - cp * k) is their weight
        most = heads * (args.context_parallel_size - 1) / args.seq_length
        warn(
            "--context-parallel-size with --mtp-num-layers: Megatron averages the heads' losses "
            "over each rank's own labels, and the first rank, which holds the end of a sample, has "
            f"fewer. Its labels weigh up to {most:.1g} more, with and without TST. "
            "--calculate-per-token-loss does not change that, fewer context-parallel ranks do"
        )


def _warn_of_replicated_weights(args):
    """Weights that every tensor-parallel rank has, under heads that are spread over the ranks:
    Megatron sums their gradients where sequence parallelism marks them.
    """
    variant = getattr(args, "experimental_attention_variant", None)
    pattern = getattr(args, "hybrid_layer_pattern", None) or ""
    add = "with --tensor-model-parallel-size and without --sequence-parallel: Megatron"
    if getattr(args, "multi_latent_attention", False):
        warn(
            f"--multi-latent-attention {add} leaves the gradient of the keys' rotary part, which "
            "all heads share, to each rank's own heads. Add --sequence-parallel"
        )
    if variant == "gated_delta_net" or "G" in pattern:
        warn(
            f"gated delta net {add} leaves the gradient of its output norm to each rank's own "
            "heads. Add --sequence-parallel"
        )
