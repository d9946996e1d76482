"""What the benchmarks share: time and peak memory of a call, and what a row says about where it was
measured.
"""

from __future__ import annotations

import csv
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call, until the GPU is done."""
    import torch

    if has_gpu():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if has_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
    import megatron.core
    import torch

    return {
        "device": torch.cuda.get_device_name() if has_gpu() else _processor(),
        "torch": torch.__version__,
        "megatron_core": megatron.core.__version__,
        "commit": _commit(),
    }


def append_rows(path: Path, rows: list[dict]) -> None:
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
