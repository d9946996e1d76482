"""The bag view against the paper's own construction, masks, modes and the entropy floor."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.close import close

import megatron_tst
from megatron_tst.data.bags import bag_entropy, bag_view, ordinary_slice, superposed_sample
from megatron_tst.ops import reference
from megatron_tst.ops.loss import target_weights
from megatron_tst.ops.names import IGNORE

pytestmark = pytest.mark.numeric


def sample(raw, mask=None):
    return {
        "tokens": raw[:-1],
        "labels": raw[1:],
        "loss_mask": torch.ones(len(raw) - 1) if mask is None else mask,
    }


@settings(max_examples=200)
@given(L=st.integers(1, 12), s=st.integers(1, 8), b=st.integers(1, 3), extra=st.integers(1, 12))
def test_bag_view_is_the_papers_label_shift(L, s, b, extra):
    raw = torch.randint(0, 1000, (b, s * L + extra))
    tokens, labels = bag_view(raw, L, s)
    for j in range(L):
        for i in range(s):
            assert (tokens[:, j, i] == raw[:, j * s + i]).all()
            t = (j + 1) * s + i  # Y[b, j, i] = x[b, (j+1)*s + i]
            assert (labels[:, j, i] == (raw[:, t] if t < raw.shape[1] else IGNORE)).all()


def test_last_bag_has_one_label_unless_the_loader_has_more():
    raw = torch.arange(2 * 4 * 3 + 1).view(1, -1)[:, : 4 * 3 + 1]
    assert bag_view(raw, 4, 3)[1][0, -1].tolist() == [12, IGNORE, IGNORE]
    assert bag_view(torch.arange(15).view(1, -1), 4, 3)[1][0, -1].tolist() == [12, 13, 14]
    assert bag_view(torch.arange(99).view(1, -1), 4, 3)[1][0, -1].tolist() == [12, 13, 14]


@pytest.mark.parametrize(
    "raw, message",
    [
        (
            torch.arange(12).view(1, -1),
            r"at least bag_size\*seq_length \+ 1 = 13 tokens a row .* got 12",
        ),
        (torch.arange(13), "expected int64 token ids"),
        (torch.ones(1, 13), "expected int64 token ids"),
        (torch.arange(52).view(1, 2, 26), "expected int64 token ids"),
        (torch.tensor(3), "expected int64 token ids"),
    ],
)
def test_bag_view_refuses(raw, message):
    with pytest.raises(ValueError, match=message):
        bag_view(raw, 4, 3)
    for sizes in ((4, 0), (4, -1), (0, 3), (-1, -3)):
        with pytest.raises(ValueError, match="bag_size >= 1"):
            bag_view(raw, *sizes)


def test_public_names():
    assert megatron_tst.bag_view is bag_view
    for name in megatron_tst.__all__:
        assert getattr(megatron_tst, name) is not None


@pytest.mark.parametrize("s", [1, 2, 5])
def test_sample_view_equals_bag_view(s):
    L = 6
    raw = torch.randint(0, 100, (L * s + 1,))
    got = superposed_sample({**sample(raw), "dataset_id": 7}, L, s, "both", torch.ones(s))
    tokens, labels = bag_view(raw.view(1, -1), L, s)
    assert torch.equal(got["tokens"], tokens[0]) and torch.equal(got["labels"], labels[0])
    assert (
        got["position_ids"].tolist() == list(range(L))
        and got["loss_mask"].tolist() == [1] * L
        and got["dataset_id"] == 7
    )
    assert all(got[key].is_contiguous() for key in ("tokens", "labels", "loss_mask"))


def test_masked_labels_are_ignored_and_a_bag_without_labels_does_not_count():
    L, s = 4, 2
    raw = torch.arange(100, 109)
    mask = torch.ones(8)
    mask[[1, 2, 4]] = 0  # the labels 102, 103 (all of bag 1) and 105
    got = superposed_sample(sample(raw, mask), L, s, "both", torch.ones(s))
    assert got["labels"].tolist() == [[IGNORE, IGNORE], [104, IGNORE], [106, 107], [108, IGNORE]]
    assert got["loss_mask"].tolist() == [0, 1, 1, 1]


def test_places_of_weight_zero_have_no_label():
    got = superposed_sample(sample(torch.arange(9)), 4, 2, "both", target_weights("first-token", 2))
    assert got["labels"].tolist() == [[2, IGNORE], [4, IGNORE], [6, IGNORE], [8, IGNORE]]


def test_input_only_predicts_the_single_token_after_the_bag():
    mask = torch.ones(8)
    mask[3] = 0
    got = superposed_sample(sample(torch.arange(9), mask), 4, 2, "input", torch.ones(2))
    assert got["tokens"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert got["labels"].tolist() == [2, 4, 6, 8] and got["loss_mask"].tolist() == [1, 0, 1, 1]
    assert all(value.is_contiguous() for value in got.values())


def test_output_only_predicts_the_next_bag_from_single_tokens():
    got = superposed_sample(sample(torch.arange(5)), 4, 3, "output", torch.ones(3))
    assert got["tokens"].tolist() == [0, 1, 2, 3]
    assert got["labels"].tolist() == [[1, 2, 3], [2, 3, 4], [3, 4, IGNORE], [4, IGNORE, IGNORE]]
    assert got["loss_mask"].dtype == torch.float32
    assert all(value.is_contiguous() for value in got.values())


def test_the_given_sample_is_left_as_it_was():
    given_ = sample(torch.arange(9))
    before = {key: value.clone() for key, value in given_.items()}
    for mode in ("both", "input", "output"):
        superposed_sample(
            given_, 4 if mode != "output" else 8, 2, mode, target_weights("first-token", 2)
        )
    ordinary_slice(given_, 1, 4)
    assert given_.keys() == before.keys()
    assert all(torch.equal(given_[key], before[key]) for key in before)


def test_ordinary_slices_are_stock_samples():
    raw = torch.arange(13)
    parts = [ordinary_slice({**sample(raw), "dataset_id": 7}, k, 4) for k in range(3)]
    assert all(p["dataset_id"] == 7 and p["loss_mask"].tolist() == [1] * 4 for p in parts)
    assert torch.equal(torch.cat([p["tokens"] for p in parts]), raw[:-1])
    assert torch.equal(torch.cat([p["labels"] for p in parts]), raw[1:])
    assert all(p["position_ids"].tolist() == [0, 1, 2, 3] for p in parts)


@pytest.mark.parametrize(
    "weighting", ["uniform", "power-law", "exponential", "first-token", "fitted-power-law"]
)
def test_bag_entropy(weighting):
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (7, 5, 6))
    labels[torch.rand(labels.shape) < 0.3] = IGNORE
    labels[0, 0] = IGNORE
    got = bag_entropy(labels, target_weights(weighting, 6))
    want = reference.bag_entropy(labels, reference.target_weights(weighting, 6))
    close(got, want, 1e-6)  # largest seen 7e-8
    rows = bag_entropy(labels.flatten(0, 1), target_weights(weighting, 6))  # another dimension
    assert torch.equal(rows, got.flatten())


def test_entropy_of_distinct_labels_is_log_s():
    close(bag_entropy(torch.tensor([[3, 1, 2, 9]]), torch.ones(4)), [math.log(4)], 1e-6)
    assert bag_entropy(torch.tensor([[3, 3, 3, 3]]), torch.ones(4)).item() == 0
