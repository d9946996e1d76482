"""--cuda-graph-impl full_iteration over the switch of phases: Megatron's own training loop and its
own FullCudaGraphWrapper, with tapes in the place of CUDA graphs (support/graphs_on_cpu.py).
tests/gpu/test_full_iteration_graph.py has real ones.
"""

import re

import pytest
import torch
from support.paths import ROOT
from support.runs import TINY, TST

pytestmark = pytest.mark.numeric

SCRIPT = str(ROOT / "tests" / "support" / "train.py")
# fewer steps than a phase has: one runs as it is, the second is captured, the rest are replays
GRAPHS = (
    "--cuda-graph-impl full_iteration --cuda-graph-warmup-steps 1 "
    "--no-check-for-nan-in-loss-and-grad"
).split()
MOCK = ["--mock-data", "--vocab-size", "512"]


def figures(fork_server, folder, *flags, **env):
    run = fork_server.train(folder, *TINY, *MOCK, *flags, script=SCRIPT, env=env)
    assert run.ok, run.log[-3000:]
    return run, torch.load(folder / "rank0.pt", weights_only=False)


@pytest.fixture
def both(fork_server, tmp_path):
    def both(*flags):
        for name in ("plain", "graphs"):
            (tmp_path / name).mkdir()
        plain = figures(fork_server, tmp_path / "plain", *flags)
        graphs = figures(fork_server, tmp_path / "graphs", *flags, *GRAPHS, GRAPHS_ON_CPU="1")
        return *plain, *graphs

    return both


def test_x(both):
    plain, want, graphs, got = both(*TST)
    print(graphs.log)
    assert got["steps"] == want["steps"]
