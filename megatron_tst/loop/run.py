"""One training run: its batches on tensor-parallel ranks, its log lines, its boundary.

Each public method takes a function of Megatron's training loop and returns ours (patch.install);
all of them call the stock one.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import torch

from megatron_tst import compat, extension
from megatron_tst.checkpoint.phases import store, stored
from megatron_tst.config import TSTConfig
from megatron_tst.data import bags, stock_index
from megatron_tst.loop import patch
from megatron_tst.loop.batches import broadcast_bags
from megatron_tst.loop.boundary_log import WATCHED, BoundaryLog
from megatron_tst.loop.resume import check_resume
from megatron_tst.loop.switch import LossTrend, first_end
from megatron_tst.ops.loss import target_weights
from megatron_tst.ops.names import ABLATIONS
from megatron_tst.schedule import RECOVERY, SUPERPOSITION, Schedule

LOSS_KEY = "lm loss"  # the name that Megatron's scripts report their loss under
EXCESS_KEY = "mce minus bag entropy"


@dataclass
class Run:
    """One training run: its settings and phases, and what it has seen since the last log call.

    Args:
        args: Megatron's.
        schedule: the phases in effect: those that the flags ask for, until a checkpoint or
            --tst-switch auto changes them.
    """

    args: argparse.Namespace
    config: TSTConfig
    schedule: Schedule
    entropy: torch.Tensor | None = None  # fp32 [2]: sum over positions that count, and their number
    datasets: list = field(
        default_factory=list
    )  # (PhasedDataset, stock dataset or None): one for each model chunk that needs data
    logged_to: int = 0  # samples of the run at the last log call
    boundary_log: BoundaryLog = field(init=False)
    trend: LossTrend | None = field(init=False)

    def __post_init__(self):
        self.boundary_log = BoundaryLog(self.args)
        iterations = self.schedule.train_samples // self.schedule.global_batch_size
        self.trend = LossTrend(self.config, iterations) if self.config.switch == "auto" else None

    def superposed_now(self) -> bool:
        """Whether the batch being fetched is superposed: a training step (evaluation runs without
        gradients) of such a phase.

        Known on the host of every rank, so that receivers size their buffers without waiting for
        the GPU; rank 0 of the tensor-parallel group checks it against the batch itself.
        """
        return torch.is_grad_enabled() and self._phase().name == SUPERPOSITION

    def _phase(self):
        return self.schedule.phase_at(self.args.consumed_train_samples)

    def get_batch_on_this_tp_rank(self, stock, trained=True):
        """Megatron's function (megatron/core/utils.py), for batches that may be bags; `trained`
        False for skipped iterations.
        """

        def get_batch_on_this_tp_rank(batch, **named):
            if not self.superposed_now():
                return stock(batch, **named)
            batch = broadcast_bags(batch, self._phase().bag_size, self.config.superpose, **named)
            labels = batch["labels"]
            if trained and labels is not None and labels.dim() == 3 and self.config.loss == "mce":
                self._note_entropy(labels, batch["loss_mask"])
            return batch

        return get_batch_on_this_tp_rank

    def _note_entropy(self, labels, mask):
        weights = target_weights(self.config.target_weighting, labels.shape[-1], labels.device)
        entropy = bags.bag_entropy(labels, weights)
        noted = torch.stack([(entropy * mask).sum(), mask.sum()])
        self.entropy = noted if self.entropy is None else self.entropy + noted

    def _mean_entropy(self):
        """Over the step's positions that count, as the script averages its loss. Runs on every rank
        that has a loss.
        """
        from megatron.core import mpu

        total, self.entropy = self.entropy, None
        torch.distributed.all_reduce(
            total, group=mpu.get_data_parallel_group(with_context_parallel=True)
        )
        return total[0] / total[1].clamp_min(1)

    def training_log(self, stock):
        """Megatron's function, with phase, bag size and raw tokens beside its figures and the
        boundary announced.
        """

        def training_log(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named):
            done, step = self.args.consumed_train_samples, self.args.global_batch_size
            phase = self.schedule.phase_at(done - step)
            if self.entropy is not None and LOSS_KEY in loss_dict:
                loss_dict[EXCESS_KEY] = loss_dict[LOSS_KEY] - self._mean_entropy()
            if phase.name == RECOVERY:
                total_loss_dict.pop(EXCESS_KEY, None)  # else Megatron goes on printing 0
            self._write_scalars(iteration, phase)
            result = stock(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named)
            logged = iteration % self.args.log_interval == 0
            if logged or named.get("is_first_iteration"):
                _print_last(self._line(iteration, phase, loss_dict))
            self.boundary_log.saw_iteration(iteration, learning_rate, loss_dict.get(LOSS_KEY))
            ended = [p for p in self.schedule.superposed_phases if self.logged_to < p.end <= done]
            if self.trend and phase.name == SUPERPOSITION:
                if LOSS_KEY in loss_dict:
                    self.trend.see(loss_dict[LOSS_KEY])
                if ended:
                    self.trend.restart()
                elif logged:
                    self._decide(phase, iteration)
            for p in ended:
                _print_last(self._boundary(p, iteration))
            self.logged_to = done
            return result

        return training_log

    def _decide(self, phase, iteration):
        """--tst-switch auto: end the phase soon if its loss hardly falls. All ranks come here
        together.
        """
        self.trend.share()
        fetched = -(
            -2 * self.args.num_workers // _micro_batches()
        )  # a prefetch worker is at most two micro-batches ahead
        ahead = (
            max(fetched, WATCHED) * self.args.global_batch_size
        )  # the log's block watches some iterations before the boundary
        skipped = set(self.args.iterations_to_skip or ()) if self.config.exit_at_boundary else set()
        end = first_end(self.schedule, phase, self.args.consumed_train_samples, ahead, skipped)
        fall = self.trend.fall if self._warmed_up() else None
        decided = torch.tensor(
            [fall is not None and fall < self.trend.least and end < phase.samples],
            dtype=torch.int32,
            device=torch.cuda.current_device(),
        )
        torch.distributed.broadcast(decided, 0)
        if not decided.item():
            return
        before = phase.end // self.args.global_batch_size
        self.follow(self.schedule.ending(phase, end))
        after = (phase.first_sample + end) // self.args.global_batch_size
        _print_first(
            f" [tst] --tst-switch auto at iteration {iteration}: the loss falls by {fall:.3g} "
            f"nats in a hundredth of the run, less than "
            f"{self.trend.least:g}: bag size {phase.bag_size} ends after iteration {after} "
            f"instead of {before} | now: {self.schedule.described}"
        )

    def _warmed_up(self) -> bool:
        """Whether the learning rate has reached its height: before that the loss may fall slowly
        for want of it.
        """
        args = self.args
        samples = args.lr_warmup_samples or (args.lr_warmup_iters or 0) * args.global_batch_size
        if args.lr_warmup_fraction:
            whole = (
                args.lr_decay_samples
                or (args.lr_decay_iters or args.train_iters) * args.global_batch_size
            )
            samples = args.lr_warmup_fraction * whole
        return args.consumed_train_samples >= samples

    def follow(self, schedule: Schedule) -> None:
        """Go on with other phases from here on: in batches, datasets, logs, and in the checkpoints
        to come.
        """
        self.schedule = schedule
        store(self.args, schedule)
        for dataset, stock in self.datasets:
            dataset.follow(schedule)
            if self.config.stock_index and self.args.rank == 0:
                stock_index.write(dataset.long_samples, stock, schedule)

    def go_on_from(self, checkpoint_args: argparse.Namespace) -> None:
        """A checkpoint has been loaded: take its phases, or change what lies ahead where
        --tst-override says so.
        """
        before, self.schedule = stored(checkpoint_args), check_resume(self.args, checkpoint_args)
        store(self.args, self.schedule)
        for name in ("tst_long_samples", "tst_boundary", "tst_switch_state", "tst_validation"):
            setattr(self.args, name, getattr(checkpoint_args, name, None))
        if self.trend and self.args.tst_switch_state:
            self.trend.restart(self.args.tst_switch_state)
        self.logged_to = checkpoint_args.consumed_train_samples
        if self.schedule != before:
            raw = [
                f"{s.raw_tokens(s.train_samples)} raw tokens in all"
                for s in (before, self.schedule)
            ]
            _print_first(
                f" [tst] --tst-override at iteration "
                f"{self.logged_to // self.args.global_batch_size}: "
                f"{before.described} ({raw[0]}) -> {self.schedule.described} ({raw[1]})"
            )

    def _write_scalars(self, iteration, phase):
        from megatron.training import get_tensorboard_writer, get_wandb_writer

        args = self.args
        values = {
            "tst bag size": phase.bag_size,
            "tst raw tokens": self.schedule.raw_tokens(args.consumed_train_samples),
        }
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        if writer and iteration % args.tensorboard_log_interval == 0:
            for name, value in values.items():
                writer.add_scalar(name, value, iteration)
            if wandb:
                wandb.log(values, iteration)

    def _line(self, iteration, phase, loss_dict):
        raw = self.schedule.raw_tokens(self.args.consumed_train_samples)
        line = (
            f" [tst] iteration {iteration:8d} | phase: {phase.name} | bag size: "
            f"{phase.bag_size} | raw tokens: {raw} |"
        )
        if (
            LOSS_KEY in loss_dict
        ):  # Megatron prints a mean over iterations, and twice counts the first one after a start
            line += f" {LOSS_KEY} of this iteration: {loss_dict[LOSS_KEY].item():.6E} |"
        return line

    def _boundary(self, phase, iteration):
        status = patch.status()
        raw, ahead = self.schedule.raw_tokens(phase.end), self.schedule.phase_at(phase.end)
        mixed = iteration % self.args.log_interval
        what = (
            "superposition is done"
            if ahead.name == RECOVERY
            else f"bag size {phase.bag_size} is done"
        )
        begins = (
            "recovery begins: plain next-token training on stock code"
            if ahead.name == RECOVERY
            else f"bag size {ahead.bag_size} begins"
        )
        return (
            f" [tst] boundary after iteration {phase.end // self.args.global_batch_size}: {what} "
            f"({raw} raw tokens), {begins}; "
            "weights, optimizer state, learning-rate schedule and data position go on"
            f" | superposed on this rank: {status.superposed_embeddings} embedding and "
            f"{status.multi_hot_losses} loss calls |"
            + (
                f" the next log line averages both phases ({mixed} iterations of the first) |"
                if mixed
                else ""
            )
        )

    def evaluate(self, stock):
        """Megatron's function; the validation loss is kept for the log's block at the boundary."""

        def evaluate(*positional, **named):
            result = stock(*positional, **named)
            self.boundary_log.saw_validation((result[0] or {}).get(LOSS_KEY), self.schedule)
            return result

        return evaluate

    def save_checkpoint_and_time(self, stock):
        """Megatron's function; what --tst-switch auto has seen goes into the checkpoint."""

        def save_checkpoint_and_time(*positional, **named):
            if self.trend:
                self.args.tst_switch_state = self.trend.share()
            return stock(*positional, **named)

        return save_checkpoint_and_time

    def checkpoint_and_decide_exit(self, stock):
        """Megatron's function; with --tst-exit-at-boundary its own exit-interval path ends the run
        at the boundary.
        """

        def checkpoint_and_decide_exit(model, optimizer, *rest, **named):
            self.boundary_log.after_iteration(self.schedule, model, optimizer)
            if (
                self.config.exit_at_boundary
                and self.args.consumed_train_samples == self.schedule.superposition_samples
            ):
                before, self.args.exit_interval = self.args.exit_interval, 1
                try:
                    return stock(model, optimizer, *rest, **named)
                finally:
                    self.args.exit_interval = before
            return stock(model, optimizer, *rest, **named)

        return checkpoint_and_decide_exit

    def announce(self):
        c, s = self.config, self.schedule
        _print_first(
            f" [tst] on: bag size {', '.join(map(str, c.bag_sizes))} ({c.superpose} superposed), "
            f"{s.superposition_samples // s.global_batch_size} iterations of superposition "
            f"({s.superposition_samples} samples, {s.raw_tokens(s.superposition_samples)} raw "
            f"tokens) then recovery to sample "
            f"{s.train_samples} ({s.raw_tokens(s.train_samples)} raw tokens in all) | "
            f"{s.described} | switch: {self._switch()} | "
            f"loss {c.loss}, {c.target_weighting} weighting | loss kernel: {self._kernels()} | "
            f"Megatron {compat.megatron_version()}, patched: {', '.join(patch.status().seams)}"
        )

    def _switch(self) -> str:
        if not self.trend:
            return "fixed"
        return (
            f"auto, when the loss falls by less than {self.trend.least:g} nats in a hundredth of "
            f"the run (smoothed over "
            f"{self.trend.window} iterations), at the latest after the iterations above"
        )

    def _kernels(self) -> str:
        asked = "torch" if self.config.loss in ABLATIONS else self.config.kernel
        kernel = extension.choose(asked, "cuda" if torch.cuda.is_available() else "cpu")
        recovery = "extension" if self.config.kernel_in_recovery else "Megatron's"
        return f"{kernel} (extension: {extension.load().description}), in recovery {recovery}"


def _print_last(text: str) -> None:
    from megatron.training.utils import print_rank_last

    print_rank_last(text)


def _print_first(text: str) -> None:
    from megatron.training.utils import print_rank_0

    print_rank_0(text)


def _micro_batches() -> int:
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    return get_num_microbatches()
