"""What is installed, what TST will use, and what to do about each fault. Needs nothing but Python.

    megatron-tst doctor
    megatron-tst doctor --json

The second prints the same as one JSON object. Exit code 0: training would start. 1: there is a
FAULT. Packages are judged as for a GPU run: a broken Transformer Engine or apex is a fault where
MEGATRON_TST_CPU=1 would hide it, and a broken extension is one although the torch kernels stand in.
"""

from __future__ import annotations

import json
import textwrap

from megatron_tst.cli.screen import Parser, call
from megatron_tst.doctor import report

WIDTH = 110


def main(argv: list[str] | None = None, prog: str = "megatron-tst doctor") -> int:
    """Look, and say what was found. -> exit code"""
    parser = Parser(prog, __doc__)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object in place of the screen"
    )
    return call(parser, _run, argv)


def _run(options) -> int:
    found = report.examine()
    print(json.dumps(found, indent=2) if options.json else screen(found))
    return 0 if found["would_train"] else 1


def screen(report: dict) -> str:
    """The table, what TST will use, the faults."""

    def columns(head: str, text: str) -> list[str]:
        return textwrap.wrap(
            text,
            WIDTH - 2,  # a backslash may follow
            initial_indent=head,
            subsequent_indent=" " * len(head),
            break_on_hyphens=False,
        )

    faults = [row for row in report["rows"] if row["state"] == "FAULT"]
    lines = []
    for row in report["rows"]:  # a fault is shown whole below
        found = textwrap.shorten(row["found"], WIDTH - 28) if row in faults else row["found"]
        lines += columns(f"{row['name']:22}{row['state']:6}", found)
    lines += [
        "",
        "TST will use",
        *(
            line
            for what, which in report["will_use"].items()
            for line in columns(f"  {what:26}", which)
        ),
    ]
    if report["run_on_cpu"]:
        command = columns("  ", report["run_on_cpu"])
        lines += ["", "A run that starts on CPU", *(line + " \\" for line in command[:-1])]
        lines += command[-1:]
    lines += [
        "",
        f"{len(faults) or 'no'} fault{'s' * (len(faults) > 1)}: training would "
        f"{'fail' if faults else 'start'}",
    ]
    for row in faults:
        lines += columns(
            f"  {row['name']}: ", f"expected {row['expected']}, got {row['found']}. {row['do']}"
        )
    return "\n".join(lines)
