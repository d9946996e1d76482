"""The ablations' losses, bce and hinge, against the fp64 reference and against formulas written
out: values, gradients, shards of the vocabulary.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.close import close
from support.losses import IGNORE, draw, grad_of

from megatron_tst import TSTConfig
from megatron_tst.loop import patch
from megatron_tst.ops import reference
from megatron_tst.ops.loss import multi_hot_cross_entropy, target_weights
from megatron_tst.ops.names import ABLATIONS, TARGET_WEIGHTINGS

pytestmark = [pytest.mark.numeric, pytest.mark.parametrize("loss", ABLATIONS)]


def compare(logits, labels, weighting, loss, upstream):
    s = labels.shape[-1]
    got, grad = grad_of(
        lambda z: multi_hot_cross_entropy(z, labels, target_weights(weighting, s), loss=loss),
        logits,
        upstream,
    )
    exact = reference.target_weights(weighting, s)
    want, want_grad = grad_of(
        lambda z: reference.multi_hot_cross_entropy(z, labels, exact, loss),
        logits.double(),
        upstream,
    )
    assert got.dtype == torch.float32
    close(got, want, 1e-6)  # largest seen 1e-7
    terms = upstream.abs().unsqueeze(-1)
    # largest seen 6e-8
    close(grad, want_grad.nan_to_num(), 3e-6, terms=terms, rounded=logits.dtype)


def off_the_kink(logits):
    """The hinge's slope jumps at 1 and -1: a rounded logit must not lie on the other side of it
    than in fp64.
    """
    return torch.where((logits.abs() - 1).abs() < 1e-3, 0.5, logits)


@settings(max_examples=60)
@given(
    n=st.integers(0, 7),
    vocab=st.integers(1, 70),
    s=st.integers(1, 9),
    seed=st.integers(0, 999),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    weighting=st.sampled_from(TARGET_WEIGHTINGS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equals_the_reference(loss, n, vocab, s, seed, ignored, weighting, dtype):
    logits, labels = draw((n,), vocab, s, seed, ignored, few=max(1, vocab // 2))
    compare(off_the_kink(logits).to(dtype), labels, weighting, loss, torch.randn(n))


def test_the_reference_is_the_formula_written_out(loss):
    """A bag of distinct tokens, equal weights: torch's own multi-label loss for bce, the hinge by
    hand; and its gradient is that of its value.
    """
    logits, labels = torch.randn(5, 9).double(), torch.tensor([[1, 3, 8]]).expand(5, 3)
    hot = torch.zeros(5, 9).double()
    hot[:, [1, 3, 8]] = 1
    if loss == "bce":
        want = F.binary_cross_entropy_with_logits(logits, hot, reduction="none").sum(-1)
    else:
        want = (1 - (2 * hot - 1) * logits).clamp_min(0).sum(-1)
    # largest seen 9e-17
    close(reference.multi_hot_cross_entropy(logits, labels, loss=loss), want, 1e-14)
    weights = reference.target_weights("power-law", 3)
    assert torch.autograd.gradcheck(
        lambda z: reference.multi_hot_cross_entropy(z, labels, weights, loss),
        off_the_kink(logits).requires_grad_(),
    )


def test_start_and_duplicates(loss):
    labels = torch.tensor([[2, 2, 0, 2]])
    at_zero = multi_hot_cross_entropy(torch.zeros(1, 6), labels, loss=loss)
    close(at_zero, [6 * math.log(2) if loss == "bce" else 6], 1e-6)
    logits = torch.randn(1, 6)
    assert torch.equal(
        multi_hot_cross_entropy(logits, labels, loss=loss),
        multi_hot_cross_entropy(logits, torch.tensor([[0, 2]]), loss=loss),
    )


def test_ignored_rows_padding_and_a_nan_stay_alone(loss):
    logits, labels = draw((5,), 20, 3, ignored=0)
    labels.clamp_(max=15)
    labels[2], logits[1, 0], logits[:, 16:] = IGNORE, torch.nan, -torch.inf
    got, grad = grad_of(
        lambda z: multi_hot_cross_entropy(z, labels, loss=loss), logits, torch.ones(5)
    )
    assert (
        got.isnan().tolist() == [False, True, False, False, False]
        and got[2] == 0
        and (grad[2] == 0).all()
    )
    rest = [0, 2, 3, 4]
    assert (grad[rest, 16:] == 0).all() and grad[rest].isfinite().all() and got[[0, 3, 4]].all()


def test_logits_are_untouched_unless_asked(loss):
    logits, labels = draw((8,), 40, 3)
    before = logits.clone()
    _, apart = grad_of(
        lambda z: multi_hot_cross_entropy(z, labels, loss=loss), logits, torch.ones(8)
    )
    assert torch.equal(logits, before)
    inner = logits.requires_grad_() * 1.0
    total = multi_hot_cross_entropy(inner, labels, loss=loss, inplace_backward=True).sum()
    total.backward(retain_graph=True)
    assert torch.equal(inner.detach(), apart)
    with pytest.raises(RuntimeError, match="overwritten by the first backward"):
        total.backward()


@pytest.mark.parametrize("label", [4, -1])
def test_labels_outside_the_vocabulary_are_refused(loss, label):
    with pytest.raises(ValueError, match=f"expected labels in 0..3 or -100, got {label}"):
        multi_hot_cross_entropy(torch.zeros(2, 4), torch.full((2, 1), label), loss=loss)


def test_there_is_no_second_derivative(loss):
    leaf = torch.randn(4, 9).requires_grad_()
    value = multi_hot_cross_entropy(leaf, torch.zeros(4, 1, dtype=torch.int64), loss=loss)
    (grad,) = torch.autograd.grad(value.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_the_extension_is_refused(loss):
    with pytest.raises(
        ValueError, match=f"expected kernel 'auto' or 'torch' with loss '{loss}', got 'extension'"
    ):
        multi_hot_cross_entropy(
            torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int64), loss=loss, kernel="extension"
        )


def test_the_model_trains_with_it(megatron, loss):
    """Through the patch, bags of one included: those must not fall back to Megatron's cross
    entropy.
    """
    from support.models import gpt

    for s in (1, 3):
        logits, labels = torch.randn(8, 2, 96), torch.randint(0, 96, (2, 8, s))
        want = reference.multi_hot_cross_entropy(logits.transpose(0, 1), labels, loss=loss)
        patch.apply(TSTConfig(loss=loss))
        try:
            got = gpt().compute_language_model_loss(labels, logits)
        finally:
            patch.remove()
        close(got, want, 1e-6)  # largest seen 6e-8


def rank_compares_with_the_whole(loss):
    """One rank of a group: its shard's loss and gradient against the fp64 reference of the whole
    vocabulary.
    """
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    for few, weighting in ((None, "uniform"), (6, "power-law"), (None, "power-law")):
        logits, labels = draw(
            (3, 7), 12 * size, 5, seed=5, few=few
        )  # few: every label on the first rank
        logits[..., -3:] = -torch.inf
        labels = labels.masked_fill(labels >= 12 * size - 3, IGNORE)
        logits, upstream = off_the_kink(logits), torch.randn(3, 7)
        want, want_grad = grad_of(
            lambda z: reference.multi_hot_cross_entropy(
                z, labels, reference.target_weights(weighting, 5), loss
            ),
            logits.double(),
            upstream,
        )
        got, grad = grad_of(
            lambda z: multi_hot_cross_entropy(
                z, labels, target_weights(weighting, 5), tp_group=dist.group.WORLD, loss=loss
            ),
            logits.chunk(size, -1)[rank],
            upstream,
        )
        close(got, want, 1e-6)  # largest seen 6e-8
        close(grad, want_grad.nan_to_num().chunk(size, -1)[rank], 1e-6)  # largest seen 5e-8


def test_vocabulary_split_over_ranks(fork_server, loss):
    fork_server.call(rank_compares_with_the_whole, loss, nproc=2)
