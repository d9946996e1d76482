"""Data files and output folders, looked at before anything is built on them."""

from __future__ import annotations

import os

import numpy as np

from megatron_tst.errors import TSTError, refuse


def check_data_files(prefixes: list[str], vocab_size: int | None, documents: int = 256) -> None:
    """Refuse indexed datasets that are missing, truncated, or made with a larger vocabulary.

    Args:
        prefixes: paths without .bin and .idx; object-storage ones are left to Megatron.
        vocab_size: number of token ids of the tokenizer, None to leave it unchecked.
        documents: how many documents, spread over each dataset, are looked at for ids outside the
            vocabulary.

    Raises:
        TSTError: naming the first file that is wrong, and what it should hold.
    """
    for prefix in prefixes:
        if "://" in prefix:
            continue
        for path in (prefix + ".idx", prefix + ".bin"):
            if not os.path.isfile(path):
                hint = (
                    "Give the prefix without an extension; `megatron-tst corpus` makes such a pair "
                    "from text."
                )
                refuse("--data-path", f"{prefix}.bin and {prefix}.idx", f"no file {path}", hint)
        dataset = _open_indexed(prefix)
        pointers, lengths = dataset.index.sequence_pointers, dataset.index.sequence_lengths
        if len(lengths) == 0:
            refuse(f"{prefix}.idx", "at least one document", "none", "Prepare the corpus again.")
        itemsize = np.dtype(dataset.index.dtype).itemsize
        expected = int(pointers[-1]) + int(lengths[-1]) * itemsize
        got = os.path.getsize(prefix + ".bin")
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
            f"{prefix}.idx: expected a whole Megatron index, got one that cannot be read "
            f"({type(error).__name__}: {error}). "
            "It is truncated or not an index: copy it again or prepare the corpus again."
        ) from error


def check_output_folder(flag: str, folder: str | None) -> None:
    """Refuse an output folder that cannot be written to, and make it where it is missing.

    Args:
        flag: that names it, for the message.
        folder: None, and object storage, are left alone.

    Raises:
        TSTError: it cannot be written to.
    """
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
            flag,
            "a folder that can be written to",
            f"{folder}: {error.strerror}",
            "Choose another one or mend its permissions.",
        )
