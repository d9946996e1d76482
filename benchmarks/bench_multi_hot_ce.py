"""Multi-hot cross entropy, forward and backward to the logits' gradient: ours against its peers, in
one process, interleaved.

    python benchmarks/bench_multi_hot_ce.py [-N 64] [-V 128256] [-s 1 4 16] [--dtype bf16] [--tp 1]
    [--threads 1 2]
                                            [--json] [--csv FILE] [--plot FILE]

Time: medians over rounds in which every variant runs once, or with --apart (always on a GPU) each
variant and a copy of the logits, one variant after the other. Rows are written to the CSV as soon
as they are there. share_of_copy: bandwidth over the three passes that are needed (read, read,
write), as a share of what a copy (read, write) reaches in the same rounds. extra_mb: peak memory
beyond the logits, the gradient included. With --tp N, N processes hold V / N columns each (gloo on
CPU); the figures are rank 0's.

On a GPU times are those of CUDA events, without the launches of Python and with a cold L2 cache
(measure.py). What restores logits that a variant writes over is not timed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import statistics
import sys
from pathlib import Path

from measure import append_rows, has_gpu, peak_bytes, seconds, where

from megatron_tst.model_size import LLAMA_3_VOCABULARY

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-N", "--rows", type=int, default=64, help="positions")
    parser.add_argument(
        "-V",
        "--vocab-size",
        type=int,
        nargs="+",
        default=[LLAMA_3_VOCABULARY],
        help="the whole vocabulary, one or several",
    )
    parser.add_argument("-s", "--bag-size", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--tp", type=int, default=1, help="processes that share the vocabulary")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1], help="of each process, on CPU"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--variants", nargs="+", help="some of them alone, by name")
    parser.add_argument(
        "--apart", action="store_true", help="variant by variant, each beside the copy"
    )
    parser.add_argument(
        "--extension",
        metavar="NAME=FILE",
        help="ours is the extension in FILE, its rows are called 'ours (NAME)'",
    )
    parser.add_argument(
        "--json", action="store_true", help="print a list of rows and nothing else on stdout"
    )
    parser.add_argument("--csv", type=Path, help="append the rows")
    parser.add_argument("--plot", type=Path, help="draw time over bag size")
    options = parser.parse_args(argv)
    for size in options.vocab_size:
        if size % options.tp:
            parser.error(f"--vocab-size: expected multiples of --tp {options.tp}, got {size}.")
    if options.extension and not Path(options.extension.partition("=")[2]).is_file():
        parser.error(
            f"--extension: expected NAME=FILE of an extension, got {options.extension}. "
            "python setup.py build_ext --build-lib FOLDER builds one."
        )

    out, _ = os.fdopen(os.dup(1), "w"), os.dup2(2, 1)  # stdout is for the result alone
    rows = run_ranks(options)
    if options.plot:
        plot(rows, options.plot)
    print(json.dumps(rows) if options.json else table(rows), file=out, flush=True)
    return 0


def run_ranks(options) -> list[dict]:
    import torch.multiprocessing as mp

    if options.tp == 1:
        return measure(0, options)
    queue = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(_rank, (options, queue), nprocs=options.tp, join=False)
    rows = queue.get()
    while not context.join():
        pass
    return rows


def _rank(rank, options, queue):
    rows = measure(rank, options)
    if rank == 0:
        queue.put(rows)


def measure(rank: int, options) -> list[dict]:
    """One rank's part: every variant, vocabulary, bag size and dtype. Rank 0 writes the CSV."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if has_gpu() else torch.device("cpu")
    from megatron_tst import compat

    compat.hide_broken_transformer_engine()
    if options.extension:
        take_extension(options.extension.partition("=")[2])
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29671")
    dist.init_process_group("nccl" if has_gpu() else "gloo", rank=rank, world_size=options.tp)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=options.tp)
    rows = []
    group = parallel_state.get_tensor_model_parallel_group()
    for dtype in options.dtype:
        for vocab_size in options.vocab_size:
            for some in measure_shape(options, dtype, vocab_size, device, group):
                if options.csv and rank == 0:
                    append_rows(options.csv, some)
                rows += some
    dist.destroy_process_group()
    return rows


