"""Output layer and loss, forward and backward: separate against --tst-fused-linear-loss, time for
memory, in one process, interleaved.

python benchmarks/bench_linear_loss.py [-N 1024] [-V 32000] [-H 512] [-s 4] [--dtype fp32] [--json]
[--csv FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from measure import append_rows, has_gpu, peak_bytes, seconds, where

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("--help", action="help")
    parser.add_argument("-N", "--rows", type=int, default=8192 if has_gpu() else 1024)
    parser.add_argument("-V", "--vocab-size", type=int, default=151936 if has_gpu() else 32000)
    parser.add_argument("-H", "--hidden-size", type=int, default=4096 if has_gpu() else 512)
    parser.add_argument("-s", "--bag-size", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if has_gpu() else "fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    out, _ = os.fdopen(os.dup(1), "w"), os.dup2(2, 1)
    rows = measure(options)
    if options.csv:
        append_rows(options.csv, rows)
    keys = ("variant", "N", "V", "H", "s", "dtype", "ms", "extra_mb")
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows]
    print(json.dumps(rows) if options.json else "\n".join(lines), file=out, flush=True)
    return 0


def measure(options) -> list[dict]:
    import torch

    from megatron_tst import compat, extension

    compat.hide_broken_transformer_engine()
    from megatron_tst.ops.linear_loss import _LinearMultiHotCrossEntropy
    from megatron_tst.ops.loss import KERNELS, multi_hot_cross_entropy

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, dtype = "cuda" if has_gpu() else "cpu", getattr(torch, DTYPES[options.dtype])
    n, v, h, s = options.rows, options.vocab_size, options.hidden_size, options.bag_size
    hidden = torch.randn(n, h, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, device=device) / h**0.5).to(dtype).requires_grad_()
    weight.main_grad = torch.zeros(v, h, device=device)  # as DistributedDataParallel gives it
    weight.grad_added_to_main_grad = False
    labels, weights = torch.randint(0, v, (n, s), device=device), torch.ones(s, device=device)
    run = KERNELS[extension.choose("auto", device)]

    def separate():
        loss = multi_hot_cross_entropy(hidden @ weight.t(), labels, weights, inplace_backward=True)
        grads = torch.autograd.grad(loss.mean(), (hidden, weight))
        weight.main_grad += grads[1]

    def fused():
        loss = _LinearMultiHotCrossEntropy.apply(
            hidden, weight, labels, weights, None, 0, v, False, run, False
        )
        torch.autograd.grad(loss.mean(), (hidden, weight))

    calls = {"separate": separate, "fused": fused}
    extra, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        call()
        extra[name] = peak_bytes(call)
    for _ in range(options.rounds):
        for name, call in calls.items():
            call()
            times[name].append(seconds(call))
    return [
        {
            "variant": name,
            "N": n,
            "V": v,
            "H": h,
            "s": s,
            "dtype": options.dtype,
            "threads": options.threads,
            "ms": round(1e3 * statistics.median(times[name]), 2),
            "extra_mb": round(extra[name] / 1e6, 1),
            **where(),
        }
        for name in calls
    ]


if __name__ == "__main__":
    sys.exit(main())
