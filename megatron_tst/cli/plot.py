"""Draw the losses of Megatron runs, and say how much sooner one group of runs reaches another's
loss.

    megatron-tst plot --output loss.png baseline=baseline.log "TST s=2"=tst.log
    megatron-tst plot --output loss.svg baseline=a1.log,a2.log "TST s=2"=b1.log,b2.log --json
    megatron-tst plot --parameters 1115904 baseline=tensorboard/a TST=tensorboard/b

A LOG is what the last rank printed, or a folder of TensorBoard files. A resumed run may be one
concatenated log: what was done again after a restart counts once. A LOG may be packed (gzip, bzip2,
xz). One run a name: training loss and next-token validation loss over iterations. Several a name,
which are seeds in pairs, or --axes: the validation loss against steps, FLOPs, raw tokens and
seconds, mean with lowest and highest, and the speed-up over the first name at equal loss. A run
that ends in NaN has none. What was left out or not understood is said. --json says what was read
from each run, and the speed-ups. Needs pip install 'megatron-tst[demo]'.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_tst.cli.screen import Parser, answer, call
from megatron_tst.errors import refuse
from megatron_tst.planning.curves import SpeedUp

MOST = 10**15  # parameters that a model may have


def parser(prog: str) -> Parser:
    """The flags of this verb; `prog` is the command as it was called."""
    it = Parser(prog, __doc__)
    it.add_argument(
        "--output",
        type=Path,
        default=Path("loss.png"),
        help="ends in .png or .svg; default: loss.png",
    )
    it.add_argument("--title", default="")
    it.add_argument(
        "--axes",
        action="store_true",
        help="validation loss against steps, FLOPs, raw tokens and seconds",
    )
    it.add_argument(
        "--validation-set",
        metavar="NAME",
        help="of several (--multiple-validation-sets), by name or number",
    )
    it.add_argument(
        "--parameters",
        type=int,
        help="of the whole model, for FLOPs: TensorBoard does not say, a log of one rank says its "
        "own",
    )
    it.add_argument("--json", action="store_true", help="print one JSON object")
    it.add_argument("runs", nargs="+", metavar="NAME=LOG[,LOG ...]")
    return it


def main(argv: list[str] | None = None, prog: str = "megatron-tst plot") -> int:
    """Run the verb. -> exit code"""
    return call(parser(prog), _run, argv)


def _run(options):
    from megatron_tst.planning import curves, plots

    if options.output.suffix not in (".png", ".svg"):
        refuse("--output", "a name that ends in .png or .svg", options.output, "Rename it.")
    if options.parameters is not None and not 0 < options.parameters <= MOST:
        do = "Give those of the whole model."
        refuse("--parameters", "a whole number from 1 to 10^15", options.parameters, do)
    sources = _sources(options.runs)
    groups = {
        name: [curves.read(path, options.validation_set) for path in paths]
        for name, paths in sources.items()
    }
    for name, paths in sources.items():
        for path, run in zip(paths, groups[name]):
            run.parameters = options.parameters or run.parameters
            if not run.train:
                got = f"none with a loss ({'; '.join(run.notes)})" if run.notes else "none"
                do = "Give the last rank's log."
                refuse(path, "training lines of Megatron with `lm loss`", got, do)
    read = [path for paths in sources.values() for path in paths]
    with_axes = options.axes or any(len(runs) > 1 for runs in groups.values())
    if with_axes:
        for name, runs in groups.items():
            if not set.intersection(*(set(run.validation) for run in runs)):
                expected = f"validation losses at the same iterations in every run of {name}"
                refuse("--axes", expected, "none", "Train with --eval-iters.")
        plots.plot_axes(groups, options.output, options.title, read)
    else:
        first = {name: runs[0] for name, runs in groups.items()}
        plots.plot(first, options.output, options.title, read)
    found = curves.speed_ups(groups)
    notes = _notes(sources, groups)
    about = {
        "output": str(options.output),
        "runs": {
            name: [
                {"log": str(path), **curves.summary(run)} for path, run in zip(sources[name], runs)
            ]
            for name, runs in groups.items()
        },
        "speed_ups": [dataclasses.asdict(speed_up) for speed_up in found],
        "notes": notes,
    }
    lines = [said(speed_up) for speed_up in found] if with_axes else []
    answer(options.json, about, "\n".join([*notes, *lines, str(options.output)]))
    return 0


def _sources(items: list[str]) -> dict[str, list[Path]]:
    """name -> the logs of its runs"""
    sources: dict[str, list[Path]] = {}
    for item in items:
        name, paths = _named(item)
        if name in sources:
            do = "Name them apart, or give seeds of one run as NAME=LOG,LOG."
            refuse("a run", "a name of its own", f"{name!r} twice", do)
        if len({path.resolve() for path in paths}) < len(paths):
            refuse(f"the runs of {name}", "a log each", "the same one twice", "Give each seed's.")
        sources[name] = paths
    return sources


def _notes(sources: dict[str, list[Path]], groups: dict[str, list]) -> list[str]:
    """What the readers left out, and what of it makes a speed-up impossible."""
    notes = [
        f"{name}, {path}: {note}"
        for name, runs in groups.items()
        for path, run in zip(sources[name], runs)
        for note in run.notes
    ]
    (first, base), *others = groups.items()
    for name, runs in others:
        pairs = list(zip(base, runs))
        if len(base) != len(runs):
            notes.append(
                f"{name} against {first}: {len(runs)} and {len(base)} runs, of which the first "
                f"{len(pairs)} are pairs"
            )
        ended = sum(a.nan_from is not None or b.nan_from is not None for a, b in pairs)
        if ended:
            notes.append(
                f"{name} against {first}: no speed-up from {ended} of {len(pairs)} pairs, in which "
                f"a run ends in NaN"
            )
    return notes


def said(speed_up: SpeedUp) -> str:
    """A line of a planning.curves.SpeedUp."""
    how = "one pair"
    if speed_up.standard_error is not None:
        how = (
            f"{speed_up.lowest:.3f} to {speed_up.highest:.3f}, standard error "
            f"{speed_up.standard_error:.3f}, n = {speed_up.pairs}"
        )
    return (
        f"{speed_up.name} against {speed_up.against}, equal validation loss: speed-up in "
        f"{speed_up.axis} {speed_up.mean:.3f} ({how})"
    )


def _named(item: str) -> tuple[str, list[Path]]:
    """NAME=PATH,PATH at the "=" after which the paths are there: names and folders may have one of
    their own.
    """
    for i in (i for i, letter in enumerate(item) if letter == "="):
        name, paths = item[:i], [Path(path) for path in item[i + 1 :].split(",")]
        if name and all(path.exists() for path in paths):
            return name, paths
    refuse("a run", "NAME=LOG with an existing log", repr(item), "Check the path.")
