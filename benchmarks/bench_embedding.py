"""The superposed embedding, forward and backward to the table's gradient: ours against its peers,
in one process, interleaved.

    python benchmarks/bench_embedding.py [-V 32000] [-H 1024] [-b 2] [-L 1024] [-s 4 16] [--dtype
    fp32 bf16] [--json] [--csv FILE]

error: relative error of the gradient against fp64, ids Zipf-distributed (a frequent token is hit
thousands of times).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

from measure import append_rows, has_gpu, peak_bytes, seconds, where

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("--help", action="help")
    parser.add_argument("-V", "--vocab-size", type=int, default=32000)
    parser.add_argument("-H", "--hidden-size", type=int, default=1024)
    parser.add_argument("-b", "--micro-batch-size", type=int, default=2)
    parser.add_argument("-L", "--seq-length", type=int, default=1024)
    parser.add_argument("-s", "--bag-size", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    out, _ = os.fdopen(os.dup(1), "w"), os.dup2(2, 1)
    rows = [
        row
        for dtype in options.dtype
        for s in options.bag_size
        for row in measure(options, dtype, s)
    ]
    if options.csv:
        append_rows(options.csv, rows)
    keys = ("variant", "V", "H", "b", "L", "s", "dtype", "ms", "extra_mb", "error")
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows]
    print(json.dumps(rows) if options.json else "\n".join(lines), file=out, flush=True)
    return 0


def measure(options, short, bag_size) -> list[dict]:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(options.threads)
    device = "cuda" if has_gpu() else "cpu"
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    v, h, shape = (
        options.vocab_size,
        options.hidden_size,
        (options.micro_batch_size, options.seq_length, bag_size),
    )
    ids = (
        torch.multinomial(
            1 / torch.arange(1, v + 1).double(), shape[0] * shape[1] * bag_size, replacement=True
        )
        .view(shape)
        .to(device)
    )
    table = torch.randn(v, h, device=device).to(getattr(torch, DTYPES[short])).requires_grad_()
    upstream = (0.1 + torch.randn(*shape[:2], h, device=device)).to(table.dtype)
    exact = torch.zeros(v, h, dtype=torch.float64, device=device)
    for place in range(bag_size):
        exact.index_add_(0, ids[..., place].reshape(-1), upstream.double().view(-1, h) / bag_size)

    def forward_backward(embed):
        (grad,) = torch.autograd.grad(embed(table, ids), table, upstream)
        if not hasattr(table, "main_grad"):
            return grad
        if not table.grad_added_to_main_grad:  # as DistributedDataParallel's hook does
            table.main_grad.add_(grad)
        return table.main_grad

    calls = {
        name: functools.partial(forward_backward, embed)
        for name, embed in variants(dist.group.WORLD).items()
    }
    error = {}
    for name, call in calls.items():
        error[name] = ((call().double() - exact).norm() / exact.norm()).item()
        vars(table).pop("main_grad", None)
    extra = {}
    for name, call in calls.items():
        call()
        extra[name] = peak_bytes(call)
        vars(table).pop("main_grad", None)
    times = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            call()  # the allocator's state is then the variant's own
            times[name].append(seconds(call))
            vars(table).pop("main_grad", None)
    return [
        {
            "variant": name,
            "V": v,
            "H": h,
            "b": shape[0],
            "L": shape[1],
            "s": bag_size,
            "dtype": short,
            "threads": options.threads,
            "ms": round(1e3 * statistics.median(times[name]), 2),
            "extra_mb": round(extra[name] / 1e6, 1),
            "error": f"{error[name]:.1e}",
            **where(),
        }
        for name in calls
    ]


def variants(group) -> dict:
    """name -> embed(table [V, H], ids [b, L, S]) -> [b, L, H]."""
    import torch
    import torch.nn.functional as F

    from megatron_tst.ops import embedding

    def into_main_grad(embed):
        def with_buffer(table, ids):
            if not hasattr(table, "main_grad"):
                table.main_grad = torch.zeros(table.shape, device=table.device)
            table.grad_added_to_main_grad = False
            return embed(table, ids)

        return with_buffer

    def ours(kernel):
        def embed(table, ids):
            module = SimpleNamespace(
                weight=table,
                vocab_start_index=0,
                num_embeddings=len(table),
                tp_group=group,
                reduce_scatter_embeddings=False,
            )
            return embedding.superposed_embedding(module, ids, kernel)

        return embed

    def embedding_bag(table, ids):
        return F.embedding_bag(ids.flatten(0, 1), table, mode="mean").view(*ids.shape[:2], -1)

    def listing_2(table, ids):
        return (
            sum(F.embedding(ids[..., place], table) for place in range(ids.shape[-1]))
            / ids.shape[-1]
        )

    return {
        "ours": ours("extension"),
        "ours, main_grad": into_main_grad(ours("extension")),
        "ours, torch": ours("torch"),
        "ours, torch, main_grad": into_main_grad(ours("torch")),
        "gather + mean": lambda table, ids: F.embedding(ids, table).mean(2),
        "embedding_bag": embedding_bag,
        "embedding_bag, main_grad": into_main_grad(embedding_bag),
        "paper's loop": listing_2,
    }


if __name__ == "__main__":
    sys.exit(main())
