"""A real multi-node run on one machine: torchrun on two nodes, a worker killed in the superposition
phase, the restart over the boundary.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.close import close
from support.harness import SCRIPT, SUPERPOSED, TOLERANCE
from support.layouts import ITERATIONS, Case, Layout
from support.two_nodes import start, two_nodes


@pytest.fixture
def nodes():
    try:
        with two_nodes() as names:
            yield names
    except OSError as error:
        pytest.skip(f"NOT RUN: network namespaces cannot be made here: {error}")


@pytest.mark.slow
@pytest.mark.namespaces
def test_killed_worker_and_restart_over_the_boundary(trainer, nodes, tmp_path):
    case, layout = Case("tp2 pp2", s=3), Layout("tp2 pp2")
    want = trainer.reference(case)

    results, checkpoints = tmp_path / "results", tmp_path / "ck"
    results.mkdir()
    flags = [
        *trainer.flags(case, layout),
        "--save",
        checkpoints,
        "--save-interval",
        "1",
        "--load",
        checkpoints,
    ]
    flags += ["--pretrained-checkpoint", trainer.start(case.model)]  # until there is one in --load
    command = list(map(str, ["--nproc-per-node", 2, SCRIPT, results, *flags]))
    kill = SUPERPOSED - 1
    logs = [open(tmp_path / f"node{i}.log", "w+") for i in (0, 1)]
    runs = [start(node, nodes[node], command, logs[node], {"KILL": f"3@{kill}"}) for node in (0, 1)]
    codes = [run.wait(timeout=400) for run in runs]
    texts = [open(log.name).read() for log in logs]
    assert codes == [0, 0], (codes, texts[0][-2000:], texts[1][-2000:])
    assert f"killed after iteration {kill}" in texts[
        1
    ] and f"successfully loaded checkpoint from {checkpoints}" in "".join(texts)

    ranks = [torch.load(results / f"rank{rank}.pt", weights_only=True) for rank in range(4)]
    steps = ranks[3]["steps"]  # of the restarted run alone, the first of them still superposed
    first = ITERATIONS - len(steps)
    assert 0 < first <= kill and first < SUPERPOSED
    for i, (losses, norm) in enumerate(steps, start=first):
        close(losses["lm loss"], want.losses[i]["lm loss"], TOLERANCE["fp32"].superposition)
        close(norm, want.norms[i], TOLERANCE["fp32"].norms)
    boundary = f"[tst] boundary after iteration {SUPERPOSED}"
    assert "".join(texts).count(boundary) == 1


@pytest.mark.slow
def test_these_tests_over_several_nodes(tmp_path):
    """The command of README.md, here in two shells of one machine: either runs half of each
    layout's ranks.
    """
    case = Path(__file__).parent / "test_layouts.py"
    options = [
        "--nodes",
        "2",
        "--shared-folder",
        tmp_path / "shared",
        "--parallel-report",
        tmp_path / "report.json",
        "-k",
        "cp2 and tied",
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        case,
        "-q",
        "-p",
        "no:cacheprovider",
        "--backend",
        "gloo",
        *options,
    ]
    runs = [
        subprocess.Popen(
            [*map(str, command), "--node", str(node)], stdout=subprocess.PIPE, text=True
        )
        for node in (0, 1)
    ]
    texts = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0] and all(
        "1 passed" in text for text in texts
    ), texts
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["about"]["nodes"] == 2 and [row["status"] for row in report["cases"]] == [
        "passed"
    ]
