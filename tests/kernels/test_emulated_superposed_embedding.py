"""csrc/superposed_embedding.cu on the CPU (tests/support/cuda_on_cpu): against the fp64 reference,
and bit for bit against the C++ kernel, whose order of additions it shares. Every access is checked
on the way.
"""

import ctypes
from dataclasses import dataclass

import pytest
import torch
from support import cuda_on_cpu
from support.close import close
from support.cuda_on_cpu import Fault, Gpu

from megatron_tst import extension
from megatron_tst.ops import embedding

pytestmark = pytest.mark.skipif(
    cuda_on_cpu.NOT_RUN is not None, reason=f"{cuda_on_cpu.NOT_RUN}: the emulated CUDA kernels"
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, FP32)]  # from, to
# Constants of the file: as they are; blocks of a warp, so that small rows have several; columns in
# slices, and few partial sums at once.
AS_IT_IS = ()
SMALL = (("kPoolThreads", 32), ("kAddThreads", 32))
SLICES = (("kAddThreads", 32), ("kScratch", 64), ("kPartialsAtOnce", 2))


@dataclass(frozen=True)
class Case:
    """A call of each kernel, on the rank that holds rows start to start + rows of `vocab`."""

    positions: int = 9
    bag_size: int = 5
    columns: int = 40
    vocab: int = 30
    start: int = 0
    rows: int | None = None  # None: all
    dtype: torch.dtype = BF16
    out: torch.dtype = FP32
    few: int | None = None  # distinct tokens
    ahead: int = 0  # elements before a matrix, behind a multiple of 128 bytes
    constants: tuple[tuple[str, int], ...] = SMALL
    seed: int = 1  # of numbers and threads

    def draw(self):
        """-> table, tokens, upstream, gradient"""
        torch.manual_seed(self.seed)
        rows = self.vocab if self.rows is None else self.rows
        tokens = torch.randint(0, self.few or self.vocab, (self.positions, self.bag_size))
        return (
            torch.randn(rows, self.columns).to(self.dtype),
            tokens,
            torch.randn(self.positions, self.columns).to(self.dtype),
            torch.randn(rows, self.columns).to(self.out),
        )

    def gpu(self, seed):
        return Gpu(cuda_on_cpu.build("superposed_embedding", self.constants), seed or self.seed)

    def name(self):
        return "_".join(str(t).removeprefix("torch.") for t in (self.dtype, self.out))

    def pool(self, table, tokens, seed=None):
        """-> the bags' means"""
        gpu = self.gpu(seed)
        out = gpu.output((len(tokens), self.columns), self.out, self.ahead, self.columns)
        gpu.call(
            f"pool_{self.name()}",
            gpu.input(tokens, name="tokens"),
            *(*tokens.shape, self.start, *table.shape, self.vocab),
            gpu.input(table, self.ahead, self.columns, name="table"),
            out,
        )
        return gpu.result(out)

    def add_gradient(self, tokens, upstream, gradient, seed=None):
        """-> the gradient, added to"""
        gpu = self.gpu(seed)
        ids = gpu.input(tokens, name="tokens")
        keys = gpu.output((tokens.numel(),), torch.int32, name="keys")
        sizes = *tokens.shape, self.start, len(gradient)
        gpu.call("rows_of_places", ids, *sizes, keys)
        order = gpu.result(keys).sort(stable=True)
        added = gpu.update(gradient, self.ahead, self.columns, name="gradient")
        given = ids, *tokens.shape, *gradient.shape
        floats = gpu.call("scratch_size", *given, returns=ctypes.c_int64)
        gpu.call(
            f"add_gradient_{self.name()}",
            *(ids, *sizes, self.columns),
            gpu.input(order.values, name="sorted"),
            gpu.input(order.indices, name="order"),
            gpu.input(upstream, self.ahead, self.columns, name="upstream"),
            gpu.output((floats,), FP32, name="scratch"),
            added,
        )
        return gpu.result(added)

    def check(self, given=None):
        table, tokens, upstream, gradient = given or self.draw()
        mean = self.pool(table, tokens)
        added = self.add_gradient(tokens, upstream, gradient)
        exact, share = gradient.double(), upstream.double() / self.bag_size
        want = torch.zeros(len(tokens), self.columns, dtype=torch.float64)
        for place in range(self.bag_size):
            row = tokens[:, place] - self.start
            held = ((row >= 0) & (row < len(table))).nonzero()[:, 0]
            want[held] += table.double()[row[held]] / self.bag_size
            exact.index_add_(0, row[held], share[held])
        close(mean, want, 1e-6, terms=table.double().abs().max(), rounded=self.out)
        terms = 1 + gradient.double().abs().max()
        close(added, exact, 1e-6, terms=terms, rounded=self.out)
        if extension.load().loaded:
            pool, add_gradient_ = embedding.KERNELS["extension"]()
            assert torch.equal(mean, pool(table, tokens, self.start, self.vocab, self.out))
            add_gradient_(gradient := gradient.clone(), upstream, tokens, self.start, self.vocab)
            assert torch.equal(added, gradient)


