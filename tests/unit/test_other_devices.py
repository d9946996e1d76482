"""On which device and in which type the ops work: those of what they are given, whatever torch's
defaults are. On tensors that have a shape, a type and a device, and no content.
"""

import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_tst.ops import embedding, linear_loss, main_grad, torch_kernel
from megatron_tst.ops.loss import KERNELS, multi_hot_cross_entropy, of_all_ranks
from megatron_tst.ops.names import ABLATIONS, LOSSES

pytestmark = pytest.mark.numeric

N, V, S, H = 6, 10, 3, 4
ELSEWHERE = "meta"  # "cuda" means the CPU in these tests (cpu_torch.py)
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


@pytest.fixture(autouse=True)
def another_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Context:
    """autograd's, for a forward or a backward on its own: its engine wants a real GPU."""

    needs_input_grad = [True] * 10

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


def there(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device=ELSEWHERE)


def labels():
    return there(N, S, dtype=torch.int64)


def assert_is(tensor, *shape, dtype=torch.float32):
    assert (tensor.shape, tensor.dtype, tensor.device.type) == (shape, dtype, ELSEWHERE)


@pytest.mark.parametrize("loss", LOSSES + ABLATIONS)
@pytest.mark.parametrize("where", [None, "cpu", ELSEWHERE])
def test_losses(loss, where):
    """Weights of the host are brought to the logits; those of a device are not looked at."""
    weights = where and torch.tensor([1.0, 0.5, 0.25]).to(where)
    assert_is(multi_hot_cross_entropy(there(N, V), labels(), weights, loss=loss, kernel="torch"), N)


@pytest.mark.parametrize("alt", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_torch_kernel(alt, dtype):
    z, weights = there(N, V, dtype=dtype), there(S, dtype=torch.float32)
    local = torch_kernel.statistics(z, labels(), weights, 0, V, alt)
    assert_is(local, 4, N)
    loss, saved = torch_kernel.loss(local[None], labels(), weights, alt)
    assert_is(loss, N)
    assert_is(saved, 3, N)
    assert_is(torch_kernel.gradient(z, labels(), weights, saved, loss, 0, alt), N, V, dtype=dtype)


def test_labels_are_looked_at_without_waiting(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "_assert_async", seen.append)
    torch_kernel.check_label_range(labels(), V)
    (asserted,) = seen
    assert_is(asserted, dtype=torch.bool)


def test_what_is_gathered(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", lambda into, *_, group: None)
    assert_is(of_all_ranks(there(4, N, dtype=torch.float32), ALONE), 1, 4, N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_fused_output_layer(dtype):
    context = Context()
    rest = labels(), there(S, dtype=torch.float32), None, 0, V, False, KERNELS["torch"], False
    op = linear_loss._LinearMultiHotCrossEntropy
    loss = op.forward(context, there(N, H, dtype=dtype), there(V, H, dtype=dtype), *rest)
    assert_is(loss, N)
    with torch.no_grad():
        hidden, weight, *others = op.backward(context, loss)
    assert_is(hidden, N, H, dtype=dtype)
    assert_is(weight, V, H, dtype=dtype)
    assert others == [None] * 8


class OnGPU(torch.Tensor):
    """One that says so."""

    is_cuda = True


@pytest.mark.parametrize(
    "fuse, where, dtype, by_megatron",
    [
        (True, OnGPU, torch.bfloat16, True),
        (False, OnGPU, torch.bfloat16, False),
        (True, OnGPU, torch.float32, False),
        (True, torch.Tensor, torch.bfloat16, False),
    ],
)
def test_megatrons_kernel_adds_to_main_grad(monkeypatch, fuse, where, dtype, by_megatron):
    """On a GPU, with gradient accumulation fusion, in 16 bits: products summed in fp32."""
    seen = []
    module = SimpleNamespace(wgrad_gemm_accum_fp32=lambda *arguments: seen.append(arguments))
    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", module)
    weight = torch.empty(V, H, dtype=dtype).as_subclass(where)
    weight.main_grad = torch.empty(V, H, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    accumulate, finish = linear_loss._weight_gradient(weight, fuse)
    grad, hidden = torch.empty(N, V, dtype=dtype), torch.empty(N, H, dtype=dtype)
    accumulate(grad, hidden)
    assert len(seen) == by_megatron
    for given in seen:
        assert all(a is b for a, b in zip(given, (hidden, grad, weight.main_grad), strict=True))
    assert finish().shape == weight.shape and weight.grad_added_to_main_grad


def test_the_embedding(monkeypatch):
    def reduce(mean, group):
        assert_is(mean, 2, 3, H)  # what crosses the wire
        return mean

    monkeypatch.setattr(embedding.mappings, "reduce_from_tensor_model_parallel_region", reduce)
    context, table = Context(), there(V, H)
    tokens = there(2, 3, S, dtype=torch.int64)
    two = SimpleNamespace(size=lambda: 2)
    out = embedding._PoolBags.forward(context, table, tokens, 0, 2 * V, two, False, "torch")
    assert_is(out, 2, 3, H, dtype=torch.bfloat16)
    with torch.no_grad():
        grad, *others = embedding._PoolBags.backward(context, out)
    assert_is(grad, V, H, dtype=torch.bfloat16)
    assert others == [None] * 6


def test_tokens_are_looked_at_without_waiting(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "_assert_async", seen.append)
    embedding._pool(there(V, H), labels(), 0, V, torch.bfloat16)
    (asserted,) = seen
    assert_is(asserted, dtype=torch.bool)


def test_the_embeddings_gradient(monkeypatch):
    """Six positions of three places name row 0. fp32 is added up in fp32 alone."""
    name = "reduce_from_tensor_model_parallel_region"
    monkeypatch.setattr(embedding.mappings, name, lambda mean, group: mean)
    context, table = Context(), torch.ones(V, H, dtype=torch.bfloat16)
    tokens = torch.zeros(2, 3, S, dtype=torch.int64)
    out = embedding._PoolBags.forward(context, table, tokens, 0, V, ALONE, False, "torch")
    with torch.no_grad():
        grad = embedding._PoolBags.backward(context, out)[0]
    assert grad.dtype == torch.bfloat16 and grad.tolist() == [[6.0] * H] + [[0.0] * H] * (V - 1)


def test_what_stands_for_a_gradient():
    assert_is(main_grad.added(there(V, H)), V, H, dtype=torch.bfloat16)


def test_the_sum_of_the_output_layers_gradients():
    """fp32, which takes products of fp32 alone."""
    weight = torch.zeros(V, H, dtype=torch.float32)
    accumulate, finish = linear_loss._weight_gradient(weight, False)
    accumulate(torch.ones(N, V, dtype=torch.float32), torch.ones(N, H, dtype=torch.float32))
    assert torch.equal(finish(), torch.full((V, H), float(N), dtype=torch.float32))
