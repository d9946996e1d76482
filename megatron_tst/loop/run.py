"""One training run: its phases, and what Megatron's training loop is handed in each of them.

Each public method that takes `stock`, a function of Megatron's training loop, returns ours
(patch.install). All of ours call the stock one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from megatron_tst.checkpoint.phases import store, stored
from megatron_tst.config import TSTConfig
from megatron_tst.data import stock_index
from megatron_tst.loop.batches import broadcast_bags
from megatron_tst.loop.boundary_log import WATCHED, BoundaryLog
from megatron_tst.loop.entropy import MeanBagEntropy
from megatron_tst.loop.graphs import PhaseGraph
from megatron_tst.loop.report import EXCESS_KEY, LOSS_KEY, Report
from megatron_tst.loop.resume import check_resume
from megatron_tst.loop.switch import LossTrend, first_end
from megatron_tst.schedule import RECOVERY, SUPERPOSITION, Phase, Schedule


@dataclass
class Run:
    """One training run: its settings, and its phases as they are now.

    Args:
        args: Megatron's.
        config: the TST settings.
        schedule: the phases in effect: those that the flags ask for, until a checkpoint or
            --tst-switch auto changes them.
    """

    args: argparse.Namespace
    config: TSTConfig
    schedule: Schedule
    # (PhasedDataset, stock dataset or None), one for each model chunk that needs data
    datasets: list = field(default_factory=list)
    training_alone: bool = False  # Megatron builds the training data of the split alone
    logged_to: int = 0  # samples of the run at the last log call
    boundary_log: BoundaryLog = field(init=False)
    entropy: MeanBagEntropy = field(init=False)
    graph: PhaseGraph = field(init=False)
    trend: LossTrend | None = field(init=False)
    report: Report = field(init=False)

    def __post_init__(self):
        iterations = self.schedule.train_samples // self.schedule.global_batch_size
        self.boundary_log = BoundaryLog(self.args)
        self.entropy = MeanBagEntropy(self.config.target_weighting)
        self.graph = PhaseGraph()
        self.trend = LossTrend(self.config, iterations) if self.config.switch == "auto" else None
        self.report = Report(self.args, self.config, self.trend)

    def superposed_now(self) -> bool:
        """Whether the batch being fetched is superposed: a training step (evaluation runs without
        gradients) of such a phase.

        Known on the host of every rank, so that receivers size their buffers without waiting for
        the GPU. Rank 0 of the tensor-parallel group checks it against the batch itself.
        """
        return torch.is_grad_enabled() and self._phase().name == SUPERPOSITION

    def _phase(self) -> Phase:
        return self.schedule.phase_at(self.args.consumed_train_samples)

    def get_batch_on_this_tp_rank(self, stock: Callable, trained: bool = True) -> Callable:
        """Megatron's function (megatron/core/utils.py), for batches that may be bags.

        Args:
            trained: False for the batches of skipped iterations, whose entropy is not noted.
        """

        def get_batch_on_this_tp_rank(batch, **named):
            if not self.superposed_now():
                return stock(batch, **named)
            batch = broadcast_bags(batch, self._phase().bag_size, self.config.superpose, **named)
            labels = batch["labels"]
            if trained and labels is not None and labels.dim() == 3 and self.config.loss == "mce":
                self.entropy.see(labels, batch["loss_mask"])
            return batch

        return get_batch_on_this_tp_rank

    def full_iteration_graph(self, stock: Callable) -> Callable:
        """FullCudaGraphWrapper.__call__ (megatron/core/full_cuda_graph.py), called by all ranks to
        run, capture or replay one step: with a graph of the phase that the step is in.
        """

        def __call__(wrapper, *positional, **named):
            if not named.get("forward_only"):
                phase = self._phase()
                if dropped := self.graph.follow(wrapper, phase):
                    self.report.graph_is_reset(self.schedule, phase, dropped)
            return stock(wrapper, *positional, **named)

        return __call__

    @contextlib.contextmanager
    def build_training_alone(self) -> Iterator[None]:
        """Until the block ends, Megatron's dataset builder builds no validation or test data."""
        self.training_alone = True
        try:
            yield
        finally:
            self.training_alone = False

    def dataset_builder(self, stock: Callable) -> Callable:
        """BlendedMegatronDatasetBuilder.__init__ (megatron/core/datasets): without the splits that
        are not wanted (build_training_alone).
        """

        def __init__(builder, cls, sizes, is_built_on_rank, config):
            if self.training_alone:
                config = copy.copy(config)
                if config.split_matrix:
                    config.split_matrix = [config.split_matrix[0], None, None]
                if config.blend_per_split:
                    config.blend_per_split = [config.blend_per_split[0], None, None]
            stock(builder, cls, sizes, is_built_on_rank, config)

        return __init__

    def training_log(self, stock: Callable) -> Callable:
        """Megatron's function, called by all ranks after each iteration: with phase, bag size and
        raw tokens beside its figures, and the end of each phase announced.
        """

        def training_log(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named):
            done, batch = self.args.consumed_train_samples, self.args.global_batch_size
            schedule, phase = self.schedule, self.schedule.phase_at(done - batch)
            superposed = phase.name == SUPERPOSITION
            if superposed and self.entropy.sees and LOSS_KEY in loss_dict:
                loss_dict[EXCESS_KEY] = loss_dict[LOSS_KEY] - self.entropy.take()
            if phase.name == RECOVERY:
                total_loss_dict.pop(EXCESS_KEY, None)  # else Megatron goes on printing 0
            self.report.scalars(schedule, phase, iteration)
            result = stock(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named)
            loss, logged = loss_dict.get(LOSS_KEY), iteration % self.args.log_interval == 0
            if logged or named.get("is_first_iteration"):
                self.report.iteration(schedule, phase, iteration, loss)
            self.boundary_log.saw_iteration(iteration, learning_rate, loss)
            ended = [p for p in schedule.superposed_phases if self.logged_to < p.end <= done]
            if self.trend and superposed:
                self._follow_the_loss(phase, iteration, loss, bool(ended), logged)
            for p in ended:
                self.report.phase_is_done(self.schedule, p, iteration)
            self.logged_to = done
            return result

        return training_log

    def _follow_the_loss(self, phase, iteration, loss, ended, logged):
        """--tst-switch auto, after each superposed iteration."""
        if loss is not None:
            self.trend.see(loss)
        if ended:
            self.trend.restart()
        elif logged:
            self._decide(phase, iteration)

    def _decide(self, phase, iteration):
        """End the phase as soon as its data allow if its loss hardly falls. All ranks come here
        together, and rank 0 decides.
        """
        self.trend.share()
        end = self._earliest_end(phase)
        fall = self.trend.fall if self._warmed_up() else None
        flat = fall is not None and fall < self.trend.least and end < phase.samples
        decided = torch.tensor([flat], dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.broadcast(decided, 0)
        if decided.item():
            self.follow(self.schedule.ending(phase, end))
            self.report.phase_ends_early(self.schedule, phase, end, iteration, fall)

    def _earliest_end(self, phase) -> int:
        """Samples of the phase that are read whatever is decided now.

        Example: batches of 4 samples in one micro-batch, --num-workers 4, and 12 iterations = 48
        samples behind, all of them of this phase. A worker is at most two micro-batches ahead, so
        up to 2 * 4 = 8 iterations are fetched. The boundary's block in the log watches the 5
        before the boundary. The larger counts: 8 more iterations, 32 samples, stay as they are.
        The phase ends after 48 + 32 = 80 samples (iteration 20), or at the next multiple of
        phase.block, where no long sample is left half read.
        """
        args = self.args
        fetched = -(-2 * args.num_workers // _micro_batches())
        ahead = max(fetched, WATCHED) * args.global_batch_size
        skipped = set(args.iterations_to_skip or ()) if self.config.exit_at_boundary else set()
        return first_end(self.schedule, phase, args.consumed_train_samples, ahead, skipped)

    def _warmed_up(self) -> bool:
        """Whether the learning rate has reached its height: before that the loss may fall slowly
        for want of it.
        """
        args, batch = self.args, self.args.global_batch_size
        samples = args.lr_warmup_samples or (args.lr_warmup_iters or 0) * batch
        if args.lr_warmup_fraction:
            decay = args.lr_decay_samples or (args.lr_decay_iters or args.train_iters) * batch
            samples = args.lr_warmup_fraction * decay
        return args.consumed_train_samples >= samples

    def follow(self, schedule: Schedule) -> None:
        """Go on with other phases from here on: in batches, datasets, logs, and in the checkpoints
        to come. Called by all ranks.
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

        Raises:
            TSTError: its run and this one differ where they may not (resume.check_resume).
        """
        before, self.schedule = stored(checkpoint_args), check_resume(self.args, checkpoint_args)
        store(self.args, self.schedule)
        for name in ("tst_long_samples", "tst_boundary", "tst_switch_state", "tst_validation"):
            setattr(self.args, name, getattr(checkpoint_args, name, None))
        if self.trend and self.args.tst_switch_state:
            self.trend.restart(self.args.tst_switch_state)
        self.logged_to = checkpoint_args.consumed_train_samples
        if self.schedule != before:
            self.report.overridden(before, self.schedule, self.logged_to)

    def evaluate(self, stock: Callable) -> Callable:
        """Megatron's function; the validation loss is kept for the log's block at the boundary."""

        def evaluate(*positional, **named):
            result = stock(*positional, **named)
            self.boundary_log.saw_validation((result[0] or {}).get(LOSS_KEY), self.schedule)
            return result

        return evaluate

    def save_checkpoint_and_time(self, stock: Callable) -> Callable:
        """Megatron's function; what --tst-switch auto has seen goes into the checkpoint."""

        def save_checkpoint_and_time(*positional, **named):
            if self.trend:
                self.args.tst_switch_state = self.trend.share()
            return stock(*positional, **named)

        return save_checkpoint_and_time

    def checkpoint_and_decide_exit(self, stock: Callable) -> Callable:
        """Megatron's function; with --tst-exit-at-boundary its own exit-interval path ends the run
        at the boundary.
        """

        def checkpoint_and_decide_exit(model, optimizer, *rest, **named):
            self.boundary_log.after_iteration(self.schedule, model, optimizer)
            at_boundary = self.args.consumed_train_samples == self.schedule.superposition_samples
            if not (self.config.exit_at_boundary and at_boundary):
                return stock(model, optimizer, *rest, **named)
            before, self.args.exit_interval = self.args.exit_interval, 1
            try:
                return stock(model, optimizer, *rest, **named)
            finally:
                self.args.exit_interval = before

        return checkpoint_and_decide_exit


def _micro_batches() -> int:
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    return get_num_microbatches()
