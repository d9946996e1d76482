"""Every raw token exactly once over all phases, whoever reads it and however often the run stops; a
sample's index alone says its phase.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tst.config import TSTConfig
from megatron_tst.data.dataset import PhasedDataset
from megatron_tst.errors import TSTError
from megatron_tst.loop.switch import first_end
from megatron_tst.schedule import RECOVERY, SUPERPOSITION, Schedule


class Stream(torch.utils.data.Dataset):
    """Long samples over the stream 0, 1, 2, ...: token ids are positions in the corpus. Overlaps by
    one token, as Megatron's do.
    """

    def __init__(self, count, length):
        self.count, self.length = count, length

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        raw = torch.arange(i * self.length, (i + 1) * self.length + 1)
        return {
            "tokens": raw[:-1],
            "labels": raw[1:],
            "loss_mask": torch.ones(self.length),
            "dataset_id": i,
        }


def dataset(plan, superpose="both"):
    config = TSTConfig(plan.bag_sizes[:-1], iters=plan.samples[:-1], superpose=superpose)
    return PhasedDataset(Stream(plan.long_samples, plan.long_sample_length), plan, config)


@st.composite
def plans(draw):
    """A run: bag sizes (one, or a schedule of them), iterations of each, of recovery, L and the
    global batch.
    """
    superpose = draw(st.sampled_from(["both", "input", "output"]))
    sizes = draw(
        st.one_of(
            st.lists(st.integers(2, 7), min_size=1, max_size=1),
            st.sampled_from([(16, 8, 4), (6, 4), (8, 2), (4, 6, 3), (9, 3)]),
        )
    )
    L, batch = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 4, 6]))
    samples = [draw(st.integers(1, 7)) * batch for _ in sizes]
    recovery = draw(st.integers(1, 9)) * batch
    return Schedule(
        (*sizes, 1), (*samples, recovery), L, batch, single_tokens_in=superpose == "output"
    ), superpose


def read(data, plan, start, stop, dp=1, micro=1):
    """What the ranks of a run read from sample `start` to `stop`, by Megatron's own sampler. ->
    samples
    """
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    for rank in range(dp if stop > start else 0):
        batches = iter(MegatronPretrainingSampler(len(data), start, micro, rank, dp))
        for _ in range((stop - start) // (micro * dp)):
            yield from (data[i] for i in next(batches))


def tokens_of(samples):
    return torch.cat(
        [sample["tokens"].flatten() for sample in samples] or [torch.empty(0, dtype=torch.int64)]
    )


def check_once(tokens, plan, consumed):
    """Each raw token once, as many as the accounting says, and between them no more left out than
    the ends of phases that do not come out even.
    """
    assert len(tokens) == len(tokens.unique()) == plan.raw_tokens(consumed)
    for phase in plan.phases:
        if phase.end > consumed:
            break
        first, length = (
            phase.first_long * plan.long_sample_length,
            phase.long_samples * plan.long_sample_length,
        )
        of_phase = ((tokens >= first) & (tokens < first + length)).sum()
        left = length - int(of_phase)
        assert (
            left
            == (phase.long_samples * phase.pieces - phase.samples) * phase.width * plan.seq_length
            < plan.long_sample_length
        )


@settings(max_examples=200)
@given(plans(), st.data())
def test_every_raw_token_is_read_exactly_once(run, data):
    """Any number of stops, each with a data-parallel size and a micro-batch size of its own."""
    plan, superpose = run
    batch, consumed, tokens = plan.global_batch_size, 0, []
    total = plan.train_samples // batch
    stops = sorted(data.draw(st.sets(st.integers(1, total), max_size=4)) | {total})
    for stop in stops:
        dp = data.draw(st.sampled_from([d for d in range(1, batch + 1) if batch % d == 0]))
        micro = data.draw(
            st.sampled_from([m for m in range(1, batch // dp + 1) if batch // dp % m == 0])
        )
        tokens.append(
            tokens_of(read(dataset(plan, superpose), plan, consumed, stop * batch, dp, micro))
        )
        consumed = stop * batch
    check_once(torch.cat(tokens), plan, consumed)


@settings(max_examples=200)
@given(plans())
def test_every_label_is_what_follows_in_the_corpus(run):
    plan, superpose = run
    data = dataset(plan, superpose)
    for i in range(len(data)):
        sample, phase = data[i], plan.phase_at(i)
        tokens, labels, s = sample["tokens"], sample["labels"], phase.bag_size
        if phase.name == RECOVERY:
            assert torch.equal(labels, tokens + 1)
        elif superpose == "both":
            assert tokens.shape == labels.shape == (plan.seq_length, s)
            assert (labels[labels >= 0] == (tokens + s)[labels >= 0]).all() and (
                labels[:, 0] >= 0
            ).all()
        elif superpose == "input":
            assert torch.equal(labels, tokens[:, -1] + 1)
        else:
            expected = tokens.unsqueeze(-1) + torch.arange(1, s + 1)
            assert (labels[labels >= 0] == expected[labels >= 0]).all() and (
                labels[:, 0] >= 0
            ).all()


@settings(max_examples=200)
@given(plans(), st.data())
def test_moved_boundaries_keep_the_accounting(run, data):
    """Phases ended early while the run goes on (--tst-switch auto), by ranks whose workers have
    fetched ahead.
    """
    plan, superpose = run
    batch, tokens, consumed = plan.global_batch_size, [], 0
    samples = dataset(plan, superpose)
    for _ in range(data.draw(st.integers(1, 3))):
        if consumed == plan.train_samples:
            break
        now = data.draw(st.integers(consumed // batch, plan.train_samples // batch - 1)) * batch
        ahead = data.draw(st.integers(0, 3)) * batch
        phase = plan.phase_at(now)
        tokens.append(tokens_of(read(samples, plan, consumed, now)))
        fetched = min(now + ahead, plan.train_samples)
        tokens.append(
            tokens_of(read(samples, plan, now, fetched))
        )  # as bags of the plan before the change
        consumed = fetched
        if phase.name == RECOVERY:
            break
        end = first_end(plan, phase, now, ahead, set())
        assert end % phase.block == 0 and phase.first_sample + end >= fetched
        if end >= phase.samples:
            continue
        new = plan.ending(phase, end)
        assert (
            new.reads_as(plan, fetched)
            and new.long_samples <= plan.long_samples
            and new.train_samples == plan.train_samples
        )
        plan = new
        samples.follow(plan)
    tokens.append(tokens_of(read(samples, plan, consumed, plan.train_samples)))
    check_once(torch.cat(tokens), plan, plan.train_samples)


@settings(max_examples=300)
@given(plans(), st.data())
def test_reads_as_is_what_is_read(run, data):
    """The short answer against reading both, in runs that differ in the length or the bag size of
    one phase.
    """
    plan, _ = run
    batch, sizes, samples = plan.global_batch_size, list(plan.bag_sizes), list(plan.samples)
    i = data.draw(st.integers(0, len(samples) - 1))
    samples[i] = data.draw(st.integers(1, 9)) * batch
    if i < len(samples) - 1 and data.draw(st.booleans()):
        sizes[i] = data.draw(
            st.sampled_from(
                [s for s in range(2, plan.width + 1) if plan.width % s == 0] or [sizes[i]]
            )
        )
    new = dataclasses.replace(plan, bag_sizes=tuple(sizes), samples=tuple(samples))
    consumed = data.draw(
        st.integers(plan.phases[i].first_sample, min(plan.train_samples, new.train_samples))
    )
    one, other = (
        [(p.name, p.bag_size, long, piece) for p, long, piece in map(x.locate, range(consumed))]
        for x in (plan, new)
    )
    if plan.reads_as(new, consumed):
        assert one == other
    # it may say no where a block happens to be read alike, never before the phase that differs or
    # at its beginning
    else:
        assert one != other or (
            plan.phases[i].pieces > 1 and consumed > plan.phases[i].first_sample
        )
    assert new.reads_as(plan, consumed) == plan.reads_as(new, consumed)


def test_the_fields_of_every_phase():
    """8, 4, then recovery, in batches of 4: by hand. Recovery's stride is all of its long samples,
    so that its batches spread over them; its last long sample is read in part.
    """
    plan = Schedule((8, 4, 1), (4, 12, 20), seq_length=2, global_batch_size=4)
    assert [dataclasses.astuple(phase) for phase in plan.phases] == [
        (SUPERPOSITION, 8, 8, 0, 4, 0, 1, 4),
        (SUPERPOSITION, 4, 4, 4, 12, 4, 2, 4),
        (RECOVERY, 1, 1, 16, 20, 10, 8, 3),
    ]
    assert [phase.end for phase in plan.phases] == [4, 16, 36]
    assert [phase.block for phase in plan.phases] == [4, 8, 24]
    assert [phase.long_samples for phase in plan.phases] == [4, 6, 3]
    assert plan.superposed_phases == plan.phases[:2]
    assert (plan.superposition_samples, plan.recovery_samples, plan.train_samples) == (16, 20, 36)
    assert (plan.long_samples, plan.width, plan.long_sample_length) == (13, 8, 16)
    assert (
        plan.described == "bag size 8 for 1 iterations, bag size 4 for 3 iterations, recovery for 5"
    )


def test_recovery_shorter_than_a_long_sample():
    plan = Schedule((8, 4, 1), (4, 12, 4), seq_length=2, global_batch_size=4)
    assert (plan.phases[2].stride, plan.phases[2].long_samples) == (1, 1)
    assert [plan.locate(index)[1:] for index in range(16, 20)] == [(10, i) for i in range(4)]
    assert [plan.phase_at(consumed).first_sample for consumed in (0, 4, 15, 16, 20)] == [
        0,
        4,
        4,
        16,
        16,
    ]


def test_a_run_of_nothing_has_a_schedule():
    """--train-samples 0, which is refused later with its flag: by checks/refusals.py."""
    plan = Schedule((1,), (0,), seq_length=2, global_batch_size=4)
    assert (plan.phases[0].stride, plan.phases[0].block, plan.long_samples) == (1, 1, 0)
    assert plan.raw_tokens(0) == 0 and plan.phase_at(0) == plan.phases[0]


def test_a_schedule_stays_as_it_is():
    plan = Schedule((8, 4, 1), (4, 12, 4), seq_length=2, global_batch_size=4)
    for part, name in ((plan, "samples"), (plan.phases[0], "stride")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, 1)
    for sizes, samples in (((4, 1), (8,)), ((4, 1), (8, 8, 8))):
        with pytest.raises(AssertionError):
            Schedule(sizes, samples, seq_length=2, global_batch_size=4)
    for width in (6, 9):
        with pytest.raises(AssertionError):
            dataclasses.replace(plan, width=width)
    assert dataclasses.replace(plan, width=16).phases[0].pieces == 2


def test_which_samples_are_alike_in_a_phase_of_another_length():
    """The examples of Phase.samples_as_in."""

    def alike(sizes, one, other, phase):
        ours, theirs = (
            Schedule(sizes, samples, seq_length=2, global_batch_size=2).phases[phase]
            for samples in (one, other)
        )
        assert ours.samples_as_in(theirs) == theirs.samples_as_in(ours)
        return ours.samples_as_in(theirs)

    assert alike((4, 1), (6, 10), (10, 6), 0) == 6
    assert alike((4, 2, 1), (4, 6, 10), (4, 10, 6), 1) == 4
    assert alike((4, 2, 1), (4, 6, 10), (4, 10, 6), 2) == 0
    small, large = (Schedule((4, 2, 1), (8, 16, 8), 2, batch).phases[1] for batch in (2, 4))
    assert small.samples_as_in(large) == large.samples_as_in(small) == 0


def test_reads_as_says_no_from_the_first_sample_that_differs():
    plan = Schedule((4, 2, 1), (4, 4, 8), seq_length=2, global_batch_size=2)

    def answer(consumed, **changes):
        return plan.reads_as(dataclasses.replace(plan, **changes), consumed)

    other = dict(bag_sizes=(4, 4, 1))
    assert [answer(consumed, **other) for consumed in (3, 4, 5, 6)] == [True, True, False, False]
    for changes in (dict(seq_length=3), dict(seq_length=1), dict(width=8)):
        assert [answer(consumed, **changes) for consumed in (0, 1, 16)] == [False] * 3
    assert [answer(consumed) for consumed in (0, 4, 5, 16)] == [True] * 4


def test_reads_as_says_no_where_pieces_move():
    """The example of Schedule.reads_as."""
    plan = Schedule((4, 2, 1), (4, 6, 10), seq_length=2, global_batch_size=2)
    longer = dataclasses.replace(plan, samples=(4, 10, 6))
    answers = [plan.reads_as(longer, consumed) for consumed in (4, 8, 9)]
    assert answers == [longer.reads_as(plan, consumed) for consumed in (4, 8, 9)]
    assert answers == [True, True, False]


def test_superposed_output_reads_one_token_a_position():
    plan = Schedule((4, 1), (8, 8), seq_length=2, global_batch_size=4, single_tokens_in=True)
    assert (plan.width, plan.long_sample_length, plan.long_samples) == (1, 2, 16)
    assert [(p.bag_size, p.width, p.pieces) for p in plan.phases] == [(4, 1, 1), (1, 1, 1)]


def test_a_lengthened_recovery_reads_text_of_its_own():
    plan = Schedule.of(4, 3, 40, 2, 4)
    longer = plan.lengthened(12).lengthened(8)
    assert [phase.name for phase in longer.phases] == [SUPERPOSITION, *[RECOVERY] * 3]
    assert longer.superposed_phases == plan.phases[:1]
    assert (
        longer.reads_as(plan, 40)
        and longer.train_samples == 60
        and longer.superposition_samples == 12
    )
    check_once(tokens_of(read(dataset_of(longer), longer, 0, 60)), longer, 60)


def dataset_of(plan):
    return PhasedDataset(
        Stream(plan.long_samples, plan.long_sample_length), plan, TSTConfig(4, iters=3)
    )


@settings(max_examples=100)
@given(plans())
def test_raw_tokens_add_up_sample_by_sample(run):
    plan, superpose = run
    total = 0
    for consumed in range(plan.train_samples):
        phase = plan.phase_at(consumed)
        assert plan.raw_tokens(consumed) == total
        assert phase.name == (SUPERPOSITION if consumed < plan.superposition_samples else RECOVERY)
        total += plan.seq_length * (1 if superpose == "output" else phase.bag_size)
    assert plan.raw_tokens(plan.train_samples) == total


def test_paper_accounting():
    """Table 1: 3B, 2^21 tokens a step, s = 6, 6000 of 20000 steps: 104.9B raw tokens."""
    plan = Schedule.of(6, 6000, 20000 * 512, 4096, 512)
    assert plan.raw_tokens(plan.train_samples) == 2**21 * (6 * 6000 + 14000)


def test_a_schedule_of_bag_sizes_reads_whole_long_samples():
    """16, 8, 4: each phase's samples fit its long samples of 16*L tokens exactly, so no text is
    left out.
    """
    plan = Schedule((16, 8, 4, 1), (8 * 10, 8 * 10, 8 * 12, 8 * 32), 4096, 8)
    assert (plan.width, plan.long_samples) == (16, 80 + 40 + 24 + 16)
    assert [phase.pieces for phase in plan.phases] == [1, 2, 4, 16]


def test_neighbours_of_a_batch_come_from_different_long_samples():
    plan = Schedule((4, 2, 1), (8, 16, 64), 4, 8)
    for first in range(0, plan.train_samples, 8):
        assert len({plan.locate(first + j)[1] for j in range(8)}) == 8


def test_locate_refuses_what_is_outside():
    plan = Schedule.of(2, 1, 4, 2, 2)
    for index in (-1, plan.train_samples, plan.train_samples + 1):
        with pytest.raises(IndexError, match="expected 0 <= index"):
            plan.locate(index)


def test_too_few_long_samples_are_refused():
    plan = Schedule.of(4, 3, 16, 4, 2)
    with pytest.raises(
        TSTError,
        match=rf"expected {plan.long_samples} samples of 16 tokens, got {plan.long_samples - 1}",
    ):
        PhasedDataset(Stream(plan.long_samples - 1, 16), plan, TSTConfig(4, iters=3))


def test_samples_of_another_length_and_foreign_tokens_are_refused():
    plan = Schedule.of(4, 3, 16, 4, 2)
    for length in (8, 32):
        with pytest.raises(TSTError, match=f"expected 16 tokens, got {length}"):
            PhasedDataset(Stream(99, length), plan, TSTConfig(4, iters=3))[0]
    with pytest.raises(TSTError, match="below the vocabulary size 100, got 111"):
        PhasedDataset(Stream(99, 16), plan, TSTConfig(4, iters=3), vocab_size=100)[6]
    with pytest.raises(TSTError, match="training sample 6: .* size 111, got 111"):
        PhasedDataset(Stream(99, 16), plan, TSTConfig(4, iters=3), vocab_size=111)[6]
    assert PhasedDataset(Stream(99, 16), plan, TSTConfig(4, iters=3), vocab_size=112)[6]


def test_the_mask_is_megatrons_and_lengths_reach_prefetch_workers():
    plan = Schedule.of(4, 3, 16, 4, 2)
    data = PhasedDataset(Stream(99, 16), plan, TSTConfig(4, iters=3), causal_mask=True)
    hidden = [[[False, *[True] * 3], [False] * 2 + [True] * 2, [False] * 3 + [True], [False] * 4]]
    for index in (0, 15):  # of bags, of recovery
        mask = data[index]["attention_mask"]
        assert mask.tolist() == hidden and mask.dtype == torch.bool
    assert "attention_mask" not in dataset_of(plan)[0]
    assert data._lengths.is_shared()


def test_no_other_schedule_is_followed():
    plan = Schedule.of(4, 3, 16, 4, 2)
    exact = dataset_of(plan)
    more_text = plan.lengthened(8)
    for other in (
        dataclasses.replace(plan, seq_length=5),
        dataclasses.replace(plan, width=8),
        more_text,
        dataclasses.replace(plan, samples=(8, 8)),
    ):
        with pytest.raises((AssertionError, RuntimeError)):
            exact.follow(other)
    exact.follow(dataclasses.replace(plan, samples=(4, 12)))
    assert exact.schedule.samples == (4, 12) and len(exact) == 16
    exact.follow(plan)  # and back
    assert exact.schedule == plan


def test_ratio_becomes_iterations():
    args = type(
        "Args", (), dict(train_samples=None, train_iters=20000, global_batch_size=8, seq_length=4)
    )
    assert TSTConfig(6, step_ratio=0.3).schedule(args).samples == (6000 * 8, 14000 * 8)
    assert TSTConfig((16, 8, 4), step_ratio=(0.1, 0.1, 0.1)).schedule(args).samples == (
        16000,
        16000,
        16000,
        112000,
    )
    args.train_iters = 100
    assert (
        TSTConfig(6, step_ratio=0.29).schedule(args).superposition_samples == 29 * 8
    )  # 0.29 * 100 = 28.999999999999996
    args.train_samples, args.train_iters = 800, None
    assert TSTConfig(6, step_ratio=0.25).schedule(args).superposition_samples == 200
