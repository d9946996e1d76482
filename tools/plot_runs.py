"""Draw the losses of Megatron runs, and say how much sooner one group of runs reaches another's
loss.

    python tools/plot_runs.py --output loss.png baseline=logs/baseline.log "TST s=2"=logs/tst.log
    python tools/plot_runs.py --output loss.svg baseline=a1.log,a2.log,a3.log "TST s=2"=b1.log,b2.log,b3.log      # seeds, in pairs
    python tools/plot_runs.py --output loss.png --parameters 1115904 baseline=tensorboard/a
    TST=tensorboard/b

Reads the lines that Megatron and megatron_tst print on the last rank (a resumed run may be given as
one concatenated log), or a folder of TensorBoard files. One run a name: training loss and
next-token validation loss over iterations. Several a name (or --axes): the validation loss against
steps, FLOPs, raw tokens and seconds, mean with lowest and highest, and against the first name the
speed-up at equal loss on each of them. Writes what --output ends in, .png or .svg.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training_curves import AXES, Run, read, read_log, speed_up, spread

__all__ = ["Run", "main", "plot", "plot_axes", "read_log", "speed_ups"]


def plot(runs: dict[str, Run], output: Path, title: str = "") -> None:
    """Two panels over iterations (equal iterations are equal FLOPs): training loss and next-token
    validation loss.
    """
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, (name, run) in enumerate(runs.items()):
        colour = f"C{number}"
        boundary = run.boundary or 0
        first = {i: loss for i, loss in run.train.items() if i <= boundary}
        second = {i: loss for i, loss in run.train.items() if i > boundary}
        if first:
            left.plot(
                first.keys(),
                first.values(),
                color=colour,
                linestyle="--",
                label=f"{name}: superposition (mce)",
            )
        if run.excess:
            left.plot(
                run.excess.keys(),
                run.excess.values(),
                color=colour,
                linestyle=":",
                label=f"{name}: mce minus bag entropy",
            )
        left.plot(second.keys(), second.values(), color=colour, label=f"{name}: next token")
        right.plot(
            run.validation.keys(), run.validation.values(), color=colour, marker=".", label=name
        )
        if boundary:
            for axis in (left, right):
                _mark_boundary(axis, boundary, "grey", "boundary")
    _finish_losses(right, runs.values())
    for axis, name in ((left, "training loss"), (right, "validation loss, next token")):
        axis.set(xlabel="iteration (equal FLOPs)", ylabel="nats per position", title=name)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    _save(figure, output, title)


def plot_axes(groups: dict[str, list[Run]], output: Path, title: str = "") -> None:
    """Next-token validation loss against each of AXES that all runs know; a group is its mean, and
    a band from lowest to highest.
    """
    plt = _pyplot()
    known = [
        axis for axis in AXES if all(run.curve(axis) for runs in groups.values() for run in runs)
    ]
    figure, panels = plt.subplots(
        1, len(known), figsize=(4.6 * len(known), 4.2), layout="constrained", squeeze=False
    )
    for panel, axis in zip(panels[0], known):
        for number, (name, runs) in enumerate(groups.items()):
            colour = f"C{number}"
            steps = sorted(set.intersection(*(set(run.validation) for run in runs)))
            losses = [[run.validation[step] for run in runs] for step in steps]
            curves = [
                run.curve(axis, {step: run.validation[step] for step in steps})[0] for run in runs
            ]
            where = [sum(at) / len(at) for at in zip(*curves)]  # seconds differ from run to run
            panel.plot(
                where,
                [sum(at) / len(at) for at in losses],
                color=colour,
                marker=".",
                label=f"{name} (n = {len(runs)})",
            )
            if len(runs) > 1:
                panel.fill_between(
                    where,
                    [min(at) for at in losses],
                    [max(at) for at in losses],
                    color=colour,
                    alpha=0.25,
                )
            boundaries = [
                run.curve(axis, {run.boundary: 0.0})[0][0] for run in runs if run.boundary
            ]
            if boundaries:
                _mark_boundary(panel, sum(boundaries) / len(boundaries), colour, "boundary")
        _finish_losses(panel, [run for runs in groups.values() for run in runs])
        panel.set(xlabel=AXES[axis], ylabel="next-token validation loss, nats", title=axis)
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    _save(figure, output, title)


def speed_ups(groups: dict[str, list[Run]]) -> list[str]:
    """A line for each group but the first and each axis: how many times sooner it reaches the loss
    that both reach.

    The n-th runs of two groups are a pair (the same seed), so the spread is that of the pairs.
    """
    (first, base), *others = groups.items()
    lines = []
    for name, runs in others:
        for axis in AXES:
            pairs = [
                found for a, b in zip(base, runs) if (found := speed_up(a, b, axis)) is not None
            ]
            if pairs:
                mean, lowest, highest, error = spread(pairs)
                how = (
                    f"{lowest:.3f} to {highest:.3f}, standard error {error:.3f}, n = {len(pairs)}"
                    if len(pairs) > 1
                    else "one pair"
                )
                lines.append(
                    f"{name} against {first}, equal validation loss: speed-up in {axis} "
                    f"{mean:.3f} ({how})"
                )
    return lines


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _mark_boundary(axis, where, colour, text):
    axis.axvline(where, color=colour, linewidth=0.8)
    axis.annotate(
        text,
        (where, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, -12),
        textcoords="offset points",
        color=colour,
        fontsize=8,
    )


def _finish_losses(axis, runs):
    finals = [run.final_validation for run in runs if run.final_validation]
    if finals:
        axis.set_ylim(min(finals) - 0.1, min(finals) + 2.2)


def _save(figure, output, title):
    """Under a temporary name first: nobody sees half a picture."""
    figure.suptitle(title, fontsize=10)
    temporary = output.with_name(f".{output.name}.part{output.suffix}")
    figure.savefig(temporary, dpi=130)
    temporary.replace(output)
    _pyplot().close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("loss.png"), help="ends in .png or .svg"
    )
    parser.add_argument("--title", default="")
    parser.add_argument(
        "--axes",
        action="store_true",
        help="validation loss against steps, FLOPs, raw tokens and seconds",
    )
    parser.add_argument(
        "--parameters",
        type=int,
        help="of the whole model, for FLOPs: TensorBoard does not say, a log of one rank says its "
        "own",
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=LOG[,LOG ...]")
    args = parser.parse_args(argv)
    if args.output.suffix not in (".png", ".svg"):
        return _error(f"expected --output to end in .png or .svg, got {args.output}. Rename it.")
    groups = {}
    for item in args.runs:
        name, paths = _named(item)
        groups[name] = []
        for path in paths:
            if not name or not path.exists():
                return _error(
                    f"expected NAME=LOG with an existing log, got {item!r}. Check the path."
                )
            groups[name].append(run := read(path))
            run.parameters = args.parameters or run.parameters
            if not run.train:
                return _error(
                    f"expected training lines of Megatron in {path}, found none. Give the last "
                    f"rank's log."
                )
    if args.axes or any(len(runs) > 1 for runs in groups.values()):
        if not all(run.validation for runs in groups.values() for run in runs):
            return _error(
                "expected validation losses in every run, found a run without. Train with "
                "--eval-iters."
            )
        plot_axes(groups, args.output, args.title)
        for line in speed_ups(groups):
            print(line)
    else:
        plot({name: runs[0] for name, runs in groups.items()}, args.output, args.title)
    print(args.output)
    return 0


def _named(item: str) -> tuple[str, list[Path]]:
    """NAME=PATH,PATH at the "=" after which the paths are there: names and folders may have one of
    their own.
    """
    for i in (i for i, letter in enumerate(item) if letter == "="):
        name, paths = item[:i], [Path(path) for path in item[i + 1 :].split(",")]
        if all(path.exists() for path in paths):
            break
    else:
        return "", [Path(item)]
    return name, paths


def _error(text):
    print(f"plot_runs: error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
