"""multi_hot_cross_entropy against the fp64 reference: losses and every gradient, each kernel, on
one rank and over gloo.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.close import close
from support.losses import IGNORE, draw, grad_of

from megatron_tst import extension
from megatron_tst.ops import chunks, reference, torch_kernel
from megatron_tst.ops import loss as loss_module
from megatron_tst.ops.loss import target_weights
from megatron_tst.ops.names import ABLATIONS, LOSSES, TARGET_WEIGHTINGS

pytestmark = pytest.mark.numeric

_kernel = "auto"


@pytest.fixture(scope="module", params=["torch", "extension"], autouse=True)
def kernel(request):
    """Every test of this file runs with both kernels."""
    global _kernel
    if request.param == "extension" and not extension.load().loaded:
        pytest.skip(f"NOT RUN: the extension is {extension.load().description}")
    _kernel = request.param
    return _kernel


def multi_hot_cross_entropy(logits, labels, weights=None, **options):
    return loss_module.multi_hot_cross_entropy(
        logits, labels, weights, **{"kernel": _kernel} | options
    )


def largest(logits):
    """Of the terms that a position's loss is the sum of."""
    return 1 + logits.float().abs().amax(-1)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighting", TARGET_WEIGHTINGS)
@pytest.mark.parametrize("s", [1, 2, 5, 16])
def test_equals_the_reference(loss, weighting, s):
    logits, labels = draw((6, 5), 50, s, few=7)
    labels[0, 0] = IGNORE
    upstream = torch.randn(6, 5)
    exact = reference.target_weights(weighting, s)
    got, grad = grad_of(
        lambda z: multi_hot_cross_entropy(z, labels, target_weights(weighting, s), loss=loss),
        logits,
        upstream,
    )
    want, want_grad = grad_of(
        lambda z: reference.multi_hot_cross_entropy(z, labels, exact, loss),
        logits.double(),
        upstream,
    )
    assert got.dtype == torch.float32
    close(got, want, 1e-6)  # largest seen 1e-7
    close(grad, want_grad.nan_to_num(), 1e-6)  # largest seen 2e-7


@settings(max_examples=150)
@given(
    n=st.integers(0, 9),
    vocab=st.integers(1, 70),
    s=st.integers(1, 9),
    seed=st.integers(0, 999),
    weighting=st.sampled_from(TARGET_WEIGHTINGS),
    loss=st.sampled_from(LOSSES),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    margin=st.integers(0, 9),
)
def test_any_shape(n, vocab, s, seed, weighting, loss, ignored, dtype, margin):
    wide, labels = draw((n,), vocab + margin, s, seed, ignored, few=vocab)
    logits = wide.to(dtype)[:, margin:]  # rows apart from each other, and not aligned
    upstream, weights = torch.randn(n), target_weights(weighting, s)
    got, grad = grad_of(
        lambda z: multi_hot_cross_entropy(z, labels, weights, loss=loss), logits, upstream
    )
    exact = reference.target_weights(weighting, s)
    want, want_grad = grad_of(
        lambda z: reference.multi_hot_cross_entropy(z, labels, exact, loss),
        logits.double(),
        upstream,
    )
    close(got, want, 3e-6, terms=largest(logits))  # largest seen 2e-7
    want_grad = want_grad.nan_to_num()  # the reference's at rows without a label
    terms = upstream.abs().unsqueeze(-1)
    close(grad, want_grad, 3e-6, terms=terms, rounded=dtype)  # largest seen 2e-7


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_vocabulary_of_several_blocks(dtype, loss):
    """The extension converts 2048 columns at a time: here two blocks and a part of one, with the
    largest logit and labels in each.
    """
    vocab = 2 * 2048 + 37
    logits, labels = draw((6,), vocab, 4, ignored=0)
    for i, column in enumerate((0, 2047, 2048, 4095, 4096, vocab - 1)):
        logits[i, column], labels[i, 0] = 20.0, column
        labels[i, 1] = vocab - 1 - column
    logits, upstream = logits.to(dtype), torch.randn(6)
    got, grad = grad_of(lambda z: multi_hot_cross_entropy(z, labels, loss=loss), logits, upstream)
    want, want_grad = grad_of(
        lambda z: reference.multi_hot_cross_entropy(z, labels, loss=loss), logits.double(), upstream
    )
    close(got, want, 3e-6, terms=largest(logits))  # largest seen 7e-8
    terms = upstream.abs().unsqueeze(-1)
    close(grad, want_grad, 3e-6, terms=terms, rounded=dtype)  # largest seen 7e-7


