"""Data files and output folders, looked at before anything is built on them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from megatron_tst.errors import TSTError, refuse

_ANOTHER = "It is damaged or not an index of token ids: copy it again or prepare the corpus again."
_HEADER = 34  # bytes of an .idx before its lengths
_BLOCK = 1 << 22  # elements that are looked at together
_WHOLE, _SAMPLE, _SAMPLES = 256 << 20, 64 << 10, 1024  # bytes of a .bin, of a block of it; blocks


def check_data_files(prefixes: list[str], vocab_size: int | None) -> None:
    """Refuse indexed datasets that are missing, damaged, or made with a larger vocabulary.

    The first rank of each node reads the whole index (20 GB for a thousand million documents, half
    a minute of a core) and the token ids: all of a .bin of up to 256 MiB, of a larger one 1024
    blocks that are spread evenly from its first byte to its last, 64 MiB together. The others look
    at the sizes.

    Args:
        prefixes: paths without .bin and .idx; object-storage ones are left to Megatron.
        vocab_size: number of token ids of the tokenizer, None to leave it unchecked.

    Raises:
        TSTError: naming the first file that is wrong, and what it should hold.
    """
    first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
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
        if os.path.getsize(prefix + ".bin") == 0:  # Megatron cannot map it
            refuse(f"{prefix}.bin", "at least one token", "none", _ANOTHER)
        index = _open_indexed(prefix).index
        _check_sizes(prefix, index)
        if first_of_node:
            _check_index(prefix, index)
            if vocab_size is not None:
                _check_ids(prefix, index, vocab_size)


def _check_sizes(prefix, index):
    """Length of either file against the numbers in the index."""
    pointers, lengths, documents = _parts(index)
    if len(lengths) == 0:
        refuse(f"{prefix}.idx", "at least one document", "none", _ANOTHER)
    if np.dtype(index.dtype).kind not in "iu":
        got = np.dtype(index.dtype)
        refuse(f"{prefix}.idx", "token ids, which are whole numbers", got, _ANOTHER)
    size = _HEADER + lengths.nbytes + pointers.nbytes + documents.nbytes
    got = os.path.getsize(prefix + ".idx")
    if got not in (size, size + len(lengths)):  # with a mode for each sequence: multimodal
        refuse(f"{prefix}.idx", f"{size} bytes for its numbers", got, _ANOTHER)
    expected = int(pointers[-1]) + int(lengths[-1]) * index.dtype_size
    got = os.path.getsize(prefix + ".bin")
    if got != expected:
        refuse(
            f"{prefix}.bin",
            f"{expected} bytes as its index says",
            got,
            "The file is truncated or not the index's: copy it again.",
        )


def _check_index(prefix, index):
    """Lengths, pointers and documents against each other, a block in memory at a time: a sequence
    begins where the one before it ends, documents are runs of whole sequences
    (megatron/core/datasets/indexed_dataset.py, _IndexWriter.write).
    """
    pointers, lengths, documents = _parts(index)

    def wrong(expected, got):
        refuse(f"{prefix}.idx", expected, got, _ANOTHER)

    if pointers[0] != 0:
        wrong("sequence 0 at byte 0", f"at {pointers[0]}")
    for start in range(0, len(lengths), _BLOCK):
        block = lengths[start : start + _BLOCK].astype(np.int64)
        if (bad := np.flatnonzero(block < 0)).size:
            wrong("lengths of 0 and more", f"{block[bad[0]]} of sequence {start + bad[0]}")
        ends = pointers[start : start + _BLOCK] + block * index.dtype_size
        following = pointers[start + 1 : start + 1 + _BLOCK]
        if (bad := np.flatnonzero(ends[: len(following)] != following)).size:
            at = int(bad[0])
            expected = f"sequence {start + at + 1} at byte {ends[at]}, where the one before it ends"
            wrong(expected, f"at {following[at]}")
    if documents[0] != 0:  # that they end at the last sequence Megatron's reader has looked at
        wrong("documents from sequence 0", f"from {documents[0]}")
    for start in range(0, len(documents) - 1, _BLOCK):
        block = documents[start : start + _BLOCK + 1]
        if (bad := np.flatnonzero(block[1:] < block[:-1])).size:
            at = int(bad[0])
            expected = f"document {start + at + 1} at sequence {block[at]} or behind it"
            wrong(expected, f"at {block[at + 1]}")


def _check_ids(prefix, index, vocab_size):
    tokens = np.memmap(f"{prefix}.bin", index.dtype, "r")
    starts, block = np.arange(0, len(tokens), _BLOCK), _BLOCK
    if tokens.nbytes > _WHOLE:
        block = _SAMPLE // index.dtype_size
        starts = np.linspace(0, len(tokens) - block, _SAMPLES).astype(np.int64)
    for start in starts:
        ids = tokens[start : start + block]
        if 0 <= int(ids.min()) and int(ids.max()) < vocab_size:
            continue
        worst = int(ids.max()) if ids.max() >= vocab_size else int(ids.min())
        at = (int(start) + int(np.flatnonzero(ids == worst)[0])) * index.dtype_size
        document = int(np.searchsorted(index.sequence_pointers, at, side="right")) - 1
        refuse(
            f"vocabulary of {prefix}",
            f"token ids below the tokenizer's {vocab_size}",
            f"{worst} in document {document}",
            "Use the tokenizer (or --vocab-size) that the data were prepared with.",
        )


def _parts(index):
    return index.sequence_pointers, index.sequence_lengths, index.document_indices


def _open_indexed(prefix):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        return IndexedDataset(prefix)
    except Exception as error:  # a short or foreign file fails in many ways
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise TSTError(
            f"{prefix}.idx: expected a whole Megatron index, got one that cannot be read ({text}). "
            "It is truncated or not an index: copy it again or prepare the corpus again."
        ) from error


def check_tokenizer(model: str | None) -> None:
    """Refuse a --tokenizer-model that is written as a path and is not there. A name on the hub, as
    meta-llama/Llama-3.1-8B, is left to Megatron.

    Raises:
        TSTError: nothing is there.
    """
    if not model or "://" in model or os.path.exists(os.path.expanduser(model)):
        return
    ending = os.path.splitext(model)[1]
    if model.startswith(("/", ".", "~")) or ending in (".json", ".model", ".tiktoken"):
        do = "Check the path, on every node."
        refuse("--tokenizer-model", "a tokenizer's file or folder", f"nothing at {model}", do)


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


def check_load_folder(folder: str | None, step: int | None) -> None:
    """Refuse a --load in which Megatron would not find what is meant. In an iteration's own folder
    it finds no tracker file and begins from scratch.

    Args:
        folder: None, and object storage, are left alone.
        step: --ckpt-step; None: the tracker file's.

    Raises:
        TSTError: it is an iteration's folder, or has no such iteration.
    """
    if not folder or "://" in folder:
        return
    path = Path(os.path.abspath(folder))
    if re.fullmatch(r"iter_\d{7,}|release", path.name) and (path / "metadata.json").is_file():
        do = f"Give {path.parent}, and --ckpt-step for another iteration than the last."
        refuse("--load", "the folder that --save named", f"{folder}, a checkpoint in it", do)
    if step is not None and path.is_dir() and not (path / f"iter_{step:07d}").is_dir():
        there = sorted(int(p.name[5:]) for p in path.glob("iter_*") if p.name[5:].isdecimal())
        expected = f"one of {', '.join(map(str, there[-9:]))}" if there else "an iteration"
        refuse("--ckpt-step", f"{expected} in {folder}", step, "Correct it.")
