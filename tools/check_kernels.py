"""Do the extension's kernels give what the fp64 reference gives? Some fifty cases in one process,
in seconds: on the GPU where there is one, else on CPU.

    python tools/check_kernels.py [--csv FILE] [--small]

The loss against ops/reference.py in every dtype, in place, as two tensor-parallel shards whose
statistics are put together by hand, on special values, from run to run, in a CUDA graph; then the
embedding in the same way. Each case is written to the CSV as soon as it is known: the largest
difference as a multiple of what rounding may make, and at most 1 is allowed; or how many bits or
values are wrong, and 0 is allowed. Exit code 1: a case is wrong. --small is for a try on CPU.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_tst import extension
from megatron_tst.ops import reference
from megatron_tst.ops.embedding import superposed_embedding
from megatron_tst.ops.loss import KERNELS, multi_hot_cross_entropy, target_weights
from megatron_tst.ops.names import IGNORE, LOSSES

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# of fp32 sums and exponentials, as fractions of a row's largest term: tests/gpu has the same
LOSS, GRADIENT = 1e-5, 4e-6
Found = tuple[float, float]  # the largest difference, and what is allowed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, help="is replaced")
    parser.add_argument("--small", action="store_true", help="rows and columns as CPUs like them")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = extension.load()
    if not found.loaded or (device == "cuda" and not found.cuda):
        print(
            f"check_kernels: error: expected an extension with {device} kernels, got one that is "
            f"{found.description}. python setup.py build_ext --inplace builds it.",
            file=sys.stderr,
        )
        return 2
    a_group_of_one()
    columns = ("kernel", "case", "difference", "allowed", "ok")
    table = [options.csv.open("w", newline="")] if options.csv else []
    writers = [csv.writer(file) for file in table]
    for writer in writers:
        writer.writerow(columns)
    wrong = done = 0
    for kernel, case, call in cases(Draw(device, options.small)):
        try:
            difference, allowed = call()
            ok = difference <= allowed  # not so if it is nan
        except Exception as error:  # the next cases may still say something
            difference, allowed, ok = str(error).splitlines()[0], "", False
        shown = f"{difference:.2e}" if isinstance(difference, float) else difference
        row = (kernel, case, shown, f"{allowed:g}" if allowed != "" else "", "yes" if ok else "NO")
        print(*row, flush=True)
        for writer, file in zip(writers, table):
            writer.writerow(row)
            file.flush()
        wrong, done = wrong + (not ok), done + 1
    print(f"{done - wrong} of {done} cases right on {device}; extension: {found.description}")
    return 1 if wrong else 0


class Draw:
    """Inputs of a shape, on a device, cut to what a CPU does in milliseconds if small."""

    def __init__(self, device: str, small: bool):
        self.device, self.most = device, (20, 600) if small else (1 << 30, 1 << 30)

    def __call__(self, n, v, s, dtype, margin=0, few=None):
        """-> logits [n, v] that begin `margin` elements into a row of memory, labels [n, s],
        upstream [n].
        """
        n, v = min(n, self.most[0]), min(v, self.most[1])
        make = torch.Generator(self.device).manual_seed(n + v + s)
        labels = torch.randint(0, min(few or v, v), (n, s), device=self.device, generator=make)
        labels[torch.rand(labels.shape, device=self.device, generator=make) < 0.2] = IGNORE
        wide = 3 * torch.randn(n, v + margin, device=self.device, generator=make)
        upstream = torch.randn(n, device=self.device, generator=make)
        return wide.to(dtype)[:, margin:], labels, upstream


def cases(draw: Draw) -> Iterator[tuple[str, str, Callable[[], Found]]]:
    """(kernel, case, what checks it)."""
    shapes = [(1, 1, 1), (33, 7, 5), (33, 1000, 16), (300, 4099, 4), (33, 50257, 16)]
    for (n, v, s), dtype, loss in (
        (shape, dtype, loss) for shape in shapes for dtype in DTYPES for loss in LOSSES
    ):
        inputs = functools.partial(draw, n, v, s, dtype, margin=s % 3, few=4 * s)
        yield (
            "loss",
            f"{loss} {name(dtype)} N={n} V={v} s={s}",
            lambda i=inputs, loss=loss: against_reference(*i(), loss),
        )
    for n, v in ((1, 151936), (2000, 32001)):
        yield (
            "loss",
            f"mce bfloat16 N={n} V={v} s=16, one or several blocks a row",
            lambda n=n, v=v: against_reference(*draw(n, v, 16, torch.bfloat16, margin=1), "mce"),
        )
    for dtype in DTYPES:
        yield (
            "loss",
            f"in place {name(dtype)}: the same bits",
            lambda dtype=dtype: in_place(*draw(50, 4096, 6, dtype)),
        )
    for dtype, loss in ((dtype, loss) for dtype in DTYPES for loss in LOSSES):
        yield (
            "loss",
            f"tensor parallel 2, {loss} {name(dtype)}",
            lambda dtype=dtype, loss=loss: two_shards(*draw(40, 50258, 16, dtype), loss),
        )
    for loss in LOSSES:
        yield (
            "loss",
            f"special values, {loss}",
            lambda loss=loss: special(*draw(6, 40, 3, torch.float32, few=30), loss),
        )
    for dtype in DTYPES[:2]:
        yield (
            "loss",
            f"same bits in 20 runs, {name(dtype)}",
            lambda dtype=dtype: loss_bits(*draw(200, 32000, 16, dtype, few=20)),
        )
    yield (
        "loss",
        "no wait for the GPU, captured in a graph",
        lambda: captured(*draw(64, 32000, 4, torch.bfloat16)),
    )
    for dtype in DTYPES[:2]:
        # the last: two tokens, each thousands of times
        for b, length, s, v, h in (
            (2, 33, 3, 100, 40),
            (2, 256, 16, 5000, 1024),
            (2, 700, 8, 2, 9),
        ):
            yield (
                "embedding",
                f"{name(dtype)} {b} x {length}, s={s}, V={v}, H={h}",
                lambda dtype=dtype, shape=(b, length, s, v, h): pooled(draw, dtype, *shape),
            )
    yield (
        "embedding",
        "bfloat16, its gradient returned",
        lambda: pooled(draw, torch.bfloat16, 2, 33, 3, 100, 40, into=False),
    )
    yield "embedding", "rows of another rank, a NaN in row 0", lambda: other_ranks_rows(draw)
    yield "embedding", "same bits in 10 runs", lambda: embedding_bits(draw)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def worst(got, want, terms, dtype=torch.float64) -> float:
    """Largest difference as a fraction of `terms`, beside one rounding of `want` to `dtype`."""
    got, want = got.detach().double(), want.detach().double()
    about = torch.finfo(dtype)
    ulp = (want.abs() * about.eps).clamp_min(about.smallest_normal * about.eps)
    delta = ((got - want).abs() - ulp / 2).clamp_min(0)
    delta = torch.where(got.isnan() | want.isnan(), torch.nan, delta)
    return (delta / terms.double().expand_as(delta)).max().item()


def with_gradient(function, leaf, upstream):
    leaf = leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = function(leaf)
    (grad,) = torch.autograd.grad((out * upstream).sum(), leaf)
    return out.detach(), grad


def ours(logits, labels, upstream, loss="mce", **options):
    weights = target_weights("power-law", labels.shape[1])
    return with_gradient(
        lambda z: multi_hot_cross_entropy(
            z * 1 if "inplace_backward" in options else z,  # a leaf may not be written over
            labels,
            weights,
            loss=loss,
            kernel="extension",
            **options,
        ),
        logits,
        upstream,
    )


def exact(logits, labels, upstream, loss):
    weights = reference.target_weights("power-law", labels.shape[1])
    value, grad = with_gradient(
        lambda z: reference.multi_hot_cross_entropy(z, labels, weights, loss),
        logits.double(),
        upstream,
    )
    return value, grad.nan_to_num()


def both(got, want, logits, upstream) -> Found:
    """Of loss and gradient, each in units of what it is allowed."""
    peak = 1 + logits.float().abs().amax(-1)
    loss = worst(got[0], want[0], peak) / LOSS
    gradient = worst(got[1], want[1], upstream.abs()[:, None], logits.dtype) / GRADIENT
    return max(loss, gradient, key=lambda x: (x != x, x)), 1.0


def against_reference(logits, labels, upstream, loss) -> Found:
    got = ours(logits, labels, upstream, loss)
    return both(got, exact(logits, labels, upstream, loss), logits, upstream)


def same(*pairs) -> Found:
    """Bits: how many elements differ."""
    return float(sum((a != b).sum().item() for a, b in pairs)), 0.0


def in_place(*inputs) -> Found:
    return same(*zip(ours(*inputs), ours(*inputs, inplace_backward=True)))


def two_shards(logits, labels, upstream, loss) -> Found:
    """What two ranks would do, one after the other in this process."""
    run, alt, whole = KERNELS["extension"], loss == "mce-alt", logits.shape[1]
    weights = target_weights("power-law", labels.shape[1], logits.device)
    shards = [(k * (whole // 2), shard) for k, shard in enumerate(logits.chunk(2, -1))]
    statistics = torch.stack(
        [run("statistics")(z, labels, weights, start, whole, alt) for start, z in shards]
    )
    value, saved = run("loss")(statistics, labels, weights, alt)
    gradient = [
        run("gradient")(z, labels, weights, saved, upstream, start, alt) for start, z in shards
    ]
    want = exact(logits, labels, upstream, loss)
    return both((value, torch.cat(gradient, -1)), want, logits, upstream)


def special(logits, labels, upstream, loss) -> Found:
    """A NaN stays in its row; columns of -inf and rows without upstream get no gradient."""
    labels[:, 0] = 3
    logits[:, 35:] = -torch.inf
    logits[1, 0], logits[4, 2], upstream[4] = torch.nan, torch.inf, 0.0
    value, grad = ours(logits, labels, upstream, loss)
    good = [0, 2, 3, 5]
    faults = [
        ~value[good].isfinite(),
        ~value[1].isnan(),
        ~grad[good].isfinite(),
        grad[good, 35:] != 0,
        grad[4] != 0,
    ]
    return float(sum(fault.sum().item() for fault in faults)), 0.0


def loss_bits(*inputs) -> Found:
    first = ours(*inputs)
    return same(*(pair for _ in range(20) for pair in zip(first, ours(*inputs))))


def captured(logits, labels, upstream) -> Found:
    """On CPU the call alone."""
    leaf = logits.detach().requires_grad_()
    weights = target_weights("uniform", labels.shape[1], logits.device)

    def step():
        loss = multi_hot_cross_entropy(leaf, labels, weights, kernel="extension")
        return loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]

    want = step()
    if logits.is_cuda:
        return same(*zip(in_a_graph(step), want))
    return same(*zip(step(), want))


def in_a_graph(step: Callable[[], tuple]) -> tuple:
    """What a captured step gives when it is replayed. Raises if the step waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for tensor in out:
        tensor.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    return out


