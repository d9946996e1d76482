"""Text files -> a BPE tokenizer and Megatron's indexed dataset (PREFIX.bin, PREFIX.idx).

    python tools/prepare_corpus.py --output corpus/python [--input DIR_OR_FILE ...] [--vocab-size
    2048]

Without --input: the Python standard library's sources and texts, which are on any machine. Each
file is one document, ended by the end-of-document token, which is the last id (vocab-size - 1), as
Megatron's NullTokenizer expects. Written beside and renamed: the outputs are whole or absent.
PREFIX.json says what was made: train with --tokenizer-type NullTokenizer --vocab-size VOCAB_SIZE.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
from rich.progress import track

END = "<|end|>"
TEXT = {".py", ".txt", ".rst", ".md", ".c", ".h", ".cpp", ".cu", ".json", ".toml"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, metavar="PREFIX")
    parser.add_argument(
        "--input",
        type=Path,
        nargs="*",
        help="files or folders; default: the Python standard library",
    )
    parser.add_argument(
        "--vocab-size", type=int, default=2048, help="token ids, the end-of-document one included"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="order of the documents; the last ones become validation data",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing PREFIX")
    args = parser.parse_args(argv)
    if args.vocab_size < 300:
        return _error(
            f"--vocab-size: expected at least 300 (256 bytes and some merges), got "
            f"{args.vocab_size}."
        )
    outputs = [
        Path(f"{args.output}{suffix}") for suffix in (".bin", ".idx", ".json", ".tokenizer.json")
    ]
    if not args.force and any(path.exists() for path in outputs):
        return _error(
            f"--output: expected a new prefix, got {args.output}, which exists. Choose another "
            f"one or add --force."
        )
    files = find_files(args.input or [Path(sysconfig.get_path("stdlib"))])
    if not files:
        return _error(
            f"--input: expected text files ({' '.join(sorted(TEXT))}), found none in {args.input}."
        )
    random.Random(args.seed).shuffle(files)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=args.output.parent, prefix=".prepare_corpus_"
        ) as folder:
            summary = build(files, Path(folder) / "new", args.vocab_size)
            for path in outputs:  # the index last: without it nobody takes the .bin for whole
                if path.suffix != ".idx":
                    os.replace(f"{folder}/new{str(path)[len(str(args.output)) :]}", path)
            os.replace(f"{folder}/new.idx", f"{args.output}.idx")
    except OSError as error:
        return _error(
            f"--output: expected a place that can be written to, got {args.output}: "
            f"{error.strerror}."
        )
    print(
        f"{args.output}: {summary['documents']} documents, {summary['tokens']} tokens, vocabulary "
        f"{summary['vocab_size']}"
    )
    return 0


def find_files(roots: list[Path]) -> list[Path]:
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


def build(files: list[Path], prefix: Path, vocab_size: int) -> dict:
    """Train the tokenizer on `files`, write prefix.bin, .idx, .json and .tokenizer.json; returns
    what .json holds.
    """
    from megatron_tst import compat

    compat.hide_broken_transformer_engine()
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [text for path in track(files, "reading      ") if (text := read(path))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=True
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.add_special_tokens([END])
    end = tokenizer.token_to_id(END)
    if end != vocab_size - 1:
        raise SystemExit(
            _error(
                f"--vocab-size: the text is too small for {vocab_size} ids, it gives {end + 1}. "
                f"Ask for fewer or add text."
            )
        )

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    tokens = 0
    for start in track(range(0, len(texts), 64), "tokenizing   "):
        for encoded in tokenizer.encode_batch(texts[start : start + 64]):
            ids = np.array([*encoded.ids, end])
            builder.add_document(ids, [len(ids)])
            tokens += len(ids)
    builder.finalize(f"{prefix}.idx")
    tokenizer.save(f"{prefix}.tokenizer.json")
    summary = {
        "documents": len(texts),
        "tokens": tokens,
        "vocab_size": vocab_size,
        "end_of_document": end,
    }
    Path(f"{prefix}.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def read(path: Path) -> str:
    """The file as text; files that are not UTF-8 (test data) or empty are left out as ''."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def _error(text: str) -> int:
    print(f"prepare_corpus: error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
