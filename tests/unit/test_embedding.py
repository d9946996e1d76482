"""The superposed embedding against the fp64 reference and against Megatron's own, on one rank and
over gloo.
"""

from types import SimpleNamespace

import pytest
import torch
from support.close import close

from megatron_tst import extension
from megatron_tst.config import TSTConfig
from megatron_tst.ops import embedding, reference

pytestmark = pytest.mark.numeric

FOUND = extension.load()
needs_extension = pytest.mark.skipif(
    not FOUND.loaded, reason=f"the extension is {FOUND.description}"
)
KERNELS = [pytest.param("extension", marks=needs_extension), "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALONE = SimpleNamespace(size=lambda: 1)


def module_of(weight, start=0, vocab=None, group=ALONE, scatter=False):
    """What superposed_embedding wants of Megatron's embedding."""
    return SimpleNamespace(
        weight=weight,
        vocab_start_index=start,
        num_embeddings=vocab or len(weight),
        tp_group=group,
        reduce_scatter_embeddings=scatter,
    )


def zipf(vocab, *shape):
    probabilities = 1 / torch.arange(1, vocab + 1).double()
    count = torch.Size(shape).numel()
    draws = torch.multinomial(probabilities, max(count, 1), replacement=True)  # torch refuses 0
    return draws[:count].view(shape)


def ops_of(kernel):
    """-> pool, add_gradient_"""
    return embedding.KERNELS[kernel]()


def build(megatron, vocab=64, width=32, dtype=torch.float32, scatter=False, group=None):
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

    size = megatron.get_tensor_model_parallel_world_size()
    config = ModelParallelConfig(
        tensor_model_parallel_size=size,
        sequence_parallel=scatter,
        params_dtype=dtype,
        use_cpu_initialization=True,
    )
    return VocabParallelEmbedding(
        vocab,
        width,
        init_method=torch.nn.init.normal_,
        reduce_scatter_embeddings=scatter,
        config=config,
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("s", [2, 3, 7])
def test_equals_the_reference(megatron, monkeypatch, kernel, s):
    from megatron_tst.loop import patch

    # the setting reaches the op: the other kernel is not there
    monkeypatch.setattr(embedding, "KERNELS", {kernel: embedding.KERNELS[kernel]})
    torch.manual_seed(0)
    module = build(megatron)
    tokens = torch.randint(0, 64, (3, 5, s))
    upstream = torch.randn(3, 5, 32)
    patch.apply(TSTConfig(kernel=kernel))
    try:
        out = module(tokens)
        assert patch.status().superposed_embeddings == 1
    finally:
        patch.remove()
    (grad,) = torch.autograd.grad((out * upstream).sum(), module.weight)
    table = module.weight.detach().double().requires_grad_()
    want = reference.superposed_embedding(table, tokens)
    (want_grad,) = torch.autograd.grad((want * upstream).sum(), table)
    assert out.shape == (3, 5, 32)
    close(out, want, 1e-6)  # largest seen 6e-8
    close(grad, want_grad, 1e-6)  # largest seen 4e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bag_of_one_and_plain_ids_are_stock_bit_for_bit(megatron, dtype):
    from megatron_tst.loop import patch

    torch.manual_seed(0)
    module = build(megatron, dtype=dtype)
    ids = torch.randint(0, 64, (3, 5))
    stock = module(ids)
    patch.apply()
    try:
        assert torch.equal(module(ids), stock) and patch.status().superposed_embeddings == 0
        assert (
            torch.equal(module(ids.unsqueeze(-1)), stock)
            and patch.status().superposed_embeddings == 1
        )
    finally:
        patch.remove()


def test_order_in_a_bag_and_share_of_each_member(patched, megatron):
    torch.manual_seed(0)
    module = build(megatron)
    bag = torch.tensor([[[5, 9, 5, 2]]])
    close(module(bag), module(bag.flip(-1)), 1e-6)  # largest seen 6e-8
    (grad,) = torch.autograd.grad(module(bag).sum(), module.weight)
    assert (
        grad[5].tolist() == [0.5] * 32
        and grad[9].tolist() == grad[2].tolist() == [0.25] * 32
        and grad.sum() == 32
    )


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s", [1, 3, 16, 37])
@pytest.mark.parametrize("width", [1, 7, 64, 1500])
def test_the_mean_is_the_same_bits_with_either_kernel(dtype, s, width):
    torch.manual_seed(0)
    table, tokens = torch.randn(50, width).to(dtype), torch.randint(0, 50, (9, s))
    for rows, start in ((table, 0), (table[20:45], 20)):
        for out in {dtype, torch.float32}:
            got, want = (
                ops_of(kernel)[0](rows, tokens, start, 50, out) for kernel in ("extension", "torch")
            )
            assert got.dtype == out and torch.equal(got, want)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 1500])
