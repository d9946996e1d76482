"""The matrix of layout x model x precision x phase, from the report of the tests that compare
layouts with one process.

    pytest tests/distributed --parallel-report report.json
    python tools/parallel_matrix.py report.json                       a table
    python tools/parallel_matrix.py report.json --json                one object a line
    python tools/parallel_matrix.py report.json --write docs/parallelism.md    between its two marks

`make matrix` does the first and the last, and keeps the report as docs/parallelism.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path

BEGIN, END = "<!-- matrix: begin (tools/parallel_matrix.py writes this) -->", "<!-- matrix: end -->"
PHASES = "superposition", "recovery"


def rows(report: dict) -> list[dict]:
    """One row a case and phase, as --json prints them; then what is refused and what is not
    verified, in either phase.
    """
    compared = [
        {
            "layout": case["layout"],
            "model": case["model"],
            "options": case["options"],
            "bag_size": case["s"],
            "precision": case["precision"],
            "phase": phase,
            "status": case["status"],
            "difference": case["difference"][phase],
            "gradient_norm": case["difference"]["norms"],
            "weights": case["difference"]["weights"],
            "test": case["test"],
        }
        for case in report["cases"]
        for phase in PHASES
    ]
    rest = [
        {
            "layout": layout,
            "precision": precision,
            "phase": phase,
            "status": status,
            "difference": None,
            field: text,
        }
        for status, field in (("refused", "test"), ("not verified", "why"))
        for layout, precision, text in report[status]
        for phase in PHASES
    ]
    return compared + rest


def table(report: dict) -> str:
    """Markdown: one line a case, the largest differences in its cells. Settings other than the
    layout are letters, and a list below says what each stands for: no line is over 100 columns.
    """
    about = report["about"]
    nodes = "one node" if about["nodes"] == 1 else f"{about['nodes']} nodes"
    letters = {}
    rows = [_row(case, letters) for case in report["cases"]]
    settings = [f"{letter}: {_settings(options)}" for options, letter in letters.items()]
    lines = [
        *textwrap.wrap(
            f"{len(report['cases'])} cases on {about['device']} over {about['backend']}, {nodes}, "
            f"{about['date']}, torch {about['torch']}, megatron-core {about['megatron-core']}. "
            "Letters in the column `+` are settings beside the layout, listed below the table. "
            "`one` is one process.",
            100,
        ),
        "",
        "| layout | model | + | s | type | superposition | recovery | norm | weights | same as |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        *(line for setting in settings for line in _item(setting)),
    ]
    for status, why in (("refused", "Shown by"), ("not verified", "Why")):
        lines += ["", f"**{status.capitalize()}**", ""]
        for layout, precision, text in report[status]:
            what = layout if precision == "any" else f"{layout}, in {precision}"
            said = f"`{text}`" if status == "refused" else text
            lines += _item(f"{what}. {why}: {said}")
    return "\n".join(lines)


def _row(case: dict, letters: dict[str, str]) -> str:
    found = case["difference"]
    layout = [word for word in case["layout"].split() if not _uneven(word)]
    options = " ".join([*filter(_uneven, case["layout"].split()), case["options"].strip()]).strip()
    letter = letters.setdefault(options, _letter(len(letters))) if options else ""
    same = "stock, bit for bit" if "bag_of_one" in case["test"] else "one"
    cells = [
        " ".join(layout),
        case["model"],
        letter,
        str(case["s"]),
        case["precision"],
        _figure(found["superposition"]),
        _figure(found["recovery"]),
        _figure(found["norms"]),
        "-" if "fsdp" in case["layout"] else _figure(found["weights"]),
        same if case["status"] == "passed" else "**differs**",
    ]
    return f"| {' | '.join(cells)} |"


def _uneven(word: str) -> bool:
    """Whether a word of a layout says what the stages of a pipeline hold."""
    return ":" in word or word.startswith("first")


def _letter(number: int) -> str:
    """0 -> a, 25 -> z, 26 -> aa"""
    return ("" if number < 26 else _letter(number // 26 - 1)) + chr(ord("a") + number % 26)


def _settings(options: str) -> str:
    layout, *flags = options.split("--")
    return " ".join(f"`{text}`" for text in [*layout.split(), *(f"--{f.strip()}" for f in flags)])


def _item(text: str) -> list[str]:
    """An entry of a Markdown list, in lines of 100 columns."""
    return textwrap.wrap(
        text, 100, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False
    )


def _figure(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


def write(page: Path, report: dict) -> None:
    """Replace what is between the page's marks."""
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(
            f"{page}: expected the lines {BEGIN!r} and {END!r}, got a page without them. Put them "
            f"where the table belongs."
        )
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table(report)}\n{END}{rest.split(END)[1]}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "report",
        type=Path,
        nargs="?",
        default=Path(__file__).parent.parent / "docs" / "parallelism.json",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line instead of the table"
    )
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="put the table between the marks of this page"
    )
    options = parser.parse_args(argv)
    try:
        report = json.loads(options.report.read_text())
        if options.json:
            print("\n".join(map(json.dumps, rows(report))))
        elif options.write:
            write(options.write, report)
        else:
            print(table(report))
    except (OSError, KeyError, ValueError) as error:
        print(
            f"parallel_matrix: error: {options.report}: {error!r}. Make it with: pytest "
            f"tests/distributed --parallel-report FILE",
            file=sys.stderr,
        )
        return 2
    return int(any(case["status"] != "passed" for case in report["cases"]))


if __name__ == "__main__":
    sys.exit(main())
