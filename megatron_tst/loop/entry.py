"""Glue to megatron.training: how a script reaches TST, and every check before its training starts
(run.py is what comes then).

`prepare()` puts our flags and our `pretrain` under the names by which a script imports them;
examples/pretrain_gpt_tst.py calls it in its first lines, `python -m megatron_tst.launch` for an
unmodified script. Everything else is reached from `pretrain`.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import sysconfig

from megatron_tst import compat, cpu
from megatron_tst.checkpoint.format import TRACKER, Checkpoint, mend_tracker
from megatron_tst.checkpoint.phases import store
from megatron_tst.checks.files import check_data_files, check_output_folder
from megatron_tst.checks.refusals import check_arguments, check_sequence_length
from megatron_tst.config import TSTConfig, add_tst_arguments
from megatron_tst.data.dataset import phased_provider
from megatron_tst.errors import PatchError, TSTError, refuse
from megatron_tst.loop import patch, seams
from megatron_tst.loop.resume import check_optimizer, check_resume
from megatron_tst.loop.run import Run


def prepare() -> None:
    """Give scripts the --tst flags and TST's pretrain. Call before the script imports
    megatron.training.

    Also asks for CPU training where the environment does (cpu.py), and survives a half-installed
    Transformer Engine.
    """
    cpu.enable_if_asked()
    compat.hide_broken_transformer_engine()
    with one_line_errors():
        patch.install(
            {
                seams.ADD_ARGUMENTS: lambda stock: lambda parser: add_tst_arguments(stock(parser)),
                seams.VALIDATE_ARGUMENTS: _validate_args,
                seams.PRETRAIN: lambda stock: pretrain,
                seams.BUILD_HELPERS: build_dataset_helpers,
            }
        )


_checked = None  # the arguments that were checked last: once is enough
_entered = False  # whether pretrain was reached


def check(args) -> TSTConfig:
    """The TST settings of Megatron's arguments, after every check that needs no data: flags,
    conflicts, output folders.
    """
    global _checked
    config = TSTConfig.from_args(args)
    if _checked is not args:
        check_arguments(config, args)
        _check_resumed_optimizer(config, args)
        if args.rank == 0:
            if (
                config.enabled
                and getattr(args, "load", None)
                and (iteration := mend_tracker(args.load)) is not None
            ):
                print(
                    f" [tst] {args.load}: {TRACKER} was empty (a run killed while it wrote it); "
                    f"going on from iteration {iteration}",
                    flush=True,
                )
            for flag in ("save", "tensorboard_dir", "data_cache_path", "tst_stock_index"):
                check_output_folder("--" + flag.replace("_", "-"), getattr(args, flag, None))
        _checked = args
    return config


def _check_resumed_optimizer(config, args) -> None:
    """Refuse a resume whose optimizer state Megatron would not restore: a traceback at best, with
    torch's Adam wrong steps at worst.
    """
    loads = (
        getattr(args, "load", None)
        and not getattr(args, "no_load_optim", False)
        and not getattr(args, "finetune", False)
    )
    if not config.enabled or not loads:
        return
    try:
        folder = (
            args.load
            if args.ckpt_step is None
            else os.path.join(args.load, f"iter_{args.ckpt_step:07d}")
        )
        check_optimizer(args, Checkpoint(folder).args)
    except TSTError:
        pass  # no checkpoint yet, or of another format: Megatron says what it makes of it
    if not getattr(args, "use_distributed_optimizer", False) or cpu.asked_for():
        return
    from megatron.core.optimizer import distrib_optimizer

    if not distrib_optimizer.HAVE_APEX_OR_TE and os.path.isfile(os.path.join(args.load, TRACKER)):
        refuse(
            "--load with --use-distributed-optimizer",
            "the Adam of Transformer Engine or Apex",
            "torch's, whose state Megatron's distributed optimizer does not restore",
            "Install transformer-engine, or add --no-load-optim to start the optimizer anew.",
        )


def _validate_args(stock):
    def validate_args(args, *rest, **named):
        with one_line_errors():
            check_sequence_length(
                TSTConfig.from_args(args), args
            )  # Megatron's own assertion names no numbers
        result = stock(args, *rest, **named)
        with one_line_errors():
            check(args)
        return result

    return validate_args


def pretrain(*positional, **named):
    """megatron.training.pretrain with TST: the same arguments, the same return value.

    Reads the --tst flags from Megatron's global arguments. With bag size 1 Megatron's own function
    runs unchanged, but for the checks of input files and output folders and of the checkpoint that
    is resumed from.

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
    patch.install({seams.BUILD_HELPERS: build_dataset_helpers})
    if not config.enabled:
        patch.install(
            {
                seams.CHECK_CHECKPOINT: _before(
                    lambda checkpoint_args: check_resume(args, checkpoint_args)
                )
            }
        )
        return loop.pretrain(*call.args, **call.kwargs)

    schedule = config.schedule(args)
    store(args, schedule, planned=schedule)
    run = Run(args, config, schedule)
    patch.apply(config)
    patch.install(
        {
            seams.CHECK_CHECKPOINT: _before(run.go_on_from),
            seams.TRAINING_LOG: run.training_log,
            seams.EVALUATE: run.evaluate,
            seams.SAVE: run.save_checkpoint_and_time,
            seams.DECIDE_EXIT: run.checkpoint_and_decide_exit,
            seams.SKIPPED_BATCH: lambda stock: run.get_batch_on_this_tp_rank(stock, trained=False),
        }
    )
    given = call.arguments
    given["train_valid_test_dataset_provider"] = phased_provider(
        given["train_valid_test_dataset_provider"],
        args,
        config,
        lambda: run.schedule,
        lambda *pair: run.datasets.append(pair),
    )
    _reach_batches(run, given["forward_step_func"], args)
    run.announce()
    return loop.pretrain(*call.args, **call.kwargs)


