"""The CUDA kernels against the fp64 reference, and what only a GPU can show: streams, graphs,
synchronisation, 64-bit addresses.
"""

import subprocess
import sys

import pytest
import torch
from check_kernels import in_a_graph
from support.close import close
from support.losses import IGNORE

from megatron_tst import extension
from megatron_tst.ops import reference
from megatron_tst.ops.loss import multi_hot_cross_entropy, target_weights
from megatron_tst.ops.names import LOSSES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="NOT RUN: the CUDA kernels against the reference: no GPU",
    ),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def built():
    assert extension.load().cuda, f"the extension is {extension.load().description}"


def draw(n, v, s, dtype, margin=0, few=None, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    labels = torch.randint(0, few or v, (n, s), device="cuda", generator=generator)
    labels[torch.rand(labels.shape, device="cuda", generator=generator) < 0.2] = IGNORE
    wide = 3 * torch.randn(n, v + margin, device="cuda", generator=generator)
    return wide.to(dtype)[:, margin:], labels, torch.randn(n, device="cuda", generator=generator)


def grad_of(function, logits, upstream):
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(leaf)
    (grad,) = torch.autograd.grad((loss * upstream).sum(), leaf)
    return loss.detach(), grad


def check(logits, labels, upstream, weighting="power-law", loss="mce", **options):
    weights = target_weights(weighting, labels.shape[1])
    got, grad = grad_of(
        lambda z: multi_hot_cross_entropy(
            z, labels, weights, loss=loss, kernel="extension", **options
        ),
        logits,
        upstream,
    )
    exact = reference.target_weights(weighting, labels.shape[1])
    want, want_grad = grad_of(
        lambda z: reference.multi_hot_cross_entropy(z, labels, exact, loss),
        logits.double(),
        upstream,
    )
    close(got, want, 1e-5, terms=1 + logits.float().abs().amax(-1))
    terms = upstream.abs().unsqueeze(-1)
    close(grad, want_grad.nan_to_num(), 4e-6, terms=terms, rounded=logits.dtype)
    return got, grad


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 7, 64, 1000, 4099, 50257])
def test_equals_the_reference(dtype, loss, v):
    for n, s, margin, few in ((1, 1, 0, None), (33, 5, 0, 3), (33, 16, 3, None), (300, 4, 5, None)):
        check(*draw(n, v, s, dtype, margin, min(few or v, v)), loss=loss)


