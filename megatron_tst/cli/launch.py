"""Run an unmodified Megatron-LM script with TST: pretrain_gpt.py, pretrain_hybrid.py, or any other
that calls megatron.training.pretrain. Without --tst- flags it runs as it is.

    torchrun --nproc-per-node 8 -m megatron_tst launch pretrain_gpt.py ARGUMENTS --tst-bag-size 6 \\
        --tst-step-ratio 0.3

The same as torchrun ... -m megatron_tst.launch pretrain_gpt.py ... SCRIPT's own folder comes first
where Python looks for modules, so a checkout of Megatron-LM is used with its script.
MEGATRON_TST_CPU=1 trains on CPU.
"""

from __future__ import annotations

import argparse

from megatron_tst.cli.screen import Parser, guarded


def parser(prog: str) -> Parser:
    """The flags of this verb; `prog` is the command as it was called."""
    it = Parser(prog, __doc__)
    it.add_argument("script", metavar="SCRIPT", help="calls megatron.training.pretrain")
    it.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="ARGUMENTS",
        help="its own flags, and those of TST (--tst-...)",
    )
    return it


def main(argv: list[str] | None = None, prog: str = "megatron-tst launch") -> int:
    """Run the verb. -> exit code"""
    with guarded(prog) as end:
        options = parser(prog).parse_args(argv)
        end.code = 0
    if end.code == 0:
        # outside: the script's exceptions, signals and exit codes stay its own
        from megatron_tst import launch

        launch.main([options.script, *options.arguments])
    return end.code
