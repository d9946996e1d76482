"""The losses on six rows that plain Python works out: the fp64 reference, the torch kernel and the
ablations on shards of a vocabulary.
"""

import math

import pytest
import torch
from support.close import close
from support.losses import IGNORE, grad_of

from megatron_tst import extension
from megatron_tst.ops import reference, torch_kernel
from megatron_tst.ops.ablations import BagAblation
from megatron_tst.ops.loss import KERNELS, multi_hot_cross_entropy, of_all_ranks
from megatron_tst.ops.names import ABLATIONS, LOSSES

pytestmark = pytest.mark.numeric

RANKS, COLUMNS, V = 2, 5, 10  # two ranks of five columns
WEIGHTS = torch.tensor([0.25, 0.5, 0.125])  # their sum is not 1, nor is any of them
# Numbers that bf16 has. 1 and -1 are where the hinge's slope jumps.
LOGITS = torch.tensor(
    [
        [0.5, -0.25, -1.0, 2.0, 0.0, 0.75, -1.5, 1.0, 0.25, -0.5],
        [1.25, 0.5, -2.0, 0.0, 0.75, -0.75, 1.5, -0.25, 0.5, 2.0],
        [-0.5, 0.25, 1.75, -1.25, 0.5, 1.5, 0.0, -0.75, 2.0, 0.25],
        [-torch.inf, 0.25, -0.5, 1.0, 2.0, 0.0, -1.75, 0.5, 1.25, -0.25],
        [0.75, -0.5, 1.5, 0.25, -1.25, *[-torch.inf] * 5],  # a rank of padding alone
        [2.0, 1.5, -0.25, 0.5, 0.0, -1.0, 0.25, 1.25, -0.5, 0.75],
    ]
)
LABELS = torch.tensor(
    [
        [7, 7, 1],
        [0, 9, 0],
        [IGNORE, 5, 0],  # the first column of either rank
        [IGNORE, IGNORE, IGNORE],
        [2, 3, 4],
        [8, IGNORE, 8],
    ]
)
UPSTREAM = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5, 0.25])


def row_by_hand(z, bag, loss):
    """-> the loss of a row, and its gradient at each logit."""
    pairs = [(label, weight) for label, weight in zip(bag, WEIGHTS.tolist()) if label != IGNORE]
    if not pairs:
        return 0.0, [0.0] * V
    total = sum(math.exp(x) for x in z)
    p = [math.exp(x) / total for x in z]
    if loss == "mce":  # the mean of single cross entropies
        mass = sum(weight for _, weight in pairs)
        value = sum(-weight / mass * math.log(p[label]) for label, weight in pairs)
        taken = [sum(w for label, w in pairs if label == v) / mass for v in range(V)]
        return value, [p[v] - taken[v] for v in range(V)]
    largest = max(weight for _, weight in pairs)
    t = [max([w / largest for label, w in pairs if label == v], default=0) for v in range(V)]
    if loss == "mce-alt":  # the probability that the token is one of the bag's
        inside = sum(t[v] * p[v] for v in range(V))
        return -math.log(inside), [p[v] - t[v] * p[v] / inside for v in range(V)]
    value, gradient = 0.0, []
    for v in range(V):  # "is v in the bag?" A logit of -inf has said no
        if loss == "bce":
            yes = math.log1p(math.exp(-z[v])) if t[v] else 0.0
            no, slope = math.log1p(math.exp(z[v])), 1 / (1 + math.exp(-z[v])) - t[v]
        else:
            yes, no = max(0.0, 1 - z[v]) if t[v] else 0.0, max(0.0, 1 + z[v])
            slope = (1 - t[v]) * (z[v] > -1) - t[v] * (z[v] < 1)
        value += t[v] * yes + (1 - t[v]) * no
        gradient.append(slope)
    return value, gradient


def by_hand(loss):
    """-> [6], [6, V]"""
    rows = [row_by_hand(z, bag, loss) for z, bag in zip(LOGITS.tolist(), LABELS.tolist())]
    values, gradients = (torch.tensor(x, dtype=torch.float64) for x in zip(*rows))
    return values, gradients * UPSTREAM.double()[:, None]


