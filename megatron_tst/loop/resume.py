"""What a run that resumes from a checkpoint may change."""

from __future__ import annotations

import argparse
import dataclasses
import os

from megatron_tst import cpu
from megatron_tst.checkpoint.format import TRACKER, checkpoint_to_load
from megatron_tst.checkpoint.inspect import layer_pattern
from megatron_tst.checkpoint.phases import stored
from megatron_tst.config import TSTConfig
from megatron_tst.errors import refuse
from megatron_tst.loop.model_class import check_model_class
from megatron_tst.schedule import Schedule

# The data's order and the objective depend on these.
_KEPT = {
    "global_batch_size": None,
    "seq_length": None,
    "tst_superpose": "both",
    "tst_target_weighting": "uniform",
    "tst_loss": "mce",
}
_WITH_OVERRIDE = {
    "tst_bag_size": 1,
    "tst_switch": "fixed",
    "tst_switch_slope": None,
    "tst_switch_window": None,
}


def check_resume(args: argparse.Namespace, checkpoint_args: argparse.Namespace) -> Schedule | None:
    """The phases of a run that goes on from a checkpoint (not asked with --finetune).

    Args:
        args: this run's, with its phases stored.
        checkpoint_args: the checkpoint's; consumed_train_samples says how far it is.

    Returns:
        the phases in effect from here on, None for a run without TST.

    Raises:
        TSTError: naming the first setting that differs and may not, its value in the checkpoint and
            in this run.
    """
    ours, theirs = stored(args, "tst_planned"), stored(checkpoint_args)
    if not ours and not theirs:
        return None
    if not theirs:
        got = "one without TST settings"
        do = "Add --finetune to start TST from its weights, or drop the --tst- flags."
        refuse("resuming with TST", "a checkpoint of a TST run", got, do)
    if not ours:
        do = (
            f"Add --tst-bag-size {checkpoint_args.tst_bag_size} and the run's other --tst- "
            "flags, or --finetune to keep the weights alone."
        )
        refuse("resuming without TST", "the --tst- flags of the checkpoint's run", "none", do)
    do = "The order of the data and the objective depend on it. Give the first run's flags."
    for name, default in _KEPT.items():
        _same(name, default, args, checkpoint_args, do)
    check_optimizer(args, checkpoint_args)
    before = stored(checkpoint_args, "tst_planned")
    if not TSTConfig.from_args(args).override:
        do = "Give the first run's flags, or --tst-override to change what lies ahead."
        for name, default in _WITH_OVERRIDE.items():
            _same(name, default, args, checkpoint_args, do)
        if ours != before:
            do = (
                "Give the first run's --tst-iters or --tst-step-ratio and --train-iters or "
                "--train-samples, or --tst-override to change what lies ahead."
            )
            refuse("resuming with other phases", before.described, ours.described, do)
        return theirs
    if ours == before and args.tst_switch == checkpoint_args.tst_switch:
        return theirs
    return _changed(theirs, before, ours, checkpoint_args.consumed_train_samples)


def _changed(old: Schedule, planned: Schedule, new: Schedule, consumed: int) -> Schedule:
    """`new` as far as what is read already allows it."""
    widths = [1 if new.single_tokens_in else s for s in new.bag_sizes]
    if any(old.width % w for w in widths):
        refuse(
            "--tst-bag-size with --tst-override",
            f"divisors of {old.width}",
            ",".join(map(str, new.bag_sizes[:-1])),
            "The run's data are cut from samples of so many bags. Choose among these.",
        )
    new = dataclasses.replace(new, width=old.width)
    if new.reads_as(old, consumed):
        return new
    boundary = old.superposition_samples
    if consumed < boundary:
        phase, batch = old.phase_at(consumed), old.global_batch_size
        first = phase.first_sample // batch
        expected = (
            f"bag size {phase.bag_size} from iteration {first + 1} to {consumed // batch} "
            "as in the checkpoint"
        )
        if phase.pieces > 1:
            expected += f", to its end after iteration {first} + a multiple of {phase.pieces}"
        refuse(
            "--tst-override",
            expected,
            new.described,
            "Only what lies ahead can change: write what lies behind as it was.",
        )
    if not any(_superposed(new) == _superposed(known) for known in (old, planned)):
        do = (
            "The run is in recovery: superposition cannot be taken up again. Only --train-iters "
            "or --train-samples can change."
        )
        refuse("--tst-override", old.described, new.described, do)
    more = new.train_samples - old.train_samples
    return old.lengthened(more) if more > 0 else old


def _superposed(schedule):
    return [(phase.bag_size, phase.samples) for phase in schedule.superposed_phases]


def _same(name, default, args, checkpoint_args, do):
    value, kept = getattr(args, name, default), getattr(checkpoint_args, name, default)
    if value != kept:
        refuse(f"resuming with another {name}", f"{kept} as in the checkpoint", value, do)


