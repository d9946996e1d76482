"""The two-phase dataset, and the checks of data files before anything is built on them.

Megatron builds ONE training dataset of long samples; a sample's index alone says its phase (schedule.py), so
consumed_train_samples, resuming, prefetch workers and data parallelism need nothing new. Validation and test data stay
ordinary samples: the validation loss is plain next-token loss from the first step to the last.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from collections.abc import Callable

import numpy as np
import torch

from megatron_tst import stock_index
from megatron_tst.bags import ordinary_slice, superposed_sample
from megatron_tst.config import TSTConfig, TSTError, refuse
from megatron_tst.loss import target_weights
from megatron_tst.schedule import Schedule


class TwoPhaseDataset(torch.utils.data.Dataset):
    """Training samples of both phases over one Megatron dataset of long samples.

    Args:
        long_samples: a dataset (GPTDataset, BlendedDataset, ...) of at least `schedule.long_samples` samples of
            `schedule.long_sample_length` tokens, without attention mask.
        schedule: where the phases lie.
        config: what is superposed, and the target weights.
        vocab_size: rows of the embedding table; a larger token id is an error.
        causal_mask: add the [1, L, L] mask of Megatron's dataset (True = hidden).

    Item i is bags for i < N1 (`bags.superposed_sample`), an ordinary sample of L tokens above.

    Raises:
        TSTError: the dataset is too small, its samples have another length, or a token id is outside the vocabulary.
    """

    def __init__(
        self, long_samples, schedule: Schedule, config: TSTConfig, vocab_size: int | None = None, causal_mask: bool = False
    ):
        if len(long_samples) < schedule.long_samples:
            refuse(
                "training data",
                f"{schedule.long_samples} samples of {schedule.long_sample_length} tokens",
                len(long_samples),
                "Add data, give the data paths weights (so that Megatron repeats them), train for fewer iterations, or lower --tst-bag-size.",
            )
        self.long_samples, self.schedule, self.config, self.vocab_size = long_samples, schedule, config, vocab_size
        self.weights = target_weights(config.target_weighting, config.bag_size)
        length = schedule.seq_length
        hidden = torch.ones(1, length, length, dtype=torch.bool).triu(1) if causal_mask else None
        self.mask = {} if hidden is None else {"attention_mask": hidden}

    def __len__(self) -> int:
        return self.schedule.train_samples

    def __getitem__(self, index: int) -> dict:
        long_index, part = self.schedule.locate(index)
        sample = {**self.long_samples[long_index], **self.mask}
        self._check(sample["tokens"], long_index)
        if part is not None:
            return ordinary_slice(sample, part, self.schedule.seq_length)
        return superposed_sample(sample, self.schedule.seq_length, self.config.bag_size, self.config.superpose, self.weights)

    def _check(self, tokens, long_index):
        if len(tokens) != self.schedule.long_sample_length:
            refuse(
                "training sample",
                f"{self.schedule.long_sample_length} tokens",
                len(tokens),
                "The script's dataset provider must take its sample length from get_args().seq_length.",
            )
        if self.vocab_size is not None and int(tokens.max()) >= self.vocab_size:
            refuse(
                f"training sample {long_index}",
                f"token ids below the vocabulary size {self.vocab_size}",
                int(tokens.max()),
                "Use the tokenizer that the data were prepared with.",
            )


def two_phase_provider(provider: Callable, args: argparse.Namespace, schedule: Schedule, config: TSTConfig) -> Callable:
    """Wrap a train_valid_test_datasets_provider so that its training data are two-phase.

    It is called once for long training samples and once, as ever, for validation and test; the splits that are not
    wanted are asked for one sample. Its other arguments and its attributes (is_distributed) are kept.
    """

    @functools.wraps(provider)
    def wrapped(sizes, *rest, **named):
        train_size, valid_size, test_size = sizes
        assert train_size == schedule.train_samples, (train_size, schedule)
        one = [None if size is None else min(size, 1) for size in sizes]
        with _overridden(args, seq_length=schedule.long_sample_length, create_attention_mask_in_dataloader=False):
            train, _, _ = provider([schedule.long_samples, one[1], one[2]], *rest, **named)
        _, valid, test = provider([one[0], valid_size, test_size], *rest, **named)
        if config.stock_index:
            with _overridden(args, data_cache_path=config.stock_index):
                stock, _, _ = provider([train_size, one[1], one[2]], *rest, **named)
            if args.rank == 0:
                stock_index.write(train, stock, schedule)
        if train is not None:  # None on the ranks that get their batches from another one
            train = TwoPhaseDataset(
                train, schedule, config, args.padded_vocab_size, causal_mask=args.create_attention_mask_in_dataloader
            )
        return train, valid, test

    return wrapped


@contextlib.contextmanager
def _overridden(args, **values):
    before = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)


def check_data_files(prefixes: list[str], vocab_size: int | None, documents: int = 256) -> None:
    """Refuse indexed datasets that are missing, truncated, or made with a larger vocabulary.

    Args:
        prefixes: paths without .bin and .idx; object-storage ones are left to Megatron.
        vocab_size: number of token ids of the tokenizer, None to leave it unchecked.
        documents: how many documents, spread over each dataset, are looked at for ids outside the vocabulary.
    """
    for prefix in prefixes:
        if "://" in prefix:
            continue
        for path in (prefix + ".idx", prefix + ".bin"):
            if not os.path.isfile(path):
                hint = "Give the prefix without an extension; tools/prepare_corpus.py makes such a pair from text."
                refuse("--data-path", f"{prefix}.bin and {prefix}.idx", f"no file {path}", hint)
        dataset = _open_indexed(prefix)
        pointers, lengths = dataset.index.sequence_pointers, dataset.index.sequence_lengths
        if len(lengths) == 0:
            refuse(f"{prefix}.idx", "at least one document", "none", "Prepare the corpus again.")
        itemsize = np.dtype(dataset.index.dtype).itemsize
        expected, got = int(pointers[-1]) + int(lengths[-1]) * itemsize, os.path.getsize(prefix + ".bin")
        if got != expected:
            refuse(
                f"{prefix}.bin",
                f"{expected} bytes as its index says",
                got,
                "The file is truncated or not the index's: copy it again.",
            )
        if vocab_size is None:
            continue
        for i in np.unique(np.linspace(0, len(lengths) - 1, documents).astype(np.int64)):
            largest = int(dataset.get(int(i)).max(initial=0))
            if largest >= vocab_size:
                refuse(
                    f"vocabulary of {prefix}",
                    f"token ids below the tokenizer's {vocab_size}",
                    f"{largest} in document {i}",
                    "Use the tokenizer (or --vocab-size) that the data were prepared with.",
                )


def _open_indexed(prefix):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        return IndexedDataset(prefix, mmap=True)
    except Exception as error:  # a short or foreign file fails in many ways
        raise TSTError(
            f"{prefix}.idx: expected a whole Megatron index, got one that cannot be read ({type(error).__name__}: {error}). "
            "It is truncated or not an index: copy it again or prepare the corpus again."
        ) from error


def check_output_folder(flag: str, folder: str | None) -> None:
    """Refuse an output folder that cannot be written to; makes it where it is missing."""
    if not folder or "://" in folder:
        return
    probe = os.path.join(folder, f".megatron_tst_probe_{os.getpid()}")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(probe, "wb"):
            pass
        os.unlink(probe)
    except OSError as error:
        refuse(
            flag, "a folder that can be written to", f"{folder}: {error.strerror}", "Choose another one or mend its permissions."
        )
