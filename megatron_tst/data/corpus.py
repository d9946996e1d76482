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
import re
import stat
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from megatron_tst import compat
from megatron_tst.checkpoint.atomic import new_files, write_json, write_text
from megatron_tst.checkpoint.places import identity
from megatron_tst.errors import optional, refuse, warn

END = "<|end|>"
TEXT = {".py", ".txt", ".rst", ".md", ".c", ".h", ".cpp", ".cu", ".json", ".toml"}
FILES = (".bin", ".json", ".tokenizer.json", ".idx")  # in the order in which they get their names
SMALLEST = 300  # token ids: 256 bytes, the end of a document and some merges
LARGEST = 1 << 20  # token ids; the largest tokenizers have a fourth of it
# Training takes the square of the longest word: a file that is one word is cut for it.
_LONG_WORD = re.compile(r"\S{1000}|\s{1000}")
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
        what PREFIX.json holds, and `left_out`: a reason -> (number of files, the first of them).

    Raises:
        TSTError: an input that is not there, no text, too little text for so many ids, tokenizers
            is not installed, and atomic.new_files's.
    """
    if vocab_size < SMALLEST:
        expected = f"at least {SMALLEST} (256 bytes and some merges)"
        refuse("--vocab-size", expected, vocab_size, "Ask for more.")
    if vocab_size > LARGEST:
        refuse("--vocab-size", f"at most {LARGEST:,} token ids", f"{vocab_size:,}", "Lower it.")
    if prefix.name in ("", ".."):
        do = "Give the beginning of the files' names, as corpus/mine."
        refuse("--output", "a prefix", repr(str(prefix)), do)
    roots = list(roots)
    left_out = LeftOut()
    files = find_files(roots or [Path(sysconfig.get_path("stdlib"))], prefix, left_out)
    if not files:
        got = f"none in {' '.join(map(str, roots))}{left_out.said(', ')}"
        refuse("--input", f"text files ({' '.join(sorted(TEXT))})", got, "Name others.")
    random.Random(seed).shuffle(files)

    for path in files:
        if path.suffix == ".jsonl":
            warn(
                f"{path}: read as one document, JSON and all. Megatron-LM's preprocess_data.py "
                "makes a document of each line"
            )

    def ours(folder):
        return _as_made(folder / prefix.name)

    with new_files(prefix, FILES, force, files, ours) as folder:
        summary = build(files, folder / prefix.name, vocab_size, progress, left_out)
    return summary | {"left_out": dict(left_out)}


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


class LeftOut(dict):
    """Files of the input that are no documents: a reason -> (how many, the first of them)."""

    def add(self, reason: str, path: Path) -> None:
        """Count a file; the first is the first by name."""
        count, first = self.get(reason, (0, str(path)))
        self[reason] = count + 1, min(first, str(path))

    def said(self, before: str = "") -> str:
        """All of them as half a sentence, behind `before`; "" where nothing was left out."""
        if not self:
            return ""
        rows = [f"{count} {reason} (the first: {first})" for reason, (count, first) in self.items()]
        text = f"{before}left out: {', '.join(rows)}"
        return text.encode(errors="backslashreplace").decode()  # names may be no UTF-8


def find_files(roots: Iterable[Path], prefix: Path, left_out: LeftOut) -> list[Path]:
    """The files to read, each once, whatever links lead to it: those that are named, whatever their
    ending, and text files below a folder, sorted. Installed third-party packages are left out of a
    folder that holds them, unless it is named itself.

    Args:
        prefix: what is below a folder and belongs to this corpus is not read. What belongs to
            another one is left out.
        left_out: gets the files that are no text by their ending.

    Raises:
        TSTError: a root that is not there or is neither file nor folder, or belongs to the prefix.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    own = {identity(Path(f"{prefix}{ending}")) for ending in FILES} - {None}
    for root in roots:
        here = identity(root)
        if here is None:
            refuse("--input", "files and folders that exist", root, "Correct the path.")
        if here in own:
            do = "Choose another --output."
            refuse("--input", "text from elsewhere", f"{root}, which --output replaces", do)
        if root.is_dir():
            candidates = sorted(_below(root, left_out))
        elif root.is_file():
            candidates = [root]
        else:
            refuse("--input", "files and folders", f"{root}, which is neither", "Leave it out.")
        for path in candidates:
            here = identity(path)
            if here in seen or here in own:
                continue
            if path != root and _of_a_corpus(path):
                left_out.add("of another corpus", path)
            elif path != root and path.suffix not in TEXT:
                left_out.add("of other endings", path)
            elif not path.is_file():
                left_out.add("that are no files", path)
            else:
                found.append(path)
                seen.add(here)
    return found


def _of_a_corpus(path: Path) -> bool:
    """Whether it is what `make` writes beside an index."""
    names = (path.name.removesuffix(ending) for ending in FILES if path.name.endswith(ending))
    return any(
        name and all(path.with_name(name + ending).exists() for ending in (".bin", ".idx"))
        for name in names
    )


def _below(root: Path, left_out: LeftOut) -> Iterator[Path]:
    """All files below a folder; each folder once, also where links make a loop."""
    seen = {identity(root)}

    def unreadable(error):
        left_out.add("in folders that cannot be read", Path(error.filename))

    for folder, inside, names in os.walk(root, followlinks=True, onerror=unreadable):
        inside[:] = [name for name in inside if name not in ("site-packages", "__pycache__")]
        for name in list(inside):
            here = identity(Path(folder, name))
            if here in seen:
                inside.remove(name)
            seen.add(here)
        yield from (Path(folder, name) for name in names)


def build(
    files: list[Path],
    prefix: Path,
    vocab_size: int,
    progress: Callable[[int, int], None],
    left_out: LeftOut,
) -> dict:
    """Train the tokenizer on `files` and write PREFIX's FILES, in place. -> what PREFIX.json holds

    Raises:
        TSTError: no text in the files, too little text for so many ids, or tokenizers is not
            installed.
    """
    tokenizers = optional("tokenizers", "megatron-tst[demo]")
    compat.hide_broken_transformer_engine()
    with warnings.catch_warnings(
        action="ignore"
    ):  # of what Megatron does without a GPU's libraries
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    texts = []
    for number, path in enumerate(files, 1):
        text, reason = read(path)
        if reason:
            left_out.add(reason, path)
        else:
            texts.append(text)
        progress(number, 2 * len(files))
    if not texts:
        do = "Name others, or convert them to UTF-8."
        refuse("--input", "files of text", f"none{left_out.said(', ')}", do)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False
    )
    pieces = (piece for text in texts for piece in _pieces(text))
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_special_tokens([END])
    tokenizer.encode_special_tokens = True  # a text that has these letters does not end there
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


def _pieces(text: str) -> Iterator[str]:
    """The text in one piece, or cut behind each thousand letters of an endless word."""
    start = 0
    for match in _LONG_WORD.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def read(path: Path) -> tuple[str, str]:
    """(the file as text, with "\\n" at the end of lines; why it is left out, or "")"""
    try:
        # without waiting for a writer, where it has become a FIFO since
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return "", "that are no files"
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read()
        finally:
            os.close(descriptor)
    except OSError:
        return "", "that cannot be read"
    if not content:
        return "", "empty"
    if b"\0" in content:
        return "", "not text (null bytes: UTF-16, or binary)"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "", "not in UTF-8"
    return text.replace("\r\n", "\n").replace("\r", "\n"), ""
