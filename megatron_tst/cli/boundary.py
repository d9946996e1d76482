"""A checkpoint of a TST run -> one of a plain Megatron run, which stock scripts continue.

    megatron-tst boundary ck ck_stock
    torchrun ... pretrain_gpt.py ... --load ck_stock

Weights, optimizer state, learning-rate schedule and data position go over byte by byte. CHECKPOINT
is the folder that --save named (then its latest iteration), or one iter_... in it. TARGET is whole
or absent, also after a kill.
"""

from __future__ import annotations

from pathlib import Path

from megatron_tst.cli.screen import Parser, answer, call, progress_bar


def parser(prog: str) -> Parser:
    """The flags of this verb; `prog` is the command as it was called."""
    it = Parser(prog, __doc__)
    it.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    it.add_argument("target", type=Path, metavar="TARGET", help="a new folder, for --load")
    it.add_argument("--drop-optimizer", action="store_true", help="weights alone")
    it.add_argument(
        "--reset-optimizer",
        action="store_true",
        help="zero its state and its step, keep the learning-rate schedule",
    )
    it.add_argument(
        "--reinit",
        default="",
        metavar="embedding,head",
        help="new values in one or both (the paper's table 2: both)",
    )
    it.add_argument("--seed", type=int, default=0, help="of the new embedding and head")
    it.add_argument(
        "--layer-spec",
        metavar="local|transformer_engine",
        help="of the run that is to load it (names of expert layers)",
    )
    it.add_argument(
        "--format",
        choices=("0.18", "0.19"),
        help="common.pt as Megatron-Core <= 0.18 reads it, or as >= 0.19 writes it",
    )
    it.add_argument(
        "--drop-fp8-state",
        action="store_true",
        help="leave out modules' _extra_state (delayed-scaling FP8)",
    )
    it.add_argument("--force", action="store_true", help="replace an existing TARGET")
    it.add_argument("--json", action="store_true", help="print one JSON object")
    return it


def main(argv: list[str] | None = None, prog: str = "megatron-tst boundary") -> int:
    """Run the verb. -> exit code"""
    return call(parser(prog), _run, argv)


def _run(options):
    from megatron_tst.checkpoint.boundary import convert, load_flags
    from megatron_tst.checkpoint.format import Checkpoint
    from megatron_tst.checkpoint.inspect import describe

    source = Checkpoint(options.checkpoint)
    with progress_bar("writing") as progress:
        folder = convert(
            source,
            options.target,
            drop_optimizer=options.drop_optimizer,
            reset_optimizer=options.reset_optimizer,
            reinit=tuple(filter(None, options.reinit.split(","))),
            layer_spec=options.layer_spec,
            legacy=None if options.format is None else options.format == "0.18",
            drop_fp8_state=options.drop_fp8_state,
            seed=options.seed,
            force=options.force,
            progress=progress,
        )
    named = ("iteration", "consumed samples", "raw tokens", "phase", "model")
    about = {name: value for name, value in describe(source).items() if name in named}
    flags = load_flags(
        options.target,
        drop_optimizer=options.drop_optimizer,
        drop_fp8_state=options.drop_fp8_state,
        layer_spec=options.layer_spec,
    )
    text = (
        f"{folder}: iteration {about['iteration']}, {about['consumed samples']} samples, "
        f"{about['raw tokens']} raw tokens, phase {about['phase']}, {about['model']}\n"
        f"  stock Megatron goes on with {' '.join(flags)}"
    )
    answer(options.json, {"written": str(folder), **about, "load": flags}, text)
    return 0