# --- the embedding


def a_group_of_one() -> None:
    """Megatron's embedding asks for a group, whatever its size."""
    if not torch.distributed.is_initialized():
        alone = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=alone, rank=0, world_size=1)


def table_of(draw, dtype, v, h):
    make = torch.Generator(draw.device).manual_seed(v + h)
    table = torch.randn(v, h, device=draw.device, generator=make).to(dtype)
    return table, make


def embed(table, ids, main_grad=None, start=0, ranks=1):
    """A rank's forward, whose backward adds to main_grad where there is one, as inside a model.

    With ranks = 2 the sum over ranks is left out, so that one process can be either of them.
    """
    weight = torch.nn.Parameter(table.clone())
    if main_grad is not None:
        weight.main_grad, weight.grad_added_to_main_grad = main_grad, False
    group = torch.distributed.group.WORLD
    if ranks > 1:
        group = types.SimpleNamespace(size=lambda: ranks, rank=lambda: 1)
    module = types.SimpleNamespace(
        weight=weight,
        vocab_start_index=start,
        num_embeddings=len(table) * ranks,
        tp_group=group,
        reduce_scatter_embeddings=False,
    )
    return superposed_embedding(module, ids, "extension"), weight


def pooled(draw, dtype, b, length, s, v, h, into=True) -> Found:
    """Mean and gradient against fp64, ids by Zipf's law. The gradient adds to what is there."""
    h = min(h, draw.most[1])
    table, make = table_of(draw, dtype, v, h)
    chance = 1 / torch.arange(1, v + 1, device=draw.device)
    ids = torch.multinomial(chance, b * length * s, replacement=True, generator=make)
    ids = ids.view(b, length, s)
    upstream = torch.randn(b, length, h, device=draw.device, generator=make).to(dtype)
    main_grad = torch.ones(v, h, device=draw.device) if into else None
    out, weight = embed(table, ids, main_grad)
    out.backward(upstream)
    want = reference.superposed_embedding(table, ids)
    part = upstream.double().view(-1, 1, h).expand(-1, s, -1).reshape(-1, h) / s
    want_grad = torch.zeros(v, h, dtype=torch.float64, device=draw.device)
    before = 1.0 if into else 0.0
    size = torch.zeros_like(want_grad).index_add_(0, ids.flatten(), part.abs()) + before + 1e-30
    want_grad = want_grad.index_add_(0, ids.flatten(), part) + before
    got_grad, rounded = (main_grad, torch.float64) if into else (weight.grad, dtype)
    terms = table.double().abs()[ids].mean(2)
    forward = worst(out, want, terms, dtype) / 1e-6
    backward = worst(got_grad, want_grad, size, rounded) / 1e-6
    return max(forward, backward, key=lambda x: (x != x, x)), 1.0


