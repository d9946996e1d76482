"""The matrix of layout x model x precision x phase, from the report of the tests that compare
layouts with one process.

    pytest tests/distributed --parallel-report report.json
    python tools/parallel_matrix.py report.json                       a table
    python tools/parallel_matrix.py report.json --json                one object a line: layout, phase, precision, status, difference
    python tools/parallel_matrix.py report.json --write docs/parallelism.md    put it between the page's two marks

`make matrix` does the first and the last, and keeps the report as docs/parallelism.json.
"""

from __future__ import annotations

import argparse
import json
import sys
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
    """Markdown: one line a case, the largest differences in its cells."""
    about = report["about"]
    nodes = "one node" if about["nodes"] == 1 else f"{about['nodes']} nodes"
    lines = [
        f"{len(report['cases'])} cases on {about['device']} over {about['backend']}, {nodes}, "
        f"{about['date']}, torch {about['torch']}, "
        f"megatron-core {about['megatron-core']}.",
        "",
        "| layout | model | other settings | s | precision | superposition | recovery | gradient "
        "norm | weights | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        found = case["difference"]
        exact = "bag_of_one" in case["test"]
        options = " ".join(
            f"`{option}`"
            for option in ["--" + text.strip() for text in case["options"].split("--")[1:]]
        )
        weights = "-" if "fsdp" in case["layout"] else _figure(found["weights"])
        cells = [
            case["layout"],
            case["model"],
            options,
            str(case["s"]),
            case["precision"],
            _figure(found["superposition"]),
            _figure(found["recovery"]),
            _figure(found["norms"]),
            weights,
            ("= stock, bit for bit" if exact else "= one process")
            if case["status"] == "passed"
            else "**differs**",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for status, header in (("refused", "shown by"), ("not verified", "why")):
        lines += ["", f"| {status} | precision | {header} |", "|---|---|---|"]
        lines += [
            f"| {layout} | {precision} | {f'`{text}`' if status == 'refused' else text} |"
            for layout, precision, text in report[status]
        ]
    return "\n".join(lines)


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
