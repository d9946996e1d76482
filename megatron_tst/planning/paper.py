"""What the paper measured (arXiv 2605.06546): final losses over r and s, and the runs of its table
1. No torch; figures: paper_tables/.

All losses are final training losses (plain next-token cross entropy, nats) of one run each: the
paper repeats none, so that none has an error bar.
"""

from __future__ import annotations

import csv
import functools
import math
from dataclasses import dataclass
from pathlib import Path

TABLES = Path(__file__).resolve().parent / "paper_tables"
PARAMETERS = {
    "270m": 270e6,
    "600m": 600e6,
    "3b": 3e9,
    "moe-10b-a1b": 10e9,
}  # by their names; the paper counts none
GPUS = {
    "270m": 8,
    "600m": 8,
    "3b": 64,
    "moe-10b-a1b": 64,
}  # "8 B200 for the smaller, 64 for the bigger models"
_GRIDS = {  # file: model, steps, weighting of the targets, table
    "270m_20k": ("270m", 20000, "uniform", 4),
    "270m_100k": ("270m", 100000, "uniform", 5),
    "600m_20k": ("600m", 20000, "uniform", 6),
    "600m_20k_power_law": ("600m", 20000, "power-law", 7),
}
_LAST_RATIO = 0.9  # at 1.0 the models never left superposition
_SAME_RATIO = 0.0005


@dataclass(frozen=True)
class Cell:
    """A loss of a grid.

    Args:
        loss: nats.
        difference: loss minus the grid's baseline of the same steps; below 0, TST was better.
        between: None for a measured cell; else the two measured r that the loss is interpolated
            between, on a straight line.
    """

    loss: float
    difference: float
    between: tuple[float, float] | None


@dataclass(frozen=True)
class Grid:
    """Final losses of one model at one number of steps: {(r, s): nats}."""

    model: str
    steps: int
    weighting: str
    table: int
    losses: dict[tuple[float, int], float]

    @property
    def baseline(self) -> float:
        """The loss without superposition."""
        return self.losses[0.0, 1]

    def cell(self, r: float, s: int) -> Cell | None:
        """The loss at (r, s); None outside the grid. r = 0 is the baseline, whatever s is."""
        column = {0.0: self.baseline} | {
            ratio: loss
            for (ratio, size), loss in self.losses.items()
            if size == s and ratio <= _LAST_RATIO
        }
        if len(column) == 1 or not 0 <= r <= max(column) + _SAME_RATIO:
            return None
        nearest = min(column, key=lambda ratio: abs(ratio - r))
        if abs(nearest - r) <= _SAME_RATIO:
            return Cell(column[nearest], column[nearest] - self.baseline, None)
        low, high = max(x for x in column if x < r), min(x for x in column if x > r)
        loss = column[low] + (column[high] - column[low]) * (r - low) / (high - low)
        return Cell(loss, loss - self.baseline, (low, high))


@dataclass(frozen=True)
class Run:
    """A row of table 1: steps of superposition and in all, positions a step, B200-hours, final
    loss.
    """

    model: str
    tst_steps: int
    steps: int
    s: int
    batch: int
    b200_hours: int
    loss: float

    @property
    def r(self) -> float:
        """Share of its steps that are superposed."""
        return self.tst_steps / self.steps

    @property
    def tokens(self) -> int:
        """Raw tokens that it reads."""
        return self.batch * (self.s * self.tst_steps + self.steps - self.tst_steps)


@functools.cache
def grids() -> tuple[Grid, ...]:
    """The paper's sweeps over r and s, tables 4 to 7."""

    def losses(name):
        return {(float(row["r"]), int(row["s"])): float(row["loss"]) for row in _rows(name)}

    return tuple(Grid(*about, losses(name)) for name, about in _GRIDS.items())


@functools.cache
def runs() -> tuple[Run, ...]:
    """The runs of the paper's table 1."""
    kinds = {
        name: {"str": str, "int": int, "float": float}[kind]
        for name, kind in Run.__annotations__.items()
    }
    return tuple(
        Run(**{name: kinds[name](value) for name, value in row.items()}) for row in _rows("runs")
    )


def by_distance(parameters: float, steps: int, weighting: str) -> list[Grid]:
    """The grids of this weighting (of "uniform" where it has none), the nearest in parameters
    first, then in steps; on log scales.
    """
    known = [grid for grid in grids() if grid.weighting == weighting] or [
        grid for grid in grids() if grid.weighting == "uniform"
    ]
    return sorted(
        known,
        key=lambda g: (
            abs(math.log(parameters / PARAMETERS[g.model])),
            abs(math.log(steps / g.steps)),
        ),
    )


def nearest(
    parameters: float, steps: int, r: float, s: int, weighting: str
) -> tuple[Grid, Cell] | None:
    """The nearest grid that has (r, s), and what it has there; None where no grid of this weighting
    does.
    """
    return next(
        (
            (grid, cell)
            for grid in by_distance(parameters, steps, weighting)
            if (cell := grid.cell(r, s))
        ),
        None,
    )


def speed_up(run: Run) -> tuple[float, Run] | None:
    """Steps of the baseline of about the same loss over the steps of a TST run, and that baseline.

    None where no baseline of table 1 comes within 0.02 nats. The 10B-A1B run is 0.016 below its
    baseline, the 3B run 0.001.
    """
    others = [other for other in runs() if other.model == run.model and not other.tst_steps]
    other = min(others, key=lambda other: abs(other.loss - run.loss))
    return (other.steps / run.steps, other) if abs(other.loss - run.loss) <= 0.02 else None


def _rows(name):
    with open(TABLES / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
