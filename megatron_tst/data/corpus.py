"""Text files -> a BPE tokenizer and Megatron's indexed dataset.

    PREFIX.bin, PREFIX.idx   the documents' token ids and where each begins, for --data-path PREFIX
    PREFIX.tokenizer.json    the tokenizer, as the tokenizers library writes it
    PREFIX.json              what was made: documents, tokens, vocab_size, end_of_document, and the
                             sizes of the other files

Each file is one document, ended by the end-of-document token. That is the last id, vocab_size - 1,
as Megatron's NullTokenizer expects.
"""

from __future__ import annotations

import json
import os
import random
import sysconfig
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from megatron_tst import compat
from megatron_tst.checkpoint.atomic import new_files, write_json, write_text
from megatron_tst.errors import optional, refuse

END = "<|end|>"
TEXT = {".py", ".txt", ".rst", ".md", ".c", ".h", ".cpp", ".cu", ".json", ".toml"}
FILES = (".bin", ".json", ".tokenizer.json", ".idx")  # in the order in which they get their names
SMALLEST = 300  # token ids: 256 bytes, the end of a document and some merges
_BATCH = 64  # documents that are tokenized at once


def is_there(prefix: str | os.PathLike) -> bool:
    """Whether a whole corpus has this prefix: the index is the last file to get its name."""
    return Path(f"{prefix}.idx").exists()


def vocab_size(prefix: str | os.PathLike) -> int:
    """Token ids of a corpus, the end-of-document one included, for --vocab-size."""
    return json.loads(Path(f"{prefix}.json").read_text())["vocab_size"]


def make(
    prefix: Path,
    roots: Iterable[Path] = (),
    *,
    vocab_size: int = 2048,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict:
    """Write PREFIX's files. They are whole or absent, also when the process is killed.

    Args:
        prefix: of the outputs; its folder is made.
        roots: files and folders of text; none: the Python standard library, which is everywhere.
        vocab_size: token ids, the end-of-document one included.
        seed: order of the documents; the last ones become validation data (--split).
        force: replace existing outputs; those that are not as `make` wrote them are moved aside.
        progress: called with (files done, files in all); each is read once and tokenized once.

    Returns:
        what PREFIX.json holds.

    Raises:
        TSTError: no text, too little text for so many ids, tokenizers is not installed, and
            atomic.new_files's.
    """
    if vocab_size < SMALLEST:
        expected = f"at least {SMALLEST} (256 bytes and some merges)"
        refuse("--vocab-size", expected, vocab_size, "Ask for more.")
    roots = list(roots)
    files = find_files(roots or [Path(sysconfig.get_path("stdlib"))])
    if not files:
        got = f"none in {' '.join(map(str, roots))}"
        refuse("--input", f"text files ({' '.join(sorted(TEXT))})", got, "Name others.")
    random.Random(seed).shuffle(files)

    def ours(folder):
        return _as_made(folder / prefix.name)

    with new_files(prefix, FILES, force, files, ours) as folder:
        return build(files, folder / prefix.name, vocab_size, progress)


def _others(prefix):
    """Of the files beside PREFIX.json that are there: ending -> os.stat's."""
    paths = {ending: Path(f"{prefix}{ending}") for ending in FILES if ending != ".json"}
    return {ending: path.stat() for ending, path in paths.items() if path.exists()}


def _as_made(prefix):
    """Whether `make` wrote these files, those that are there, PREFIX.json last, and nobody has
    changed them since.
    """
    try:
        sizes = json.loads(Path(f"{prefix}.json").read_bytes())["files"]
        end = os.stat(f"{prefix}.json").st_mtime_ns
        return all(
            found.st_size == sizes.get(ending) and found.st_mtime_ns <= end
            for ending, found in _others(prefix).items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def find_files(roots: Iterable[Path]) -> list[Path]:
    """Text files below `roots`, sorted; installed third-party packages are left out of a folder
    that holds them, unless it is named itself.
    """
    found = []
    for root in roots:
        candidates = [root] if root.is_file() else sorted(root.rglob("*"))
        found += [
            p
            for p in candidates
            if p.suffix in TEXT and p.is_file() and "site-packages" not in p.relative_to(root).parts
        ]
    return found


def build(
    files: list[Path],
    prefix: Path,
    vocab_size: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict:
    """Train the tokenizer on `files` and write PREFIX's FILES, in place. -> what PREFIX.json holds

    Raises:
        TSTError: too little text for so many ids, or tokenizers is not installed.
    """
    tokenizers = optional("tokenizers", "megatron-tst[demo]")
    compat.hide_broken_transformer_engine()
    with warnings.catch_warnings(
        action="ignore"
    ):  # of what Megatron does without a GPU's libraries
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    texts = []
    for number, path in enumerate(files, 1):
        if text := read(path):
            texts.append(text)
        progress(number, 2 * len(files))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.add_special_tokens([END])
    end = tokenizer.token_to_id(END)
    if end != vocab_size - 1:
        got = f"a text that is too small for {vocab_size}: it gives {end + 1}"
        refuse("--vocab-size", "as many ids as the text gives", got, "Ask for fewer or add text.")

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    tokens = 0
    for start in range(0, len(texts), _BATCH):
        for encoded in tokenizer.encode_batch(texts[start : start + _BATCH]):
            ids = np.array([*encoded.ids, end])
            builder.add_document(ids, [len(ids)])
            tokens += len(ids)
        progress(len(files) + min(start + _BATCH, len(texts)), 2 * len(files))
    builder.finalize(f"{prefix}.idx")
    write_text(Path(f"{prefix}.tokenizer.json"), tokenizer.to_str(pretty=True))
    summary = {
        "documents": len(texts),
        "tokens": tokens,
        "vocab_size": vocab_size,
        "end_of_document": end,
    }
    summary["files"] = {ending: found.st_size for ending, found in _others(prefix).items()}
    write_json(Path(f"{prefix}.json"), summary)
    progress(2 * len(files), 2 * len(files))
    return summary


def read(path: Path) -> str:
    """The file as text; files that are not UTF-8 (test data) or empty are left out as ''."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""
