"""Whether two checkpoints hold the same weights and optimizer state, bit for bit.

    megatron-tst verify ck ck_stock
    megatron-tst verify ck/iter_0000100 other --weights-only --json

They may be cut into shards in different ways. A CHECKPOINT is the folder that --save named (then
its latest iteration), or one iter_... in it. Exit code 1: they differ.
"""

from __future__ import annotations

from pathlib import Path

from megatron_tst.cli.screen import Parser, answer, call, progress_bar


def parser(prog: str) -> Parser:
    """The flags of this verb; `prog` is the command as it was called."""
    it = Parser(prog, __doc__)
    it.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    it.add_argument("other", type=Path, metavar="CHECKPOINT")
    it.add_argument("--weights-only", action="store_true", help="leave the optimizer's state out")
    it.add_argument("--json", action="store_true", help="print one JSON object")
    return it


def main(argv: list[str] | None = None, prog: str = "megatron-tst verify") -> int:
    """Run the verb. -> exit code"""
    return call(parser(prog), _run, argv)


def _run(options):
    from megatron_tst.checkpoint.format import Checkpoint
    from megatron_tst.checkpoint.verify import differences

    one, other = Checkpoint(options.checkpoint), Checkpoint(options.other)
    with progress_bar("comparing") as progress:
        found = differences(one, other, optimizer=not options.weights_only, progress=progress)
    about = {
        "checkpoints": [str(one.path), str(other.path)],
        "weights_only": options.weights_only,
        "same": not found,
        "differences": found,
    }
    rows = [f"  {name}: {how}" for name, how in found.items()]
    last = f"{len(found)} tensors differ" if found else f"the same: {len(one.tensors)} tensors"
    answer(options.json, about, "\n".join([*rows, last]))
    return int(bool(found))
