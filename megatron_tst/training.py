"""Glue to megatron.training: pretrain, batches for tensor-parallel ranks, logging, the boundary.

`prepare()` puts our flags and our `pretrain` under the names by which a script imports them; examples/pretrain_gpt_tst.py calls it in
its first lines, `python -m megatron_tst.launch` for an unmodified script. Everything else is reached from `pretrain`.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import sysconfig
from dataclasses import dataclass, field

import torch

from megatron_tst import bags, compat, cpu, patch
from megatron_tst.config import TSTConfig, TSTError, add_tst_arguments, check_arguments, check_resume, record_in_arguments, refuse
from megatron_tst.data import check_data_files, check_output_folder, two_phase_provider
from megatron_tst.loss import target_weights
from megatron_tst.schedule import RECOVERY, SUPERPOSITION, Schedule

LOSS_KEY = "lm loss"  # the name that Megatron's scripts report their loss under
EXCESS_KEY = "mce minus bag entropy"


def prepare() -> None:
    """Give scripts the --tst flags and TST's pretrain. Call before the script imports megatron.training.

    Also asks for CPU training where the environment does (cpu.py), and survives a half-installed Transformer Engine.
    """
    cpu.enable_if_asked()
    compat.hide_broken_transformer_engine()
    with one_line_errors():
        patch.install(
            {
                compat.ADD_ARGUMENTS: lambda stock: lambda parser: add_tst_arguments(stock(parser)),
                compat.VALIDATE_ARGUMENTS: _validate_args,
                compat.PRETRAIN: lambda stock: pretrain,
                compat.BUILD_HELPERS: build_dataset_helpers,
            }
        )


_checked = None  # the arguments that were checked last: once is enough
_entered = False  # whether pretrain was reached


def check(args) -> TSTConfig:
    """The TST settings of Megatron's arguments, after every check that needs no data: flags, conflicts, output folders."""
    global _checked
    config = TSTConfig.from_args(args)
    if _checked is not args:
        check_arguments(config, args)
        if args.rank == 0:
            for flag in ("save", "tensorboard_dir", "data_cache_path"):
                check_output_folder("--" + flag.replace("_", "-"), getattr(args, flag, None))
        _checked = args
    return config


def _validate_args(stock):
    def validate_args(args, *rest, **named):
        result = stock(args, *rest, **named)
        with one_line_errors():
            check(args)
        return result

    return validate_args


def pretrain(*positional, **named):
    """megatron.training.pretrain with TST: the same arguments, the same return value.

    Reads the --tst flags from Megatron's global arguments. With bag size 1 Megatron's own function runs unchanged, but
    for the checks of input files and output folders and of the checkpoint that is resumed from.

    Ends the process with one line on stderr and exit code 2 where the set-up is wrong.
    """
    with one_line_errors():
        return _pretrain(*positional, **named)


def _pretrain(*positional, **named):
    import megatron.training.training as loop
    from megatron.training import get_args

    global _entered
    _entered = True
    call = inspect.signature(loop.pretrain).bind(*positional, **named)
    args = get_args()
    config = check(args)
    _check_data(args)
    patch.install({compat.CHECK_CHECKPOINT: _check_checkpoint_args, compat.BUILD_HELPERS: build_dataset_helpers})
    if not config.enabled:
        return loop.pretrain(*call.args, **call.kwargs)

    schedule = config.schedule(args)
    record_in_arguments(config, schedule, args)
    run = _Run(args, config, schedule)
    patch.apply(config)
    patch.install(
        {
            compat.TRAINING_LOG: run.training_log,
            compat.DECIDE_EXIT: run.checkpoint_and_decide_exit,
            compat.SKIPPED_BATCH: run.get_batch_on_this_tp_rank,
        }
    )
    given = call.arguments
    given["train_valid_test_dataset_provider"] = two_phase_provider(
        given["train_valid_test_dataset_provider"], args, schedule, config
    )
    _reach_batches(run, given["forward_step_func"], args)
    run.announce()
    return loop.pretrain(*call.args, **call.kwargs)


