"""torch's CUDA functions, answered by the CPU: what Megatron asks of torch without asking whether
there is a GPU. cpu.py says when. Line numbers are megatron-core 0.19.2's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types

# torch.zeros(..., device="cuda") and the like, all over the loop
_MAKERS = (
    "tensor as_tensor zeros ones empty full rand randn randint arange linspace eye "
    "zeros_like ones_like empty_like full_like rand_like randn_like"
).split()
_NEW = "new_zeros new_ones new_empty new_full new_tensor".split()
_MEMORY = (
    "memory_allocated max_memory_allocated memory_reserved max_memory_reserved device_memory_used"
).split()
_MEMORY_STATS = (
    "reserved_bytes.all.current",
    "allocated_bytes.all.current",
    "allocated_bytes.all.peak",
    "allocation.all.current",
)


def install(torch: types.ModuleType) -> None:
    """Replace torch's functions for devices, streams, random state, memory and collectives."""
    _devices(torch)
    _streams(torch)
    _random_state(torch)
    _memory_queries(torch)
    _uneven_collectives(torch)


def _devices(torch) -> None:
    cpu = torch.device("cpu")

    def is_cuda(device):
        return (isinstance(device, int) and not isinstance(device, bool)) or str(device).startswith(
            "cuda"
        )

    def on_cpu(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            if kwargs.get("device") is not None and is_cuda(kwargs["device"]):
                kwargs["device"] = cpu
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return function(*args, **kwargs)

        return call

    # torch.zeros(..., device="cuda") and the like, all over the loop
    for name in _MAKERS:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    to = torch.Tensor.to
    torch.Tensor.to = on_cpu(
        lambda self, *a, **k: to(self, *((cpu, *a[1:]) if a and is_cuda(a[0]) else a), **k)
    )
    for name in _NEW:  # mappings.py:444, MoE
        setattr(torch.Tensor, name, on_cpu(getattr(torch.Tensor, name)))
    # batches, rotary caches, embedding masks: x.cuda()
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *a, **k: self
    torch.Tensor.pin_memory = lambda self, *a, **k: self
    torch.Tensor.record_stream = lambda self, stream: None
    # initialize.py:270 skips model parallelism without a device
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda *a: None
    torch.cuda.get_device_capability = lambda *a: (8, 0)
    torch.cuda.get_device_properties = lambda *a: types.SimpleNamespace(
        major=8, minor=0, multi_processor_count=1, total_memory=1 << 34, name="cpu"
    )
    type_, optimizers = torch.Tensor.type, os.path.join("megatron", "core", "optimizer")

    def type_as_on_cuda(self, *args, **kwargs):
        answer = type_(self, *args, **kwargs)
        # clip_grads.py:174 and the mixed-precision optimizers compare with "torch.cuda.FloatTensor"
        if isinstance(answer, str) and optimizers in sys._getframe(1).f_code.co_filename:
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_as_on_cuda


def _streams(torch) -> None:
    class Stream:
        """One order of execution: every wait is over already. Also stands for an event."""

        cuda_stream = 0

        def __init__(self, *args, **kwargs):
            pass

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            return False

        def record_event(self, event=None):
            return event or Stream()

        def query(self):
            return True

        def elapsed_time(self, other):
            return 0.0

    only = Stream()
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *a, **k: only
    torch.cuda.stream = lambda *a, **k: contextlib.nullcontext()
    torch.cuda.set_stream = torch.cuda.synchronize = torch.cuda.empty_cache = lambda *a, **k: None
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *a, **k: None


def _random_state(torch) -> None:
    # The CUDA generator is the CPU's: Megatron's tracker of tensor-parallel generators then works
    # as it is.
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    torch.cuda.initial_seed = torch.initial_seed

    def get_rng_state(*args, **kwargs):
        return torch.get_rng_state()

    def set_rng_state(state, *args, **kwargs):
        torch.set_rng_state(state)

    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = get_rng_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = set_rng_state


def _memory_queries(torch) -> None:
    for name in _MEMORY:
        setattr(torch.cuda, name, lambda *a, **k: 0)
    torch.cuda.memory_stats = lambda *a, **k: dict.fromkeys(_MEMORY_STATS, 0)
    torch.cuda.reset_peak_memory_stats = lambda *a, **k: None


def _uneven_collectives(torch) -> None:
    """gloo has no all_gather or reduce_scatter of unequal parts
    (core/tensor_parallel/mappings.py:154 and :197, MoE; with async_op
    core/distributed/param_and_grad_buffer.py:472, Muon).
    """

    class Done:
        """Of a collective that is over when it is begun."""

        def wait(self, *args):
            return True

    dist = torch.distributed
    gather, scatter = dist.all_gather, dist.reduce_scatter

    def uneven(tensors):
        return len({t.shape[0] for t in tensors if t.dim()}) > 1

    def all_gather(outputs, tensor, group=None, async_op=False):
        if not uneven(outputs):
            return gather(outputs, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros(max(o.shape[0] for o in outputs), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in outputs]
        gather(parts, padded, group=group)
        for output, part in zip(outputs, parts):
            output.copy_(part[: len(output)])
        return Done() if async_op else None

    def reduce_scatter(output, inputs, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if async_op or not uneven(inputs):
            return scatter(output, inputs, op=op, group=group, async_op=async_op)
        whole = torch.cat(list(inputs))
        dist.all_reduce(whole, op=op, group=group)
        output.copy_(whole.split([len(t) for t in inputs])[dist.get_rank(group)])

    dist.all_gather, dist.reduce_scatter = all_gather, reduce_scatter
