"""The table of docs/parallelism.md is that of the report beside it, the report that of today's
cases; the fabric check measures.
"""

import json
import re
from pathlib import Path

import parallel_matrix
import pytest
from support.layouts import BAGS_OF_ONE, CASES, NOT_VERIFIED, REFUSED

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture
def report():
    return json.loads((DOCS / "parallelism.json").read_text())


def test_the_page_is_not_stale(report):
    """Run `make matrix` after a change of the cases."""
    assert [case["id"] for case in report["cases"]] == [case.id for case in [*CASES, *BAGS_OF_ONE]]
    assert all(case["status"] == "passed" for case in report["cases"])
    assert parallel_matrix.table(report) in (DOCS / "parallelism.md").read_text()


def test_what_the_stages_of_a_pipeline_hold_is_listed_below_the_table(report):
    """A | of theirs would end a cell."""
    table = parallel_matrix.table(report)
    assert len({row.count("|") for row in table.splitlines() if row.startswith("|")}) == 1
    assert "| pp2 | deepseek | " in table and ": `stages:Et|ttmL`" in table


def test_one_row_a_case_and_phase(report, capsys):
    assert parallel_matrix.main(["--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 * sum(
        len(report[part]) for part in ("cases", "refused", "not verified")
    ) and {row["phase"] for row in rows} == {"superposition", "recovery"}
    assert {"layout", "phase", "precision", "status", "difference"} <= set(rows[0])
    assert {row["status"] for row in rows} == {"passed", "refused", "not verified"}
    assert max(row["difference"] for row in rows if row["precision"] == "fp32") < 1e-6


def test_what_is_said_to_be_refused_has_its_test(report):
    assert report["refused"] == [list(row) for row in REFUSED] and report["not verified"] == [
        list(row) for row in NOT_VERIFIED
    ]
    for _, _, test in REFUSED:
        path, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / path).read_text(), test


def test_a_case_that_differs_is_named(report, tmp_path, capsys):
    report["cases"][0]["status"] = "failed"
    path, page = tmp_path / "report.json", tmp_path / "page.md"
    path.write_text(json.dumps(report))
    assert parallel_matrix.main([str(path)]) == 1 and "**differs**" in capsys.readouterr().out
    page.write_text(f"before\n{parallel_matrix.BEGIN}\nold\n{parallel_matrix.END}\nafter\n")
    assert parallel_matrix.main([str(path), "--write", str(page)]) == 1
    text = page.read_text()
    assert (
        text.startswith("before\n")
        and text.endswith("after\n")
        and "old" not in text
        and "**differs**" in text
    )


def test_mistakes(tmp_path, capsys):
    assert (
        parallel_matrix.main([str(tmp_path / "none.json")]) == 2
        and "--parallel-report" in capsys.readouterr().err
    )
    page = tmp_path / "page.md"
    page.write_text("no marks")
    assert (
        parallel_matrix.main(["--write", str(page)]) == 2
        and "without them" in capsys.readouterr().err
    )
    assert page.read_text() == "no marks"


def test_fabric_check(fork_server, tmp_path):
    flags = ["--seq-length", "64", "--hidden-size", "32", "--bucket", "4096", "--rounds", "3"]
    script = str(ROOT / "tools" / "check_fabric.py")
    run = fork_server.train(*flags, "--json", tmp_path / "out.jsonl", script=script, nproc=2)
    assert run.ok, run.log
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["bytes"] for row in rows] == [
        4 * 64 * 32,
        2 * 64 * 32,
        4 * 4096,
        2 * 64 * 32 * 8,
    ] and len(re.findall("GB/s", run.log)) == 4
    for row in rows:
        factor = 1.0 if row["collective"] == "all-reduce" else 0.5
        assert row["bus_GB_per_s"] == pytest.approx(
            factor * row["bytes"] / row["milliseconds"] / 1e6
        )
    slow = fork_server.train(*flags, "--at-least", "1e6", script=script, nproc=2)
    assert slow.codes == [1, 1] and "TOO SLOW" in slow.log
