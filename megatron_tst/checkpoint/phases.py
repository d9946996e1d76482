"""A run's phases in the arguments that its checkpoints hold.

Megatron stores its arguments whole in every checkpoint. Ours are the --tst flags and

    tst_planned       the phases that the flags ask for
    tst_plan          the phases in effect: others once --tst-switch auto has ended one early
    tst_long_samples  how many long samples the dataset was built of, which decides their order
    tst_switch_state  what --tst-switch auto has seen of the loss (loop/switch.py)
    tst_validation    the last validation: iteration and next-token loss
    tst_boundary      what the log says of the moment before the boundary (loop/boundary_log.py)
"""

from __future__ import annotations

import argparse

from megatron_tst.schedule import Schedule


def store(args: argparse.Namespace, schedule: Schedule, planned: Schedule | None = None) -> None:
    """Put the phases in effect, and at the start those that the flags ask for, into Megatron's
    arguments.
    """
    args.tst_plan = _plain(schedule)
    if planned is not None:
        args.tst_planned = _plain(planned)


def stored(args: argparse.Namespace, name: str = "tst_plan") -> Schedule | None:
    """The phases in a checkpoint's arguments; None where the run had no superposed iteration.

    Args:
        args: Megatron's, of a run or from a checkpoint.
        name: tst_plan or tst_planned.
    """
    plan = getattr(args, name, None)
    if not plan:
        return None
    fields = {  # fewer in checkpoints of earlier versions
        key: tuple(value) if isinstance(value, (list, tuple)) else value
        for key, value in plan.items()
    }
    return Schedule(
        seq_length=args.seq_length,
        global_batch_size=args.global_batch_size,
        single_tokens_in=getattr(args, "tst_superpose", "both") == "output",
        **fields,
    )


def _plain(schedule):
    names = "bag_sizes", "samples", "width", "recovery_phases"
    return {name: getattr(schedule, name) for name in names}
