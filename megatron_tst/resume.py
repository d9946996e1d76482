"""What a checkpoint's arguments hold of a run's phases, and what a run that resumes from it may change.

Megatron stores its arguments whole in every checkpoint. Ours are the --tst flags and

    tst_planned       the phases that the flags ask for
    tst_plan          the phases in effect: other than planned once --tst-switch auto has ended one early
    tst_long_samples  how many long samples the dataset was built of: its order hangs on that
    tst_switch_state  what --tst-switch auto has seen of the loss (switch.py)
    tst_validation    the last validation: iteration and next-token loss
    tst_boundary      what the log's block shows of the moment before the boundary (boundary_log.py)
"""

from __future__ import annotations

import argparse
import dataclasses

from megatron_tst.config import TSTConfig, refuse
from megatron_tst.schedule import Schedule

# The data's order and the objective hang on these.
_KEPT = {
    "global_batch_size": None,
    "seq_length": None,
    "tst_superpose": "both",
    "tst_target_weighting": "uniform",
    "tst_loss": "mce",
}
_WITH_OVERRIDE = {"tst_bag_size": 1, "tst_switch": "fixed", "tst_switch_slope": None, "tst_switch_window": None}


def store(args: argparse.Namespace, schedule: Schedule, planned: Schedule | None = None) -> None:
    """Put the phases in effect, and at the start those that the flags ask for, into Megatron's arguments."""
    args.tst_plan = _plain(schedule)
    if planned is not None:
        args.tst_planned = _plain(planned)


def stored(args: argparse.Namespace, name: str = "tst_plan") -> Schedule | None:
    """The phases in a checkpoint's arguments; None where the run had no superposed iteration."""
    plan = getattr(args, name, None)
    if not plan:
        return None
    single = getattr(args, "tst_superpose", "both") == "output"
    plan = {key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in plan.items()}
    return Schedule(seq_length=args.seq_length, global_batch_size=args.global_batch_size, single_tokens_in=single, **plan)


def _plain(schedule):
    return {name: getattr(schedule, name) for name in ("bag_sizes", "samples", "width", "recovery_phases")}


def check_resume(args: argparse.Namespace, checkpoint_args: argparse.Namespace) -> Schedule | None:
    """The phases of a run that goes on from a checkpoint (not asked with --finetune).

    Args:
        args: this run's, with its phases stored.
        checkpoint_args: the checkpoint's; consumed_train_samples says how far it is.

    Returns:
        the phases in effect from here on, None for a run without TST.

    Raises:
        TSTError: naming the first setting that differs and may not, its value in the checkpoint and in this run.
    """
    ours, theirs = stored(args, "tst_planned"), stored(checkpoint_args)
    if not ours and not theirs:
        return None
    if not theirs:
        got, do = "one without TST settings", "Add --finetune to start TST from its weights, or drop the --tst- flags."
        refuse("resuming with TST", "a checkpoint of a TST run", got, do)
    if not ours:
        do = f"Add --tst-bag-size {checkpoint_args.tst_bag_size} and the run's other --tst- flags, or --finetune to keep the weights alone."
        refuse("resuming without TST", "the --tst- flags of the checkpoint's run", "none", do)
    for name, default in _KEPT.items():
        _same(
            name, default, args, checkpoint_args, "The order of the data and the objective hang on it. Give the first run's flags."
        )
    check_optimizer(args, checkpoint_args)
    before = stored(checkpoint_args, "tst_planned")
    if not TSTConfig.from_args(args).override:
        for name, default in _WITH_OVERRIDE.items():
            _same(name, default, args, checkpoint_args, "Give the first run's flags, or --tst-override to change what lies ahead.")
        if ours != before:
            do = "Give the first run's --tst-iters or --tst-step-ratio and --train-iters or --train-samples, or --tst-override to change what lies ahead."  # fmt: skip
            refuse("resuming with other phases", described(before), described(ours), do)
        return theirs
    if ours == before and args.tst_switch == checkpoint_args.tst_switch:
        return theirs
    return _changed(theirs, before, ours, checkpoint_args.consumed_train_samples)


def _changed(old: Schedule, planned: Schedule, new: Schedule, consumed: int) -> Schedule:
    """`new` as far as what is read already allows it."""
    widths = [1 if new.single_tokens_in else s for s in new.bag_sizes]
    if any(old.width % w for w in widths):
        do = "The run's data are cut from samples of so many bags. Choose among these."
        refuse("--tst-bag-size with --tst-override", f"divisors of {old.width}", ",".join(map(str, new.bag_sizes[:-1])), do)
    new = dataclasses.replace(new, width=old.width)
    if new.reads_as(old, consumed):
        return new
    boundary = old.superposition_samples
    if consumed < boundary:
        phase, batch = old.phase_at(consumed), old.global_batch_size
        first = phase.first_sample // batch
        expected = f"bag size {phase.bag_size} from iteration {first + 1} to {consumed // batch} as in the checkpoint"
        if phase.pieces > 1:
            expected += f", to its end after iteration {first} + a multiple of {phase.pieces}"
        refuse("--tst-override", expected, described(new), "Only what lies ahead can change: write what lies behind as it was.")
    if not any(_superposed(new) == _superposed(known) for known in (old, planned)):
        do = "The run is in recovery: superposition cannot be taken up again. Only --train-iters or --train-samples can change."
        refuse("--tst-override", described(old), described(new), do)
    more = new.train_samples - old.train_samples
    return old.lengthened(more) if more > 0 else old


def _superposed(schedule):
    return [(phase.bag_size, phase.samples) for phase in schedule.superposed_phases]


def described(schedule: Schedule) -> str:
    """The phases in words: "bag size 16 for 100 iterations, ..., recovery for 800"."""
    lengths = [
        f"bag size {p.bag_size} for {p.samples // schedule.global_batch_size} iterations" for p in schedule.superposed_phases
    ]
    return ", ".join([*lengths, f"recovery for {schedule.recovery_samples // schedule.global_batch_size}"])


def _same(name, default, args, checkpoint_args, do):
    value, kept = getattr(args, name, default), getattr(checkpoint_args, name, default)
    if value != kept:
        refuse(f"resuming with another {name}", f"{kept} as in the checkpoint", value, do)


def check_optimizer(args, checkpoint_args):
    """Refuse layouts between which Megatron does not carry the optimizer's state; weights alone it carries between all.

    Raises:
        TSTError: with the flag, what the checkpoint has and what this run has.
    """
    if getattr(args, "no_load_optim", False):
        return
    ep, kept = (getattr(x, "expert_model_parallel_size", 1) for x in (args, checkpoint_args))
    if (ep == 1) != (kept == 1):
        refuse(
            "--expert-model-parallel-size with the optimizer's state",
            f"{'1' if kept == 1 else 'more than 1'}, as the checkpoint's {kept}",
            ep,
            "Megatron keeps the experts' optimizer apart only above 1. Keep to that side of 1, or add --no-load-optim.",
        )
    ours, theirs = (bool(getattr(x, "use_distributed_optimizer", False)) for x in (args, checkpoint_args))
    if ours != theirs:
        refuse(
            "--use-distributed-optimizer with the optimizer's state",
            f"{'it' if theirs else 'none'}, as in the checkpoint",
            "it" if ours else "none",
            "Megatron loads neither optimizer's state into the other. Keep to the checkpoint's, or add --no-load-optim.",
        )
