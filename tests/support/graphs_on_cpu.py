"""CUDA graphs on CPU: what torch.cuda.graph records and torch.cuda.CUDAGraph.replay repeats, played
by a tape of torch's own operations.

As on a GPU, a capture leaves every tensor that was there before it as it was, and a replay runs the
same operations on the same tensors' memory: no Python of the captured function runs again, and
nothing but the contents of its inputs can differ. Unlike on a GPU, a tensor that is made while
capturing keeps its memory to itself. Not for sequence parallelism over gloo, whose reduce-scatter
works on copies that no operation of torch makes: stock Megatron is off with it too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class CUDAGraph:
    """In the place of torch.cuda.CUDAGraph."""

    alive = 0

    def __init__(self):
        self.tape: list = []
        CUDAGraph.alive += 1

    def __del__(self):
        CUDAGraph.alive -= 1

    def register_generator_state(self, state: object) -> None:
        """Nothing random is captured in the tests."""

    def replay(self) -> None:
        with torch.no_grad():
            for operation, args, kwargs, results in self.tape:
                again = tree_leaves(operation(*args, **kwargs))
                for work in again if operation.namespace == "c10d" else ():
                    if not torch.is_tensor(work):
                        work.wait()
                for old, new in zip(results, again, strict=True):
                    if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class _Capture(TorchDispatchMode):
    """Writes down each operation, and what it is about to write over."""

    def __init__(self, tape):
        super().__init__()
        self.tape, self.before, self.made = tape, {}, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in _written(operation, args, kwargs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.made | self.before.keys():
                self.before[storage.data_ptr()] = storage, storage.clone()
        results = operation(*args, **kwargs)
        # the memory as it is now: Megatron may hang other memory behind a tensor (viewless tensors)
        args, kwargs, made = tree_map_only(
            torch.Tensor, torch.Tensor.detach, (args, kwargs, tree_leaves(results))
        )
        given = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        self.made |= {_memory(leaf) for leaf in made if torch.is_tensor(leaf)} - given
        self.tape.append((operation, args, kwargs, made))
        return results


def _memory(tensor):
    return tensor.untyped_storage().data_ptr()


def _written(operation, args, kwargs):
    """The tensors that the operation writes into. Collectives do not say; they write into lists."""
    if operation.namespace == "c10d":
        yield from (leaf for leaf in tree_leaves(args) if torch.is_tensor(leaf))
        return
    for i, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if torch.is_tensor(leaf))


@contextlib.contextmanager
def graph(cuda_graph: CUDAGraph, **options: object) -> Iterator[None]:
    """In the place of torch.cuda.graph: nothing that the block computes is left behind."""
    capture = _Capture(cuda_graph.tape)
    with capture:
        yield
    for storage, contents in capture.before.values():
        storage.copy_(contents)


def install() -> None:
    """Give torch.cuda these graphs, and Megatron random numbers that do not ask for CUDA's."""
    torch.cuda.CUDAGraph, torch.cuda.graph = CUDAGraph, graph
    torch.cuda.graph_pool_handle = lambda: None
    # a generator's state that a graph can hold is CUDA's alone
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker as Tracker

    stock = Tracker.__init__

    def __init__(self, use_cudagraphable_rng=False, **named):
        stock(self, use_cudagraphable_rng=False, **named)

    Tracker.__init__ = __init__