def test_a_row_that_needs_no_program():
    """Its softmax is 0.1, 0.2, 0.3 and 0.4, all other columns are padding."""
    z = [math.log(x) for x in (0.1, 0.2, 0.3, 0.4)] + [-math.inf] * 6
    value, gradient = row_by_hand(z, [3, IGNORE, 1], "mce")  # weights of 0.25 and 0.125
    want = 2 / 3 * math.log(1 / 0.4) + 1 / 3 * math.log(1 / 0.2)
    assert value == pytest.approx(want)
    assert gradient == pytest.approx([0.1, 0.2 - 1 / 3, 0.3, 0.4 - 2 / 3] + [0] * 6)
    value, gradient = row_by_hand(z, [3, 3, 1], "mce-alt")  # 1 of 3, a quarter of 1: 0.4 + 0.05
    assert value == pytest.approx(-math.log(0.45))
    assert gradient == pytest.approx([0.1, 0.2 - 1 / 9, 0.3, 0.4 - 8 / 9] + [0] * 6)


@pytest.mark.parametrize("loss", LOSSES + ABLATIONS)
@pytest.mark.parametrize("shape", [(2, 3), (6, 1)])
def test_the_reference(loss, shape):
    want, want_grad = by_hand(loss)
    z = LOGITS.double().view(*shape, V).requires_grad_()
    got = reference.multi_hot_cross_entropy(z, LABELS.view(*shape, 3), WEIGHTS, loss)
    (grad,) = torch.autograd.grad((got * UPSTREAM.view(shape)).sum(), z)
    assert got.shape == shape and got.dtype == torch.float64
    close(got.view(6), want, 1e-14)
    if loss == "mce-alt":  # the reference's gradient is not there where nothing is in the bag
        grad = grad.nan_to_num()
    close(grad.view(6, V), want_grad, 1e-14)


@pytest.mark.parametrize("loss", LOSSES + ABLATIONS)
def test_the_reference_without_weights(loss):
    z, labels = LOGITS.view(2, 3, V), LABELS.view(2, 3, 3)
    z, labels = z[:, :2], labels[:, :2, [0, 1, 2, 2]]  # no two sizes are alike
    want = reference.multi_hot_cross_entropy(z, labels, torch.ones(4), loss)
    assert torch.equal(reference.multi_hot_cross_entropy(z, labels, loss=loss), want)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_papers_average(weights):
    """The second place of one bag is empty: its mean is over the five others."""
    z = LOGITS[[0, 1, 2, 5, 1, 0]]
    labels = torch.tensor([[1, 0, 3], [0, IGNORE, 2], [9, 8, 7], [4, 4, 4], [2, 0, 5], [6, 1, 0]])
    places = []
    for place in range(3):
        terms = []
        for row, bag in zip(z.tolist(), labels.tolist()):
            if bag[place] != IGNORE:
                terms.append(math.log(sum(map(math.exp, row))) - row[bag[place]])
        places.append(sum(terms) / len(terms))
    of_places = [1, 1, 1] if weights is None else weights.tolist()
    want = sum(w * p for w, p in zip(of_places, places)) / sum(of_places)
    for shape in ((2, 3), (6, 1)):
        got = reference.paper_loss(z.view(*shape, V), labels.view(*shape, 3), weights)
        assert got.item() == pytest.approx(want, rel=1e-12)
    four = torch.cat([labels, labels[:, :1]], 1)  # a size that no other dimension has
    ones = reference.paper_loss(z.view(2, 3, V), four.view(2, 3, 4), torch.ones(4))
    assert reference.paper_loss(z.view(2, 3, V), four.view(2, 3, 4)) == ones


def test_the_entropy_of_bags():
    labels = [[1, 1, 1, 1], [1, 2, 3, IGNORE], [1, 2, 2, 1], [IGNORE] * 4, [IGNORE, 4, IGNORE, 5]]
    labels = torch.tensor([*labels, [9, IGNORE, IGNORE, 9]]).view(2, 3, 4)

    def entropy(*shares):
        return -sum(x * math.log(x) for x in shares)

    got = reference.bag_entropy(labels, torch.tensor([0.5, 1.5, 0.0, 2.0]))
    want = [0, entropy(1 / 4, 3 / 4), entropy(5 / 8, 3 / 8), 0, entropy(3 / 7, 4 / 7), 0]
    assert got.dtype == torch.float64 and got.shape == (2, 3)
    close(got.view(6), torch.tensor(want, dtype=torch.float64), 1e-14)
    got = reference.bag_entropy(labels)
    want = [0, math.log(3), math.log(2), 0, math.log(2), 0]
    close(got.view(6), torch.tensor(want, dtype=torch.float64), 1e-14)


@pytest.mark.parametrize(
    "weighting, g",
    [
        ("uniform", [1, 1, 1]),
        ("power-law", [1, 1 / 2, 1 / 3]),
        ("exponential", [math.exp(-1), math.exp(-2), math.exp(-3)]),
        ("first-token", [1, 0, 0]),
        ("fitted-power-law", [4.98, 3.63 + 1.35 / 2**1.25, 3.63 + 1.35 / 3**1.25]),
    ],
)
def test_the_weightings_of_the_reference(weighting, g):
    got = reference.target_weights(weighting, 3)
    assert got.dtype == torch.float64 and got.tolist() == pytest.approx(g, rel=1e-14)