@pytest.mark.parametrize("loss", [*LOSSES, *ABLATIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_chunks_of_rows(monkeypatch, dtype, loss):
    """The torch kernel takes as many rows at once as fit into its memory; the last chunk is
    shorter.
    """
    logits, labels = draw((4, 5), 50, 3, few=9)
    logits, upstream = logits.to(dtype), torch.randn(4, 5)

    def run():
        return grad_of(
            lambda z: multi_hot_cross_entropy(z, labels, loss=loss, kernel="torch"),
            logits,
            upstream,
        )

    whole = run()
    monkeypatch.setitem(torch_kernel.TORCH_KERNEL, "cpu", 3 * 50 * 4)
    assert len(list(torch_kernel.row_chunks(logits.view(20, 50)))) == 7
    for some, other in zip(run(), whole):
        close(some, other, 1e-6)  # largest seen 2e-9
    exact, _ = grad_of(
        lambda z: reference.multi_hot_cross_entropy(z, labels, loss=loss), logits.double(), upstream
    )
    close(run()[0], exact, 1e-6)  # largest seen 6e-8


def test_gradcheck_of_the_reference():
    """The oracle itself: its gradient is that of its value."""
    logits, labels = draw((3,), 9, 4, few=4)
    for loss in LOSSES:
        weights = reference.target_weights("power-law", 4)
        assert torch.autograd.gradcheck(
            lambda z: reference.multi_hot_cross_entropy(z, labels, weights, loss),
            logits.double().requires_grad_(),
        )


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double:UserWarning")
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_of_the_op(loss):
    """As far as fp32 goes: differences over 0.02 in a logit."""
    logits, labels = draw((3,), 9, 4, few=4, scale=1.0)
    weights = target_weights("power-law", 4)
    op = lambda z: multi_hot_cross_entropy(z, labels, weights, loss=loss)  # noqa: E731
    assert torch.autograd.gradcheck(op, logits.requires_grad_(), eps=1e-2, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_gradient_is_the_fp32_one_rounded_once(dtype, loss):
    logits, labels = draw((4, 8), 333, 6)
    logits = logits.to(dtype)
    upstream = 1e-3 * torch.randn(
        4, 8
    )  # scaled before rounding: a bf16 gradient of 1/s first would lose this
    got, grad = grad_of(lambda z: multi_hot_cross_entropy(z, labels, loss=loss), logits, upstream)
    want, want_grad = grad_of(
        lambda z: multi_hot_cross_entropy(z, labels, loss=loss), logits.float(), upstream
    )
    assert torch.equal(got, want) and grad.dtype == dtype and torch.equal(grad, want_grad.to(dtype))


@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, 8), (torch.float16, 11)])
def test_ties_round_to_even(dtype, bits):
    """Two equal logits: the column without the label gets upstream / 2, here halfway between two
    numbers of the dtype.
    """
    upstream = 2 * (1 + torch.arange(1, 16, 2) * 2.0**-bits)
    _, grad = grad_of(
        lambda z: multi_hot_cross_entropy(z, torch.zeros(8, 1, dtype=torch.int64)),
        torch.ones(8, 2).to(dtype),
        upstream,
    )
    assert torch.equal(grad[:, 1], (upstream / 2).to(dtype)) and torch.equal(
        grad[:, 0], -(upstream / 2).to(dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_label_is_megatrons_cross_entropy(megatron, dtype):
    """Bit for bit with the torch kernel; the extension's exp is another one, within an ulp."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits, labels = draw((16, 4), 1000, 1, ignored=0)
    logits, upstream = logits.to(dtype), torch.randn(16, 4)
    got, grad = grad_of(lambda z: multi_hot_cross_entropy(z, labels), logits, upstream)
    # a clone: Megatron's overwrites fp32 logits
    want, want_grad = grad_of(
        lambda z: vocab_parallel_cross_entropy(z.clone(), labels.squeeze(-1)), logits, upstream
    )
    if _kernel == "torch":
        assert torch.equal(got, want) and torch.equal(grad, want_grad)
    else:
        close(got, want, 1e-6)  # largest seen 2e-8
        # either is rounded to the dtype, so that they can be an ulp apart
        # largest seen 2e-7
        close(grad, want_grad, 1e-6, terms=upstream.abs().unsqueeze(-1), rounded=dtype, roundings=2)


def found_inf(grad):
    """What Megatron's gradient scaler asks of a gradient (core/optimizer/optimizer.py)."""
    found = torch.zeros(1)
    torch._amp_foreach_non_finite_check_and_unscale_([grad.float()], found, torch.ones(1))
    return bool(found.item())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("s", [1, 4])
@pytest.mark.parametrize("dtype, upstream", [(torch.float16, 2.0**19), (torch.bfloat16, 3.4e38)])
def test_a_gradient_too_large_for_its_dtype_is_infinite(megatron, dtype, upstream, s, inplace):
    """Not the dtype's largest number: a loss scale that is too large must be found. One label:
    where Megatron's own is infinite.
    """
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits, labels = draw((8, 8), 40, s, ignored=0, scale=8.0)
    labels[:4] = labels[:4, :, :1]  # one token s times: as large as with one label
    logits = logits.to(dtype)
    scale = torch.where(torch.arange(8) % 2 == 0, upstream, 1.0).expand(
        8, 8
    )  # the other columns of rows stay small
    _, grad = grad_of(
        lambda z: multi_hot_cross_entropy(z * 1.0, labels, inplace_backward=inplace), logits, scale
    )
    _, exact = grad_of(
        lambda z: reference.multi_hot_cross_entropy(z, labels), logits.double(), scale.double()
    )
    limit = torch.finfo(dtype).max * (
        1 + torch.finfo(dtype).eps / 4
    )  # what is larger is rounded up
    clear = (exact.abs() / limit - 1).abs() > 2e-5
    overflows = exact.abs() > limit
    assert overflows[:4].sum() > 8 and not overflows[:, 1::2].any()
    assert (
        torch.equal(grad.isinf()[clear], overflows[clear])
        and (grad * exact.sign())[overflows & clear].min() == torch.inf
    )
    assert found_inf(grad) and not found_inf(grad[:, 1::2])
    if s == 1:
        _, stock = grad_of(
            lambda z: vocab_parallel_cross_entropy(z.clone(), labels.squeeze(-1)), logits, scale
        )
        assert torch.equal(grad.isinf()[clear], stock.isinf()[clear])


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["logit", "upstream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_reaches_the_gradient(megatron, dtype, where, bad):
    """A logit that overflowed in fp16, or a gradient that came in as such: found, and in the rows
    where Megatron's own loss has it.
    """
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits, labels = draw((6, 3), 3000, 1, ignored=0)  # columns of more than one block
    logits, upstream = logits.to(dtype), torch.ones(6, 3)
    (logits[2, 1] if where == "logit" else upstream[2])[1] = bad
    _, stock = grad_of(
        lambda z: vocab_parallel_cross_entropy(z.clone(), labels.squeeze(-1)), logits, upstream
    )
    rows = ~stock.isfinite().all(-1)
    assert rows.nonzero().tolist() == [[2, 1]]
    for loss in LOSSES:
        bags = torch.cat([labels, labels.roll(1, 0)], -1) if where == "logit" else labels
        got, grad = grad_of(lambda z: multi_hot_cross_entropy(z, bags, loss=loss), logits, upstream)
        assert torch.equal(~grad.isfinite().all(-1), rows) and found_inf(grad)
        assert got[2, 1].isfinite() == (where == "upstream")


def test_logits_are_untouched_unless_asked():
    logits, labels = draw((8,), 40, 3)
    before = logits.clone()
    _, out_of_place = grad_of(lambda z: multi_hot_cross_entropy(z, labels), logits, torch.ones(8))
    assert torch.equal(logits, before)
    leaf = logits.clone().requires_grad_()
    inner = leaf * 1.0
    multi_hot_cross_entropy(inner, labels, inplace_backward=True).sum().backward()
    assert torch.equal(leaf.grad, out_of_place) and torch.equal(
        inner.detach(), out_of_place
    )  # the memory became the gradient


def test_in_place_backward_runs_once():
    logits, labels = draw((4,), 10, 2)
    loss = multi_hot_cross_entropy(
        logits.requires_grad_() * 1.0, labels, inplace_backward=True
    ).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="overwritten by the first backward"):
        loss.backward()
    twice = multi_hot_cross_entropy(logits * 1.0, labels).sum()
    twice.backward(retain_graph=True)
    twice.backward()


def test_row_gradients_sum_to_zero_for_partly_ignored_bags():
    logits, labels = draw((200,), 64, 4, ignored=0.6)
    _, grad = grad_of(
        lambda z: multi_hot_cross_entropy(z, labels, target_weights("power-law", 4)),
        logits,
        torch.ones(200),
    )
    close(grad.double().sum(-1), torch.zeros(200), 1e-6, terms=1)  # largest seen 3e-7


def test_duplicates_count_with_multiplicity():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    bag = torch.tensor([[2, 2, 0, 2]])
    _, grad = grad_of(lambda z: multi_hot_cross_entropy(z, bag), logits, torch.ones(1))
    close(grad, logits.softmax(-1) - torch.tensor([[0.25, 0.0, 0.75]]), 1e-6)  # largest seen 5e-8
    # as a set for mce-alt
    once = multi_hot_cross_entropy(logits, torch.tensor([[2, 0]]), loss="mce-alt")
    close(multi_hot_cross_entropy(logits, bag, loss="mce-alt"), once, 1e-6)


def test_order_in_a_bag_matters_only_with_weights():
    logits, labels = draw((50,), 30, 4, ignored=0)
    flipped = labels.flip(-1)
    for loss in LOSSES:
        a, b = (multi_hot_cross_entropy(logits, y, loss=loss) for y in (labels, flipped))
        close(a, b, 1e-6)  # largest seen 5e-8
    a, b = (
        multi_hot_cross_entropy(logits, y, target_weights("power-law", 4))
        for y in (labels, flipped)
    )
    assert (a - b).abs().max() > 0.1


def test_fully_ignored_rows_are_exactly_zero():
    logits, labels = draw((5,), 20, 3)
    labels[2] = IGNORE
    for loss in LOSSES:
        got, grad = grad_of(
            lambda z: multi_hot_cross_entropy(z, labels, loss=loss), logits, torch.ones(5)
        )
        assert got[2] == 0 and (grad[2] == 0).all() and got[[0, 1, 3, 4]].all()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_loss_get_exact_zeros_whatever_their_logits_are(dtype, loss, bad):
    """No valid label, or an upstream of 0: a masked position."""
    logits, labels = draw((4,), 20, 3, ignored=0)
    labels[1], upstream = IGNORE, torch.tensor([1.0, 1.0, 0.0, 1.0])
    logits[1:3, 7] = bad
    got, grad = grad_of(
        lambda z: multi_hot_cross_entropy(z, labels, loss=loss), logits.to(dtype), upstream
    )
    assert got[1] == 0 and not grad[1:3].any()
    assert grad.isfinite().all() and grad[[0, 3]].any(-1).all()


def test_a_nan_row_stays_alone_and_padded_columns_get_zero():
    logits, labels = draw((5,), 20, 3, ignored=0)
    labels.clamp_(max=15)
    logits[:, 16:] = -torch.inf
    logits[1, 0] = torch.nan
    for loss in LOSSES:
        got, grad = grad_of(
            lambda z: multi_hot_cross_entropy(z, labels, loss=loss), logits, torch.ones(5)
        )
        assert got.isnan().tolist() == [False, True, False, False, False]
        assert (grad[[0, 2, 3, 4], 16:] == 0).all() and grad[[0, 2, 3, 4]].isfinite().all()


def test_large_logits_are_finite_and_shifts_do_not_matter():
    logits, labels = draw((20,), 30, 3)
    a = multi_hot_cross_entropy(logits, labels)
    close(a, multi_hot_cross_entropy(logits + 100.0, labels), 1e-6, terms=100)  # largest seen 8e-8
    for loss in LOSSES:
        assert multi_hot_cross_entropy(1e4 * logits, labels, loss=loss).isfinite().all()


def test_floor_is_the_entropy_of_the_bag():
    labels = torch.tensor([[0, 1, 2, 3], [5, 5, 6, 6]])
    target = torch.zeros(2, 8).scatter_add_(-1, labels, torch.full((2, 4), 0.25))
    best = multi_hot_cross_entropy(target.log().clamp_min(-60), labels)
    close(best, [math.log(4), math.log(2)], 1e-6)
    logits = torch.randn(2, 8)
    assert (multi_hot_cross_entropy(logits, labels) >= best).all()
    alt = multi_hot_cross_entropy(logits, labels[:1].expand(2, 4), loss="mce-alt")
    assert (
        alt <= multi_hot_cross_entropy(logits, labels[:1].expand(2, 4)) - math.log(4) + 1e-6
    ).all()  # Jensen


@pytest.mark.parametrize("weighting", TARGET_WEIGHTINGS)
def test_mean_over_positions_is_the_papers_average_where_every_bag_is_full(weighting):
    logits, labels = draw((4, 16), 100, 5, ignored=0)
    exact = reference.target_weights(weighting, 5)
    got = multi_hot_cross_entropy(logits, labels, target_weights(weighting, 5)).double().mean()
    close(got, reference.paper_loss(logits, labels, exact), 1e-6)  # largest seen 9e-8


def test_difference_from_the_papers_average_with_one_extra_token():
    """Only the last bag's lone label weighs more: as much as a whole bag, where the paper's average
    gives it 1/s of one.
    """
    logits, labels = draw((2, 64), 100, 4, ignored=0)
    labels[:, -1, 1:] = IGNORE
    ours, theirs = (
        multi_hot_cross_entropy(logits, labels).double(),
        reference.paper_loss(logits, labels),
    )
    assert 0 < abs(ours.mean() - theirs) < 0.1
    # largest seen 4e-9
    close(ours[:, :-1].mean(), reference.paper_loss(logits[:, :-1], labels[:, :-1]), 1e-6)


def test_first_token_weighting_is_next_token_loss_of_the_bags_first_token(megatron):
    logits, labels = draw((30,), 50, 4, ignored=0)
    got = multi_hot_cross_entropy(logits, labels, target_weights("first-token", 4))
    assert torch.equal(got, multi_hot_cross_entropy(logits, labels[:, :1]))


def test_scale_of_the_weights_drops_out():
    logits, labels = draw((30,), 50, 4)
    weights = target_weights("power-law", 4)
    for loss in LOSSES:
        a, b = (
            multi_hot_cross_entropy(logits, labels, w, loss=loss) for w in (weights, 1000 * weights)
        )
        close(a, b, 1e-6)
        assert torch.equal(multi_hot_cross_entropy(logits, labels, weights.double(), loss=loss), a)


def test_fitted_weights_are_the_papers():
    assert (
        target_weights("fitted-power-law", 4) / target_weights("fitted-power-law", 4).sum()
    ).tolist() == pytest.approx([0.293, 0.247, 0.233, 0.227], abs=6e-4)


@pytest.mark.parametrize(
    "weighting, g",
    [
        ("uniform", [1, 1, 1]),
        ("power-law", [1, 1 / 2, 1 / 3]),
        ("exponential", [1, math.exp(-1), math.exp(-2)]),
        ("first-token", [1, 0, 0]),
        ("fitted-power-law", [4.98, 3.63 + 1.35 / 2**1.25, 3.63 + 1.35 / 3**1.25]),
    ],
)
def test_weights_of_places(weighting, g):
    got = target_weights(weighting, 3)
    assert got.dtype == torch.float32 and got.tolist() == pytest.approx(g, rel=1e-7)
    assert target_weights(weighting, 3) is got  # a copy to a GPU would wait for it
    if weighting == "fitted-power-law":  # made in fp64, rounded once
        want = reference.target_weights(weighting, 1000)
        assert torch.equal(target_weights(weighting, 1000), want.float())


def test_a_group_of_one_gathers_nothing():
    logits, labels = draw((6, 5), 50, 3)
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)  # no collective could work with it
    for loss in (*LOSSES, *ABLATIONS):
        got, want = (
            loss_module.multi_hot_cross_entropy(
                logits=logits, labels=labels, weights=torch.ones(3), loss=loss, tp_group=group
            )
            for group in (alone, None)
        )
        assert torch.equal(got, want)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_other_column(loss):
    """A stride of two within the row."""
    wide, labels = draw((4,), 60, 2, ignored=0, few=30)

    def run(columns):
        return grad_of(
            lambda z: multi_hot_cross_entropy(columns(z), labels, loss=loss), wide, torch.ones(4)
        )

    got, want = run(lambda z: z[:, ::2]), run(lambda z: z[:, ::2].contiguous())
    assert all(map(torch.equal, got, want))


def test_strided_rows_and_leading_dimensions():
    wide = torch.randn(6, 3, 77)
    labels = torch.randint(0, 50, (6, 3, 2))
    view = wide[..., 5:55]  # row stride 77, unaligned start
    assert torch.equal(
        multi_hot_cross_entropy(view, labels), multi_hot_cross_entropy(view.contiguous(), labels)
    )
    assert multi_hot_cross_entropy(view.transpose(0, 1), labels.transpose(0, 1)).shape == (3, 6)


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_of_one_number(loss):
    """Columns that share their memory: a stride of 0 within the row."""
    wide, labels = torch.randn(4, 60), torch.randint(0, 50, (4, 2))

    def run(repeat):
        options = dict(loss=loss, inplace_backward=True)
        return grad_of(
            lambda z: multi_hot_cross_entropy(repeat(z[:, :1]), labels, **options),
            wide,
            torch.randn(4, generator=torch.Generator().manual_seed(1)),
        )

    got, want = run(lambda z: z.expand(4, 50)), run(lambda z: z.repeat(1, 50))
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(labels=torch.zeros(4, dtype=torch.int64)),
            "leading sizes of logits .* labels.unsqueeze",
        ),
        (
            dict(labels=torch.zeros(3, 2, dtype=torch.int64)),
            r"got labels \(3, 2\) and logits \(4, 10\)",
        ),
        (
            dict(labels=torch.zeros(5, 2, dtype=torch.int64)),
            r"got labels \(5, 2\) and logits \(4, 10\)",
        ),
        (dict(labels=torch.zeros(4, 0, dtype=torch.int64)), "S >= 1"),
        (
            dict(labels=torch.zeros(4, 2, dtype=torch.int32)),
            "expected int64 labels, got torch.int32",
        ),
        (dict(labels=torch.full((4, 2), 10)), "expected labels in 0..9 or -100, got 10"),
        (dict(labels=torch.full((4, 2), -1)), "expected labels in 0..9 or -100, got -1"),
        (
            dict(logits=torch.zeros(4, 10, dtype=torch.float64)),
            "fp32, bf16 or fp16, got torch.float64",
        ),
        (
            dict(logits=torch.zeros(4, 0)),
            r"V/tp >= 1\] in fp32, bf16 or fp16, got torch.float32 \(4, 0\)",
        ),
        (
            dict(labels=torch.zeros(4, 2, dtype=torch.int64, device="meta")),
            "labels on the device of the logits, cpu, got meta",
        ),
        (dict(weights=torch.ones(3)), r"expected weights \[2\], one for .*, got \(3,\)"),
        (dict(weights=torch.ones(1)), r"expected weights \[2\], one for .*, got \(1,\)"),
        (
            dict(
                logits=torch.zeros(4, 5, 10),
                labels=torch.zeros(4, 5, 2, dtype=torch.int64),
                weights=torch.ones(3),
            ),
            r"expected weights \[2\]",
        ),
        (dict(weights=torch.tensor([1.0, -1.0])), "weights >= 0"),
        (dict(weights=torch.zeros(2)), "one of them positive"),
        (dict(loss="mse"), "one of .*mce.*got 'mse'"),
        (dict(kernel="fast"), "got 'fast'"),
        (
            dict(loss="bce", kernel="extension"),
            "expected kernel 'auto' or 'torch' with loss 'bce', got 'extension'. It is an ablation",
        ),
    ],
)
def test_refusals(change, message):
    call = dict(logits=torch.zeros(4, 10), labels=torch.zeros(4, 2, dtype=torch.int64)) | change
    logits, labels = call.pop("logits"), call.pop("labels")
    with pytest.raises(ValueError, match=message):
        multi_hot_cross_entropy(logits, labels, **call)


