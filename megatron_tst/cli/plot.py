"""Draw the losses of Megatron runs, and say how much sooner one group of runs reaches another's
loss.

    megatron-tst plot --output loss.png baseline=baseline.log "TST s=2"=tst.log
    megatron-tst plot --output loss.svg baseline=a1.log,a2.log "TST s=2"=b1.log,b2.log --json
    megatron-tst plot --parameters 1115904 baseline=tensorboard/a TST=tensorboard/b

A LOG is what the last rank printed (a resumed run may be one concatenated log), or a folder of
TensorBoard files. One run a name: training loss and next-token validation loss over iterations.
Several a name, which are seeds in pairs, or --axes: the validation loss against steps, FLOPs, raw
tokens and seconds, mean with lowest and highest, and the speed-up over the first name at equal
loss. --json says what was read from each run, and the speed-ups. Needs pip install
'megatron-tst[demo]'.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_tst.cli.screen import Parser, answer, call
from megatron_tst.errors import refuse
from megatron_tst.planning.curves import SpeedUp


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
    groups, sources = {}, {}
    for item in options.runs:
        name, paths = _named(item)
        sources[name], groups[name] = paths, [curves.read(path) for path in paths]
        for path, run in zip(paths, groups[name]):
            run.parameters = options.parameters or run.parameters
            if not run.train:
                refuse(path, "training lines of Megatron", "none", "Give the last rank's log.")
    with_axes = options.axes or any(len(runs) > 1 for runs in groups.values())
    if with_axes:
        if not all(run.validation for runs in groups.values() for run in runs):
            refuse(
                "--axes",
                "validation losses in every run",
                "a run without",
                "Train with --eval-iters.",
            )
        plots.plot_axes(groups, options.output, options.title)
    else:
        plots.plot({name: runs[0] for name, runs in groups.items()}, options.output, options.title)
    found = curves.speed_ups(groups)
    about = {
        "output": str(options.output),
        "runs": {
            name: [
                {"log": str(path), **curves.summary(run)} for path, run in zip(sources[name], runs)
            ]
            for name, runs in groups.items()
        },
        "speed_ups": [dataclasses.asdict(speed_up) for speed_up in found],
    }
    lines = [said(speed_up) for speed_up in found] if with_axes else []
    answer(options.json, about, "\n".join([*lines, str(options.output)]))
    return 0


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