def test_the_embedding_of_the_reference():
    table = torch.tensor([[1.0, 2.0], [4.0, 8.0], [10.0, 20.0]])
    got = reference.superposed_embedding(table, torch.tensor([[[0, 1, 1], [2, 2, 1]]]))
    assert got.dtype == torch.float64 and got.tolist() == [[[3, 6], [8, 16]]]


@pytest.fixture
def four_rows_a_chunk(monkeypatch):
    monkeypatch.setitem(torch_kernel.TORCH_KERNEL, "cpu", 4 * COLUMNS * 4)


@pytest.fixture(params=KERNELS)
def step(request):
    """-> a kernel's function, by its name"""
    if request.param == "extension" and not extension.load().loaded:
        pytest.skip("NOT RUN: the extension is not built")
    return KERNELS[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_kernel_on_shards(four_rows_a_chunk, step, loss, dtype):
    want, want_grad = by_hand(loss)
    alt, rest = loss == "mce-alt", (LABELS, WEIGHTS)
    parts = LOGITS.to(dtype).chunk(RANKS, 1)
    local = [step("statistics")(z, *rest, rank * COLUMNS, V, alt) for rank, z in enumerate(parts)]
    got, saved = step("loss")(torch.stack(local), *rest, alt)
    close(got, want, 1e-6)
    for rank, z in enumerate(parts):
        untouched = z.clone()
        rest_of_call = *rest, saved, UPSTREAM, rank * COLUMNS, alt
        grad = step("gradient")(z, *rest_of_call)
        assert torch.equal(z, untouched) and grad.dtype == dtype
        part = want_grad[:, rank * COLUMNS : (rank + 1) * COLUMNS]
        close(grad, part, 1e-6, terms=UPSTREAM.abs()[:, None], rounded=dtype)
        step("gradient_")(untouched, *rest_of_call)
        assert torch.equal(untouched, grad)


def test_the_largest_logit_beside_a_rank_of_padding(step):
    """They are further apart than fp32 reaches. The token is certain: its loss is 0."""
    labels, weights = torch.tensor([[1]]), torch.ones(1)
    parts = torch.tensor([[0.0, 3e38]]), torch.full((1, 2), -torch.inf)
    local = [step("statistics")(z, labels, weights, 2 * r, 4, False) for r, z in enumerate(parts)]
    got, _ = step("loss")(torch.stack(local), labels, weights, False)
    assert got.tolist() == [0]


@pytest.mark.parametrize("at", [0, 2500, 4999])
def test_the_largest_logit_in_one_block_of_several(step, at):
    """e^100 is more than fp32 holds: the others' sums are shifted to this block's peak."""
    z, labels, weights = torch.zeros(1, 5000), torch.tensor([[at, 1000]]), torch.ones(2)
    z[0, at] = 100
    got, _ = step("loss")(
        step("statistics")(z, labels, weights, 0, 5000, False)[None], labels, weights, False
    )
    close(got, torch.tensor([50.0]), 1e-6)  # the mean of 0 and 100


def test_a_label_of_no_weight_on_padding(step):
    """Column 2 is -inf. Its label counts for nothing, and the other's loss is log 2."""
    z, labels = torch.tensor([[1.0, 1.0, -torch.inf]]), torch.tensor([[2, 0]])
    weights = torch.tensor([0.0, 1.0])
    got, saved = step("loss")(
        step("statistics")(z, labels, weights, 0, 3, False)[None], labels, weights, False
    )
    grad = step("gradient")(z, labels, weights, saved, torch.ones(1), 0, False)
    close(got, torch.tensor([math.log(2)]), 1e-6)
    close(grad, torch.tensor([[-0.5, 0.5, 0.0]]), 1e-6)


@pytest.mark.parametrize("loss", ABLATIONS)
def test_the_ablations_on_shards(four_rows_a_chunk, loss):
    want, want_grad = by_hand(loss)
    total, grads = 0, []
    for rank, z in enumerate(LOGITS.chunk(RANKS, 1)):
        z = z.clone().requires_grad_()
        part = BagAblation.apply(z, LABELS, WEIGHTS, None, rank * COLUMNS, V, loss, False)
        grads += torch.autograd.grad((part * UPSTREAM).sum(), z)
        total = total + part.detach()
    close(total, want, 1e-6)
    close(torch.cat(grads, 1), want_grad, 1e-6)


class Group:
    """As much of a process group as the ops ask of one."""

    def __init__(self, size, rank=0):
        self.size, self.rank = lambda: size, lambda: rank


@pytest.mark.parametrize("loss", LOSSES)
def test_a_rank_of_two(monkeypatch, loss):
    """By the public function, whose all-gather is put in by hand."""
    want, want_grad = by_hand(loss)
    parts = LOGITS.chunk(RANKS, 1)
    local = [
        torch_kernel.statistics(z, LABELS, WEIGHTS, rank * COLUMNS, V, loss == "mce-alt")
        for rank, z in enumerate(parts)
    ]

    def gather(into, given, group):
        assert group is group_of_rank and torch.equal(given, local[rank])
        into.copy_(torch.cat(local))

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", gather)
    for rank, z in enumerate(parts):
        group_of_rank = Group(RANKS, rank)
        got, grad = grad_of(
            lambda z: multi_hot_cross_entropy(
                z, LABELS, WEIGHTS, tp_group=group_of_rank, loss=loss, kernel="torch"
            ),
            z,
            UPSTREAM,
        )
        close(got, want, 1e-6)
        close(grad, want_grad[:, rank * COLUMNS : (rank + 1) * COLUMNS], 1e-6)


def test_the_collective_of_the_losses(monkeypatch):
    """Of the group that is given: all ranks' statistics, one after the other."""
    local, other, group = torch.randn(4, 7), torch.randn(4, 7), Group(3)

    def gather(into, given, group):
        groups.append(group)
        into.copy_(torch.cat([given, other, given]))

    groups = []
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", gather)
    got = of_all_ranks(local, group)
    assert groups == [group] and torch.equal(got, torch.stack([local, other, local]))
    assert torch.equal(of_all_ranks(local, None), local[None])


@pytest.mark.parametrize("loss", ABLATIONS)
def test_the_collective_of_the_ablations(monkeypatch, loss):
    def reduce(tensor, group):
        groups.append(group)
        tensor.mul_(3)  # three ranks of the same logits

    groups, group = [], Group(3)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    rest = LABELS, WEIGHTS
    alone = BagAblation.apply(LOGITS, *rest, None, 0, V, loss, False)
    got = BagAblation.apply(LOGITS, *rest, group, 0, V, loss, False)
    assert groups == [group] and torch.equal(got, 3 * alone)


def test_labels_of_a_rank():
    index, owned = torch_kernel.own_labels(torch.tensor([[3, 4, 6, 7, IGNORE]]), 4, 3)
    assert index.tolist() == [[0, 0, 2, 0, 0]]
    assert owned.tolist() == [[False, True, True, False, False]]


@pytest.mark.parametrize(
    "bag, weights, carries",
    [
        ([3, IGNORE], [0.5, 1.0], True),
        ([IGNORE, 3], [0.5, 0.0], False),
        ([IGNORE, IGNORE], [0.5, 1.0], False),
        ([0, IGNORE], [0.25, 0.0], True),
    ],
)
def test_rows_that_carry_a_loss(bag, weights, carries):
    bags = torch.tensor([bag, bag, bag])
    assert torch_kernel.carries_loss(bags, torch.tensor(weights)).tolist() == [carries] * 3


def test_the_weight_of_a_token():
    labels = torch.tensor([[1, IGNORE, 1], [IGNORE] * 3, [IGNORE, 2, 0]])
    got = torch_kernel.weight_of_token(labels, torch.tensor([0.5, 0.25, 0.125]))
    assert got.tolist() == [[1, 0, 0.25], [0, 0, 0], [0, 1, 0.5]]


@pytest.mark.parametrize("wrong", [[7, 12], [12, 7], [-1, 3], [-101, 0], [-99, -1]])
def test_labels_outside_the_vocabulary(wrong):
    fine = [0, 6, IGNORE]
    torch_kernel.check_label_range(torch.tensor([fine, fine]), 7)
    with pytest.raises(ValueError) as refused:
        torch_kernel.check_label_range(torch.tensor([fine, [4, *wrong]]), 7)
    assert str(refused.value) == (
        f"multi_hot_cross_entropy: expected labels in 0..6 or -100, got {wrong[0]}. Check that the "
        "data were tokenised with this vocabulary."
    )


def test_chunks_of_rows(monkeypatch):
    """Rows of five fp32 numbers, 99 bytes a chunk: four rows."""
    monkeypatch.setitem(torch_kernel.TORCH_KERNEL, "cpu", 99)
    got = list(torch_kernel.row_chunks(torch.zeros(9, 5)))
    assert got == [slice(0, 4), slice(4, 8), slice(8, 12)]