def check(*cases):
    for case in cases:
        try:
            case.check()
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize("dtype, out", PAIRS)
def test_shapes(dtype, out):
    """Widths below, at and above a thread's, a warp's and a block's columns."""
    check(
        *(
            Case(positions, bag_size, columns, dtype=dtype, out=out, constants=constants)
            for positions, bag_size, columns, constants in (
                (1, 1, 1, SMALL),
                (1, 2, 4, AS_IT_IS),
                (5, 3, 7, SMALL),
                (9, 4, 128, SMALL),
                (7, 9, 132, SMALL),
                (3, 16, 260, SLICES),
                (20, 8, 33, SLICES),
                (4, 17, 520, AS_IT_IS),
                (2, 33, 1028, AS_IT_IS),
                (3, 64, 4, SMALL),
                (2, 131, 68, SMALL),
            )
        )
    )


@pytest.mark.parametrize("dtype, out", PAIRS)
def test_rows_that_are_not_aligned(dtype, out):
    """Four columns of a row are one access only where all rows allow it."""
    check(
        *(
            Case(columns=columns, ahead=ahead, dtype=dtype, out=out)
            for columns in (64, 66, 67)
            for ahead in (0, 1, 2, 4)
        )
    )


def test_ranks_that_hold_a_part():
    """Tokens before, in and behind the rank's rows; a rank that holds no token of any bag."""
    check(
        *(
            Case(positions=positions, bag_size=4, start=start, rows=rows, few=few)
            for positions in (3, 30)
            for start, rows in ((0, 10), (10, 10), (20, 10), (29, 1))
            for few in (30, 5)
        )
    )


@pytest.mark.parametrize("constants", [SMALL, SLICES])
@pytest.mark.parametrize("places", [31, 32, 33, 63, 64, 65, 96, 97, 300])
def test_tokens_in_several_windows(places, constants):
    """Occurrences that end before, at and behind the border of a window, of one, two and more."""
    check(Case(places, 1, 12, few=1, constants=constants))
    check(Case(places, 2, 12, few=2, constants=constants), Case(places, 3, 5, few=3))
    for first in (1, 30, 31, 32, 33, 40, 64):
        case = Case(places + first, 1, 132, vocab=3, constants=constants)
        tokens = torch.tensor([0] * first + [1] * places)[torch.randperm(first + places)]
        table, _, upstream, gradient = case.draw()
        case.check((table, tokens.unsqueeze(1), upstream, gradient))


def test_a_frequent_token_before_tokens_of_other_ranks():
    """The rank's last row goes on until the places that it does not own."""
    for owned in (32, 40, 64):
        case = Case(owned + 50, 1, 8, vocab=4, start=1, rows=1)
        tokens = torch.tensor([1] * owned + [2] * 50)[torch.randperm(owned + 50)]
        table, _, upstream, gradient = case.draw()
        case.check((table, tokens.unsqueeze(1), upstream, gradient))


def test_the_same_bits_whatever_the_order_of_threads():
    case = Case(60, 6, 136, few=4, constants=SLICES)
    table, tokens, upstream, gradient = case.draw()
    results = [
        (case.pool(table, tokens, seed), case.add_gradient(tokens, upstream, gradient, seed))
        for seed in range(2, 8)
    ]
    for mean, added in results[1:]:
        assert torch.equal(mean, results[0][0]) and torch.equal(added, results[0][1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_stays_with_its_bags(bad):
    case = Case(4, 2, 8, vocab=10, start=5, rows=5)
    table, _, upstream, gradient = case.draw()
    tokens = torch.tensor([[0, 7], [5, 7], [1, 2], [4, 9]])
    table[0] = bad
    mean = case.pool(table, tokens)
    assert mean.isfinite().all(1).tolist() == [True, False, True, True] and (mean[2] == 0).all()
    upstream[2] = bad  # its tokens are another rank's
    assert case.add_gradient(tokens, upstream, gradient).isfinite().all()


@pytest.mark.parametrize("wrong", [30, -1, 2**62])
def test_tokens_outside_the_vocabulary_are_asserted(wrong):
    case = Case(rows=10)
    table, tokens, _, _ = case.draw()
    tokens[-1, -1] = wrong
    with pytest.raises(Fault, match="device-side assert: token >= 0"):
        case.pool(table, tokens)


@pytest.mark.parametrize(
    "positions, bag_size, columns, floats",
    [
        (8192, 16, 4096, 2 * 4096 * 2048),  # 64 MiB: half the columns
        (8192, 16, 512, 2 * 4096 * 512),
        (8192, 1, 100, 2 * 256 * 100),
        (2**20, 16, 8192, 2 * 2**19 * 512),  # at least a block's columns
        (2**27, 16, 8192, 2 * 2**26 * 512),  # 64 bits
    ],
)
def test_scratch(positions, bag_size, columns, floats):
    kernels = cuda_on_cpu.build("superposed_embedding")
    gpu = Gpu(kernels)
    tokens = gpu.input(torch.zeros(1, dtype=torch.int64))
    sizes = positions, bag_size, 1000, columns
    assert gpu.call("scratch_size", tokens, *sizes, returns=ctypes.c_int64) == floats
