"""Pictures of training curves, by matplotlib (megatron-tst[demo]); written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from megatron_tst.checkpoint.atomic import new_files
from megatron_tst.errors import optional
from megatron_tst.planning.runs import AXES, Run

_DRAWN_BY = "megatron-tst"  # in every picture, which says that it may be replaced


def plot(runs: dict[str, Run], output: Path, title: str = "", sources: Iterable[Path] = ()) -> None:
    """Two panels over iterations (equal iterations are equal FLOPs): training loss and next-token
    validation loss. `output`, `sources`: as `save` has them.
    """
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, (name, run) in enumerate(runs.items()):
        colour, name = f"C{number}", _plain(name)
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
        if run.nan_from is not None:
            for axis in (left, right):
                _mark_boundary(axis, run.nan_from, colour, "NaN")
    _finish_losses(right, runs.values())
    for axis, name in ((left, "training loss"), (right, "validation loss, next token")):
        axis.set(xlabel="iteration (equal FLOPs)", ylabel="nats per position", title=name)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(_plain(title), fontsize=10)
    save(figure, output, sources)


def plot_axes(
    groups: dict[str, list[Run]], output: Path, title: str = "", sources: Iterable[Path] = ()
) -> None:
    """Next-token validation loss against each of AXES that all runs know; a group is its mean, and
    a band from lowest to highest. `output`, `sources`: as `save` has them.
    """
    plt = pyplot()
    known = [
        axis for axis in AXES if all(run.curve(axis) for runs in groups.values() for run in runs)
    ]
    figure, panels = plt.subplots(
        1, len(known), figsize=(4.6 * len(known), 4.2), layout="constrained", squeeze=False
    )
    for panel, axis in zip(panels[0], known):
        for number, (name, runs) in enumerate(groups.items()):
            colour, name = f"C{number}", _plain(name)
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
    figure.suptitle(_plain(title), fontsize=10)
    save(figure, output, sources)


def pyplot() -> ModuleType:
    """matplotlib.pyplot, for files.

    Raises:
        TSTError: matplotlib is not installed.
    """
    optional("matplotlib", "megatron-tst[demo]").use("Agg")
    return optional("matplotlib.pyplot", "megatron-tst[demo]")


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
    finals = [run.validation[max(run.validation)] for run in runs if run.validation]
    if finals:
        axis.set_ylim(min(finals) - 0.1, min(finals) + 2.2)


def _plain(text):
    """A name as it is: matplotlib takes what stands between dollars for a formula."""
    return text.replace("$", r"\$")


def save(figure: object, output: Path, sources: Iterable[Path] = (), dpi: int = 130) -> None:
    """Write a picture: whole or absent. One that was drawn here is replaced, any other file is
    moved aside.

    Args:
        figure: matplotlib's.
        output: its ending says the format.
        sources: files that it was drawn from.

    Raises:
        TSTError: atomic.new_files's.
    """

    def ours(folder):
        with open(folder / output.name, "rb") as file:
            return _DRAWN_BY.encode() in file.read(4096)

    signed = {"Creator" if output.suffix == ".svg" else "Software": _DRAWN_BY}
    with new_files(output, [""], True, sources, ours) as folder:
        figure.savefig(folder / output.name, dpi=dpi, metadata=signed)
    pyplot().close(figure)
