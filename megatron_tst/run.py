"""One training run: its batches on tensor-parallel ranks, its log lines, its boundary.

Each public method takes a function of Megatron's training loop and returns ours (patch.install); all of them call the stock one.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import torch

from megatron_tst import bags, compat, extension, patch
from megatron_tst.config import TSTConfig
from megatron_tst.loss import target_weights
from megatron_tst.schedule import RECOVERY, SUPERPOSITION, Schedule

LOSS_KEY = "lm loss"  # the name that Megatron's scripts report their loss under
EXCESS_KEY = "mce minus bag entropy"


@dataclass
class Run:
    """One training run: its settings, and the entropy of the bags seen since the last log call."""

    args: argparse.Namespace
    config: TSTConfig
    schedule: Schedule
    entropy: torch.Tensor | None = None  # fp32 [2]: sum over positions that count, and their number
    weights: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.weights = target_weights(self.config.target_weighting, self.config.bag_size)

    def superposed_now(self) -> bool:
        """Whether the batch being fetched is superposed: a training step (evaluation runs without gradients) of the first phase.

        Known on the host of every rank, so that receivers size their buffers without waiting for the GPU; rank 0 of the
        tensor-parallel group checks it against the batch itself.
        """
        return torch.is_grad_enabled() and self.schedule.phase(self.args.consumed_train_samples) == SUPERPOSITION

    def get_batch_on_this_tp_rank(self, stock, trained=True):
        """Megatron's function (megatron/core/utils.py), for batches that may be bags; `trained` False for skipped iterations."""

        def get_batch_on_this_tp_rank(batch, **named):
            if not self.superposed_now():
                return stock(batch, **named)
            batch = self._broadcast_bags(batch, **named)
            labels = batch["labels"]
            if trained and labels is not None and labels.dim() == 3 and self.config.loss == "mce":
                self._note_entropy(labels, batch["loss_mask"])
            return batch

        return get_batch_on_this_tp_rank

    def _broadcast_bags(
        self, batch, *, tp_rank, broadcast_src_rank, broadcast_group, micro_batch_size, seq_length,
        create_attention_mask_in_dataloader, mtp_on_this_rank=False, pipeline_model_parallel_size=1,
        is_pipeline_first_stage=False, is_pipeline_last_stage=False, **_,
    ):  # fmt: skip
        """Rank 0 of the tensor-parallel group holds the batch before; every rank holds what its pipeline stage needs after."""
        row, bag = (micro_batch_size, seq_length), (micro_batch_size, seq_length, self.config.bag_size)
        mode = self.config.superpose
        tensors = {  # name: shape, dtype, stages
            "tokens": (row if mode == "output" else bag, torch.int64, "first"),
            "position_ids": (row, torch.int64, "first"),
            "labels": (row if mode == "input" else bag, torch.int64, "last"),
            "loss_mask": (row, torch.float32, "last"),
        }
        if create_attention_mask_in_dataloader:
            tensors["attention_mask"] = ((micro_batch_size, 1, seq_length, seq_length), torch.bool, "first last")
        needs_all = pipeline_model_parallel_size == 1 or mtp_on_this_rank
        here = {"first": is_pipeline_first_stage, "last": is_pipeline_last_stage}
        received = dict.fromkeys(
            ("tokens", "labels", "loss_mask", "position_ids", "attention_mask", "cu_seqlens", "cu_seqlens_padded", "max_seqlen",
             "local_cp_size", "hybrid_cp_group")
        )  # fmt: skip
        for name, (shape, dtype, stages) in tensors.items():
            if not needs_all and not any(here[stage] for stage in stages.split()):
                continue
            if tp_rank == 0:
                tensor = batch[name]
                assert tensor is not None and tuple(tensor.shape) == shape and tensor.dtype == dtype, (
                    f"{name}: expected {shape} {dtype} in the superposition phase, got {None if tensor is None else (tuple(tensor.shape), tensor.dtype)}"
                )
            else:
                tensor = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
            torch.distributed.broadcast(tensor, broadcast_src_rank, group=broadcast_group)
            received[name] = tensor
        return received

    def _note_entropy(self, labels, mask):
        entropy = bags.bag_entropy(labels, self.weights.to(labels.device))
        noted = torch.stack([(entropy * mask).sum(), mask.sum()])
        self.entropy = noted if self.entropy is None else self.entropy + noted

    def _mean_entropy(self):
        """Over the step's positions that count, as the script averages its loss. Runs on every rank that has a loss."""
        from megatron.core import mpu

        total, self.entropy = self.entropy, None
        torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
        return total[0] / total[1].clamp_min(1)

    def training_log(self, stock):
        """Megatron's function, with phase, bag size and raw tokens beside its figures and the boundary announced."""

        def training_log(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named):
            done, step = self.args.consumed_train_samples, self.args.global_batch_size
            superposed = self.schedule.phase(done - step) == SUPERPOSITION
            if self.entropy is not None and LOSS_KEY in loss_dict:
                loss_dict[EXCESS_KEY] = loss_dict[LOSS_KEY] - self._mean_entropy()
            if not superposed:
                total_loss_dict.pop(EXCESS_KEY, None)  # else Megatron goes on printing 0
            self._write_scalars(iteration, superposed)
            result = stock(loss_dict, total_loss_dict, learning_rate, iteration, *rest, **named)
            if iteration % self.args.log_interval == 0 or named.get("is_first_iteration"):
                _print_last(self._line(iteration, superposed, loss_dict))
            if done == self.schedule.superposition_samples:
                _print_last(self._boundary(iteration))
            return result

        return training_log

    def _write_scalars(self, iteration, superposed):
        from megatron.training import get_tensorboard_writer, get_wandb_writer

        args = self.args
        values = {
            "tst bag size": self.config.bag_size if superposed else 1,
            "tst raw tokens": self.schedule.raw_tokens(args.consumed_train_samples),
        }
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        if writer and iteration % args.tensorboard_log_interval == 0:
            for name, value in values.items():
                writer.add_scalar(name, value, iteration)
            if wandb:
                wandb.log(values, iteration)

    def _line(self, iteration, superposed, loss_dict):
        phase, bag = (SUPERPOSITION, self.config.bag_size) if superposed else (RECOVERY, 1)
        raw = self.schedule.raw_tokens(self.args.consumed_train_samples)
        line = f" [tst] iteration {iteration:8d} | phase: {phase} | bag size: {bag} | raw tokens: {raw} |"
        if LOSS_KEY in loss_dict:  # Megatron prints a mean over iterations, and twice counts the first one after a start
            line += f" {LOSS_KEY} of this iteration: {loss_dict[LOSS_KEY].item():.6E} |"
        return line

    def _boundary(self, iteration):
        status = patch.status()
        raw = self.schedule.raw_tokens(self.args.consumed_train_samples)
        mixed = iteration % self.args.log_interval
        return (
            f" [tst] boundary after iteration {iteration}: superposition is done ({raw} raw tokens), recovery begins: plain next-token "
            "training on stock code; weights, optimizer state, learning-rate schedule and data position go on"
            f" | superposed on this rank: {status.superposed_embeddings} embedding and {status.multi_hot_losses} loss calls |"
            + (f" the next log line averages both phases ({mixed} iterations of superposition) |" if mixed else "")
        )

    def checkpoint_and_decide_exit(self, stock):
        """Megatron's function; with --tst-exit-at-boundary its own exit-interval path ends the run at the boundary."""

        def checkpoint_and_decide_exit(*positional, **named):
            if self.config.exit_at_boundary and self.args.consumed_train_samples == self.schedule.superposition_samples:
                before, self.args.exit_interval = self.args.exit_interval, 1
                try:
                    return stock(*positional, **named)
                finally:
                    self.args.exit_interval = before
            return stock(*positional, **named)

        return checkpoint_and_decide_exit

    def announce(self):
        c, s = self.config, self.schedule
        if self.args.rank == 0:
            print(
                f" [tst] on: bag size {c.bag_size} ({c.superpose} superposed), {s.superposition_iters} iterations of superposition "
                f"({s.superposition_samples} samples, {s.raw_tokens(s.superposition_samples)} raw tokens) then recovery to sample "
                f"{s.train_samples} ({s.raw_tokens(s.train_samples)} raw tokens in all) | loss {c.loss}, {c.target_weighting} weighting | "
                f"loss kernel: {self._kernels()} | Megatron {compat.megatron_version()}, patched: {', '.join(patch.status().seams)}",
                flush=True,
            )

    def _kernels(self) -> str:
        kernel = extension.choose(self.config.kernel, "cuda" if torch.cuda.is_available() else "cpu")
        recovery = "extension" if self.config.kernel_in_recovery else "Megatron's"
        return f"{kernel} (extension: {extension.load().description}), in recovery {recovery}"


def _print_last(text: str) -> None:
    from megatron.training.utils import print_rank_last

    print_rank_last(text)
