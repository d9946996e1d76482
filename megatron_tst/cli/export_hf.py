"""A checkpoint -> a Hugging Face folder that `transformers` loads: Llama, Qwen3, Qwen3-MoE,
DeepSeek-V3.

    megatron-tst export-hf ck hf --tokenizer tokenizer.json

TST adds no parameter, so it is exactly the standard model. CHECKPOINT is the folder that --save
named (then its latest iteration), or one iter_... in it, of any parallel layout. Needs no GPU and
no Transformer Engine; with a tokenizer.json, pip install 'megatron-tst[hf]'. TARGET is whole or
absent, also after a kill.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from megatron_tst.cli.screen import Parser, answer, call, progress_bar


def parser(prog: str) -> Parser:
    """The flags of this verb; `prog` is the command as it was called."""
    it = Parser(prog, __doc__)
    add_export(it)
    it.add_argument(
        "--dtype",
        default="bfloat16",
        metavar="bfloat16|float32",
        help="of the weights; default: bfloat16",
    )
    it.add_argument(
        "--through-bridge",
        action="store_true",
        help="of another architecture, which the installed Megatron-Bridge has; with --hf-config",
    )
    it.add_argument(
        "--hf-config",
        type=Path,
        metavar="FOLDER",
        help="with the config.json of the model that was trained",
    )
    return it


def add_export(it: Parser) -> None:
    """What every export takes."""
    it.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    it.add_argument("target", type=Path, metavar="TARGET", help="a new folder")
    it.add_argument(
        "--tokenizer",
        type=Path,
        help="tokenizer.json or a folder of tokenizer files; default: the run's own",
    )
    it.add_argument(
        "--vocab-size", type=int, help="ids of the tokenizer; the rows above them are padding"
    )
    it.add_argument(
        "--allow-superposition", action="store_true", help="export although recovery has not begun"
    )
    it.add_argument("--force", action="store_true", help="replace an existing TARGET")
    it.add_argument("--json", action="store_true", help="print one JSON object")


def given(options: argparse.Namespace) -> dict:
    """Of add_export's flags, what the export functions take under the same names."""
    names = ("tokenizer", "vocab_size", "allow_superposition", "force")
    return {name: getattr(options, name) for name in names}


def main(argv: list[str] | None = None, prog: str = "megatron-tst export-hf") -> int:
    """Run the verb. -> exit code"""
    return call(parser(prog), _run, argv)


def _run(options):
    from megatron_tst.checkpoint.format import Checkpoint
    from megatron_tst.errors import refuse
    from megatron_tst.export import hf, through_bridge

    if options.through_bridge != (options.hf_config is not None):
        pair = "--through-bridge", "--hf-config FOLDER"
        there, other = pair if options.through_bridge else pair[::-1]
        refuse(other, f"it beside {there}", "none", "Give both or neither.")
    source = Checkpoint(options.checkpoint)
    export = hf.export
    if options.through_bridge:
        export = functools.partial(through_bridge.export, hf_config=options.hf_config)
    with progress_bar("writing") as progress:
        folder = export(
            source, options.target, dtype=options.dtype, progress=progress, **given(options)
        )
    about = {"written": str(folder), "from": str(source.path), "dtype": options.dtype}
    answer(options.json, about, f"{folder}: written from {source.path}")
    return 0
