"""Draw the losses of Megatron runs from their logs: training loss of each phase, next-token validation loss, the boundary.

    python tools/plot_runs.py --output loss.png baseline=logs/baseline.log "TST s=2"=logs/tst.log

Reads the lines that Megatron and megatron_tst print on the last rank; a resumed run may be given as one concatenated log.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

_TRAIN = re.compile(r"iteration +(\d+)/ *(\d+) \|.*?\| lm loss: ([\d.E+-]+)(?:.*?mce minus bag entropy: ([\d.E+-]+))?")
_VALID = re.compile(r"validation loss at iteration (\d+)[^|]*\| lm loss value: ([\d.E+-]+)")
_PHASE = re.compile(r"\[tst\] iteration +(\d+) \| phase: (\w+) \| bag size: (\d+) \| raw tokens: (\d+)")
_BOUNDARY = re.compile(r"\[tst\] boundary after iteration (\d+)")


@dataclass
class Run:
    """What a log says. Losses in nats per position by iteration; `excess` is the mce minus the bags' entropy."""

    train: dict[int, float] = field(default_factory=dict)
    excess: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    raw_tokens: dict[int, int] = field(default_factory=dict)
    boundary: int | None = None
    total: int | None = None

    @property
    def last(self) -> int:
        return max(self.train, default=0)

    @property
    def final_validation(self) -> float | None:
        return self.validation[max(self.validation)] if self.validation else None


def read_log(path: Path) -> Run:
    """Parse a log, whole or still being written. Of several evaluations at one iteration the last one counts."""
    run = Run()
    for line in path.read_text(errors="replace").splitlines():
        if match := _TRAIN.search(line):
            iteration, run.total, run.train[iteration] = int(match[1]), int(match[2]), float(match[3])
            if match[4]:
                run.excess[iteration] = float(match[4])
        elif match := _VALID.search(line):
            run.validation[int(match[1])] = float(match[2])
        elif match := _PHASE.search(line):
            run.raw_tokens[int(match[1])] = int(match[4])
        elif match := _BOUNDARY.search(line):
            run.boundary = int(match[1])
    return run


def plot(runs: dict[str, Run], output: Path, title: str = "") -> None:
    """Two panels over iterations (equal iterations are equal FLOPs): training loss and next-token validation loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, (name, run) in enumerate(runs.items()):
        colour = f"C{number}"
        boundary = run.boundary or 0
        first = {i: loss for i, loss in run.train.items() if i <= boundary}
        second = {i: loss for i, loss in run.train.items() if i > boundary}
        if first:
            left.plot(first.keys(), first.values(), color=colour, linestyle="--", label=f"{name}: superposition (mce)")
        if run.excess:
            left.plot(run.excess.keys(), run.excess.values(), color=colour, linestyle=":", label=f"{name}: mce minus bag entropy")
        left.plot(second.keys(), second.values(), color=colour, label=f"{name}: next token")
        right.plot(run.validation.keys(), run.validation.values(), color=colour, marker=".", label=name)
        if boundary:
            for axis in (left, right):
                axis.axvline(boundary, color="grey", linewidth=0.8)
                axis.annotate("boundary", (boundary, 1), xycoords=("data", "axes fraction"), xytext=(3, -12), textcoords="offset points",
                              color="grey", fontsize=8)  # fmt: skip
    finals = [run.final_validation for run in runs.values() if run.final_validation]
    if finals:
        right.set_ylim(min(finals) - 0.1, min(finals) + 2.2)
    for axis, name in ((left, "training loss"), (right, "validation loss, next token")):
        axis.set(xlabel="iteration (equal FLOPs)", ylabel="nats per position", title=name)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    temporary = output.with_name(f".{output.name}.part.png")
    figure.savefig(temporary, dpi=130)
    temporary.replace(output)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("loss.png"))
    parser.add_argument("--title", default="")
    parser.add_argument("runs", nargs="+", metavar="NAME=LOG")
    args = parser.parse_args(argv)
    runs = {}
    for item in args.runs:
        name, _, log = item.partition("=")
        if not Path(log).is_file():
            print(f"plot_runs: error: expected NAME=LOG with an existing log, got {item!r}.", file=sys.stderr)
            return 2
        runs[name] = read_log(Path(log))
        if not runs[name].train:
            print(f"plot_runs: error: expected training lines of Megatron in {log}, found none.", file=sys.stderr)
            return 2
    plot(runs, args.output, args.title)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
