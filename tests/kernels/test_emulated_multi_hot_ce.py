"""csrc/multi_hot_ce.cu on the CPU (tests/support/cuda_on_cpu) against the fp64 reference: shapes,
alignments, special values, ranks, segments, schedules. Every access is checked on the way.
"""

import ctypes
import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from support import cuda_on_cpu
from support.close import close
from support.cuda_on_cpu import Gpu
from support.losses import IGNORE, grad_of
from support.losses import draw as draw_losses

from megatron_tst.ops import reference
from megatron_tst.ops.loss import target_weights
from megatron_tst.ops.names import LOSSES, TARGET_WEIGHTINGS

pytestmark = pytest.mark.skipif(
    cuda_on_cpu.NOT_RUN is not None, reason=f"{cuda_on_cpu.NOT_RUN}: the emulated CUDA kernels"
)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Constants of the file: as they are; blocks of two warps, so that small shapes have several
# batches, and short segments, so that a row has several blocks.
AS_IT_IS = ()
SMALL = (("kThreads", 64),)
SEGMENTS_OF_64 = (("kThreads", 64), ("kShortestSegment", 64))
SEGMENTS_OF_8 = (("kThreads", 32), ("kInFlight", 2), ("kShortestSegment", 8))


@dataclass(frozen=True)
class Case:
    """One call of the loss and its gradient, compared with the reference."""

    rows: int = 3
    columns: int = 40
    labels: int = 5
    dtype: torch.dtype = torch.bfloat16
    loss: str = "mce"
    weighting: str = "power-law"
    few: int | None = None  # distinct labels
    scale: float = 3.0  # of the logits
    shift: float = 0.0  # that is added to them
    # where rows lie: elements behind a multiple of 128 bytes, elements between rows
    start: int = 0
    gap: int = 0
    out_start: int | None = 0  # None: in place
    out_gap: int = 0
    ranks: int = 1  # that share the columns
    seed: int = 1  # of numbers, threads and the exponential's errors
    constants: tuple[tuple[str, int], ...] = SMALL
    defines: tuple[str, ...] = ()

    def draw(self):
        """-> logits, labels, gradient of the loss"""
        few = min(self.few or self.columns, self.columns)
        shape = (self.rows,)
        logits, labels = draw_losses(
            shape, self.columns, self.labels, seed=self.seed, few=few, scale=self.scale
        )
        return (logits + self.shift).to(self.dtype), labels, torch.randn(self.rows)

    def check(self) -> None:
        logits, labels, upstream = self.draw()
        got, grad = self.run(logits, labels, upstream, exp_seed=self.seed)
        self.compare(got, grad, logits, labels, upstream)

    def compare(self, got, grad, logits, labels, upstream) -> None:
        exact = reference.target_weights(self.weighting, self.labels)
        want, want_grad = grad_of(
            lambda z: reference.multi_hot_cross_entropy(z, labels, exact, self.loss),
            logits.double(),
            upstream,
        )
        largest = logits.double().nan_to_num(0, 0, 0).abs().amax(-1)
        close(got, want, 1e-5, terms=1 + largest)
        terms = upstream.abs().unsqueeze(-1).double()
        if self.loss == "mce-alt":  # a member's share is the exponential of a rounded distance
            terms = terms * (1 + 2**-24 / 4e-6 * largest.unsqueeze(-1))
        close(grad, want_grad.nan_to_num(), 4e-6, terms=terms, rounded=self.dtype)

    def run(self, logits, labels, upstream, seed=None, exp_seed=0):
        """-> the loss and its gradient, of emulated kernels"""
        kernels = cuda_on_cpu.build("multi_hot_ce", self.constants, self.defines)
        weights = target_weights(self.weighting, self.labels)
        seed, alt = seed or self.seed, self.loss == "mce-alt"
        name = str(self.dtype).removeprefix("torch.")
        shards = list(logits.tensor_split(self.ranks, dim=1))
        starts = [0, *itertools.accumulate(shard.shape[1] for shard in shards)]

        def arguments(gpu, shard, start):
            stride = shard.shape[1] + self.gap
            z = gpu.input(shard, self.start, stride, name="logits")
            y, w = gpu.input(labels, name="labels"), gpu.input(weights, name="weights")
            sizes = self.rows, shard.shape[1], self.labels, start, alt
            return z, (z, stride, y, w, *sizes)

        local = []
        for shard, start in zip(shards, starts):
            gpu = Gpu(kernels, seed, exp_seed)
            _, problem = arguments(gpu, shard, start)
            scratch = scratch_memory(gpu, "statistics_scratch", self.rows, shard.shape[1])
            out = gpu.output((4, self.rows), torch.float32, name="statistics")
            gpu.call(f"statistics_{name}", *problem, self.columns, scratch, out)
            gpu.result(scratch)
            local.append(gpu.result(out))

        gpu = Gpu(kernels, seed, exp_seed)
        y, w = gpu.input(labels, name="labels"), gpu.input(weights, name="weights")
        gathered = gpu.input(torch.stack(local), name="statistics")
        loss_N = gpu.output((self.rows,), torch.float32, name="loss")
        saved = gpu.output((3, self.rows), torch.float32, name="saved")
        gpu.call("loss", y, w, self.rows, self.labels, alt, self.ranks, gathered, loss_N, saved)
        loss_N, saved = gpu.result(loss_N), gpu.result(saved)

        gradients = []
        for shard, start in zip(shards, starts):
            gpu = Gpu(kernels, seed, exp_seed)
            z, problem = arguments(gpu, shard, start)
            kept = gpu.input(saved, name="saved"), gpu.input(upstream, name="upstream")
            if self.out_start is None:
                out = z
                gpu.allow_writing(z)
            else:
                stride = shard.shape[1] + self.out_gap
                out = gpu.output(shard.shape, self.dtype, self.out_start, stride, name="out")
            scratch = scratch_memory(gpu, "gradient_scratch", self.rows, self.labels)
            gpu.call(f"gradient_{name}", *problem, *kept, scratch, out, out.stride(0))
            gpu.result(scratch)
            gradients.append(gpu.result(out))
        return loss_N, torch.cat(gradients, dim=1)


