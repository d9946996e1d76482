"""A plan from its flags: what they describe, whether it is possible, what it costs. torch is
imported for --hf-config and --data-path alone.
"""

from __future__ import annotations

import argparse
import math
import random
import time
import warnings
from dataclasses import asdict

from megatron_tst.checks import layout
from megatron_tst.config import TSTConfig
from megatron_tst.errors import refuse
from megatron_tst.hardware import ASSUMED_CUDA, GPUS
from megatron_tst.planning import arithmetic, evidence, flags
from megatron_tst.schedule import RECOVERY


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
        return {"faults": faults, "checks": rows}, args
    measured = (
        measure(args.data_path, config.schedule(args).long_sample_length)
        if args.data_path
        else None
    )
    args.tokens = args.tokens or (measured and measured["tokens"])
    found = arithmetic.make(args, config)
    found["loader"]["measured"] = measured
    found["against"], found["warnings"], found["checks"] = (
        evidence.against(found, config),
        warned,
        rows,
    )
    found["flags"] = flags.paste(
        args,
        config,
        [phase["steps"] for phase in found["phases"] if phase["name"] != RECOVERY],
        base,
    )
    if args.sweep:
        found["sweep"] = evidence.sweep(args, config)
    return found, args


def measure(paths: list[str], length: int, seconds: float = 1.0) -> dict:
    """Count the tokens of a dataset and read it with Megatron's IndexedDataset for a while: one
    process, random documents, as int64.

    Args:
        paths: as --data-path: a prefix, prefixes, or weights and prefixes. With weights `tokens` is
            what lasts until the first corpus is used up.
        length: tokens of a long sample; of longer documents so many are read.
        seconds: how long to read for.

    Returns:
        tokens of the dataset, and how fast they were read.

    Raises:
        TSTError: weights of 0, data that are not on this machine, or files that are damaged.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not installed here
        from megatron_tst import compat

        compat.hide_broken_transformer_engine()
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import get_blend_from_list

        from megatron_tst.checks.files import check_data_files

    prefixes, weights = get_blend_from_list(paths)
    if weights and not all(0 < weight < math.inf for weight in weights):
        refuse("--data-path", "weights above 0", " ".join(paths), "Leave out what is not read.")
    if remote := [prefix for prefix in prefixes if "://" in prefix]:
        refuse(
            "--data-path",
            "local files, to be counted and read",
            remote[0],
            "Give --tokens in place of it.",
        )
    check_data_files(prefixes, None)
    datasets = [IndexedDataset(prefix, mmap=True) for prefix in prefixes]
    counts = [int(dataset.sequence_lengths.sum(dtype="int64")) for dataset in datasets]
    lasts = (
        min(count * sum(weights) / weight for count, weight in zip(counts, weights) if weight)
        if weights
        else sum(counts)
    )
    draw, read, start = random.Random(0), 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        dataset = draw.choices(datasets, weights or counts)[0]
        i = draw.randrange(len(dataset))
        read += len(
            dataset.get(i, 0, min(length, int(dataset.sequence_lengths[i]))).astype("int64")
        )  # a copy: the file is mapped, not read
    itemsize = datasets[0].index.dtype_size
    return {
        "tokens": int(lasts),
        "counted": sum(counts),
        "tokens_a_second": read / elapsed,
        "mb_a_second": read * itemsize / elapsed / 1e6,
        "seconds": seconds,
    }
