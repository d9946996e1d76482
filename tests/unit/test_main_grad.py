"""Gradients in Megatron's DistributedDataParallel buffers, fp16 and bf16, summed in fp32 and in 16
bits: what stock Megatron puts there.

A bag of one token, s times, is that token: its mean is the token's row and its loss the token's, so
that stock Megatron on single tokens says what the superposed code must leave in every buffer.
"""

import copy

import pytest
import torch
from support.close import close
from support.models import batch, gpt

from megatron_tst import TSTConfig, extension
from megatron_tst.loop import patch
from megatron_tst.ops import main_grad

pytestmark = pytest.mark.numeric

V, L, S, MICRO_BATCHES = 96, 8, 4, 2
SUMS = {
    "fp32": dict(grad_reduce_in_fp32=True),
    "16 bits": {},
    "fp32 on the rank": dict(param_name_patterns_for_fp32_local_accumulation=("all",)),
}


@pytest.fixture(autouse=True)
def clean(megatron):
    yield
    patch.remove()


def buffers_after(dtype, tied, sums, steps, scale, cuda_graphs="none"):
    """Of a model wrapped by Megatron: name -> main_grad after the last of some steps, each a list
    of micro-batches.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    model = gpt(
        vocab=V,
        tied=tied,
        position="learned_absolute" if tied else "rope",
        dtype=dtype,
        fp16=dtype == torch.float16,
    )
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(**SUMS[sums]), model
    )
    wrapped.config = copy.copy(
        model.config
    )  # what zero_grad_buffer asks; the model itself runs without graphs
    wrapped.config.cuda_graph_impl = cuda_graphs
    for inputs in steps:
        wrapped.zero_grad_buffer()
        for arguments in inputs:
            (scale * wrapped(**arguments).float().mean() / len(inputs)).backward()
        wrapped.finish_grad_sync()
    assert all(p.grad is None for p in model.parameters())
    return {name: p.main_grad for name, p in model.named_parameters()}


def singles():
    torch.manual_seed(3)
    few = V // 4  # rows that many positions add to
    return [batch(torch.randint(0, few, (2, L + 1)), None) for _ in range(MICRO_BATCHES)]


def bags(of):
    """Each token s times."""
    return {
        key: of[key].unsqueeze(-1).repeat(1, 1, S) if key in ("input_ids", "labels") else of[key]
        for key in of
    }


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused linear"])
@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_buffers_hold_what_stock_puts_there(dtype, tied, sums, fused):
    if not extension.load().loaded:
        pytest.skip(f"NOT RUN: the extension is {extension.load().description}")
    scale = 2.0**10 if dtype == torch.float16 else 1.0
    want = buffers_after(dtype, tied, sums, [singles()], scale)
    patch.apply(
        TSTConfig(
            bag_size=S,
            iters=1,
            kernel="extension",
            kernel_in_recovery=True,
            fused_linear_loss=fused,
        )
    )
    superposed = buffers_after(dtype, tied, sums, [[bags(one) for one in singles()]], scale)
    assert patch.status().superposed_embeddings == patch.status().multi_hot_losses == MICRO_BATCHES
    recovery = buffers_after(dtype, tied, sums, [singles()], scale)
    assert (
        patch.status().recovery_losses == MICRO_BATCHES
        and patch.status().fused_linear_losses == 2 * MICRO_BATCHES * fused
    )
    for got in (superposed, recovery):
        assert got.keys() == want.keys()
        for name, grad in got.items():
            assert (
                grad.dtype == want[name].dtype == (dtype if sums == "16 bits" else torch.float32)
            ), name
            assert 0 < want[name].float().norm() < torch.inf, name
            close(grad, want[name], 8 * torch.finfo(dtype).eps)  # largest seen 3e-3


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused linear"])
@pytest.mark.parametrize("sums", SUMS)
def test_an_overflow_is_in_the_buffers(sums, fused):
    """fp16 logits' gradients that overflow reach the embedding's and the output layer's buffers,
    whatever adds to those: the scaler looks there.
    """
    patch.apply(TSTConfig(bag_size=S, iters=1, fused_linear_loss=fused))
    got = buffers_after(torch.float16, False, sums, [[bags(one) for one in singles()]], 2.0**24)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert not got[name].isfinite().all(), name


def test_the_first_recovery_step_under_cuda_graphs():
    """Megatron keeps `grad_added_to_main_grad` over iterations there: the stock embedding's
    gradient must not be taken for one that is in place.
    """
    patch.apply(TSTConfig(bag_size=S, iters=1))
    steps = [[bags(one) for one in singles()], singles()]
    want = buffers_after(torch.bfloat16, False, "fp32", steps[1:], 1.0)
    got = buffers_after(torch.bfloat16, False, "fp32", steps, 1.0, cuda_graphs="transformer_engine")
    assert want.keys() == got.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_which_weights_have_a_buffer():
    weight = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    main_grad.left_to_autograd(weight)
    assert not hasattr(weight, "grad_added_to_main_grad") and main_grad.buffer_of(weight) is None
    weight.main_grad = torch.zeros(2, 3)
    assert main_grad.buffer_of(weight) is None  # nobody asks for the flag
    weight.grad_added_to_main_grad = False
    assert main_grad.buffer_of(weight) is weight.main_grad
    weight.__fsdp_param__ = True
    assert main_grad.buffer_of(weight) is None
    del weight.__fsdp_param__
    weight.main_grad = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert main_grad.buffer_of(weight) is None


@pytest.mark.parametrize("tied", [None, False, True])
def test_what_autograd_gets_in_the_place_of_a_gradient(tied):
    weight = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    if tied is not None:
        weight.zero_out_wgrad = tied
    given = main_grad.added(weight)
    assert weight.grad_added_to_main_grad is True
    assert (given.shape, given.dtype, given.device) == (weight.shape, weight.dtype, weight.device)
    assert not given.requires_grad and (not tied or not given.any())
    main_grad.left_to_autograd(weight)
    assert weight.grad_added_to_main_grad is False


def test_zeros_are_written_for_tied_weights_alone():
    """Elsewhere nobody reads them, and the table is large."""
    weight = torch.nn.Parameter(torch.ones(2, 3))
    torch.use_deterministic_algorithms(True)  # what is not written is NaN
    try:
        assert main_grad.added(weight).isnan().all()
        weight.zero_out_wgrad = True
        assert not main_grad.added(weight).any()
    finally:
        torch.use_deterministic_algorithms(False)