def _reach_batches(run: Run, forward_step, args) -> None:
    """Put our get_batch_on_this_tp_rank where the script's get_batch looks it up: the script's own
    globals.
    """
    namespace = inspect.unwrap(forward_step).__globals__
    name = seams.SKIPPED_BATCH.attribute
    if name in namespace:
        stock = inspect.unwrap(namespace[name])
        namespace[name] = run.get_batch_on_this_tp_rank(stock)
    elif args.tensor_model_parallel_size > 1:
        refuse(
            "tensor parallelism with this script",
            f"a forward_step whose module calls {name} by that name",
            f"none in {namespace.get('__name__')}",
            "Import it from megatron.core.utils as pretrain_gpt.py does, so that bags reach every "
            "tensor-parallel rank.",
        )


def _check_entered() -> None:
    """Megatron is being initialised: by now a run that asks for TST must have come through our
    pretrain.
    """
    if _checked is not None and TSTConfig.from_args(_checked).enabled and not _entered:
        refuse(
            "the --tst flags",
            "a script that calls the pretrain that megatron_tst gives it",
            "one that took megatron.training.pretrain before megatron_tst was there, or has a "
            "loop of its own",
            "Run it through `python -m megatron_tst.launch`, or call "
            "megatron_tst.training.prepare() before importing megatron.training.",
        )


def _before(ours):
    """Wrap Megatron's check of a checkpoint's arguments: `ours` is called with them first."""

    def wrapped(stock):
        def check_checkpoint_args(checkpoint_args, *rest, **named):
            ours(checkpoint_args)
            return stock(checkpoint_args, *rest, **named)

        return check_checkpoint_args

    return wrapped


def build_dataset_helpers(stock):
    """Leave built dataset helpers alone, and build missing ones for the Python that runs.

    Megatron's wheel has them built but no Makefile, and the stock function ends the process when
    make fails. In a source checkout the Makefile asks whichever python3 and python3-config come
    first on PATH.
    """

    def compile_helpers():
        with one_line_errors():
            _check_entered()
        try:
            import megatron.core.datasets.helpers_cpp  # noqa: F401
        except ImportError:
            before = {name: os.environ.get(name) for name in ("PATH", "MAKEFLAGS")}
            os.environ["PATH"] = os.pathsep.join(
                [os.path.dirname(sys.executable), before["PATH"] or os.defpath]
            )
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
        raise TSTError(
            f"data arguments file: expected a readable file, got {error}. Check --data-args-path."
        ) from error
    prefixes = [prefix for part in [blend, *(per_split or [])] if part for prefix in part[0]]
    exact = args.vocab_size if args.tokenizer_type == "NullTokenizer" else None
    check_data_files(prefixes, exact or getattr(args, "padded_vocab_size", None))


@contextlib.contextmanager
def one_line_errors():
    """End the process with one line and exit code 2 on a TSTError or PatchError; let everything
    else through.
    """
    try:
        yield
    except (TSTError, PatchError) as error:
        rank = os.environ.get("RANK", "0")
        prefix = "megatron_tst: error: " if rank == "0" else f"megatron_tst: error on rank {rank}: "
        text = str(error).strip().splitlines() or [""]
        # an error of a data-loading worker comes with the worker's traceback, its own text last
        print(
            prefix + (text[-1] if "Traceback" in str(error) else " ".join(text)),
            file=sys.stderr,
            flush=True,
        )
        sys.exit(2)