def test_the_gradient_of_any_shape(kernel, dtype, width):
    """fp32 into a buffer that has values: tokens that are in one bag, in several windows of the
    kernel, in none, and on another rank.
    """
    torch.manual_seed(0)
    for positions, s, vocab in ((0, 3, 50), (1, 1, 50), (40, 5, 50), (300, 16, 50), (70, 3, 9000)):
        tokens, upstream = zipf(vocab, positions, s), torch.randn(positions, width).to(dtype)
        before = torch.randn(vocab, width)
        want = before.double()
        share = upstream.double() / s
        for place in range(s):
            want.index_add_(0, tokens[:, place], share)
        for first, last in ((0, vocab), (0, vocab // 3), (vocab // 3, vocab)):
            buffer = before[first:last].clone()
            ops_of(kernel)[1](buffer, upstream, tokens, first, vocab)
            added, exact = buffer - before[first:last], want[first:last] - before[first:last]
            # one after the other: the torch kernel's sum of a frequent token loses more
            allowed = 1e-6 if kernel == "extension" else 2e-5
            close(added, exact, allowed, terms=before.abs().max())


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_the_same_bits_in_every_run_and_with_any_number_of_threads(dtype):
    torch.manual_seed(0)
    tokens, upstream = zipf(700, 500, 16), torch.randn(500, 1100).to(dtype)
    # with 2 and 4 threads, one begins with the first place of a row
    even = torch.arange(8).repeat_interleave(1000).view(500, 16)
    table = torch.randn(700, 1100).to(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4, 3, 1):
            torch.set_num_threads(count)
            pool, add_gradient_ = ops_of("extension")
            buffer, rounded = torch.ones(600, 1100), torch.zeros(600, 1100, dtype=dtype)
            add_gradient_(buffer, upstream, tokens, 50, 700)
            add_gradient_(rounded, upstream, tokens, 50, 700)
            add_gradient_(at_borders := torch.ones(8, 1100), upstream, even, 0, 8)
            mean = pool(table, tokens, 0, 700, dtype)
            results.append((buffer, rounded, at_borders, mean))
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0]))


@needs_extension
def test_a_frequent_tokens_sum_is_made_of_windows():
    """The order of additions that csrc/superposed_embedding.h promises, which the CUDA kernel
    shares: 32 sorted places at a time, and then these sums.
    """
    torch.manual_seed(0)
    upstream = torch.randn(150, 3)
    tokens = torch.tensor([5] * 140 + [3] * 10).view(150, 1)  # sorted: 10 places of 3, 140 of 5
    buffer = torch.zeros(7, 3)
    ops_of("extension")[1](buffer, upstream, tokens, 0, 7)
    for token, windows in ((3, [upstream[140:]]), (5, upstream[:140].split([22, 32, 32, 32, 22]))):
        total = torch.zeros(3)
        for window in windows:
            of_window = torch.zeros(3)
            for row in window:
                of_window += row
            total += of_window
        assert torch.equal(buffer[token], total)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_stays_with_its_bags(kernel, bad):
    """Row 0 of a shard is not what other ranks' tokens meet, nor is a bad upstream gradient."""
    torch.manual_seed(0)
    pool, add_gradient_ = ops_of(kernel)
    table = torch.randn(10, 8)
    table[5] = bad  # the second rank's row 0
    tokens = torch.tensor([[0, 7], [5, 7], [1, 2], [4, 9]])
    out = pool(table[5:], tokens, 5, 10, torch.float32)
    assert out.isfinite().all(1).tolist() == [True, False, True, True] and (out[2] == 0).all()
    upstream = torch.randn(4, 8)
    upstream[2] = bad  # of tokens 1 and 2, the first rank's
    gradient = torch.zeros(5, 8)
    add_gradient_(gradient, upstream, tokens, 5, 10)
    assert gradient.isfinite().all()
    add_gradient_(first := torch.zeros(5, 8), upstream, tokens, 0, 10)
    assert first.isfinite().all(1).tolist() == [True, False, False, True, True]


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    """Schema (what is mutated), fake tensors, dynamic shapes, tracing."""
    torch.manual_seed(0)
    table, tokens = torch.randn(20, 8).to(dtype), torch.randint(0, 20, (6, 3))
    ops = torch.ops.megatron_tst
    for out in (dtype, torch.float32):
        args = (table, tokens, 0, 20, out)
        torch.library.opcheck(ops.superposed_embedding.default, args)
        args = (torch.zeros(20, 8, dtype=out), table[:6], tokens, 0, 20)
        torch.library.opcheck(ops.superposed_embedding_gradient_.default, args)


