"""What is in a checkpoint: phase, step, samples, raw tokens, TST settings, layout, tensors.

    megatron-tst inspect ck
    megatron-tst inspect ck/iter_0000100 --json
    megatron-tst inspect ck --check

CHECKPOINT is the folder that --save named (then its latest iteration), or one iter_... in it. Its
tensors are not read, so it takes neither memory nor a GPU. --check reads every byte once.
"""

from __future__ import annotations

from pathlib import Path

from megatron_tst.cli.screen import Parser, answer, call, progress_bar


def parser(prog: str) -> Parser:
    """The flags of this verb; `prog` is the command as it was called."""
    it = Parser(prog, __doc__)
    it.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    it.add_argument(
        "--check",
        action="store_true",
        help="hold every item against its checksums and the description",
    )
    it.add_argument("--json", action="store_true", help="print one JSON object")
    return it


def main(argv: list[str] | None = None, prog: str = "megatron-tst inspect") -> int:
    """Run the verb. -> exit code"""
    return call(parser(prog), _run, argv)


def _run(options):
    from megatron_tst.checkpoint.format import Checkpoint
    from megatron_tst.checkpoint.inspect import describe

    checkpoint = Checkpoint(options.checkpoint)
    about = describe(checkpoint)
    if options.check:
        with progress_bar("checking") as progress:
            items, size = checkpoint.check_all(progress=progress)
        about["checked"] = f"{items} items, {size} bytes: as their checksums and description say"
    answer(options.json, about, _text(about))
    return 0


def _text(about):
    lines = []
    for name, value in about.items():
        if name == "tensors":
            continue
        for row in value if isinstance(value, list) else [value]:
            text = ", ".join(f"{k} {v}" for k, v in row.items()) if isinstance(row, dict) else row
            lines.append(f"{name:18s} {text}")
    for name, entry in about["tensors"].items():
        shape, shards = str(entry["shape"]), entry["shards"]
        lines.append(f"  {name:80s} {entry['dtype']:9s} {shape:24s} {shards} shards")
    return "\n".join(lines)
