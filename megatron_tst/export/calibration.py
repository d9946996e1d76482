"""What quantize reads of a dataset: its start, to calibrate on, and its end, to measure on."""

from __future__ import annotations

import os

import numpy as np

from megatron_tst.errors import refuse


def ends_of(prefix: str | os.PathLike, samples: int, length: int, vocab: int) -> list[np.ndarray]:
    """The first and the last tokens of a dataset, no token in both; the documents one after the
    other.

    Args:
        prefix: of Megatron's indexed dataset (.bin, .idx).
        samples, length: rows of each part, and tokens of a row besides its last label.
        vocab: ids of the tokenizer.

    Returns:
        two int64 [samples, length + 1].

    Raises:
        TSTError: the dataset is missing, not whole, too short, or of another vocabulary.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    if not IndexedDataset.exists(str(prefix)):
        refuse(
            "--data-path",
            f"an indexed dataset {prefix}.bin and {prefix}.idx",
            "none",
            "`megatron-tst corpus` makes one.",
        )
    try:
        dataset = IndexedDataset(str(prefix))
        lengths = dataset.sequence_lengths
        size = int(lengths.sum(dtype=np.int64)) * dataset.index.dtype_size
        stored = os.path.getsize(f"{prefix}.bin")
    except Exception as error:  # asserts, struct and numpy errors
        refuse(
            f"{prefix}.idx",
            "an index of Megatron's indexed dataset",
            f"{type(error).__name__}: {error}",
            "Make it again.",
        )
    if stored < size:
        refuse(f"{prefix}.bin", f"{size} bytes, as its index says", stored, "Copy it again.")
    need = samples * (length + 1)
    if lengths.sum(dtype=np.int64) < 2 * need:
        expected = f"{2 * need} tokens (twice {samples} samples of {length} and a label)"
        refuse(
            prefix,
            expected,
            int(lengths.sum(dtype=np.int64)),
            "Give fewer --samples, a shorter --sequence-length or more text.",
        )

    def taken(order):
        held, parts = 0, []
        for i in order:
            if held >= need:
                break
            parts.append(dataset[int(i)])
            held += len(parts[-1])
        return parts

    first = np.concatenate(taken(range(len(lengths))))[:need]
    last = np.concatenate(taken(reversed(range(len(lengths))))[::-1])[-need:]
    largest = int(max(first.max(), last.max()))
    if largest >= vocab:
        refuse(
            prefix,
            f"ids below the vocabulary of {vocab}",
            largest,
            "Give the dataset that was tokenized with the run's tokenizer.",
        )
    return [part.astype(np.int64).reshape(samples, length + 1) for part in (first, last)]
