"""When the block at a boundary is printed and experts are counted: the worked example of
BoundaryLog.after_iteration. tests/training/test_boundary_log.py has what it says.
"""

import argparse

import pytest
import torch

from megatron_tst.loop.boundary_log import BoundaryLog
from megatron_tst.schedule import Schedule


def test_the_docstrings_example(monkeypatch):
    args = argparse.Namespace(train_iters=10, num_experts=4, tst_boundary=None)
    log, plan, happened = BoundaryLog(args), Schedule.of(4, 6, 40, 32, 4), []
    monkeypatch.setattr(log.load, "attach", lambda model: happened.append("count"))
    monkeypatch.setattr(log.load, "detach", lambda: happened.append("stop counting"))
    monkeypatch.setattr(log, "_facts", lambda phase, optimizer: {"sample": phase.end})
    monkeypatch.setattr(log, "_print", lambda *facts: happened.append("print"))
    for iteration in range(1, 11):
        args.consumed_train_samples, happened[:] = 4 * iteration, []
        log.after_iteration(plan, [], None)
        assert happened == {1: ["count"], 6: ["count"], 10: ["print", "stop counting"]}.get(
            iteration, []
        )
        assert (args.tst_boundary == {"sample": 24}) == (6 <= iteration < 10)


def test_experts_that_a_graph_routes_to_are_not_said_to_be_counted(monkeypatch, capsys, megatron):
    """The hooks would be run by no replay, or stay in a graph that is captured just then."""
    args = argparse.Namespace(
        train_iters=10, num_experts=4, num_layers=2, rank=0, tst_boundary=None, tst_validation=None
    )
    args.cuda_graph_impl, args.cuda_graph_modules = "full_iteration", []
    log, plan = BoundaryLog(args), Schedule.of(4, 6, 40, 32, 4)
    monkeypatch.setattr(log.load, "attach", lambda model: pytest.fail("experts are counted"))
    for iteration in range(1, 11):
        args.consumed_train_samples = 4 * iteration
        log.saw_iteration(iteration, 1e-3, torch.tensor(5.0))
        log.after_iteration(plan, [], argparse.Namespace())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "expert load" in line]
    assert line == (
        " [tst]   expert load    not known: --cuda-graph-impl full_iteration runs the routers in "
        "graphs"
    )
