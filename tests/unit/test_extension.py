"""The extension's ops by themselves: registration, refusals, memory, threads. What they compute is
tested in test_loss.py.
"""

import importlib.abc
import importlib.machinery
import re
import shutil
import sys
import types

import pytest
import torch

import megatron_tst
from megatron_tst import extension
from megatron_tst.ops.loss import multi_hot_cross_entropy, target_weights

pytestmark = pytest.mark.numeric

FOUND = extension.load()
needs_extension = pytest.mark.skipif(
    not FOUND.loaded, reason=f"the extension is {FOUND.description}"
)
IGNORE = -100


def arguments(n=6, v=33, s=3, dtype=torch.float32):
    torch.manual_seed(0)
    labels = torch.randint(0, v, (n, s))
    labels[0, 0] = IGNORE
    return torch.randn(n, v).to(dtype), labels, target_weights("power-law", s)


def test_is_built_where_it_can_be():
    """A machine with a compiler must not test the torch kernel alone without noticing."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler: the torch kernel alone is tested")
    assert FOUND.loaded, (
        f"the extension is {FOUND.description}; MEGATRON_TST_SKIP_EXTENSION=1 was set, or setup "
        f"failed"
    )


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alt", [False, True])
def test_opcheck(dtype, alt):
    """Schema (what is mutated), fake tensors, dynamic shapes, tracing."""
    ops = torch.ops.megatron_tst
    logits, labels, weights = arguments(dtype=dtype)
    local = ops.multi_hot_ce_statistics(logits, labels, weights, 0, 33, alt)
    _, saved = ops.multi_hot_ce_loss(local.unsqueeze(0), labels, weights, alt)
    rest = labels, weights, saved, torch.randn(6), 0, alt
    for op, args in (
        (ops.multi_hot_ce_statistics, (logits, labels, weights, 0, 33, alt)),
        (ops.multi_hot_ce_loss, (local.unsqueeze(0), labels, weights, alt)),
        (ops.multi_hot_ce_gradient, (logits, *rest)),
        (ops.multi_hot_ce_gradient_, (logits.clone(), *rest)),
    ):
        torch.library.opcheck(op.default, args)


@needs_extension
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_in_one_graph(inplace):
    logits, labels, weights = arguments(dtype=torch.bfloat16)

    def step(logits):
        # * 1: the caller's own tensor, as the output layer's is
        return multi_hot_cross_entropy(
            logits * 1, labels, weights, inplace_backward=inplace, kernel="extension"
        ).sum()

    eager, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    step(eager).backward()
    torch.compile(step, backend="aot_eager", fullgraph=True)(compiled).backward()
    assert torch.equal(eager.grad, compiled.grad)


@needs_extension
def test_same_bits_in_every_run_and_with_any_number_of_threads():
    logits, labels, weights = arguments(64, 5003, 7, torch.bfloat16)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            leaf = logits.clone().requires_grad_()
            loss = multi_hot_cross_entropy(leaf, labels, weights, kernel="extension")
            loss.sum().backward()
            results.append((loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@needs_extension
def test_rows_further_apart_than_32_bits_reach():
    memory = torch.empty(
        2**31 + 4096, dtype=torch.bfloat16
    )  # 4 GiB of addresses; only the touched pages exist
    far = memory.as_strided((2, 3000), (2**31, 1))
    near = torch.randn(2, 3000).bfloat16()
    far.copy_(near)
    _, labels, _ = arguments(2, 3000, 4)
    assert torch.equal(
        multi_hot_cross_entropy(far, labels, kernel="extension"),
        multi_hot_cross_entropy(near, labels, kernel="extension"),
    )


@needs_extension
def test_rows_without_upstream_get_zeros_whatever_their_logits_are():
    logits, labels, _ = arguments()
    logits[2, 5], logits[3, 1] = torch.nan, torch.inf
    leaf = logits.clone().requires_grad_()
    upstream = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    multi_hot_cross_entropy(leaf, labels, kernel="extension").backward(upstream)
    assert (leaf.grad[2:4] == 0).all() and leaf.grad[[0, 1, 4, 5]].isfinite().all()


@needs_extension
def test_exp_is_within_one_ulp_of_exact():
    """A row (x, 0) with the label at 0 has gradient exp(x) / (1 + exp(x)) at x, for every magnitude
    of x.
    """
    x = -torch.logspace(-6, 1.93, 40001, dtype=torch.float64).float()
    logits = torch.stack([x, torch.zeros_like(x)], -1).requires_grad_()
    multi_hot_cross_entropy(
        logits, torch.ones(len(x), 1, dtype=torch.int64), kernel="extension"
    ).sum().backward()
    exact = torch.sigmoid(x.double())
    assert (
        (logits.grad[:, 0] - exact).abs() / exact
    ).max() < 3 * 2**-24  # exp, 1 + exp, the quotient


@needs_extension
@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(logits=torch.zeros(6, 33, dtype=torch.float64)),
            r"expected logits \[N, V\] in fp32, bf16 or fp16, got Double",
        ),
        (dict(logits=torch.zeros(6, 33, 1)), r"expected logits \[N, V\].*\[6, 33, 1\]"),
        (dict(logits=torch.zeros(33, 6).t()), "columns of a row side by side"),
        (dict(logits=torch.zeros(33).expand(6, 33)), "no row over another"),
        (
            dict(labels=torch.zeros(5, 3, dtype=torch.int64)),
            r"expected labels \[6, S >= 1\], int64 and contiguous, got Long \[5, 3\]",
        ),
        (dict(labels=torch.zeros(6, 3, dtype=torch.int32)), "int64 and contiguous, got Int"),
        (dict(labels=torch.zeros(3, 6, dtype=torch.int64).t()), "int64 and contiguous"),
        (dict(labels=torch.full((6, 3), 33)), "expected labels in 0..32 or -100, got 33"),
        (dict(labels=torch.full((6, 3), -1)), "expected labels in 0..32 or -100, got -1"),
        (dict(labels=torch.full((6, 3), 2**62)), "got 4611686018427387904"),
        (dict(weights=torch.ones(2)), r"expected weights \[3\], fp32, got Float \[2\]"),
        (dict(weights=torch.ones(3, dtype=torch.float64)), "fp32, got Double"),
        (
            dict(weights=torch.ones(3, device="meta")),
            "expected labels and weights on cpu, got cpu and meta",
        ),
        (dict(saved=torch.zeros(3, 5)), r"expected saved \[3, N\] of 2 dimensions, the last 6"),
        (dict(saved=torch.zeros(2, 6)), r"expected saved \[3, N\], got \[2, 6\]"),
        (
            dict(upstream=torch.zeros(6, dtype=torch.float64)),
            r"expected upstream \[N\].*got Double",
        ),
    ],
)
def test_refusals_of_the_ops(change, message):
    logits, labels, weights = arguments()
    given = (
        dict(
            logits=logits,
            labels=labels,
            weights=weights,
            saved=torch.zeros(3, 6),
            upstream=torch.ones(6),
        )
        | change
    )
    z, y, w = given["logits"], given["labels"], given["weights"]
    ops = torch.ops.megatron_tst
    with pytest.raises((ValueError, RuntimeError), match=message):
        if "saved" in change or "upstream" in change:
            ops.multi_hot_ce_gradient(z, y, w, given["saved"], given["upstream"], 0, False)
        else:
            ops.multi_hot_ce_statistics(z, y, w, 0, 33, False)


def test_choice_of_the_kernel(monkeypatch):
    here = extension.choose("auto", "cpu")
    assert here == ("extension" if FOUND.loaded else "torch")
    assert extension.choose("torch", "cpu") == "torch"
    with pytest.raises(ValueError, match="one of auto, extension, torch, got 'fast'"):
        extension.choose("fast", "cpu")
    monkeypatch.setattr(extension, "load", lambda: extension.Extension(False, False, "not built"))
    assert extension.choose("auto", "cuda") == "torch"
    with pytest.raises(
        ValueError,
        match="expected the extension's cuda kernels, got an extension that is not built",
    ):
        extension.choose("extension", "cuda")
    monkeypatch.setattr(
        extension, "load", lambda: extension.Extension(True, False, "CPU kernels, no CUDA kernels")
    )
    assert [extension.choose("auto", device) for device in ("cpu", "cuda")] == [
        "extension",
        "torch",
    ]


@pytest.mark.parametrize(
    "module, said",
    [
        (None, "not built. `pip install --no-build-isolation`"),
        (
            types.SimpleNamespace(torch_version="1.0.0", cuda_architectures=""),
            r"built with torch 1.0.0, this is torch .* Build it again",
        ),
        (
            types.SimpleNamespace(
                torch_version=torch.__version__.split("+")[0], cuda_architectures=""
            ),
            "CPU kernels, no CUDA kernels",
        ),
    ],
)
def test_what_is_said_of_an_extension(monkeypatch, module, said):
    monkeypatch.delattr(megatron_tst, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "megatron_tst._C", module)
    if module is not None:
        monkeypatch.setattr(megatron_tst, "_C", module, raising=False)
    found = extension.load.__wrapped__()
    assert (
        re.search(said, found.description)
        and found.loaded == said.startswith("CPU kernels")
        and not found.cuda
    )


def test_an_extension_that_is_not_there(monkeypatch, tmp_path):
    """A package folder without the file, and no other finder that knows of one."""
    monkeypatch.delattr(megatron_tst, "_C", raising=False)
    monkeypatch.delitem(sys.modules, "megatron_tst._C", raising=False)
    monkeypatch.setattr(megatron_tst, "__path__", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder])
    assert extension.load.__wrapped__().description.startswith("not built. ")


def test_an_extension_that_cannot_be_loaded_is_named(monkeypatch):
    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "megatron_tst._C":
                raise ImportError("_C.so: undefined symbol: _ZN3c10")

    monkeypatch.delattr(megatron_tst, "_C", raising=False)
    monkeypatch.delitem(sys.modules, "megatron_tst._C", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    found = extension.load.__wrapped__()
    assert not found.loaded and re.search(
        "built but not loadable with torch .*undefined symbol.*Build it again", found.description
    )