@needs_extension
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(table=torch.zeros(9, 4).double()), r"expected table \[V, H\] in fp32, .* got Double"),
        (dict(table=torch.zeros(4, 9).t()), r"table .* contiguous, got Float \[9, 4\], strides"),
        (dict(tokens=torch.zeros(6, 2).int()), r"expected tokens \[N, S >= 1\], int64 .* got Int"),
        (dict(tokens=torch.zeros(6, dtype=torch.int64)), r"tokens .* got Long \[6\]"),
        (dict(tokens=torch.zeros(2, 6, dtype=torch.int64).t()), r"tokens .* strides \[1, 6\]"),
        (dict(tokens=torch.zeros(6, 0, dtype=torch.int64)), r"S >= 1\].* got Long \[6, 0\]"),
        (dict(tokens=torch.full((6, 2), 12)), r"expected token ids in 0..11, got 12\. Check that"),
        (dict(tokens=torch.full((6, 2), -1)), "expected token ids in 0..11, got -1"),
        (dict(tokens=torch.full((6, 2), 2**62)), "got 4611686018427387904"),
        (dict(dtype=torch.bfloat16), "expected a result in fp32 or Float, got BFloat16"),
        (dict(start=4), r"expected the rank's rows within 0..11, got 9 from 4 on"),
        (dict(start=-1), "expected the rank's rows within 0..11, got 9 from -1 on"),
        (dict(upstream=torch.zeros(5, 4)), r"expected upstream \[6, 4\] on cpu, got \[5, 4\]"),
        (dict(upstream=torch.zeros(6, 3)), r"expected upstream \[6, 4\] on cpu, got \[6, 3\]"),
        (dict(gradient=torch.zeros(9, 4).half()), "expected gradient in fp32 or Float, got Half"),
    ],
)
def test_refusals_of_the_ops(change, message):
    given = dict(
        table=torch.zeros(9, 4),
        tokens=torch.zeros(6, 2, dtype=torch.int64),
        start=0,
        dtype=torch.float32,
        gradient=torch.zeros(9, 4),
        upstream=torch.zeros(6, 4),
    )
    given |= change
    pool, add_gradient_ = ops_of("extension")
    with pytest.raises(ValueError, match=message):
        pool(given["table"], given["tokens"], given["start"], 12, given["dtype"])
        add_gradient_(given["gradient"], given["upstream"], given["tokens"], given["start"], 12)


@needs_extension
def test_compiles_in_one_graph(megatron):
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (2, 3, 4))

    def step(weight):
        return embedding.superposed_embedding(module_of(weight), tokens, "extension").sum()

    eager, compiled = (torch.ones(20, 8).requires_grad_() for _ in range(2))
    step(eager).backward()
    torch.compile(step, backend="aot_eager", fullgraph=True)(compiled).backward()
    assert torch.equal(eager.grad, compiled.grad)


def test_bf16_output_is_one_rounding_of_the_exact_mean(patched, megatron):
    torch.manual_seed(0)
    module = build(megatron, dtype=torch.bfloat16)
    tokens = torch.randint(0, 64, (4, 8, 6))
    want = reference.superposed_embedding(module.weight.detach(), tokens)
    terms = module.weight.detach().abs().max()
    close(module(tokens), want, 1e-6, terms=terms, rounded=torch.bfloat16)


