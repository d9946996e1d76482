"""Bandwidth of the collectives of a training step over all ranks, at the sizes that a model gives
them: run before a long job.

    torchrun --nproc-per-node 8 tools/check_fabric.py
    srun torchrun --nnodes N --nproc-per-node 8 --rdzv-... tools/check_fabric.py

The second is for several nodes (examples/slurm/nccl_tests.sbatch).

Prints a table on rank 0 and ends with exit code 1 if a collective stays under --at-least GB/s. Bus
bandwidth is what a link carries whatever the number of ranks: for an all-reduce of P bytes over R
ranks in t seconds 2(R-1)/R P/t, for an all-to-all (R-1)/R P/t.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

import torch
import torch.distributed as dist


def sizes(options) -> dict[str, tuple[str, int]]:
    """What -> (collective, bytes a rank holds). TST changes none of them: positions are the same in
    both phases.
    """
    positions = options.micro_batch_size * options.seq_length
    return {
        "pooled embedding [b, L, H], fp32": ("all-reduce", 4 * positions * options.hidden_size),
        "activations [b, L, H], bf16": ("all-reduce", 2 * positions * options.hidden_size),
        "gradients of one bucket, fp32": ("all-reduce", 4 * options.bucket),
        "tokens to experts, bf16": (
            "all-to-all",
            2 * positions * options.hidden_size * options.topk,
        ),
    }


def measure(collective: str, size: int, device: torch.device, rounds: int) -> float:
    """Median seconds of one call over all ranks, the slowest rank's."""
    ranks = dist.get_world_size()
    data = torch.ones(-(-size // (4 * ranks)) * ranks, device=device)
    out = torch.empty_like(data)
    times = []
    for _ in range(rounds + 3):
        dist.barrier()
        _wait(device)
        start = time.perf_counter()
        if collective == "all-reduce":
            dist.all_reduce(data)
        else:
            dist.all_to_all_single(out, data)
        _wait(device)
        times.append(time.perf_counter() - start)
        data.fill_(1.0)
    slowest = torch.tensor(times[3:], device=device, dtype=torch.float32)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.median().item()


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--seq-length", type=int, default=4096, help="positions, L")
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--topk", type=int, default=8, help="experts a token is sent to")
    parser.add_argument(
        "--bucket",
        type=int,
        default=40_000_000,
        help="parameters in a gradient bucket (Megatron's default)",
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--at-least",
        type=float,
        default=0.0,
        metavar="GB/s",
        help="bus bandwidth below which the check fails",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the figures there too, one JSON object a line"
    )
    options = parser.parse_args(argv)

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    ranks = dist.get_world_size()
    name = torch.cuda.get_device_name() if cuda else "CPU, gloo"
    rows = []
    for what, (collective, size) in sizes(options).items():
        seconds = measure(collective, size, device, options.rounds)
        factor = (2 if collective == "all-reduce" else 1) * (ranks - 1) / ranks
        rows.append(
            {
                "what": what,
                "collective": collective,
                "bytes": size,
                "ranks": ranks,
                "device": name,
                "milliseconds": 1e3 * seconds,
                "bus_GB_per_s": factor * size / seconds / 1e9,
            }
        )
    if dist.get_rank() == 0:
        print(f"{ranks} ranks, {name}")
        for row in rows:
            slow = "   TOO SLOW" if row["bus_GB_per_s"] < options.at_least else ""
            print(
                f"  {row['what']:34s} {row['collective']:11s} {row['bytes'] / 2**20:9.1f} MiB "
                f"{row['milliseconds']:9.3f} ms "
                f"{row['bus_GB_per_s']:8.2f} GB/s{slow}",
                flush=True,
            )
        if options.json:
            with open(options.json, "w") as file:
                file.write("\n".join(map(json.dumps, rows)) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    if any(row["bus_GB_per_s"] < options.at_least for row in rows):
        print(
            f"check_fabric: expected at least {options.at_least} GB/s of every collective, see "
            f"TOO SLOW above.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
