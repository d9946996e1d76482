"""Plan a TST run before it starts: text, FLOPs, GPU-hours, memory of the loss, loader rate, layout,
and what the paper measured.

    megatron-tst plan --preset moe-10b-a1b
    megatron-tst plan --preset 3b --tokens 80B --tst-bag-size 4 --gpu h100 --mfu 0.4

Megatron's flags of model, batch, layout, FP8 and decay (--num-layers, --train-iters, ...) and TST's
(--tst-bag-size, ...) have their names and meaning from training. --preset, --hf-config or they give
the shape. Other flags of Megatron's may stand beside them, and a launcher and a script before them:
paste the whole line that starts a run. What a plan does not use is named. Nothing is trained. Exit
code 0: a plan. 2: the run is impossible, or a value makes no sense; what is wrong is said, with
what to do.
"""

from __future__ import annotations

import json
import sys

from megatron_tst.cli.screen import Parser, call
from megatron_tst.errors import TSTError, refuse
from megatron_tst.planning import flags, launch_line, recipes


class _Parser(Parser):
    """Of a launch line it parses what a plan uses."""

    def parse_args(self, args, namespace=None):
        return super().parse_args(launch_line.read(args, self).argv, namespace)


def main(argv: list[str] | None = None, prog: str = "megatron-tst plan") -> int:
    """Plan, or print a recipe. -> exit code"""
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(prog, __doc__, allow_abbrev=False)
    flags.add_arguments(parser).add_argument(
        "--print",
        nargs="*",
        metavar="NAME=VALUE",
        help="the flags of --preset alone, as a shell's arrays; variables as in a launch script",
    )
    return call(parser, lambda options: _run(parser, options, argv), argv)


def _run(parser: Parser, options, argv: list[str] | None) -> int:
    if options.print is not None:
        return _print(parser, options)
    from megatron_tst.planning.plan import examine

    found, _ = examine(argv, parser)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        from megatron_tst.cli import plan_screen

        plan_screen.show(found)
    if faults := found.get("faults"):
        more = f" The plan says {len(faults) - 1} more." if faults[1:] else ""
        raise TSTError(faults[0] + more)
    return 0


def _print(parser: Parser, options) -> int:
    defaults = vars(parser.parse_args([])) | {"preset": options.preset, "print": options.print}
    others = [name for name, value in vars(options).items() if value != defaults[name]]
    if others or not options.preset:
        got = f"--{others[0].replace('_', '-')}" if others else "none"
        do = "Variables go behind --print, as STEPS=100."
        refuse("--print", "--preset, and nothing else, beside it", got, do)
    given = {}
    for word in options.print:
        name, equals, given[name] = word.partition("=")
        if not equals:
            refuse("--print", "variables as STEPS=100", word, "Correct it.")
    print(recipes.shell(options.preset, given))
    return 0