def take_extension(file: str) -> None:
    """Load this file as megatron_tst._C, before anything loads the installed one."""
    spec = importlib.util.spec_from_file_location("megatron_tst._C", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["megatron_tst._C"] = module


def measure_shape(options, dtype, vocab_size, device, group):
    """Yields the rows of one block after the other: all bag sizes, numbers of threads and variants
    in the same rounds, so that a machine's slow minute meets them all; or with --apart and on a GPU
    one variant and its copies.
    """
    import torch
    import torch.distributed as dist

    torch.manual_seed(0)
    source = 3 * torch.randn(options.rows, vocab_size // options.tp, device=device)
    source = source.to(getattr(torch, DTYPES[dtype]))
    leaf = source.clone().requires_grad_()
    calls = {}
    for s in options.bag_size:
        labels = torch.randint(0, vocab_size, (options.rows, s), device=device)
        found = variants(group, options.variants)
        for name in options.variants or found:  # in the order asked for
            if name in found:
                calls[name, s] = functools.partial(forward_backward, found[name], leaf, labels)
        calls["copy", s] = source.clone
    if options.apart or has_gpu():
        blocks = [[(name, s), ("copy", s)] for name, s in calls if name != "copy"]
        copies = [("copy", s) for s in options.bag_size]
        blocks = [copies, *blocks]
    else:
        blocks = [list(calls)]

    def fresh(threads):
        """In-place variants leave the gradient in the logits."""
        torch.set_num_threads(threads)
        with torch.no_grad():
            leaf.copy_(source)
        if options.tp > 1:
            dist.barrier(group)

    for block in blocks:
        times, extra = {}, {}
        for name, s in block:
            for threads in options.threads:
                key, call = (name, s, threads), calls[name, s]
                fresh(threads)
                try:
                    call()  # compiles
                    fresh(threads)
                    extra[key] = peak_bytes(call)
                    times[key] = []
                except Exception as error:  # a peer that does not run here is named, not hidden
                    what = str(error).splitlines() or [""]
                    print(
                        f"{key}: does not run here: {type(error).__name__}: {what[0]}",
                        file=sys.stderr,
                    )
                    torch.cuda.empty_cache()  # out of memory, most likely: s copies of the logits
        for _ in range(options.rounds):
            for name, s, threads in times:
                call, before = calls[name, s], functools.partial(fresh, threads)
                before()
                call()  # the allocator's state is then the variant's own, as it is in training
                times[name, s, threads].append(seconds(call, before))
        median = {key: statistics.median(found) for key, found in times.items()}
        rows = [
            {
                "variant": named(name, options.extension),
                "N": options.rows,
                "V": vocab_size,
                "s": s,
                "dtype": dtype,
                "tp": options.tp,
                "threads": threads,
                "ms": round(1e3 * median[name, s, threads], 3),
                "share_of_copy": round(
                    1.5 * median["copy", s, threads] / median[name, s, threads], 3
                ),
                "extra_mb": round(extra[name, s, threads] / 1e6, 1),
                "logits_mb": round(source.nbytes / 1e6, 1),
                **where(),
            }
            for name, s, threads in times
            if name != "copy" or block is blocks[0]  # its own row once
        ]
        if rows:
            yield rows


def named(variant: str, extension: str | None) -> str:
    """ "ours, in place" of --extension NAME=FILE is "ours (NAME), in place"."""
    if extension and variant.startswith("ours"):
        return f"ours ({extension.partition('=')[0]}){variant.removeprefix('ours')}"
    return variant


def forward_backward(loss, leaf, labels):
    import torch

    return torch.autograd.grad(loss(leaf, labels).mean(), leaf)


def variants(group, wanted: list[str] | None = None) -> dict:
    """name -> loss(logits [N, V/tp], labels [N, s]) -> [N]. "single" takes the first label alone,
    "x s" is called once a label. Packages that none of the wanted ones needs are not imported.
    """
    import torch
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_tst import extension
    from megatron_tst.ops.loss import multi_hot_cross_entropy

    def ours(**options):
        return lambda z, y: multi_hot_cross_entropy(z, y, tp_group=group, **options)

    def each_label(single):
        return lambda z, y: sum(single(z, y[:, k]) for k in range(y.shape[1])) / y.shape[1]

    def first_label(single):
        return lambda z, y: single(z, y[:, 0])

    def megatron(z, y):  # it writes over fp32 logits
        return vocab_parallel_cross_entropy(
            z.unsqueeze(0).clone() if z.dtype == torch.float32 else z.unsqueeze(0), y.unsqueeze(0)
        )[0]

    def megatron_fused(z, y):
        z = z.clone() if z.dtype == torch.float32 else z
        return fused_vocab_parallel_cross_entropy(z.unsqueeze(1), y.unsqueeze(1), group)[:, 0]

    found = {}
    if extension.load().loaded:
        found["ours"] = ours(kernel="extension")
        found["ours, in place"] = ours(kernel="extension", inplace_backward=True)
    found["ours, torch"] = ours(kernel="torch")
    found["megatron, single"] = first_label(megatron)
    found["megatron x s"] = each_label(megatron)
    found["megatron fused x s"] = each_label(megatron_fused)
    if group.size() == 1:
        found["paper's loop"] = each_label(paper_loss)
        found["paper's loop, compiled"] = compiled(each_label(paper_loss))
        found["lse + gather, compiled"] = compiled(lse_and_gather)
    if not wanted or any(name.startswith(("te", "liger")) for name in wanted):
        found.update(optional_peers(group, each_label, first_label))
    return found


def compiled(loss):
    """torch.compile at the first call, which is when its compiler is imported."""
    import torch

    whole = functools.cache(lambda: torch.compile(loss, dynamic=False))
    return lambda z, y: whole()(z, y)


def paper_loss(logits, labels):
    """Listing 3's inner step: cross entropy of one place in the bag, on fp32 logits."""
    import torch.nn.functional as F

    return F.cross_entropy(logits.float(), labels, reduction="none")


def lse_and_gather(logits, labels):
    logits = logits.float()
    return logits.logsumexp(-1) - logits.gather(-1, labels).mean(-1)


def optional_peers(group, each_label, first_label) -> dict:
    """Transformer Engine's and Liger's, where they are installed and a GPU is there."""
    found = {}
    if not has_gpu():
        return found
    try:
        from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

        def te(z, y):
            return parallel_cross_entropy(
                z.unsqueeze(0).clone(),
                y.unsqueeze(0),
                0.0,
                False,
                group if group.size() > 1 else None,
            )[0]

        found["te, single"], found["te x s"] = first_label(te), each_label(te)
    except Exception as error:
        print(f"Transformer Engine: left out: {error}", file=sys.stderr)
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy

        def liger(z, y):
            return liger_cross_entropy(z.clone(), y, reduction="none")

        found["liger, single"], found["liger x s"] = first_label(liger), each_label(liger)
    except Exception as error:
        print(f"Liger: left out: {error}", file=sys.stderr)
    return found


def table(rows: list[dict]) -> str:
    keys = ("variant", "N", "V", "s", "dtype", "tp", "threads", "ms", "share_of_copy", "extra_mb")
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows]
    first = rows[0]
    return "\n".join(
        [
            *lines,
            "",
            f"{first['device']}, torch {first['torch']}, megatron-core {first['megatron_core']}, "
            f"{first['commit']}",
        ]
    )


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    first = rows[0]
    rows = [row for row in rows if row["V"] == first["V"]]
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [
            row
            for row in rows
            if row["variant"] == name and all(row[k] == first[k] for k in ("dtype", "threads"))
        ]
        axes.plot(
            [row["s"] for row in mine],
            [row["ms"] for row in mine],
            marker="o",
            label=name,
            lw=2.5 if "ours" in name else 1,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="bag size s",
        ylabel="forward + backward, ms",
        title=f"N = {first['N']}, V = {first['V']}, {first['dtype']}, tp = "
        f"{first['tp']}\n{first['device']}",
    )
    axes.set_xticks(
        sorted({row["s"] for row in rows}), [str(s) for s in sorted({row["s"] for row in rows})]
    )
    axes.minorticks_off()
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
