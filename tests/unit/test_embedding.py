"""The superposed embedding against the fp64 reference and against Megatron's own, on one rank and
over gloo.
"""

from types import SimpleNamespace

import pytest
import torch
from support.close import close

from megatron_tst.ops import embedding, reference

pytestmark = pytest.mark.numeric


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


@pytest.mark.parametrize("s", [1, 2, 3, 7])
def test_equals_the_reference(patched, megatron, s):
    torch.manual_seed(0)
    module = build(megatron)
    tokens = torch.randint(0, 64, (3, 5, s))
    upstream = torch.randn(3, 5, 32)
    out = module(tokens)
    (grad,) = torch.autograd.grad((out * upstream).sum(), module.weight)
    table = module.weight.detach().double().requires_grad_()
    want = reference.superposed_embedding(table, tokens)
    (want_grad,) = torch.autograd.grad((want * upstream).sum(), table)
    assert out.shape == (3, 5, 32)
    close(out, want, 1e-6)  # largest seen 6e-8
    close(grad, want_grad, 1e-6)  # largest seen 4e-8
    assert patched.status().superposed_embeddings == 1


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
    probabilities = 1 / torch.arange(1, vocab + 1).double()
    tokens = torch.multinomial(probabilities, 8 * 512 * 8, replacement=True).view(shape)
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
def test_gradient_goes_into_main_grad(patched, megatron, tied):
    """Added in fp32 to what other micro-batches left there; a tied weight's dummy gradient is
    zeros, since the hook adds it.
    """
    torch.manual_seed(0)
    module = build(megatron, dtype=torch.bfloat16)
    tokens, upstream = torch.randint(0, 64, (4, 8, 6)), torch.randn(4, 8, 32).bfloat16()
    (want,) = torch.autograd.grad(module(tokens), module.weight, upstream)
    before = torch.randn(module.weight.shape)
    module.weight.main_grad, module.weight.grad_added_to_main_grad = before.clone(), False
    module.weight.zero_out_wgrad = tied
    (dummy,) = torch.autograd.grad(module(tokens), module.weight, upstream)
    assert module.weight.grad_added_to_main_grad and (not tied or (dummy == 0).all())
    added, terms = module.weight.main_grad - before, before.abs().max()
    close(want, added, 1e-6, terms=terms, rounded=torch.bfloat16)
    table = module.weight.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(
        reference.superposed_embedding(table, tokens), table, upstream.double()
    )
    close(added, exact, 1e-6, terms=terms)  # no rounding to bf16 on the way; largest seen 8e-8


@pytest.mark.parametrize("scatter", [False, True])
def test_the_parts_of_two_ranks(monkeypatch, scatter):
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
        module = SimpleNamespace(
            weight=weight,
            vocab_start_index=5 * rank,
            tp_group=group_of_rank,
            reduce_scatter_embeddings=scatter,
        )
        part = embedding.superposed_embedding(module, tokens)
        (grad,) = torch.autograd.grad((part * upstream.float()).sum(), weight)
        close(grad, want_grad.chunk(2)[rank], 1e-6)
        total = total + part.detach()
    assert total.shape == want.shape
    close(total, want, 1e-6)


def test_ids_outside_the_table_are_an_error(patched, megatron):
    """One rank holds the whole table: no id may be taken for another rank's."""
    with pytest.raises(IndexError):
        build(megatron)(torch.full((1, 2, 3), 64))


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
