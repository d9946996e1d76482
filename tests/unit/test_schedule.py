"""Every raw token exactly once over both phases; a sample's index alone says its phase."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tst.config import TSTConfig, TSTError
from megatron_tst.data import TwoPhaseDataset
from megatron_tst.schedule import RECOVERY, SUPERPOSITION, Schedule


class Stream(torch.utils.data.Dataset):
    """Long samples over the stream 0, 1, 2, ...: token ids are positions in the corpus. Overlaps by one token, as Megatron's do."""

    def __init__(self, count, length):
        self.count, self.length = count, length

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        raw = torch.arange(i * self.length, (i + 1) * self.length + 1)
        return {"tokens": raw[:-1], "labels": raw[1:], "loss_mask": torch.ones(self.length), "dataset_id": i}


def schedule(L, s, batch, t1, t2, superpose="both"):
    return Schedule(s, L, batch, t1, (t1 + t2) * batch, 1 if superpose == "output" else s)


@settings(max_examples=200, deadline=None)
@given(
    L=st.integers(1, 9),
    s=st.integers(1, 7),
    batch=st.integers(1, 4),
    t1=st.integers(0, 6),
    t2=st.integers(1, 9),
    superpose=st.sampled_from(["both", "input", "output"]),
)
def test_every_raw_token_is_read_exactly_once(L, s, batch, t1, t2, superpose):
    plan = schedule(L, s, batch, t1, t2, superpose)
    data = TwoPhaseDataset(Stream(plan.long_samples, plan.long_sample_length), plan, TSTConfig(s, iters=t1, superpose=superpose))
    read = torch.cat([data[i]["tokens"].flatten() for i in range(len(data))])
    assert len(read) == len(read.unique()) == plan.raw_tokens(plan.train_samples)
    # nothing is skipped but the slices that a recovery phase not divisible by s leaves over, fewer than s of them
    left_over = plan.long_samples * plan.long_sample_length - len(read)
    assert left_over == (plan.reserved_samples * plan.raw_per_position - plan.recovery_samples) * L
    assert left_over // L < plan.raw_per_position
    for i in range(len(data)):  # every label is the token that follows in the corpus
        tokens, labels = data[i]["tokens"], data[i]["labels"]
        if superpose == "both" and i < plan.superposition_samples:
            assert (labels[labels >= 0] == (tokens + s)[labels >= 0]).all()
        elif superpose == "input" and i < plan.superposition_samples:
            assert torch.equal(labels, tokens[:, -1] + 1)
        elif i < plan.superposition_samples:
            expected = tokens.unsqueeze(-1) + torch.arange(1, s + 1)
            assert (labels[labels >= 0] == expected[labels >= 0]).all() and (labels[:, 0] >= 0).all()
        else:
            assert torch.equal(labels, tokens + 1)


@settings(max_examples=100, deadline=None)
@given(L=st.integers(1, 50), s=st.integers(1, 16), batch=st.integers(1, 8), t1=st.integers(0, 9), t2=st.integers(1, 9))
def test_raw_tokens_add_up_sample_by_sample(L, s, batch, t1, t2):
    plan = schedule(L, s, batch, t1, t2)
    total = 0
    for consumed in range(plan.train_samples):
        assert plan.raw_tokens(consumed) == total
        assert plan.phase(consumed) == (SUPERPOSITION if consumed < t1 * batch else RECOVERY)
        total += L * (s if consumed < t1 * batch else 1)
    assert plan.raw_tokens(plan.train_samples) == total


def test_paper_accounting():
    """Table 1: 3B, 2^21 tokens a step, s = 6, 6000 of 20000 steps: 104.9B raw tokens."""
    plan = Schedule(6, 4096, 512, 6000, 20000 * 512, 6)
    assert plan.raw_tokens(plan.train_samples) == 2**21 * (6 * 6000 + 14000)


def test_neighbours_of_a_recovery_batch_come_from_different_long_samples():
    plan = schedule(L=4, s=4, batch=8, t1=1, t2=8)
    first_batch = [plan.locate(plan.superposition_samples + j)[0] for j in range(8)]
    assert len(set(first_batch)) == 8


def test_locate_refuses_what_is_outside():
    plan = schedule(2, 2, 2, 1, 1)
    for index in (-1, plan.train_samples):
        with pytest.raises(IndexError, match="expected 0 <= index"):
            plan.locate(index)


def test_too_few_long_samples_are_refused():
    plan = schedule(4, 4, 2, 3, 5)
    with pytest.raises(TSTError, match=rf"expected {plan.long_samples} samples of 16 tokens, got {plan.long_samples - 1}"):
        TwoPhaseDataset(Stream(plan.long_samples - 1, 16), plan, TSTConfig(4, iters=3))


def test_samples_of_another_length_and_foreign_tokens_are_refused():
    plan = schedule(4, 4, 2, 3, 5)
    with pytest.raises(TSTError, match="expected 16 tokens, got 8"):
        TwoPhaseDataset(Stream(99, 8), plan, TSTConfig(4, iters=3))[0]
    with pytest.raises(TSTError, match="below the vocabulary size 100, got 111"):
        TwoPhaseDataset(Stream(99, 16), plan, TSTConfig(4, iters=3), vocab_size=100)[6]


def test_ratio_becomes_iterations():
    args = type("Args", (), dict(train_samples=None, train_iters=20000, global_batch_size=8, seq_length=4))
    assert TSTConfig(6, step_ratio=0.3).schedule(args).superposition_iters == 6000
    args.train_iters = 100
    assert TSTConfig(6, step_ratio=0.29).schedule(args).superposition_iters == 29  # 0.29 * 100 = 28.999999999999996
    args.train_samples, args.train_iters = 800, None
    assert TSTConfig(6, step_ratio=0.25).schedule(args).superposition_samples == 200