@dataclass
class _Run:
    """One training run: its settings, and the entropy of the bags seen since the last log call."""

    args: object
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

    def get_batch_on_this_tp_rank(self, stock):
        """Megatron's function (megatron/core/utils.py), for batches that may be bags."""

        def get_batch_on_this_tp_rank(batch, **named):
            if not self.superposed_now():
                return stock(batch, **named)
            batch = self._broadcast_bags(batch, **named)
            if batch["labels"] is not None and batch["labels"].dim() == 3:
                if self.config.loss == "mce":
                    self._note_entropy(batch["labels"], batch["loss_mask"])
            return batch

        return get_batch_on_this_tp_rank

    def _broadcast_bags(
        self, batch, *, tp_rank, broadcast_src_rank, broadcast_group, micro_batch_size, seq_length,
        create_attention_mask_in_dataloader, pipeline_model_parallel_size=1, is_pipeline_first_stage=False,
        is_pipeline_last_stage=False, **_,
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
        here = {"first": is_pipeline_first_stage, "last": is_pipeline_last_stage}
        received = dict.fromkeys(
            ("tokens", "labels", "loss_mask", "position_ids", "attention_mask", "cu_seqlens", "cu_seqlens_padded", "max_seqlen",
             "local_cp_size", "hybrid_cp_group")
        )  # fmt: skip
        for name, (shape, dtype, stages) in tensors.items():
            if pipeline_model_parallel_size > 1 and not any(here[stage] for stage in stages.split()):
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
                f"Megatron {compat.megatron_version()}, patched: {', '.join(patch.status().seams)}",
                flush=True,
            )


def _reach_batches(run: _Run, forward_step, args) -> None:
    """Put our get_batch_on_this_tp_rank where the script's get_batch looks it up: the script's own globals."""
    namespace = inspect.unwrap(forward_step).__globals__
    name = compat.SKIPPED_BATCH.attribute
    if name in namespace:
        stock = inspect.unwrap(namespace[name])
        namespace[name] = run.get_batch_on_this_tp_rank(stock)
    elif args.tensor_model_parallel_size > 1:
        refuse(
            "tensor parallelism with this script",
            f"a forward_step whose module calls {name} by that name",
            f"none in {namespace.get('__name__')}",
            "Import it from megatron.core.utils as pretrain_gpt.py does, so that bags reach every tensor-parallel rank.",
        )


def _check_entered() -> None:
    """Megatron is being initialised: by now a run that asks for TST must have come through our pretrain."""
    if _checked is not None and TSTConfig.from_args(_checked).enabled and not _entered:
        refuse(
            "the --tst flags",
            "a script that calls the pretrain that megatron_tst gives it",
            "one that took megatron.training.pretrain before megatron_tst was there, or has a loop of its own",
            "Run it through `python -m megatron_tst.launch`, or call megatron_tst.training.prepare() before importing megatron.training.",
        )


def _check_checkpoint_args(stock):
    def check_checkpoint_args(checkpoint_args, *rest, **named):
        from megatron.training import get_args

        check_resume(get_args(), checkpoint_args)
        return stock(checkpoint_args, *rest, **named)

    return check_checkpoint_args


def build_dataset_helpers(stock):
    """Leave built dataset helpers alone, and build missing ones for the Python that runs.

    Megatron's wheel has them built but no Makefile, and the stock function ends the process when make fails. In a source
    checkout the Makefile asks whichever python3 and python3-config come first on PATH.
    """

    def compile_helpers():
        with one_line_errors():
            _check_entered()
        try:
            import megatron.core.datasets.helpers_cpp  # noqa: F401
        except ImportError:
            before = {name: os.environ.get(name) for name in ("PATH", "MAKEFLAGS")}
            os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), before["PATH"] or os.defpath])
            os.environ["MAKEFLAGS"] = f"LIBEXT={sysconfig.get_config_var('EXT_SUFFIX')}"
            try:
                stock()
            finally:
                for name, value in before.items():
                    os.environ.pop(name) if value is None else os.environ.update({name: value})

    return compile_helpers


def _check_data(args) -> None:
    from megatron.training.utils import get_blend_and_blend_per_split

    if getattr(args, "mock_data", False):
        return
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except OSError as error:
        raise TSTError(f"data arguments file: expected a readable file, got {error}. Check --data-args-path.") from error
    prefixes = [prefix for part in [blend, *(per_split or [])] if part for prefix in part[0]]
    exact = args.vocab_size if args.tokenizer_type == "NullTokenizer" else None
    check_data_files(prefixes, exact or getattr(args, "padded_vocab_size", None))


def _print_last(text: str) -> None:
    from megatron.training.utils import print_rank_last

    print_rank_last(text)


@contextlib.contextmanager
def one_line_errors():
    """End the process with one line and exit code 2 on a TSTError or PatchError; let everything else through."""
    try:
        yield
    except (TSTError, patch.PatchError) as error:
        rank = os.environ.get("RANK", "0")
        prefix = "megatron_tst: error: " if rank == "0" else f"megatron_tst: error on rank {rank}: "
        print(prefix + " ".join(str(error).split()), file=sys.stderr, flush=True)
        sys.exit(2)