def check_restorable(args: argparse.Namespace) -> None:
    """Refuse a resume whose model or optimizer state Megatron would not restore: a traceback at
    best, with torch's Adam wrong steps at worst.

    Args:
        args: Megatron's; looked at on every rank, before a model is built.

    Raises:
        TSTError: a checkpoint that is absent, incomplete or damaged, check_model_class's,
            check_optimizer's, or the distributed optimizer over torch's Adam
            (megatron/core/optimizer/distrib_optimizer.py; on CPU cpu.py mends it).
    """
    if not getattr(args, "load", None):
        return
    weights_alone = getattr(args, "no_load_optim", False) or getattr(args, "finetune", False)
    hybrid = layer_pattern(args) is not None
    checkpoint = checkpoint_to_load(_iteration(args)) if hybrid or not weights_alone else None
    if checkpoint is not None:
        check_model_class(args, checkpoint)
    if weights_alone:
        return
    if checkpoint is not None:
        check_optimizer(args, checkpoint.args)
    # with Muon in layers it is the optimizer of the embedding, the output layer and the norms
    in_layers = getattr(args, "use_layer_wise_distributed_optimizer", False)
    in_layers = in_layers and getattr(args, "use_layer_wise_param_layout", True)
    distributed = getattr(args, "use_distributed_optimizer", False) or in_layers
    if not distributed or cpu.asked_for():
        return
    from megatron.core.optimizer import distrib_optimizer

    if not distrib_optimizer.HAVE_APEX_OR_TE and os.path.isfile(os.path.join(args.load, TRACKER)):
        refuse(
            "--load with --use-distributed-optimizer",
            "the Adam of Transformer Engine or Apex",
            "torch's, whose state Megatron's distributed optimizer does not restore",
            "Install transformer-engine, or add --no-load-optim to start the optimizer anew.",
        )


def verify_load(args: argparse.Namespace) -> None:
    """Read the checkpoint of --load through before a model is built: each item against its
    checksums, which torch.load does not look at, and against the description of its tensor.

    Args:
        args: Megatron's. Each rank reads its share of the items; rank 0 says how much that was.

    Raises:
        TSTError: an item is damaged.
    """
    checkpoint = checkpoint_to_load(_iteration(args))
    if checkpoint is None:  # the first of several starts with the same flags
        said = f"no torch_dist checkpoint in {args.load} yet"
    else:
        items, size = checkpoint.check_all(share=args.rank, of=args.world_size)
        share = "" if args.world_size == 1 else f"rank 0's share (1 of {args.world_size}), "
        said = f"{checkpoint.path}: {share}{items} items, {size:,} bytes, is as it was written"
    if args.rank == 0:
        print(f" [tst] --tst-verify-load: {said}", flush=True)


def _iteration(args):
    """The folder that --load and --ckpt-step name."""
    step = getattr(args, "ckpt_step", None)
    return args.load if step is None else os.path.join(args.load, f"iter_{step:07d}")


def check_optimizer(args: argparse.Namespace, checkpoint_args: argparse.Namespace) -> None:
    """Refuse layouts between which Megatron does not carry the optimizer's state; weights alone it
    carries between all.

    Args:
        args, checkpoint_args: Megatron's of this run, and as the checkpoint has them.

    Raises:
        TSTError: with the flag, what the checkpoint has and what this run has.
    """
    if getattr(args, "no_load_optim", False):
        return
    both = [_optimizer_of(x) for x in (args, checkpoint_args)]
    for name in both[0].keys() & both[1].keys():
        ours, theirs = (found[name] for found in both)
        if ours != theirs:
            refuse(
                f"--{name.replace('_', '-')} with the optimizer's state",
                f"{theirs}, as in the checkpoint",
                ours,
                "Megatron does not load the state of one into another. Keep to the checkpoint's, "
                "or add --no-load-optim.",
            )
    ep, kept = (getattr(x, "expert_model_parallel_size", 1) for x in (args, checkpoint_args))
    if (ep == 1) != (kept == 1):
        refuse(
            "--expert-model-parallel-size with the optimizer's state",
            f"{'1' if kept == 1 else 'more than 1'}, as the checkpoint's {kept}",
            ep,
            "Megatron keeps the experts' optimizer apart only above 1. Keep to that side of 1, or "
            "add --no-load-optim.",
        )
    ours, theirs = (
        bool(getattr(x, "use_distributed_optimizer", False)) for x in (args, checkpoint_args)
    )
    if ours != theirs:
        refuse(
            "--use-distributed-optimizer with the optimizer's state",
            f"{'it' if theirs else 'none'}, as in the checkpoint",
            "it" if ours else "none",
            "Megatron loads neither optimizer's state into the other. Keep to the checkpoint's, "
            "or add --no-load-optim.",
        )


def _optimizer_of(args):
    """Argument -> which optimizer has the matrices, and with Muon which one has the rest."""
    name = (getattr(args, "optimizer", None) or "").removeprefix("dist_")
    found = {"optimizer": name} if name else {}
    if "muon" in name:
        found["muon_scalar_optimizer"] = getattr(args, "muon_scalar_optimizer", "adam")
    return found