def scratch_memory(gpu, function, *sizes):
    floats = gpu.call(function, *sizes, returns=ctypes.c_int64)
    return gpu.output((floats,), torch.float32, name="scratch memory")


def check(cases) -> None:
    for case in cases:
        try:
            case.check()
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def borders(dtype, constants):
    """Numbers of columns around those where a loop begins or ends."""
    file = {"kThreads": 256, "kInFlight": 4} | dict(constants)
    lanes = 16 // dtype.itemsize
    batch = file["kThreads"] * file["kInFlight"] * lanes
    round_, half = file["kThreads"] * lanes, batch // 2
    for middle in (0, lanes, 32 * lanes, round_, half, batch, batch + round_, 2 * batch, 3 * batch):
        yield from (middle + d for d in (-lanes - 1, -1, 0, 1, lanes + 1) if middle + d > 0)


# ---- in `make test`


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_borders(dtype, loss):
    check(Case(2, v, 3, dtype, loss, seed=v) for v in borders(dtype, SMALL))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_it_is(dtype, loss):
    """The file's own constants."""
    lanes = 16 // dtype.itemsize
    for v in (1, 1000, 256 * lanes + 3, 1024 * lanes - 1, 1024 * lanes, 2100 * lanes + 5):
        check([Case(2, v, 16, dtype, loss, start=1, gap=1, constants=AS_IT_IS)])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned(dtype, loss):
    """Each alignment of the logits, with the gradient as much, otherwise and in place."""
    lanes = 16 // dtype.itemsize
    for start, gap in itertools.product(range(lanes), (0, 1, lanes - 1)):
        for out in (start, start + 1, None):
            v = 37 + 8 * start + gap
            same = dict(dtype=dtype, loss=loss, start=start, gap=gap, seed=v)
            check([Case(2, v, 3, out_start=out, out_gap=gap, **same)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_hints(dtype):
    """What the file offers for measurements."""
    defines = ("MHCE_PLAIN_FORWARD", "MHCE_PLAIN_STORE")
    check(Case(5, v, 6, dtype, start=1, defines=defines) for v in (40, 2300))


@pytest.mark.parametrize("weighting", TARGET_WEIGHTINGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_labels(loss, weighting):
    """Bags of one, repeated tokens, more labels than lanes of a warp or threads of a block."""
    for labels, few, rows in ((1, None, 5), (2, 2, 9), (16, 3, 6), (33, 20, 3), (70, None, 2)):
        check([Case(rows, 50, labels, torch.float32, loss, weighting, few=few)])


@pytest.mark.parametrize("constants", [SEGMENTS_OF_64, SEGMENTS_OF_8], ids=["64", "8"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments(dtype, loss, constants):
    """Many blocks a row."""
    for v, start in ((63, 0), (128, 1), (130, 3), (700, 0), (1031, 1)):
        same = dict(dtype=dtype, loss=loss, start=start, gap=1, constants=constants, seed=v)
        check(Case(2, v, 6, out_start=out, few=9, **same) for out in (start, 2, None))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks(dtype, loss, ranks):
    for v, few in ((7, None), (64, 5), (1001, 1), (2300, 20)):
        check([Case(4, v, 6, dtype, loss, few=few, ranks=ranks, seed=v)])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits(dtype, loss):
    """Beyond about 2e9 the rounding of a row's reference would overflow the exponential."""
    scale = 1e4 if loss == "mce-alt" or dtype == torch.float16 else 1e8
    check(Case(4, v, 6, dtype, loss, scale=scale, few=9) for v in (5, 300, 2300))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_far_from_zero(dtype, loss):
    """What fills up a batch or a segment must not be larger than the logits."""
    for shift, constants in itertools.product((-300.0, 300.0), (SMALL, SEGMENTS_OF_64)):
        check([Case(2, 300, 4, dtype, loss, shift=shift, ranks=2, constants=constants)])


@pytest.mark.parametrize("filler", [-6e4, -1e10, -1e20, -2.3e38, -3.3e38])
@pytest.mark.parametrize("loss", LOSSES)
def test_padding_far_below(loss, filler):
    """Threads, segments and a rank that see nothing else: as -inf would be."""
    for ranks, constants in itertools.product((1, 2), (SMALL, SEGMENTS_OF_64)):
        case = Case(3, 600, 4, torch.bfloat16, loss, few=40, ranks=ranks, constants=constants)
        logits, labels, upstream = case.draw()
        logits[:, 100:] = filler
        got, grad = case.run(logits, labels, upstream)
        logits[:, 100:] = -torch.inf
        case.compare(got, grad, logits, labels, upstream)


@pytest.mark.parametrize("constants", [SMALL, SEGMENTS_OF_64], ids=["", "segments"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype, loss, ranks, constants):
    """Each row something else. Rows do not touch each other."""
    for v, in_place in ((40, False), (700, True)):
        out = None if in_place else 1
        case = Case(9, v, 5, dtype, loss, few=8, ranks=ranks, out_start=out, constants=constants)
        logits, labels, upstream = case.draw()
        labels[:, 0] = 3
        logits[0, 10:] = -torch.inf  # the last rank holds none of it
        logits[1, 8::2] = -torch.inf
        logits[2, v - 1] = torch.nan
        logits[3, 9] = torch.inf
        logits[4] = -torch.inf
        logits[5, 3], upstream[5] = torch.nan, 0.0
        labels[6], logits[6, 20] = IGNORE, torch.nan
        upstream[7] = torch.inf
        got, grad = case.run(logits, labels, upstream)
        assert got.isfinite().tolist() == [True, True, False, False, False, False, *[True] * 3]
        assert (got[6] == 0) and (grad[5:7] == 0).all()
        assert (grad[0, 10:] == 0).all() and (grad[1, 8::2] == 0).all()
        assert not grad[[2, 3, 4, 7]].isfinite().all(-1).any()
        for row in (0, 1, 8):
            one = Case(1, v, 5, dtype, loss)
            one.compare(*(x[[row]] for x in (got, grad, logits, labels, upstream)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_label_of_probability_0(ranks):
    """An infinite loss, unless the label's weight is 0."""
    case = Case(2, 40, 2, torch.float32, weighting="first-token", ranks=ranks)
    logits, _, upstream = case.draw()
    logits[:, 5] = -torch.inf
    labels = torch.tensor([[5, 7], [7, 5]])
    got, grad = case.run(logits, labels, upstream)
    assert got[0] == torch.inf
    labels[1, 1] = IGNORE
    one = Case(1, 40, 2, torch.float32, weighting="first-token")
    one.compare(*(x[[1]] for x in (got, grad, logits, labels, upstream)))


@pytest.mark.parametrize("constants", [SMALL, SEGMENTS_OF_8], ids=["", "segments"])
@pytest.mark.parametrize("loss", LOSSES)
def test_same_bits_in_every_order_of_threads(loss, constants):
    case = Case(3, 600, 16, torch.bfloat16, loss, few=5, ranks=2, out_start=1, constants=constants)
    drawn = case.draw()
    first = case.run(*drawn, seed=1)
    for seed in range(2, 8):
        assert all(torch.equal(a, b) for a, b in zip(first, case.run(*drawn, seed=seed)))


def test_a_label_outside_the_vocabulary_stops_the_kernel():
    for label in (40, -1, -101):
        case = Case(2, 40, 3)
        logits, labels, upstream = case.draw()
        labels[1, 2] = label
        with pytest.raises(cuda_on_cpu.Fault, match="device-side assert"):
            case.run(logits, labels, upstream)


# ---- in `make test-slow`


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_small_width(dtype, loss):
    for constants in (SMALL, SEGMENTS_OF_64, SEGMENTS_OF_8):
        same = dict(dtype=dtype, loss=loss, few=4, constants=constants)
        check(Case(2, v, 3, start=v % 3, seed=v, **same) for v in range(1, 200))


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_borders_as_it_is(dtype, loss):
    for start, out in ((0, 0), (1, 1), (3, None), (2, 5)):
        same = dict(dtype=dtype, loss=loss, constants=AS_IT_IS)
        widths = borders(dtype, AS_IT_IS)
        check(Case(1, v, 3, start=start, out_start=out, seed=v, **same) for v in widths)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_alignments(dtype):
    lanes = 16 // dtype.itemsize
    for start, out, v in itertools.product(range(lanes), range(lanes), (1, 9, 64, 300)):
        check([Case(2, v, 2, dtype, start=start, gap=1, out_start=out, out_gap=3)])


@pytest.mark.slow
@pytest.mark.parametrize("block", range(12))
def test_anything(block):
    """100 random cases each."""
    chosen = random.Random(block)
    for _ in range(100):
        case = Case(
            rows=chosen.choice((1, 2, 3, 5, 9, 33)),
            columns=chosen.choice((chosen.randint(1, 70), chosen.randint(70, 1500))),
            labels=chosen.choice((1, 2, 3, 8, 16, 40)),
            dtype=chosen.choice(DTYPES),
            loss=chosen.choice(LOSSES),
            weighting=chosen.choice(TARGET_WEIGHTINGS),
            few=chosen.choice((None, 1, 3, 20)),
            start=chosen.randrange(9),
            gap=chosen.choice((0, chosen.randrange(9))),
            out_start=chosen.choice((None, chosen.randrange(9))),
            out_gap=chosen.randrange(9),
            ranks=chosen.choice((1, 1, 2, 3, 4)),
            seed=chosen.randint(1, 10**6),
            constants=chosen.choice((SMALL, SEGMENTS_OF_64, SEGMENTS_OF_8)),
        )
        check([case] if case.columns >= case.ranks else [])


@pytest.mark.slow
@pytest.mark.parametrize("constants", [AS_IT_IS, SMALL, SEGMENTS_OF_64, SEGMENTS_OF_8])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_many_orders_of_threads(dtype, loss, constants):
    case = Case(3, 1100, 16, dtype, loss, few=30, start=1, out_start=1, constants=constants)
    drawn = case.draw()
    first = case.run(*drawn, seed=1)
    for seed in range(2, 20):
        assert all(torch.equal(a, b) for a, b in zip(first, case.run(*drawn, seed=seed)))
