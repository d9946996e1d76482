"""Free space in --save's folder, looked at before anything is trained: a run that cannot write its
first checkpoint loses everything until then.

The size of a checkpoint is arithmetic: the weights in the run's precision and, unless
--no-save-optim, the optimizer's fp32 weights and moments: two of Adam; one of SGD, Lion and Muon,
beside which Adam has the embedding and the output layer. megatron_tst/model_size.py counts the
weights.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil

from megatron_tst.errors import refuse, warn
from megatron_tst.model_size import parameters, uncounted
from megatron_tst.sizes import sizes


def checkpoint_bytes(args: argparse.Namespace) -> int | None:
    """Bytes of one checkpoint, all ranks together; None of a model that model_size does not count.

    Args:
        args: Megatron's, validated, with padded_vocab_size.
    """
    if uncounted(args):
        return None
    each, more = args.params_dtype.itemsize, 0
    if not getattr(args, "no_save_optim", False):
        if args.optimizer == "soap":  # whose matrices for each weight are not counted
            return None
        aware = getattr(args, "use_precision_aware_optimizer", False)

        def size(name):
            return getattr(args, name).itemsize if aware else 4

        if args.params_dtype.itemsize < 4:  # else the weights are the optimizer's own
            each += size("main_params_dtype")
        each += size("exp_avg_dtype")
        if args.optimizer in ("adam", "adaptive_muon"):
            each += size("exp_avg_sq_dtype")
        elif args.optimizer == "muon" and getattr(args, "muon_scalar_optimizer", "adam") == "adam":
            more = size("exp_avg_sq_dtype") * _tables(args)
    return parameters(args)[0] * each + more


def _tables(args):
    """Weights of embedding and output layer, which Adam has beside Muon. (Norms are Adam's too, and
    so few that they are counted as Muon's.)
    """
    tables = 2 if args.untie_embeddings_and_output_weights else 1
    return tables * args.hidden_size * args.padded_vocab_size


def check_space(args: argparse.Namespace) -> None:
    """Refuse a --save folder without space for one checkpoint, warn of one without space for all
    that the run keeps. Of several nodes, whose folder may hold a part alone, it only warns.

    Args:
        args: Megatron's, validated, with padded_vocab_size.

    Raises:
        TSTError: no space for one checkpoint, on one node.
    """
    folder = getattr(args, "save", None)
    size = checkpoint_bytes(args) if folder and "://" not in folder else None
    if not size:
        return
    free = shutil.disk_usage(folder).free
    if free < size:
        one, there = sizes(size, free)
        what, do = f"--save {folder}", "Free some, or save elsewhere."
        if args.world_size <= int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)):
            refuse(what, f"{one} free for a checkpoint", there, do)
        warn(f"{what}: a checkpoint takes {one}, and {there} are free")
        return
    kept = kept_checkpoints(args, folder)
    if free < kept * size:
        (one,), (wanted, there) = sizes(size), sizes(kept * size, free)
        warn(
            f"--save {folder}: {kept} more checkpoints of {one} take {wanted}, and "
            f"{there} are free. Raise --save-interval, or give --save-retain-interval"
        )


def kept_checkpoints(args: argparse.Namespace, folder: str) -> int:
    """How many checkpoints a run leaves in its folder, beside those that are there already."""
    batches = (args.train_samples or 0) // args.global_batch_size
    iterations = args.train_iters or batches
    every = getattr(args, "save_interval", None) or iterations
    kept = -(-iterations // max(1, every))
    if retained := getattr(args, "save_retain_interval", None):
        kept = min(kept, iterations // retained + 2)  # the newest two as well
    there = [name for name in os.listdir(folder) if re.fullmatch(r"iter_\d{7}", name)]
    return max(1, kept - len(there))
