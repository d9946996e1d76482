"""What the benchmarks share: time and peak memory of a call, and what a row says about where it was
measured.

On CPU times are the clock's. On a GPU they are those of CUDA events around the call, which waits in
the GPU's queue until Python has queued all of it, with the L2 cache full of something else.
"""

from __future__ import annotations

import csv
import functools
import os
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def seconds(call: Callable[[], object], before: Callable[[], object] | None = None) -> float:
    """Of one call.

    Args:
        call: what is timed. On a GPU it must not wait for the GPU: then the launches of Python show
            again, as they do where it runs longer on the CPU than any delay tried here.
        before: prepares it, untimed, as a copy of inputs that the call writes over.
    """
    if has_gpu():
        return _seconds_behind_a_delay(call, before)
    if before:
        before()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def seconds_to_the_end(call: Callable[[], object]) -> float:
    """Of one call that itself waits for the GPU, as a training step does, until the GPU is done."""
    import torch

    if has_gpu():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if has_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - start


LONGEST_DELAY = 1 << 26  # clock cycles, about 40 ms
_delay = 1 << 22  # cycles for which the GPU is kept busy while Python queues a call: about 2 ms


def _seconds_behind_a_delay(call, before) -> float:
    """The delay grows until Python has queued the whole call before the GPU comes to it, and stays
    so for the next ones.
    """
    global _delay
    import torch

    cold = _larger_than_the_cache()
    while True:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if before:
            before()
        cold.zero_()
        torch.cuda._sleep(_delay)
        start.record()
        call()
        end.record()
        late = start.query()  # the GPU has come to the call already
        torch.cuda.synchronize()
        if not late or _delay >= LONGEST_DELAY:
            return start.elapsed_time(end) / 1e3
        _delay *= 2


@functools.cache
def _larger_than_the_cache():
    """Bytes twice the size of the GPU's L2: writing them leaves nothing else there."""
    import torch

    size = torch.cuda.get_device_properties("cuda").L2_cache_size
    return torch.empty(2 * size, dtype=torch.uint8, device="cuda")


def peak_bytes(call: Callable[[], object]) -> int:
    """Largest amount of tensor memory alive during a call beyond what was alive at its start."""
    import torch

    if has_gpu():
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    alive = peak = 0
    allocations = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(allocations, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def peak_tflops() -> float | None:
    """Dense bf16 peak of this machine's GPU (SXM, data sheet); None on CPU and where it is not
    known.
    """
    import torch

    from megatron_tst.hardware import GPUS

    name = torch.cuda.get_device_name().lower() if has_gpu() else ""
    slower = "pcie" in name or "nvl" in name
    kinds = [] if slower else [gpu for kind, gpu in GPUS.items() if kind in name]
    return kinds[0].peak_tflops if kinds else None


def where() -> dict:
    """Device, versions, commit: the last columns of every row."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if has_gpu() else _processor(),
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
        "commit": _commit(),
    }


def append_rows(path: Path, rows: list[dict]) -> None:
    """Rows of one kind, at once in the file: what a process has written stays when it is ended."""
    new = not path.exists()
    with open(path, "a", newline="") as out:
        writer = csv.DictWriter(out, rows[0].keys())
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _processor() -> str:
    names = [
        line.split(":")[1].strip()
        for line in open("/proc/cpuinfo")
        if line.startswith("model name")
    ]
    return f"{names[0] if names else 'CPU'} ({os.cpu_count()} cores)"


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        return ""
