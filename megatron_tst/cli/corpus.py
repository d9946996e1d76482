"""Text files -> a BPE tokenizer and Megatron's indexed dataset (PREFIX.bin, PREFIX.idx).

    megatron-tst corpus --output corpus/python
    megatron-tst corpus --output corpus/notes --input notes README.md --vocab-size 8192

Without --input: the Python standard library's sources and texts, which are on any machine. A file
that is named is read whatever its ending, below a folder those of text are. Each file counts once
and is one document, ended by the end-of-document token, the last id, as Megatron's NullTokenizer
expects. Files that are empty or not UTF-8 are left out, counted and said. PREFIX.json says what was
made, PREFIX.tokenizer.json is the tokenizer. Train with --data-path PREFIX --tokenizer-type
NullTokenizer --vocab-size VOCAB_SIZE. The files are whole or absent, also after a kill. Needs
pip install 'megatron-tst[demo]'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_tst.cli.screen import Parser, call, progress_bar


def parser(prog: str) -> Parser:
    """The flags of this verb; `prog` is the command as it was called."""
    it = Parser(prog, __doc__)
    it.add_argument("--output", required=True, type=Path, metavar="PREFIX")
    it.add_argument(
        "--input",
        type=_named,
        nargs="+",
        default=[],
        help="files or folders; default: the Python standard library",
    )
    it.add_argument(
        "--vocab-size",
        type=int,
        default=2048,
        help="token ids, the end-of-document one included; default: 2048",
    )
    it.add_argument(
        "--seed",
        type=int,
        default=0,
        help="order of the documents; the last ones become validation data",
    )
    it.add_argument("--force", action="store_true", help="replace an existing PREFIX")
    return it


def main(argv: list[str] | None = None, prog: str = "megatron-tst corpus") -> int:
    """Run the verb. -> exit code"""
    return call(parser(prog), _run, argv)


def _named(text: str) -> Path:
    if not text:  # a variable of a shell that is not set; Path("") is the folder we stand in
        raise argparse.ArgumentTypeError("expected files or folders, got ''. Name them")
    return Path(text)


def _run(options):
    from megatron_tst.data import corpus

    with progress_bar("reading, then tokenizing", unit=" files") as progress:
        made = corpus.make(
            options.output,
            options.input,
            vocab_size=options.vocab_size,
            seed=options.seed,
            force=options.force,
            progress=progress,
        )
    left_out = corpus.LeftOut(made["left_out"]).said("; ")
    print(
        f"{options.output}: {made['documents']} documents, {made['tokens']} tokens, vocabulary "
        f"{made['vocab_size']}{left_out}"
    )
    return 0