def test_bf16_gradient_of_frequent_tokens_survives(patched, megatron):
    """Zipf-distributed ids, a gradient with nonzero mean: bf16 accumulation loses most of the
    frequent rows' gradient.
    """
    torch.manual_seed(0)
    vocab, shape = 1000, (8, 512, 8)
    tokens = zipf(vocab, *shape)
    module = build(megatron, vocab=vocab, dtype=torch.bfloat16)
    upstream = (0.1 + torch.randn(*shape[:2], 32)).bfloat16()
    (grad,) = torch.autograd.grad(module(tokens), module.weight, upstream)
    table = module.weight.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(
        reference.superposed_embedding(table, tokens), table, upstream.double()
    )
    close(grad, want, 6e-3)  # each element is rounded once, by 2**-9 in the mean; largest seen 2e-3
    close(grad[0], want[0], 6e-3)  # largest seen 2e-3
    frequent = (grad.double() - want)[0].norm() / want[0].norm()
    # the guard is worth having: torch's own bf16 accumulation of the same gradient
    bf16 = torch.nn.functional.embedding(tokens, module.weight).float().mean(2)
    (lossy,) = torch.autograd.grad(bf16, module.weight, upstream.float())
    assert (lossy.double() - want)[0].norm() / want[0].norm() > 10 * frequent


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_goes_into_main_grad(megatron, kernel, tied):
    """Added in fp32 to what other micro-batches left there; a tied weight's dummy gradient is
    zeros, since the hook adds it.
    """
    torch.manual_seed(0)
    module = build(megatron, dtype=torch.bfloat16)
    tokens, upstream = torch.randint(0, 64, (4, 8, 6)), torch.randn(4, 8, 32).bfloat16()

    def gradient():
        out = embedding.superposed_embedding(module, tokens, kernel)
        return torch.autograd.grad(out, module.weight, upstream)[0]

    want = gradient()
    before = torch.randn(module.weight.shape)
    module.weight.main_grad, module.weight.grad_added_to_main_grad = before.clone(), False
    module.weight.zero_out_wgrad = tied
    dummy = gradient()
    assert module.weight.grad_added_to_main_grad and (not tied or (dummy == 0).all())
    added, terms = module.weight.main_grad - before, before.abs().max()
    close(want, added, 1e-6, terms=terms, rounded=torch.bfloat16)
    table = module.weight.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(
        reference.superposed_embedding(table, tokens), table, upstream.double()
    )
    close(added, exact, 1e-6, terms=terms)  # no rounding to bf16 on the way; largest seen 8e-8


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scatter", [False, True])
def test_the_parts_of_two_ranks(monkeypatch, kernel, scatter):
    """Without the collectives, which get the embedding's own group: the parts add up to the mean,
    and each rank has the gradient of its rows.
    """

    def kept(tensor, group):
        assert group is group_of_rank
        return tensor

    for name in (
        "reduce_from_tensor_model_parallel_region",
        "reduce_scatter_to_sequence_parallel_region",
        "gather_from_sequence_parallel_region",
    ):
        monkeypatch.setattr(embedding.mappings, name, kept)
    torch.manual_seed(0)
    table = torch.randn(10, 4, dtype=torch.float64)
    tokens = torch.tensor([[[0, 4, 5], [9, 9, 4], [3, 6, 0]], [[5, 5, 5], [1, 2, 3], [8, 0, 5]]])
    upstream = torch.randn(2, 3, 4, dtype=torch.float64)
    want = reference.superposed_embedding(table.requires_grad_(), tokens)
    (want_grad,) = torch.autograd.grad((want * upstream).sum(), table)
    if scatter:
        want, upstream = want.transpose(0, 1), upstream.transpose(0, 1)
    total = 0
    for rank in (0, 1):
        group_of_rank = SimpleNamespace(size=lambda: 2)
        weight = table.detach().float().chunk(2)[rank].clone().requires_grad_()
        module = module_of(weight, 5 * rank, 10, group_of_rank, scatter)
        part = embedding.superposed_embedding(module, tokens, kernel)
        (grad,) = torch.autograd.grad((part * upstream.float()).sum(), weight)
        close(grad, want_grad.chunk(2)[rank], 1e-6)
        total = total + part.detach()
    assert total.shape == want.shape
    close(total, want, 1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("wrong", [64, 70, -1])
@pytest.mark.parametrize("rows", [64, 16])
def test_ids_outside_the_table_are_an_error(kernel, wrong, rows):
    """On every rank: none may be taken for another rank's, and be nothing. The first is named."""
    module = module_of(torch.zeros(rows, 4), vocab=64)
    tokens = torch.tensor([[[0, 1, wrong], [99, 2, 98]]])
    with pytest.raises(ValueError, match=rf"expected token ids in 0\.\.63, got {wrong}\. Check"):
        embedding.superposed_embedding(module, tokens, kernel)


@pytest.mark.parametrize("ranks, dtype", [(1, torch.bfloat16), (2, torch.float32)])
def test_a_mean_that_is_whole_is_rounded_in_the_kernel(monkeypatch, ranks, dtype):
    """No fp32 [N, H] on one rank. Parts of the mean stay fp32 until they are added up."""
    asked = []

    def pool(table, tokens, start, size, dtype):
        asked.append(dtype)
        return torch.zeros(len(tokens), table.shape[1], dtype=dtype)

    monkeypatch.setitem(embedding.KERNELS, "torch", lambda: (pool, None))
    name = "reduce_from_tensor_model_parallel_region"
    monkeypatch.setattr(embedding.mappings, name, lambda tensor, group: tensor)
    weight = torch.zeros(4, 8, dtype=torch.bfloat16)
    module = module_of(weight, 0, 4 * ranks, SimpleNamespace(size=lambda: ranks))
    mean = embedding.superposed_embedding(module, torch.zeros(1, 2, 3, dtype=torch.int64), "torch")
    assert asked == [dtype] and mean.dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_shard_of_one_row(kernel):
    pool, add_gradient_ = ops_of(kernel)
    table, tokens = torch.full((1, 4), 3.0), torch.tensor([[1, 0], [1, 1]])
    assert pool(table, tokens, 1, 2, torch.float32).tolist() == [[1.5] * 4, [3.0] * 4]
    add_gradient_(table, torch.ones(2, 4), tokens, 1, 2)
    assert table.tolist() == [[4.5] * 4]


def test_there_is_no_second_derivative(patched, megatron):
    module = build(megatron)
    out = module(torch.randint(0, 64, (3, 5, 2))).square().sum()
    (grad,) = torch.autograd.grad(out, module.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def rank_compares_with_the_whole(scatter):
    """TP ranks: each rank's shard of table and gradient against one table; sequence-parallel output
    is this rank's positions.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    import megatron_tst

    size, rank = dist.get_world_size(), dist.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    megatron_tst.apply()
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        module = build(parallel_state, dtype=dtype, scatter=scatter)
        table = torch.randn(64, 32).to(dtype)
        module.weight.data.copy_(table.chunk(size)[rank])
        tokens = torch.randint(0, 64, (3, 8, 5))
        tokens[0, 0] = 3  # a bag that one rank owns whole
        upstream = torch.randn(3, 8, 32).to(dtype)
        out = module(tokens)
        want = reference.superposed_embedding(table, tokens)
        whole = table.double().requires_grad_()
        (want_grad,) = torch.autograd.grad(
            reference.superposed_embedding(whole, tokens), whole, upstream.double()
        )
        if scatter:
            want, upstream = (t.transpose(0, 1).chunk(size)[rank] for t in (want, upstream))
        (grad,) = torch.autograd.grad(out, module.weight, upstream.contiguous())
        close(out, want, 1e-6, terms=table.abs().max(), rounded=dtype)  # largest seen 2e-8
        terms = upstream.abs().max()
        # largest seen 2e-8
        close(grad, want_grad.chunk(size)[rank], 1e-6, terms=terms, rounded=dtype)


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_table_split_over_ranks_equals_the_whole(fork_server, size, scatter):
    fork_server.call(rank_compares_with_the_whole, scatter, nproc=size)