def other_ranks_rows(draw) -> Found:
    """The rank that holds the upper half: ids of the lower one add nothing, whatever its own row 0
    is, where nobody asks for that row.
    """
    table, make = table_of(draw, torch.bfloat16, 64, 32)
    ids = torch.randint(0, 128, (2, 40, 4), device=draw.device, generator=make)
    ids[ids == 64] = 65
    table[0] = torch.nan
    owned = ids >= 64
    rows = table.double()[(ids - 64).clamp_min(1)] * owned[..., None]
    with _alone():
        out, _ = embed(table, ids, torch.zeros(64, 32, device=draw.device), start=64, ranks=2)
    terms = rows.abs().mean(2) + 1e-30
    return worst(out, rows.mean(2), terms, torch.bfloat16) / 1e-6, 1.0


class _alone:
    """Until the block ends, the sum over tensor-parallel ranks is this rank's part."""

    def __enter__(self):
        from megatron.core.tensor_parallel import mappings

        self.mappings, self.stock = mappings, mappings.reduce_from_tensor_model_parallel_region
        mappings.reduce_from_tensor_model_parallel_region = lambda part, group=None: part

    def __exit__(self, *error):
        self.mappings.reduce_from_tensor_model_parallel_region = self.stock


def embedding_bits(draw) -> Found:
    table, make = table_of(draw, torch.bfloat16, 50, 256)
    ids = torch.randint(0, 50, (2, 200, 8), device=draw.device, generator=make)
    upstream = torch.randn(2, 200, 256, device=draw.device, generator=make).bfloat16()

    def run():
        main_grad = torch.zeros(50, 256, device=draw.device)
        out, _ = embed(table, ids, main_grad)
        out.backward(upstream)
        return out.detach(), main_grad

    first = run()
    return same(*(pair for _ in range(10) for pair in zip(first, run())))


if __name__ == "__main__":
    sys.exit(main())
