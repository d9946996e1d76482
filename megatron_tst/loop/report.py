"""What a run says of its phases: the [tst] lines, and scalars for TensorBoard and W&B.

The block a few iterations after a boundary is boundary_log.py's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from megatron_tst import compat, extension
from megatron_tst.checks import text
from megatron_tst.checks.conflicts import captures_whole_steps
from megatron_tst.config import TSTConfig
from megatron_tst.loop import patch
from megatron_tst.loop.graphs import described
from megatron_tst.loop.switch import LossTrend
from megatron_tst.ops.names import ABLATIONS
from megatron_tst.schedule import RECOVERY, Phase, Schedule

LOSS_KEY = "lm loss"  # the name that Megatron's scripts report their loss under
EXCESS_KEY = "mce minus bag entropy"


class Report:
    """The lines of one run, on its first or its last rank; every rank may call every method.

    Args:
        args: Megatron's.
        config: the TST settings.
        trend: what --tst-switch auto has seen; None with a fixed switch.
    """

    def __init__(self, args: argparse.Namespace, config: TSTConfig, trend: LossTrend | None):
        self._args, self._config, self._trend = args, config, trend

    def announce(self, schedule: Schedule) -> None:
        """Say on rank 0 what the run will do, before it starts."""
        c, s = self._config, schedule
        _print_first(
            f" [tst] on: bag size {', '.join(map(str, c.bag_sizes))} ({c.superpose} superposed), "
            f"{s.superposition_samples // s.global_batch_size} iterations of superposition "
            f"({s.superposition_samples} samples, {s.raw_tokens(s.superposition_samples)} raw "
            "tokens) then recovery to sample "
            f"{s.train_samples} ({s.raw_tokens(s.train_samples)} raw tokens in all) | "
            f"{s.described} | switch: {self._switch()} | "
            f"loss {c.loss}, {c.target_weighting} weighting | loss kernel: {self._kernels()} | "
            f"embedding kernel: {_chosen(c.kernel)} | "
            f"Megatron {compat.megatron_version()}, patched: {', '.join(patch.status().seams)}"
        )

    def text(self, schedule: Schedule, found: Sequence[text.Reading]) -> None:
        """Say on rank 0 how often the run reads each corpus; nothing where that is not counted."""
        if found:
            _print_first(f" [tst] text: {text.said(found, schedule)}")

    def _switch(self) -> str:
        if not self._trend:
            return "fixed"
        return (
            f"auto, when the loss falls by less than {self._trend.least:g} nats in a hundredth of "
            f"the run (smoothed over {self._trend.window} iterations), at the latest after the "
            "iterations above"
        )

    def _kernels(self) -> str:
        asked = "torch" if self._config.loss in ABLATIONS else self._config.kernel
        recovery = "extension" if self._config.kernel_in_recovery else "Megatron's"
        return (
            f"{_chosen(asked)} (extension: {extension.load().description}), in recovery {recovery}"
        )

    def scalars(self, schedule: Schedule, phase: Phase, iteration: int) -> None:
        """Write bag size and raw tokens where Megatron writes its own figures."""
        from megatron.training import get_tensorboard_writer, get_wandb_writer

        args = self._args
        values = {
            "tst bag size": phase.bag_size,
            "tst raw tokens": schedule.raw_tokens(args.consumed_train_samples),
        }
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        if writer and iteration % args.tensorboard_log_interval == 0:
            for name, value in values.items():
                writer.add_scalar(name, value, iteration)
            if wandb:
                wandb.log(values, iteration)

    def iteration(
        self, schedule: Schedule, phase: Phase, iteration: int, loss: torch.Tensor | None
    ) -> None:
        """The line of one iteration, on the last rank.

        Args:
            loss: in nats, a scalar; None on the ranks that have none. Megatron prints a mean over
                iterations beside it, and counts the first one after a start twice.
        """
        raw = schedule.raw_tokens(self._args.consumed_train_samples)
        line = (
            f" [tst] iteration {iteration:8d} | phase: {phase.name} | bag size: "
            f"{phase.bag_size} | raw tokens: {raw} |"
        )
        if loss is not None:
            line += f" {LOSS_KEY} of this iteration: {loss.item():.6E} |"
        _print_last(line)

    def phase_is_done(self, schedule: Schedule, phase: Phase, iteration: int) -> None:
        """Say on the last rank that a superposition phase has ended."""
        ahead = schedule.phase_at(phase.end)
        if ahead.name == RECOVERY:
            done = "superposition is done"
            begins = "recovery begins: plain next-token training on stock code"
        else:
            done = f"bag size {phase.bag_size} is done"
            begins = f"bag size {ahead.bag_size} begins"
        status = patch.status()
        where = "superposed on this rank"
        if captures_whole_steps(self._args):
            where += ", outside of its CUDA graph's replays"
        line = (
            f" [tst] boundary after iteration {phase.end // schedule.global_batch_size}: {done} "
            f"({schedule.raw_tokens(phase.end)} raw tokens), {begins}; "
            "weights, optimizer state, learning-rate schedule and data position go on"
            f" | {where}: {status.superposed_embeddings} embedding and "
            f"{status.multi_hot_losses} loss calls |"
        )
        if mixed := iteration % self._args.log_interval:
            line += f" the next log line averages both phases ({mixed} iterations of the first) |"
        _print_last(line)

    def phase_ends_early(
        self, schedule: Schedule, phase: Phase, samples: int, iteration: int, fall: float | None
    ) -> None:
        """Say on rank 0 what --tst-switch auto has decided.

        Args:
            schedule: the phases after the decision.
            phase: as it was before, and the samples that it has now.
            fall: of the loss, in nats in a hundredth of the run; rank 0 has decided by it.
        """
        batch = schedule.global_batch_size
        before, after = phase.end // batch, (phase.first_sample + samples) // batch
        _print_first(
            f" [tst] --tst-switch auto at iteration {iteration}: the loss falls by {fall:.3g} "
            "nats in a hundredth of the run, less than "
            f"{self._trend.least:g}: bag size {phase.bag_size} ends after iteration {after} "
            f"instead of {before} | now: {schedule.described}"
        )

    def graph_is_reset(self, schedule: Schedule, phase: Phase, dropped: str) -> None:
        """Say on rank 0, before the first step of a phase, that the full-iteration CUDA graph of
        another one is gone.

        Args:
            phase: of the step that comes.
            dropped: whose graph it was, in words.
        """
        iteration = self._args.consumed_train_samples // schedule.global_batch_size + 1
        steps = getattr(self._args, "cuda_graph_warmup_steps", None)
        _print_first(
            f" [tst] full-iteration CUDA graph before iteration {iteration}: that of {dropped} is "
            f"reset and its static buffers are emptied; {described(phase.name, phase.bag_size)} "
            f"runs without one first (--cuda-graph-warmup-steps {steps}), then has its own"
        )

    def overridden(self, before: Schedule, after: Schedule, consumed: int) -> None:
        """Say on rank 0 what --tst-override has changed, `consumed` samples into the run."""
        raw = [f"{s.raw_tokens(s.train_samples)} raw tokens in all" for s in (before, after)]
        _print_first(
            f" [tst] --tst-override at iteration {consumed // self._args.global_batch_size}: "
            f"{before.described} ({raw[0]}) -> {after.described} ({raw[1]})"
        )


def _chosen(kernel: str) -> str:
    """Which kernel a request gets in this process."""
    return extension.choose(kernel, "cuda" if torch.cuda.is_available() else "cpu")


def _print_last(text: str) -> None:
    from megatron.training.utils import print_rank_last

    print_rank_last(text)


def _print_first(text: str) -> None:
    from megatron.training.utils import print_rank_0

    print_rank_0(text)