# --- over a vocabulary split across ranks ---


def rank_compares_with_the_whole(vocab, s, loss, weighting, which, dtype_name):
    """One rank of a group: loss and this shard's gradient against the whole op."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    logits, labels = draw((3, 7), vocab, s, seed=5, few=vocab if which == "any" else 6)
    if which == "last":
        labels = torch.where(
            labels >= 0, vocab - 1 - labels, labels
        )  # every label on the last rank
    if which == "padded":
        logits[
            ..., -(vocab // size) - 1 :
        ] = -torch.inf  # the last rank holds padding alone, the one before it some
    dtype = getattr(torch, dtype_name)
    logits = logits.to(dtype)
    upstream, weights = torch.randn(3, 7), target_weights(weighting, s)
    shard = logits.chunk(size, -1)[rank]
    got, grad = grad_of(
        lambda z: multi_hot_cross_entropy(z, labels, weights, tp_group=dist.group.WORLD, loss=loss),
        shard,
        upstream,
    )
    want, want_grad = grad_of(
        lambda z: multi_hot_cross_entropy(z, labels, weights, loss=loss), logits, upstream
    )
    want_grad = want_grad.chunk(size, -1)[rank]
    close(got, want, 1e-6)  # largest seen 1e-7
    terms = upstream.abs().unsqueeze(-1)
    close(grad, want_grad, 4e-6, terms=terms, rounded=dtype, roundings=2)  # largest seen 9e-7
    everywhere = [torch.empty_like(got) for _ in range(size)]
    dist.all_gather(everywhere, got)
    assert all(torch.equal(got, other) for other in everywhere)  # the same bits on every rank


def rank_sweep(size, kernel):
    global _kernel
    _kernel = kernel
    for loss in LOSSES:
        for which in ("any", "first", "last", "padded"):
            for weighting in ("uniform", "power-law"):
                rank_compares_with_the_whole(12 * size, 5, loss, weighting, which, "float32")
    rank_compares_with_the_whole(12 * size, 5, "mce", "uniform", "any", "bfloat16")
    rank_compares_with_the_whole(13 * size, 1, "mce", "uniform", "any", "float32")


@pytest.mark.parametrize("size", [2, 4])
def test_vocabulary_split_over_ranks_equals_the_whole(fork_server, size, kernel):
    fork_server.call(rank_sweep, size, kernel, nproc=size)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_that_share_their_memory(loss, inplace):
    """Expanded logits: each row has a gradient of its own, which must not be written over
    another's.
    """
    _, labels = draw((4,), 50, 3, ignored=0)
    one, upstream = torch.randn(1, 50), torch.randn(4)

    def run(z):
        options = dict(loss=loss, inplace_backward=inplace)
        return multi_hot_cross_entropy(z.expand(4, 50), labels, **options)

    got, grad = grad_of(run, one, upstream)
    want, want_grad = grad_of(
        lambda z: reference.multi_hot_cross_entropy(z.expand(4, 50), labels, loss=loss),
        one.double(),
        upstream,
    )
    close(got, want, 1e-6)  # largest seen 1e-7
    close(grad, want_grad, 1e-6)  # largest seen 1e-7


def test_statistics_are_gathered_in_fp32_whatever_the_default_type(megatron):
    local = torch.randn(4, 7)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = loss_module.of_all_ranks(local, torch.distributed.group.WORLD)
    finally:
        torch.set_default_dtype(before)
    assert got.dtype == torch.float32 and torch.equal(got, local.unsqueeze(0))


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_go_over_rows_that_lie_apart(loss):
    """inplace_backward saves the memory of the gradient, for a part of each row too."""
    wide, labels = draw((4,), 60, 3, ignored=0, few=53)
    leaf = wide.clone().requires_grad_()
    logits = (leaf * 1)[:, 7:]
    multi_hot_cross_entropy(logits, labels, loss=loss, inplace_backward=True).sum().backward()
    assert torch.equal(logits.detach(), leaf.grad[:, 7:]) and not leaf.grad[:, :7].any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_in_place_is_the_gradient(loss, dtype):
    """Bit for bit: every logit is read before its gradient is written over it."""
    logits, labels = draw((4,), 50, 3, ignored=0)
    grads = []
    for inplace in (False, True):
        leaf = logits.to(dtype).requires_grad_()
        options = dict(loss=loss, inplace_backward=inplace)
        multi_hot_cross_entropy(leaf * 1, labels, **options).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads) and (grads[0] < 0).any(-1).all()


def test_one_position_without_leading_dimensions():
    logits, labels = draw((1,), 50, 3, ignored=0)
    assert torch.equal(
        multi_hot_cross_entropy(logits[0], labels[0]), multi_hot_cross_entropy(logits, labels)[0]
    )


@pytest.mark.parametrize(
    "logits, labels, message",
    [
        (torch.tensor(1.0), torch.zeros(1, dtype=torch.int64), "expected logits"),
        (torch.zeros(2, 3, 0), torch.zeros(2, 3, 1, dtype=torch.int64), "expected logits"),
        (torch.zeros(2, 3, 5), torch.zeros(2, 3, 0, dtype=torch.int64), "expected labels"),
        (torch.zeros(5), torch.tensor(3), "expected labels"),
    ],
)
def test_sizes_of_nothing_are_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        multi_hot_cross_entropy(logits, labels)


def test_there_is_no_second_derivative():
    """An error, not the derivative of a gradient that autograd takes for a constant."""
    logits, labels = draw((4,), 50, 3, ignored=0)
    leaf = logits.requires_grad_()
    loss = multi_hot_cross_entropy(leaf, labels).square().sum()
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


@pytest.mark.parametrize(
    "device, row_bytes, rows",
    [
        ("cpu", 30, 3),
        ("cuda", 30, 33),
        ("meta", 30, 3),
        ("cpu", 60, 1),
        ("cpu", 101, 1),
        ("cpu", 1, 100),
        ("cpu", 0, 100),
    ],
)
def test_rows_of_a_chunk(device, row_bytes, rows):
    assert chunks.rows_of({"cpu": 100, "cuda": 1000}, device, row_bytes) == rows


def test_sizes_of_chunks():
    """Enough rows for whole matrix products, little beside a GPU's memory or a cache."""
    for sizes in (chunks.TORCH_KERNEL, chunks.LINEAR_LOSS):
        assert 1 << 20 <= sizes["cpu"] <= 64 << 20 and 1 << 28 <= sizes["cuda"] <= 1 << 30
