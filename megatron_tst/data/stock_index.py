"""Megatron's own index files, written so that a stock run reads exactly the text that superposition
has left unread, in the order in which the recovery phase would have read it.

A GPTDataset cuts one long row of shuffled documents into samples of equal length and shuffles
those. The dataset of long samples (w*L tokens, w the schedule's width: s) and one of ordinary
samples (L tokens) over the same row of documents line up: long sample k is the ordinary samples k*w
to k*w + w - 1. So a stock dataset with the long one's document index, a sample index for L, and a
shuffle index that names those samples in recovery's order is the recovery phase. Positions below N1
name text that superposition has read. A run that goes on at consumed sample N1 never asks for them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from megatron_tst.checkpoint.atomic import flushed
from megatron_tst.errors import refuse
from megatron_tst.schedule import Schedule


def write(long_samples: Dataset, stock: Dataset, schedule: Schedule) -> list[Path]:
    """Overwrite the index files that `stock` was built with.

    Args:
        long_samples: the dataset of long samples, a GPTDataset or a BlendedDataset of such.
        stock: what the script's provider gives for `schedule.train_samples` ordinary samples, with
            its index files in a folder of its own.
        schedule: the phases.

    Returns:
        the files written.

    Raises:
        TSTError: another kind of dataset.
    """
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset

    longs, parts = _places(schedule)
    if isinstance(long_samples, BlendedDataset) and isinstance(stock, BlendedDataset):
        subset = long_samples.dataset_index[longs]
        position = long_samples.dataset_sample_index[longs]
        within = np.empty(len(longs), dtype=np.int64)
        files = []
        for d, (long, ordinary) in enumerate(zip(long_samples.datasets, stock.datasets)):
            here = subset == d
            files += _write_one(long, ordinary, position[here], parts[here], schedule)
            within[here] = np.arange(here.sum())
        # Megatron rounds each dataset's share up; nobody asks for these
        more = len(stock.dataset_index) - len(subset)
        base = f"{stock.unique_description_hash}-{type(stock).__name__}-{stock.split.name}"
        return files + _replace(
            stock.config.path_to_cache,
            base,
            dataset_index=np.pad(subset, (0, more)).astype(np.int16),
            dataset_sample_index=np.pad(within, (0, more)),
        )
    if isinstance(long_samples, GPTDataset) and isinstance(stock, GPTDataset):
        return _write_one(long_samples, stock, longs, parts, schedule)
    return refuse(
        "--tst-stock-index",
        "a GPTDataset or a blend of them",
        type(long_samples).__name__,
        "Other datasets have no such index files.",
    )


def _places(schedule):
    """schedule.locate of every sample of the run: its long sample, and its slice of L tokens in it.
    A sample of bags is several slices; the first stands for all of them.
    """
    places = [phase.place(np.arange(phase.samples)) for phase in schedule.phases]
    slices = [pieces * phase.width for phase, (_, pieces) in zip(schedule.phases, places)]
    return np.concatenate([longs for longs, _ in places]), np.concatenate(slices)


def _write_one(long, ordinary, positions, parts, schedule):
    """Of one GPTDataset: its samples in the order of `positions`, which count the shuffled samples
    of the long one.
    """
    from megatron.core.datasets import helpers

    per_epoch = long._get_num_tokens_per_epoch()
    sample_index = helpers.build_sample_idx(
        long.dataset.sequence_lengths,
        long.document_index,
        schedule.seq_length,
        long._get_num_epochs(per_epoch),
        per_epoch,
        True,
        long.config.add_extra_token_to_sequence,
    )
    wanted = long.shuffle_index[positions].astype(np.int64) * schedule.width + parts
    # whoever asks for more than the run's samples gets other text
    rest = np.setdiff1d(np.arange(len(sample_index) - 1), wanted)
    kind, split = type(ordinary).__name__, ordinary.index_split.name
    base = f"{ordinary.unique_description_hash}-{kind}-{split}"
    return _replace(
        ordinary.config.path_to_cache,
        base,
        document_index=np.asarray(long.document_index),
        sample_index=sample_index,
        shuffle_index=np.concatenate([wanted, rest]),
    )


def _replace(folder, base, **arrays):
    written = []
    for name, array in arrays.items():
        path = Path(folder) / f"{base}-{name}.npy"
        assert path.is_file(), path  # Megatron has just written it
        part = path.with_suffix(".part")
        flushed(part, lambda file, array=array: np.save(file, array))
        os.replace(part, path)
        written.append(path)
    return written