@pytest.mark.parametrize("n, v", [(1, 151936), (7, 128257), (2000, 32001), (5000, 513)])
def test_one_or_several_blocks_a_row(n, v):
    check(*draw(n, v, 16, torch.bfloat16, margin=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_equals_out_of_place(dtype):
    logits, labels, upstream = draw(50, 4096, 6, dtype)
    _, want = grad_of(
        lambda z: multi_hot_cross_entropy(z, labels, kernel="extension"), logits, upstream
    )
    _, grad = grad_of(
        lambda z: multi_hot_cross_entropy(z * 1, labels, kernel="extension", inplace_backward=True),
        logits,
        upstream,
    )
    assert torch.equal(grad, want)


def test_same_as_the_cpu_kernel_and_the_torch_kernel():
    logits, labels, upstream = draw(40, 3000, 8, torch.bfloat16)
    a, grad_a = grad_of(
        lambda z: multi_hot_cross_entropy(z, labels, kernel="extension"), logits, upstream
    )
    b, grad_b = grad_of(
        lambda z: multi_hot_cross_entropy(z, labels.cpu(), kernel="extension"),
        logits.cpu(),
        upstream.cpu(),
    )
    c, grad_c = grad_of(
        lambda z: multi_hot_cross_entropy(z, labels, kernel="torch"), logits, upstream
    )
    for loss, grad in ((b.cuda(), grad_b.cuda()), (c, grad_c)):
        close(a, loss, 1e-6)
        terms = upstream.abs().unsqueeze(-1)
        close(grad_a, grad, 4e-6, terms=terms, rounded=torch.bfloat16, roundings=2)


def test_same_bits_in_every_run():
    logits, labels, upstream = draw(200, 32000, 16, torch.bfloat16, few=20)
    first = grad_of(
        lambda z: multi_hot_cross_entropy(z, labels, kernel="extension"), logits, upstream
    )
    for _ in range(20):
        again = grad_of(
            lambda z: multi_hot_cross_entropy(z, labels, kernel="extension"), logits, upstream
        )
        assert all(torch.equal(x, y) for x, y in zip(first, again))


def test_a_nan_row_stays_alone_padded_columns_and_rows_without_upstream_get_zero():
    logits, labels, upstream = draw(6, 40, 3, torch.float32, few=30)
    labels[:, 0] = 3
    logits[:, 35:] = -torch.inf
    logits[1, 0] = torch.nan
    logits[4, 2], upstream[4] = torch.inf, 0.0
    for loss in LOSSES:
        got, grad = grad_of(
            lambda z: multi_hot_cross_entropy(z, labels, loss=loss, kernel="extension"),
            logits,
            upstream,
        )
        assert got[[0, 2, 3, 5]].isfinite().all() and got[1].isnan()
        assert (
            (grad[[0, 2, 3, 5], 35:] == 0).all()
            and grad[[0, 2, 3, 5]].isfinite().all()
            and (grad[4] == 0).all()
        )


def test_more_than_2_to_the_31_elements():
    rows, v = 16640, 131072  # 2.2e9 elements, 4.4 GB; the last row is beyond 32-bit indices
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("NOT RUN: needs 12 GB of GPU memory")
    logits = torch.zeros(rows, v, dtype=torch.bfloat16, device="cuda")
    logits[-1] = torch.randn(v, device="cuda").bfloat16()
    labels = torch.full((rows, 2), v - 1, device="cuda")
    tail = logits[-3:].clone()
    leaf = logits.requires_grad_()
    loss = multi_hot_cross_entropy(leaf, labels, inplace_backward=True, kernel="extension")
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    want, want_grad = grad_of(
        lambda z: multi_hot_cross_entropy(z, labels[-3:], kernel="extension"),
        tail,
        torch.ones(3, device="cuda"),
    )
    assert torch.equal(loss.detach()[-3:], want) and torch.equal(grad[-3:], want_grad)


def test_never_waits_for_the_gpu_and_can_be_captured():
    logits, labels, _ = draw(64, 32000, 4, torch.bfloat16)
    leaf, weights = logits.requires_grad_(), target_weights("uniform", 4, "cuda")

    def step():
        loss = multi_hot_cross_entropy(leaf, labels, weights, kernel="extension")
        return loss, torch.autograd.grad(loss.sum(), leaf)[0]

    want = step()
    assert all(torch.equal(x, y) for x, y in zip(in_a_graph(step), want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_as_large_as_the_logits_is_allocated(dtype, loss):
    """Forward keeps a few numbers a row; backward in place writes over the logits, beside them it
    allocates the gradient alone.
    """
    rows, v = 2048, 32000
    logits, labels, _ = draw(rows, v, 8, dtype)
    size, upstream = logits.nbytes, torch.ones(rows, device="cuda")
    for inplace, extra in ((True, 0), (False, size)):
        leaf = logits.clone().requires_grad_()
        out = multi_hot_cross_entropy(
            leaf, labels, loss=loss, inplace_backward=inplace, kernel="extension"
        )  # warm: the allocator
        torch.autograd.grad(out, leaf, upstream)
        leaf = logits.clone().requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        out = multi_hot_cross_entropy(
            leaf, labels, loss=loss, inplace_backward=inplace, kernel="extension"
        )
        grads = torch.autograd.grad(out, leaf, upstream)
        assert len(grads) == 1 and torch.cuda.max_memory_allocated() - start < extra + 0.02 * size


def test_label_outside_the_vocabulary_stops_the_process():
    code = (
        "import torch; from megatron_tst import multi_hot_cross_entropy as ce\n"
        "print(ce(torch.zeros(4, 8, device='cuda'), torch.full((4, 2), 8, device='cuda'), "
        "kernel='extension')); torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "device-side assert" in done.stderr, done.stderr[-500:]
