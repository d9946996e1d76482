"""Pictures of training curves, by matplotlib (megatron-tst[demo]); written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from megatron_tst.checkpoint.atomic import new_files
from megatron_tst.errors import optional
from megatron_tst.planning.runs import AXES, Run

_DRAWN_BY = "megatron-tst"  # in every picture, which says that it may be replaced


def plot(runs: dict[str, Run], output: Path, title: str = "", sources: Iterable[Path] = ()) -> None:
    """Two panels over iterations (equal iterations are equal FLOPs): training loss and next-token
    validation loss. `output`, `sources`: as `save` has them.
    """
    figure, (left, right) = _panels(2, title)
    for name, run in runs.items():
        name, boundary = _plain(name), run.boundary or 0
        (line,) = right.plot(run.validation.keys(), run.validation.values(), marker=".", label=name)
        colour = line.get_color()
        first = {i: loss for i, loss in run.train.items() if i <= boundary}
        second = {i: loss for i, loss in run.train.items() if i > boundary}
        for losses, style, what in (
            (first, "--", "superposition (mce)"),
            (run.excess, ":", "mce minus bag entropy"),
            (second, "-", "next token"),
        ):
            if losses:
                what = f"{name}: {what}"
                left.plot(losses.keys(), losses.values(), style, color=colour, label=what)
        for axis in (left, right):
            if boundary:
                _mark(axis, boundary, colour, "boundary")
            if run.nan_from is not None:
                _mark(axis, run.nan_from, colour, "NaN")
    _show_the_end(right, runs.values())
    for axis, name in ((left, "training loss"), (right, "validation loss, next token")):
        _describe(axis, "iteration (equal FLOPs)", "nats per position", name)
    save(figure, output, sources)


def plot_axes(
    groups: dict[str, list[Run]], output: Path, title: str = "", sources: Iterable[Path] = ()
) -> None:
    """Next-token validation loss against each of AXES that all runs know; a group is its mean, and
    a band from lowest to highest. `output`, `sources`: as `save` has them.
    """
    all_runs = [run for runs in groups.values() for run in runs]
    known = [axis for axis in AXES if all(run.curve(axis) for run in all_runs)]
    figure, panels = _panels(len(known), title)
    for panel, axis in zip(panels, known):
        for name, runs in groups.items():
            steps = sorted(set.intersection(*(set(run.validation) for run in runs)))
            places = zip(*(run.along(axis, steps) for run in runs))
            where = [fmean(at) for at in places]  # seconds differ from run to run
            losses = [[run.validation[step] for run in runs] for step in steps]
            label = f"{_plain(name)} (n = {len(runs)})"
            (line,) = panel.plot(where, [fmean(at) for at in losses], marker=".", label=label)
            lowest, highest = [min(at) for at in losses], [max(at) for at in losses]
            colour = line.get_color()
            panel.fill_between(where, lowest, highest, color=colour, alpha=0.25)
            bounds = [run.along(axis, [run.boundary]).pop() for run in runs if run.boundary]
            if bounds:
                _mark(panel, fmean(bounds), colour, "boundary")
        _show_the_end(panel, all_runs)
        _describe(panel, AXES[axis], "next-token validation loss, nats", axis)
    save(figure, output, sources)


def _panels(count, title):
    """A figure and the panels in it, side by side."""
    drawn_by = optional("matplotlib.figure", "megatron-tst[demo]")
    figure = drawn_by.Figure(figsize=(5 * count, 4), layout="constrained")
    figure.suptitle(_plain(title))
    return figure, [figure.add_subplot(1, count, i) for i in range(1, count + 1)]


def _mark(axis, where, colour, text):
    """A line over the whole height, with a text inside."""
    axis.axvline(where, color=colour)
    place = axis.get_xaxis_transform()  # x as the losses have it, y from 0 to 1
    axis.text(where, 1, f" {text}", color=colour, transform=place, verticalalignment="top")


def _show_the_end(axis, runs):
    """Cut off the losses at the start, beside which those at the end would look alike."""
    finals = [run.validation[max(run.validation)] for run in runs if run.validation]
    if finals:
        axis.set_ylim(min(finals) - 0.1, min(finals) + 2.2)


def _describe(axis, along, up, title):
    axis.set(xlabel=along, ylabel=up, title=title)
    axis.legend(fontsize="small")
    axis.grid()


def _plain(text):
    """A name as it is: matplotlib takes what stands between dollars for a formula."""
    return text.replace("$", r"\$")


def save(figure: object, output: Path, sources: Iterable[Path] = ()) -> None:
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

    with new_files(output, [""], True, sources, ours) as folder:
        figure.savefig(folder / output.name, dpi=130, metadata={"Creator": _DRAWN_BY})
