"""What TST cannot work with, and what to be warned of: looked at before training starts.

A refusal names the flag, what was expected, what was got and what to do. Elsewhere are settings out
of their range (config.py), flags of Megatron that TST cannot be combined with (conflicts.py), and
a resume (loop/resume.py).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from megatron_tst import cpu, extension
from megatron_tst.checks.conflicts import check_conflicts, check_fused_linear_loss
from megatron_tst.checks.effects import check_effects
from megatron_tst.checks.megatron_faults import warn_of_faults
from megatron_tst.checks.precision import check_precision, recipe_of
from megatron_tst.config import TSTConfig
from megatron_tst.errors import refuse, warn
from megatron_tst.ops.names import ABLATIONS

# paper, section 4 and tables 4 to 7
ROBUST_BAG_SIZES = 4, 8
LARGEST_BAG_SIZE = 16
ROBUST_RATIOS = 0.2, 0.4
LARGEST_WIDTH = 64  # bags of 16, 12 and 8 need 48
LARGEST_COUNT = 2**63 - 1  # of Megatron's indices, int64


def this_gpu() -> tuple[tuple[int, int], str] | None:
    """(compute capability, torch's CUDA version) of this rank's GPU; None on CPU."""
    if cpu.asked_for():
        return None
    import torch

    return torch.cuda.get_device_capability(), torch.version.cuda


def check_arguments(
    config: TSTConfig,
    args: argparse.Namespace,
    gpu: Callable[[], tuple[tuple[int, int], str] | None] = this_gpu,
) -> None:
    """Refuse what cannot work with TST; warn outside the range that the paper found robust.

    Args:
        config: the TST settings.
        args: Megatron's arguments after its own validation.
        gpu: asked for (compute capability, torch's CUDA version), None on CPU, if the run has an
            FP8 or FP4 recipe: asking starts CUDA in this process.

    Raises:
        TSTError: with the flag, what was expected, what was got, what to do.
    """
    check_effects(config, args)
    if config.bag_size == 1:
        return
    if config.step_ratio is None and config.iters is None:
        refuse(
            "--tst-bag-size",
            "--tst-step-ratio or --tst-iters beside it",
            config.bag_size,
            "Say how long to superpose.",
        )
    _check_sequence_length(config, args)
    check_conflicts(args)
    if config.fused_linear_loss:
        check_fused_linear_loss(args)
    _check_ablation(config)
    _check_kernel(config)
    if recipe_of(args):
        check_precision(config, args, gpu())
    schedule = config.schedule(args)
    _check_boundary(config, schedule, args)
    _check_bag_sizes(config, schedule)
    if not schedule.train_samples:
        refuse("--train-iters or --train-samples", "at least 1", 0, "Correct it.")
    ratio = schedule.superposition_samples / schedule.train_samples
    low, high = ROBUST_BAG_SIZES
    for size in config.bag_sizes:
        if not low <= size <= high:
            warn(
                f"bag size {size}: the paper found {low} to {high} robust, and up to "
                f"{LARGEST_BAG_SIZE} at 10B parameters"
            )
    if list(config.bag_sizes) != sorted(config.bag_sizes, reverse=True):
        warn(
            f"bag sizes {', '.join(map(str, config.bag_sizes))}: expected to fall towards the 1 "
            f"of the recovery phase"
        )
    if schedule.width > LARGEST_WIDTH:
        warn(
            f"bag sizes whose least common multiple is {schedule.width}: each sample is cut from "
            f"{schedule.long_sample_length} tokens, which are all read for it"
        )
    warn_of_faults(args)
    if not ROBUST_RATIOS[0] - 0.005 <= ratio <= ROBUST_RATIOS[1] + 0.005:
        warn(
            f"step ratio {ratio:.3f}: the paper found {ROBUST_RATIOS[0]} to {ROBUST_RATIOS[1]} "
            f"robust"
        )


def _check_boundary(config, schedule, args):
    """Refuse a stop at the boundary that would lose the phase, or that Megatron would pass by."""
    if config.exit_at_boundary:
        if not getattr(args, "save", None):
            refuse(
                "--tst-exit-at-boundary",
                "--save beside it",
                "none",
                "Without a checkpoint the superposition phase would be lost.",
            )
        boundary = schedule.superposition_samples // schedule.global_batch_size
        if boundary in (getattr(args, "iterations_to_skip", None) or ()):
            do = (
                "Megatron neither saves nor exits after a skipped iteration. Move the boundary, "
                "or skip another one."
            )
            refuse(
                "--iterations-to-skip with --tst-exit-at-boundary",
                "other iterations than the boundary's",
                boundary,
                do,
            )


def _check_bag_sizes(config, schedule):
    """Refuse bags that no text could fill; the run's own text has its limit in checks/text.py."""
    shown, length = ",".join(map(str, config.bag_sizes)), schedule.seq_length
    if config.superpose == "output" and max(config.bag_sizes) > length:
        refuse(
            "--tst-bag-size with --tst-superpose output",
            f"at most --seq-length {length}",
            shown,
            "The next tokens that a position predicts lie in its own sample.",
        )
    if schedule.long_samples * schedule.long_sample_length > LARGEST_COUNT:
        refuse(
            "--tst-bag-size",
            f"a run of at most {LARGEST_COUNT:,} raw tokens, which Megatron can count",
            shown,
            "Lower it: the paper found 4 to 8 robust.",
        )


def _check_sequence_length(config: TSTConfig, args: argparse.Namespace) -> None:
    """Refuse a number of positions that the layout cannot cut into equal parts of whole bags;
    Megatron's arguments, validated or not.

    Raises:
        TSTError: with --seq-length and what it must be a multiple of.
    """
    length = args.seq_length
    if not config.enabled or length is None:
        return
    if length < 1:  # Megatron's index builder would divide by it, and kill the process
        refuse("--seq-length", "at least 1 position", length, "Correct it.")
    cp = getattr(args, "context_parallel_size", 1)
    tp = args.tensor_model_parallel_size if getattr(args, "sequence_parallel", False) else 1
    two = 2 * cp if cp > 1 else 1  # each context-parallel rank holds two chunks
    multiple = math.lcm(two, cp * tp)
    if length % multiple:
        layout = [f"--context-parallel-size {cp}"] * (cp > 1)
        layout += [f"--tensor-model-parallel-size {tp} --sequence-parallel"] * (tp > 1)
        refuse(
            f"--seq-length with {' and '.join(layout)}",
            f"a multiple of {multiple}",
            length,
            "It counts positions (bags or tokens), which are spread evenly over the ranks. Change "
            "it or the layout.",
        )


def check_sizes(config: TSTConfig, args: argparse.Namespace) -> None:
    """Refuse lengths, batches and layouts at which Megatron's validation would end in an assertion
    that names neither flags nor numbers; its arguments before that.

    Raises:
        TSTError: with the flag, its value and the layout.
    """
    _check_sequence_length(config, args)
    if not config.enabled:
        return
    layout = ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")
    for name in (*layout, "micro_batch", "global_batch"):
        size = getattr(args, f"{name}_size")
        if size is not None and size < 1:
            refuse(f"--{name.replace('_', '-')}-size", "at least 1", size, "Correct it.")
    micro, batch = args.micro_batch_size, args.global_batch_size
    ranks = args.world_size // math.prod(getattr(args, f"{name}_size") for name in layout)
    may_fall = getattr(args, "decrease_batch_size_if_needed", False)
    if micro and batch and ranks and batch % (micro * ranks) and not may_fall:
        refuse(
            "--global-batch-size",
            f"a multiple of micro-batch size x data-parallel ranks = {micro} x {ranks} = "
            f"{micro * ranks}",
            batch,
            "Change one of them.",
        )


def _check_ablation(config):
    """The ablations' losses are in torch alone, and not in the op with the output layer."""
    for flag, asked in (
        ("--tst-kernel extension", config.kernel == "extension"),
        ("--tst-fused-linear-loss", config.fused_linear_loss),
    ):
        if config.loss in ABLATIONS and asked:
            do = "It is an ablation, in torch alone. Drop one of the two."
            refuse(
                f"{flag} with --tst-loss {config.loss}",
                "--tst-loss mce or mce-alt",
                config.loss,
                do,
            )


def _check_kernel(config):
    """Refuse kernels that are not there before training, not at the first loss."""
    device = "cpu" if cpu.asked_for() else "cuda"
    for flag, asked, kernel in (
        ("--tst-kernel extension", config.kernel == "extension", "extension"),
        (
            "--tst-kernel-in-recovery",
            config.kernel_in_recovery,
            "torch" if config.kernel == "torch" else "extension",
        ),
    ):
        if not asked:
            continue
        try:
            if extension.choose(kernel, device) == "extension":
                continue
            got = "--tst-kernel torch"
        except ValueError:
            got = f"an extension that is {extension.load().description}"
        refuse(
            flag, f"the extension's {device} kernels", got, "Build the extension, or drop the flag."
        )
