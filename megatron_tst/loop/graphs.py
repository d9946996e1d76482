"""Full-iteration CUDA graphs (`--cuda-graph-impl full_iteration`): one graph for each phase.

Megatron runs the first training steps of a process as they are, captures the next one whole and
replays it from then on (megatron/core/full_cuda_graph.py). The shapes of the batches, and whatever
Python decides in a step, stay as they were in the captured one. Each bag size has shapes of its
own, so the graph of one phase must not meet the batches of the next.
"""

from __future__ import annotations

import inspect

import torch

from megatron_tst import compat
from megatron_tst.config import TSTConfig
from megatron_tst.errors import refuse
from megatron_tst.schedule import Phase, Schedule

STAGES = "training", "validation"


class PhaseGraph:
    """Which phase this process's training graph is of. Megatron keeps the graph itself on its
    class, for all runs of the process.
    """

    def __init__(self):
        self._of: tuple[str, int] | None = None  # None: this run has made no training step yet

    def follow(self, wrapper: object, phase: Phase) -> str | None:
        """Before a training step: drop the graph and the static batches of another phase, so that
        Megatron runs a few steps of this phase as they are and captures anew. Each rank drops its
        own, in the same step.

        A graph of an earlier run in this process is dropped with its validation graph: both hold
        that run's model. Otherwise validation, whose batches are the same in every phase, keeps
        its own.

        Args:
            wrapper: Megatron's FullCudaGraphWrapper.
            phase: of the step that comes.

        Returns:
            whose graph was dropped, in words; None where there was none to drop.
        """
        now = phase.name, phase.bag_size
        if now == self._of:
            return None
        before, self._of = self._of, now
        # an earlier run may have validated alone, and this one has not validated yet
        if not any(map(wrapper.curr_iter, STAGES if before is None else ("training",))):
            return None
        from megatron.core.full_cuda_graph import StaticBufferLoader

        stage = None if before is None else "training"
        torch.cuda.synchronize()  # the last replay reads the buffers and the graph's own memory
        wrapper.reset_cuda_graph(stage)
        for name in STAGES if stage is None else (stage,):
            StaticBufferLoader.static_buffers[name].clear()
        # else the dropped graph's memory would lie beside the new one's: while a graph is being
        # captured the allocator gives nothing back
        torch.cuda.empty_cache()
        return "an earlier run" if before is None else described(*before)


def described(name: str, bag_size: int) -> str:
    """A phase in a few words: "bag size 4" or "recovery"."""
    return f"bag size {bag_size}" if bag_size > 1 else name


def check_resettable(config: TSTConfig, schedule: Schedule) -> None:
    """Refuse a run whose processes see several phases, on a Megatron whose training graph cannot be
    reset.

    Raises:
        TSTError: naming what is not there.
    """
    if config.exit_at_boundary and len(schedule.superposed_phases) == 1:
        return
    from megatron.core import full_cuda_graph

    wrapper = getattr(full_cuda_graph, "FullCudaGraphWrapper", None)
    loader = getattr(full_cuda_graph, "StaticBufferLoader", None)
    reset = getattr(wrapper, "reset_cuda_graph", None)
    buffers = getattr(loader, "static_buffers", None)
    there = {
        "FullCudaGraphWrapper.reset_cuda_graph(stage)": reset is not None
        and "stage" in inspect.signature(reset).parameters,
        "FullCudaGraphWrapper.curr_iter(stage)": hasattr(wrapper, "curr_iter"),
        "StaticBufferLoader.static_buffers of training and validation": isinstance(buffers, dict)
        and set(STAGES) <= buffers.keys(),
    }
    if missing := [what for what, is_there in there.items() if not is_there]:
        refuse(
            "--cuda-graph-impl full_iteration with a switch of phases in one process",
            f"a Megatron with {', '.join(there)}",
            f"{compat.megatron_version()} without {', '.join(missing)}",
            "Use --tst-exit-at-boundary with one bag size, so that a process sees one phase alone, "
            "or --cuda-graph-impl local or transformer_engine.",
        )
