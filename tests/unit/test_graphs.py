"""Whose graph a training step finds (loop/graphs.py), and what is in graphs (checks/conflicts.py).
tests/training/test_full_iteration_graphs.py has the loop.
"""

import argparse
import types

import pytest
import torch
from megatron.core import full_cuda_graph

from megatron_tst.checks.conflicts import captures_whole_steps, routers_in_graphs
from megatron_tst.config import TSTConfig
from megatron_tst.errors import TSTError
from megatron_tst.loop.graphs import PhaseGraph, check_resettable
from megatron_tst.schedule import Schedule

EIGHT, FOUR, RECOVERY = Schedule((8, 4, 1), (8, 16, 16), 32, 4).phases
STAGES = "training", "validation"


@pytest.fixture
def wrapper(monkeypatch):
    """Megatron's own, whose state is its class's; a step is its own number."""
    for owner, names in (
        (full_cuda_graph.FullCudaGraphWrapper, ("curr_iteration", "cuda_graph", "result")),
        (full_cuda_graph.StaticBufferLoader, ("static_buffers",)),
    ):
        for name in names:
            empty = {"curr_iteration": 0, "static_buffers": []}.get(name)
            fresh = {stage: [] if empty == [] else empty for stage in STAGES}
            monkeypatch.setattr(owner, name, fresh)
    return full_cuda_graph.FullCudaGraphWrapper(lambda: None)


def run(wrapper, stage):
    """As after a captured step: a graph, its result and its static batches."""
    kind = full_cuda_graph.FullCudaGraphWrapper
    kind.curr_iteration[stage] += 1
    kind.cuda_graph[stage], kind.result[stage] = f"{stage}'s graph", f"{stage}'s losses"
    full_cuda_graph.StaticBufferLoader.static_buffers[stage].append({"tokens": stage})


def state(wrapper, stage):
    kind = full_cuda_graph.FullCudaGraphWrapper
    buffers = full_cuda_graph.StaticBufferLoader.static_buffers
    return kind.curr_iteration[stage], kind.cuda_graph[stage], kind.result[stage], buffers[stage]


NEW = 0, None, None, []


def test_each_phase_has_a_graph_of_its_own_and_validation_keeps_its(wrapper):
    graph, dropped = PhaseGraph(), [None]
    graph.follow(wrapper, EIGHT)
    for stage in STAGES:
        run(wrapper, stage)
    validated = state(wrapper, "validation")
    for phase in (EIGHT, FOUR, RECOVERY, RECOVERY):
        dropped.append(graph.follow(wrapper, phase))
        if dropped[-1]:
            assert state(wrapper, "training") == NEW
        run(wrapper, "training")
    assert dropped == [None, None, "bag size 8", "bag size 4", None]
    assert state(wrapper, "training")[0] == 2 and state(wrapper, "validation") == validated


def test_the_memory_of_the_old_graph_is_free_before_the_new_one_is_captured(wrapper, monkeypatch):
    graph, happened = PhaseGraph(), []
    graph.follow(wrapper, EIGHT)
    run(wrapper, "training")
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: happened.append(name))
    reset = wrapper.reset_cuda_graph
    wrapper.reset_cuda_graph = lambda stage: (happened.append(stage), reset(stage))
    graph.follow(wrapper, EIGHT)
    assert happened == []  # a step that changes no phase waits for nothing
    graph.follow(wrapper, FOUR)
    assert happened == ["synchronize", "training", "empty_cache"]


@pytest.mark.parametrize("stages", [STAGES, ("training",), ("validation",)])
def test_a_run_after_another_in_one_process_uses_none_of_its_graphs(wrapper, stages):
    """Not even of one that only validated (--skip-train): its graph holds its own weights."""
    for stage in stages:
        run(wrapper, stage)
    assert PhaseGraph().follow(wrapper, RECOVERY) == "an earlier run"
    assert state(wrapper, "training") == state(wrapper, "validation") == NEW


@pytest.mark.parametrize(
    "owner, name, changed, missing",
    [
        ("FullCudaGraphWrapper", "reset_cuda_graph", None, r"without [^,]*reset_cuda_graph\("),
        ("FullCudaGraphWrapper", "reset_cuda_graph", lambda self: None, "without [^,]*reset_cuda"),
        ("FullCudaGraphWrapper", "curr_iter", None, r"without [^,]*curr_iter\(stage\)\. Use"),
        ("StaticBufferLoader", "static_buffers", [], "without StaticBufferLoader.static_buffers"),
        ("StaticBufferLoader", "static_buffers", {"train": []}, "without StaticBufferLoader"),
    ],
)
def test_a_megatron_that_cannot_reset_is_refused(monkeypatch, owner, name, changed, missing):
    several, one = Schedule((8, 4, 1), (8, 16, 16), 32, 4), Schedule((8, 1), (8, 16), 32, 4)
    in_process = TSTConfig(8, iters=2)
    at_boundary = TSTConfig(8, iters=2, exit_at_boundary=True)
    check_resettable(in_process, one)
    owner = getattr(full_cuda_graph, owner)
    if changed is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, changed)
    expected = "--cuda-graph-impl full_iteration with a switch of phases in one process: expected "
    for config, schedule in ((in_process, one), (in_process, several), (at_boundary, several)):
        with pytest.raises(TSTError, match=f"{expected}.*{missing}.*--tst-exit-at-boundary"):
            check_resettable(config, schedule)
    check_resettable(at_boundary, one)  # a process sees one phase


def named(name):
    return types.SimpleNamespace(name=name)


@pytest.mark.parametrize(
    "args, whole_steps, routers",
    [
        ({}, False, False),
        (dict(cuda_graph_impl="none", cuda_graph_modules=[]), False, False),
        (dict(cuda_graph_impl="full_iteration", cuda_graph_modules=[]), True, True),
        (dict(cuda_graph_impl="local", cuda_graph_modules=[]), False, True),  # whole layers
        (dict(cuda_graph_impl="local", cuda_graph_modules=None), False, True),
        (dict(cuda_graph_impl="local", cuda_graph_modules=[named("attn")]), False, False),
        (
            dict(
                cuda_graph_impl="transformer_engine",
                cuda_graph_modules=[named("attn"), named("moe_router")],
            ),
            False,
            True,
        ),
        (
            dict(cuda_graph_impl="transformer_engine", cuda_graph_modules=[named("mamba")]),
            False,
            False,
        ),
    ],
)
def test_what_is_in_graphs(args, whole_steps, routers):
    args = argparse.Namespace(**args)
    assert captures_whole_steps(args) == whole_steps and routers_in_graphs(args) == routers


@pytest.mark.parametrize("flag", ["--cuda-graph-scope", "--cuda-graph-modules"])
def test_the_old_names_of_whole_steps_become_an_implementation(flag):
    """Megatron's validation translates them before anything here looks."""
    from megatron.training import arguments

    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args(["--cuda-graph-impl", "local", flag, "full_iteration"])
    if args.cuda_graph_scope_deprecated is not None:  # validate_args' own lines
        args.cuda_graph_modules = args.cuda_graph_scope_deprecated
    arguments._normalize_cuda_graph_modules_args(args)
    assert captures_whole_steps(args) and args.cuda_graph_modules == []
