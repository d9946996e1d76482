"""The dataset of all phases.

Megatron builds ONE training dataset of long samples; a sample's index alone says its phase
(schedule.py), so consumed_train_samples, resuming, prefetch workers and data parallelism need
nothing new. Validation and test data stay ordinary samples: the validation loss is plain next-token
loss from the first step to the last.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from megatron_tst.config import TSTConfig
from megatron_tst.data import stock_index
from megatron_tst.data.bags import ordinary_slice, raw_slice, superposed_sample
from megatron_tst.errors import refuse
from megatron_tst.ops.loss import target_weights
from megatron_tst.schedule import RECOVERY, Schedule


class PhasedDataset(torch.utils.data.Dataset):
    """Training samples of every phase over one Megatron dataset of long samples. It needs no
    megatron.training.

    Item i is the run's sample i, a dict: bags in the superposition phases
    (`bags.superposed_sample`), an ordinary sample of L tokens in recovery. A sampler that reads
    the items in order reads every raw token once.

    Args:
        long_samples: a dataset (GPTDataset, BlendedDataset, ...) of at least
            `schedule.long_samples` samples of `schedule.long_sample_length` tokens, without
            attention mask: `tokens` and `labels` int64, `loss_mask` fp32.
        schedule: where the phases lie.
        config: what is superposed, and the target weights.
        vocab_size: rows of the embedding table; a larger token id is an error.
        causal_mask: add the bool [1, L, L] mask of Megatron's dataset (True = hidden).

    Raises:
        TSTError: the dataset is too small; on access, its samples have another length, or a token
            id is outside the vocabulary.
    """

    def __init__(
        self,
        long_samples: Sequence | torch.utils.data.Dataset,
        schedule: Schedule,
        config: TSTConfig,
        vocab_size: int | None = None,
        causal_mask: bool = False,
    ):
        if len(long_samples) < schedule.long_samples:
            refuse(
                "training data",
                f"{schedule.long_samples} samples of {schedule.long_sample_length} tokens",
                len(long_samples),
                "Add data, give the data paths weights (so that Megatron repeats them), train for "
                "fewer iterations, or lower --tst-bag-size.",
            )
        self.long_samples, self.config, self.vocab_size = long_samples, config, vocab_size
        self._schedule = schedule
        # seen by prefetch workers, which hold a copy of all else
        self._lengths = torch.tensor(schedule.samples).share_memory_()
        self.weights = {s: target_weights(config.target_weighting, s) for s in schedule.bag_sizes}
        length = schedule.seq_length
        hidden = torch.ones(1, length, length, dtype=torch.bool).triu(1) if causal_mask else None
        self.mask = {} if hidden is None else {"attention_mask": hidden}

    @property
    def schedule(self) -> Schedule:
        """The phases as they are now."""
        lengths = tuple(self._lengths.tolist())
        if lengths != self._schedule.samples:
            self._schedule = dataclasses.replace(self._schedule, samples=lengths)
        return self._schedule

    def follow(self, schedule: Schedule) -> None:
        """Go on with phases of other lengths, in prefetch workers too. What they have fetched must
        lie before the change. Nothing but `samples` may differ.
        """
        before = self.schedule
        assert dataclasses.replace(schedule, samples=before.samples) == before, (schedule, before)
        assert schedule.long_samples <= len(self.long_samples)
        self._lengths.copy_(torch.tensor(schedule.samples))

    def __len__(self) -> int:
        return self.schedule.train_samples

    def __getitem__(self, index: int) -> dict:
        schedule = self.schedule
        phase, long_index, piece = schedule.locate(index)
        sample = {**self.long_samples[long_index], **self.mask}
        self._check(sample["tokens"], long_index)
        if phase.name == RECOVERY:
            return ordinary_slice(sample, piece, schedule.seq_length)
        sample = raw_slice(sample, piece, phase.width * schedule.seq_length)
        weights, superpose = self.weights[phase.bag_size], self.config.superpose
        return superposed_sample(sample, schedule.seq_length, phase.bag_size, superpose, weights)

    def _check(self, tokens, long_index):
        length = self._schedule.long_sample_length
        if len(tokens) != length:
            do = "The script's dataset provider must take its length from get_args().seq_length."
            refuse("training sample", f"{length} tokens", len(tokens), do)
        if self.vocab_size is not None and int(tokens.max()) >= self.vocab_size:
            refuse(
                f"training sample {long_index}",
                f"token ids below the vocabulary size {self.vocab_size}",
                int(tokens.max()),
                "Use the tokenizer that the data were prepared with.",
            )


def phased_provider(
    provider: Callable,
    args: argparse.Namespace,
    config: TSTConfig,
    schedule: Callable[[], Schedule],
    keep: Callable,
    training_alone: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Callable:
    """Wrap a train_valid_test_datasets_provider so that its training data are of all phases.

    It is called once for long training samples and once, as ever, for validation and test. The
    splits that are not wanted are asked for one sample. Its other arguments and its attributes
    (is_distributed) are kept.

    Args:
        provider: the script's (megatron/training/training.py calls it with the samples of each
            split).
        args: Megatron's; tst_long_samples says of how many long samples the run's dataset was built
            before, if it was.
        schedule: gives the phases in effect, which are known for good once a checkpoint has been
            loaded.
        config: the TST settings.
        keep: called with the PhasedDataset and, with --tst-stock-index, with the stock dataset of
            that index, on the ranks that have them.
        training_alone: while its context is entered, Megatron's builder builds no validation and no
            test data. Long samples of those are not wanted, and a small set may not hold one.

    Returns:
        the wrapped provider. It raises TSTError where the data are too few, or where a longer
        run's data would come in another order. A run that has read all its samples gets one more,
        which nothing reads: Megatron's sampler wants some left.
    """

    @functools.wraps(provider)
    def wrapped(sizes, *rest, **named):
        plan, (train_size, valid_size, test_size) = schedule(), sizes
        assert train_size <= plan.train_samples, (train_size, plan)
        one = [None if size is None else min(size, 1) for size in sizes]

        def long_samples(number):
            with (
                training_alone(),
                _overridden(
                    args,
                    seq_length=plan.long_sample_length,
                    create_attention_mask_in_dataloader=False,
                ),
            ):
                return provider([number, one[1], one[2]], *rest, **named)[0]

        before = getattr(args, "tst_long_samples", None)
        needed = max(plan.long_samples, before or 0)
        train = long_samples(needed)
        if before and needed > before and train is not None:
            _check_same_order(long_samples(before), train, before)
        args.tst_long_samples = needed
        _, valid, test = provider([one[0], valid_size, test_size], *rest, **named)
        stock = None
        if config.stock_index:
            with _overridden(args, data_cache_path=config.stock_index):
                stock, _, _ = provider([plan.train_samples, one[1], one[2]], *rest, **named)
            if args.rank == 0:
                stock_index.write(train, stock, plan)
        if train is not None:  # None on the ranks that get their batches from another one
            mask = args.create_attention_mask_in_dataloader
            train = PhasedDataset(train, plan, config, args.padded_vocab_size, mask)
            keep(train, stock)
            if args.consumed_train_samples >= len(train):
                train = _OneMore(train, args.consumed_train_samples + 1)
        return train, valid, test

    return wrapped


class _OneMore(torch.utils.data.Dataset):
    """A dataset that has been read to its end, and is said to have samples left."""

    def __init__(self, read: torch.utils.data.Dataset, length: int):
        self.read, self.length = read, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        return self.read[min(index, len(self.read) - 1)]


def _check_same_order(shorter, longer, count: int) -> None:
    """Refuse a dataset of more samples whose first `count` are not those that the run has been
    reading.

    Megatron shuffles all epochs of a dataset together, so that one more epoch changes the order of
    everything.
    """

    def same(a, b, count):
        parts = [getattr(x, "datasets", None) for x in (a, b)]
        if all(parts):  # blends
            names = "dataset_index", "dataset_sample_index"
            ours = [np.asarray(getattr(a, name)[:count]) for name in names]
            theirs = [np.asarray(getattr(b, name)[:count]) for name in names]
            counts = np.bincount(ours[0])  # up to the last dataset that is read
            return all(map(np.array_equal, ours, theirs)) and all(map(same, *parts, counts))
        names = "document_index", "sample_index", "shuffle_index"
        return not count or all(
            np.array_equal(getattr(a, name), getattr(b, name)) for name in names
        )

    if not same(shorter, longer, count):
        refuse(
            "--tst-override",
            f"at most the {count} long samples of {shorter.config.sequence_length} tokens that "
            "the run began with",
            len(longer),
            "More would be another epoch of the data, which Megatron shuffles anew: text would be "
            "read twice. Superpose for fewer iterations.",
        )


@contextlib.contextmanager
def _overridden(args, **values):
    before = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)
