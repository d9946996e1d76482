"""Losses of runs against steps, FLOPs, raw tokens and time; equal losses compared.

logs.py and events.py read them from what Megatron leaves behind; a run is runs.py's Run.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from megatron_tst.errors import refuse
from megatron_tst.planning.events import read_events
from megatron_tst.planning.logs import about_losses, read_log
from megatron_tst.planning.runs import AXES, Run


def read(path: Path, validation_set: str | None = None) -> Run:
    """A log of Megatron, an event file of TensorBoard, or a folder of those.

    Args:
        path: of a log, packed by gzip, bzip2 or xz or not, or of TensorBoard's files.
        validation_set: which one counts, where Megatron has several (--multiple-validation-sets):
            its name, or its number as "0". None: the only one.

    Raises:
        TSTError: a path without such a run, with two of them, or without this validation set.
    """
    run = read_events(path) if path.is_dir() or "tfevents" in path.name else read_log(path)
    if len(run.sets) == 1 and validation_set is None:
        (validation_set,) = run.sets
    if run.sets and validation_set not in run.sets:
        expected = f"one of {', '.join(run.sets)}, which {path} has"
        refuse("--validation-set", expected, validation_set or "none", "Name one.")
    if validation_set is not None and not run.sets:
        do = "Leave --validation-set out."
        refuse("--validation-set", "a run with several sets", f"{path}, which has one", do)
    if run.sets:
        chosen = run.sets[validation_set]
        run.validation = {step: loss for step, loss in chosen.items() if math.isfinite(loss)}
        run.nan_validation = set(chosen) - set(run.validation)
    run.notes += about_losses(run)
    return run


def reached(where: list[float], losses: list[float], loss: float) -> float | None:
    """Where a curve first comes down to `loss`, on straight lines between its points; None where it
    does not.
    """
    before = None
    for x, y in zip(where, losses):
        if y <= loss:
            if before is None:
                return x
            left, above = before
            return left + (x - left) * (above - loss) / (above - y)
        before = x, y
    return None


def speed_up(base: Run, other: Run, axis: str) -> float | None:
    """How many times less of `axis` the other run needs to reach the higher of both final
    validation losses; above 1: it is faster.

    A loss that one run reaches in the middle and the other at the end of its learning-rate decay
    favours the other. None where one of them does not know the axis, has no validation loss, or
    ends with one that is NaN.
    """
    if base.nan_from is not None or other.nan_from is not None:
        return None
    curves = base.curve(axis), other.curve(axis)
    if None in curves or not all(losses for _, losses in curves):
        return None
    loss = max(losses[-1] for _, losses in curves)
    ours, theirs = (reached(*curve, loss) for curve in curves)
    return ours / theirs if ours and theirs else None


@dataclass
class SpeedUp:
    """How many times sooner the runs of `name` reach the loss that they and those of `against` both
    reach, along `axis`: over pairs of runs, which have the same seed.

    Args:
        standard_error: of the mean; None for one pair.
    """

    name: str
    against: str
    axis: str
    mean: float
    lowest: float
    highest: float
    standard_error: float | None
    pairs: int


def speed_ups(groups: dict[str, list[Run]]) -> list[SpeedUp]:
    """Of each group but the first against the first, along each of AXES that both know; the n-th
    runs of two groups are a pair.
    """
    if not groups:
        return []
    (first, base), *others = groups.items()
    found = []
    for name, runs in others:
        for axis in AXES:
            pairs = [
                times for a, b in zip(base, runs) if (times := speed_up(a, b, axis)) is not None
            ]
            if pairs:
                found.append(SpeedUp(name, first, axis, *spread(pairs), len(pairs)))
    return found


def summary(run: Run) -> dict:
    """What was read from a run, ready for JSON; None where its source does not say. Raw tokens,
    FLOPs (6 N D) and seconds of training are those up to the last iteration. `nan_from` is the
    iteration from which on losses are NaN or infinite; `notes` is what the reader left out, and
    why.
    """

    def up_to_the_last(axis):
        where = run.along(axis, [run.last])
        return where and where.pop()

    tokens = up_to_the_last("raw tokens")
    return {
        "iterations": run.last,
        "planned": run.total,
        "boundary": run.boundary,
        "training_loss": run.train.get(run.last),
        "validation_loss": run.final_validation,
        "test_loss": run.test[max(run.test)] if run.test else None,
        "nan_from": run.nan_from,
        "skipped_iterations": sum(run.skipped.values()),
        "raw_tokens": None if tokens is None else round(tokens),
        "flops": up_to_the_last("FLOPs"),
        "seconds": up_to_the_last("seconds"),
        "parameters": run.parameters,
        "notes": run.notes,
    }


def spread(values: list[float]) -> tuple[float, float, float, float | None]:
    """Mean, lowest, highest, and standard error of the mean (None for one value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.mean(values), min(values), max(values), error
