"""examples/own_loop.py: both phases in a loop on megatron-core alone, on one and two processes."""

import os
import re
import subprocess
import sys

import pytest
from support.runs import ROOT
from support.trained import VOCAB, corpus_below

SCRIPT = str(ROOT / "examples" / "own_loop.py")
# Importing megatron.training, or anything in it, is a ModuleNotFoundError.
WITHOUT_TRAINING = """
import runpy, sys
sys.modules["megatron.training"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return corpus_below(tmp_path_factory.mktemp("corpus"), documents=200)


def losses(log):
    lines = re.findall(r"^\d+ \| (\w+) \| bag size (\d) \| loss ([\d.]+)$", log, re.M)
    assert [(name, bag) for name, bag, _ in lines] == (
        [("superposition", "4")] * 20 + [("recovery", "1")] * 20
    ), log[-3000:]
    return [float(loss) for *_, loss in lines]


def test_both_phases_on_one_and_on_two_processes(fork_server, text):
    """One without megatron.training, two of them sharing the model; both on the same samples."""
    arguments = [str(text), str(VOCAB)]
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRAINING, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)),
    )
    assert process.returncode == 0, process.stderr[-3000:]
    one = losses(process.stdout)
    assert "rank 0: 20 embedding and 20 loss calls with bags" in process.stdout
    run = fork_server.train(*arguments, script=SCRIPT, nproc=2)
    assert run.ok, run.log[-3000:]
    for rank in (0, 1):
        assert f"rank {rank}: 20 embedding and 20 loss calls with bags" in run.log
    two = losses(run.log)
    # Largest seen: 8e-7 here, 7e-6 with another corpus. Other samples are 7e-3 off from the start.
    assert two == pytest.approx(one, rel=5e-5)
    assert 6.1 < one[0] < 6.4  # log 500 = 6.21
    assert one[19] < one[0] - 1 and one[39] < one[20] - 0.3
