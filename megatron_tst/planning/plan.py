"""A plan from its flags: what they describe, whether it is possible, what it costs. torch is
imported for --hf-config and --data-path alone.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict

from megatron_tst.checks import layout, text
from megatron_tst.checks.blends import Blend, read_blend, training_blend
from megatron_tst.config import TSTConfig
from megatron_tst.errors import TSTError, refuse
from megatron_tst.hardware import ASSUMED_CUDA, GPUS
from megatron_tst.planning import arithmetic, evidence, flags, launch_line
from megatron_tst.schedule import RECOVERY, Schedule


def examine(
    argv: list[str], parser: argparse.ArgumentParser | None = None
) -> tuple[dict, argparse.Namespace]:
    """The plan as plain numbers and text, or {"faults": [...], "checks": [...]} of a run that is
    impossible; and the run's arguments.

    Args:
        argv: flags.add_arguments', Megatron's, TST's.
        parser: of a verb, after flags.add_arguments; none: of the flags alone.

    Raises:
        TSTError: a value that makes no sense.
    """
    args, base = flags.read(argv, parser)
    config = TSTConfig.from_args(args)
    if not config.enabled:
        length = (
            f"--tst-step-ratio {args.tst_step_ratio}"
            if args.tst_iters is None
            else f"--tst-iters {args.tst_iters}"
        )
        got = f"--tst-bag-size {args.tst_bag_size} and {length}"
        refuse(
            "TST",
            "bags of 2 or more and a length above 0",
            got,
            "This run is stock Megatron: there is nothing to plan.",
        )
    checks, warned = layout.checks(args, config, GPUS[args.gpu].capability, ASSUMED_CUDA)
    rows = [asdict(check) for check in checks]
    if faults := [check.fault for check in checks if check.fault]:
        return {"faults": faults, "checks": rows, "not_used": args.not_used}, args
    schedule = config.schedule(args)
    measured, read = None, []
    if args.data_path is not None:
        blend, share = training_blend(args, read_blend(args.data_path, "--data-path"), None)
        measured, corpora = measure(blend, share, schedule.long_sample_length)
        read, repeated = _readings(corpora, schedule, config)
        warned = [*warned, *repeated]
        args.tokens = args.tokens or measured["tokens"]
    found = arithmetic.make(args, config)
    found["loader"]["measured"], found["text"]["readings"] = measured, read
    found["against"], found["checks"] = evidence.against(found, config), rows
    found["warnings"] = [*warned, *_other_models(args.not_used)]
    found["notes"] = args.notes
    found["not_used"] = args.not_used
    found["flags"] = flags.paste(
        args,
        config,
        [phase["steps"] for phase in found["phases"] if phase["name"] != RECOVERY],
        base,
    )
    if args.sweep:
        found["sweep"] = evidence.sweep(args, config)
    return found, args


def _readings(
    corpora: Sequence[text.Corpus], schedule: Schedule, config: TSTConfig
) -> tuple[list[dict], list[str]]:
    """-> how often each corpus is read, ready for JSON; what training will say of it"""
    text.check_fit(corpora, schedule)
    found, said = text.readings(corpora, schedule), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            text.check_text(config, corpora, schedule)
        except TSTError as error:
            said.append(f"training refuses this run: {error}")
    said += [str(warning.message).removeprefix("megatron_tst: ") for warning in caught]
    rows = [
        {
            "corpus": reading.corpus.prefix,
            "tokens": reading.corpus.tokens,
            "read": round(reading.tokens),
            "times": reading.times,
        }
        for reading in found
    ]
    return rows, said


def _other_models(not_used: list[str]) -> list[str]:
    names = [name for name in not_used if name in launch_line.CHANGING]
    if not names:
        return []
    verb = "changes" if len(names) == 1 else "change"
    return [f"{', '.join(names)} {verb} the run: the figures are those of the run without"]


def measure(
    blend: Blend, share: tuple[float, float], length: int, seconds: float = 1.0
) -> tuple[dict, list[text.Corpus]]:
    """Count the tokens of a training set and read it with Megatron's IndexedDataset for a while:
    one process, random documents, as int64.

    Args:
        blend: prefixes, and their weights or None. With weights `tokens` is what lasts until the
            first corpus is used up.
        share: where the training split begins and ends, in [0, 1].
        length: tokens of a long sample; of longer documents so many are read.
        seconds: how long to read for.

    Returns:
        tokens of the dataset, and how fast they were read; its corpora.

    Raises:
        TSTError: data that are not on this machine, or files that are damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not installed here
        from megatron_tst import compat

        compat.hide_broken_transformer_engine()
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        from megatron_tst.checks.files import check_data_files

    prefixes, weights = blend
    if remote := [prefix for prefix in prefixes if "://" in prefix]:
        refuse(
            "--data-path",
            "local files, to be counted and read",
            remote[0],
            "Give --tokens in place of it.",
        )
    check_data_files(prefixes, None)
    corpora = text.count(blend, share)
    counts = [corpus.tokens for corpus in corpora]
    lasts = sum(counts)
    if weights:
        lasts = min(count * sum(weights) / weight for count, weight in zip(counts, weights))
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    if not lasts:
        refuse("--data-path", "text in the training share", "none", "Raise it in --split.")
    draw, read, size, start = random.Random(0), 0, 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        dataset = draw.choices(datasets, weights or counts)[0]
        i = draw.randrange(len(dataset))
        taken = dataset.get(i, 0, min(length, int(dataset.sequence_lengths[i])))
        read += len(taken.astype("int64"))  # a copy: the file is mapped, not read
        size += taken.nbytes
    about = {
        "tokens": int(lasts),
        "counted": sum(counts),
        "tokens_a_second": read / elapsed,
        "mb_a_second": size / elapsed / 1e6,
        "seconds": seconds,
    }
    return about, corpora
