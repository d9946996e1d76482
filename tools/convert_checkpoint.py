"""Look into checkpoints of TST runs, hand them to stock Megatron, compare them. Needs no GPU and no
Transformer Engine.

    convert_checkpoint.py inspect  CHECKPOINT [--json]        phase, step, samples, raw tokens, settings, layout, tensors
    convert_checkpoint.py boundary CHECKPOINT TARGET          a standard Megatron checkpoint that stock `pretrain_gpt.py --load TARGET` continues
    convert_checkpoint.py verify   CHECKPOINT CHECKPOINT      the same weights and optimizer state, tensor by tensor?

CHECKPOINT is the folder that --save named, or one iter_... in it. Exit code 0: done (the same), 1:
they differ, 2: refused, with one line on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_tst.checkpoint.boundary import convert
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.inspect import describe
from megatron_tst.checkpoint.verify import differences
from megatron_tst.errors import TSTError


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        return options.run(options)
    except (TSTError, OSError) as error:
        print(f"convert_checkpoint: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True, metavar="verb")

    verb = verbs.add_parser("inspect", help="what is in a checkpoint")
    verb.add_argument("checkpoint", type=Path)
    verb.add_argument("--json", action="store_true")
    verb.set_defaults(run=_inspect)

    verb = verbs.add_parser("boundary", help="write what stock Megatron continues from")
    verb.add_argument("checkpoint", type=Path)
    verb.add_argument("target", type=Path, help="a new folder")
    verb.add_argument(
        "--drop-optimizer", action="store_true", help="weights alone; continue with --no-load-optim"
    )
    verb.add_argument(
        "--reset-optimizer",
        action="store_true",
        help="zero its state and its step, keep the learning-rate schedule",
    )
    verb.add_argument(
        "--reinit",
        default="",
        metavar="embedding,head",
        help="new values in one or both (the paper's table 2: both)",
    )
    verb.add_argument("--seed", type=int, default=0, help="of the new embedding and head")
    verb.add_argument(
        "--layer-spec",
        choices=("local", "transformer_engine"),
        help="of the run that is to load it (names of expert layers)",
    )
    verb.add_argument(
        "--format",
        choices=("0.18", "0.19"),
        help="common.pt as Megatron-Core <= 0.18 reads it, or as >= 0.19 writes it",
    )
    verb.add_argument(
        "--drop-fp8-state",
        action="store_true",
        help="leave out modules' _extra_state (delayed-scaling FP8)",
    )
    verb.add_argument("--force", action="store_true", help="replace an existing target")
    verb.set_defaults(run=_boundary)

    verb = verbs.add_parser("verify", help="compare two checkpoints")
    verb.add_argument("checkpoint", type=Path)
    verb.add_argument("other", type=Path)
    verb.add_argument("--weights-only", action="store_true", help="leave the optimizer's state out")
    verb.set_defaults(run=_verify)
    return parser


def _inspect(options):
    about = describe(Checkpoint(options.checkpoint))
    if options.json:
        print(json.dumps(about, indent=1, default=str))
        return 0
    tensors = about.pop("tensors")
    for name, value in about.items():
        for row in value if isinstance(value, list) else [value]:
            text = ", ".join(f"{k} {v}" for k, v in row.items()) if isinstance(row, dict) else row
            print(f"{name:18s} {text}")
    for name, entry in tensors.items():
        print(f"  {name:80s} {entry['dtype']:9s} {entry['shape']!s:24s} {entry['shards']} shards")
    return 0


def _boundary(options):
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
    about = describe(source)
    print(
        f"{folder}: iteration {about['iteration']}, {about['consumed samples']} samples, "
        f"{about['raw tokens']} raw tokens, phase {about['phase']}"
    )
    if options.drop_fp8_state or options.layer_spec == "transformer_engine":
        print(
            "  Transformer Engine's layers ask for an extra state each, empty without FP8, that "
            "it may lack: load it with --dist-ckpt-strictness log_all"
        )
    return 0


def _verify(options):
    one, other = Checkpoint(options.checkpoint), Checkpoint(options.other)
    with progress_bar("comparing") as progress:
        found = differences(one, other, optimizer=not options.weights_only, progress=progress)
    for name, how in found.items():
        print(f"  {name}: {how}")
    print(f"{len(found)} tensors differ" if found else f"the same: {len(one.tensors)} tensors")
    return int(bool(found))


def progress_bar(what, unit="B"):
    """A progress bar on stderr, in bytes or in `unit`. -> context manager of a function (done, of)"""
    import contextlib

    from tqdm import tqdm

    @contextlib.contextmanager
    def running():
        with tqdm(desc=what, unit=unit, unit_scale=True, file=sys.stderr, disable=None) as bar:

            def advance(done, total):
                bar.total = total
                bar.update(done - bar.n)

            yield advance

    return running()


if __name__ == "__main__":
    sys.exit(main())
