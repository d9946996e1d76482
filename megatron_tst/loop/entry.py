"""Glue to megatron.training: how a script reaches TST, and every check before its training starts
(run.py is what comes then).

`prepare()` puts our flags and our `pretrain` under the names by which a script imports them. The
package's own script calls it in its first lines, `python -m megatron_tst.launch` for an unmodified
script. Everything else is reached from `pretrain`.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import sysconfig
from collections.abc import Callable

from megatron_tst import compat, cpu
from megatron_tst.checkpoint.format import emptied, mend_tracker
from megatron_tst.checkpoint.phases import store
from megatron_tst.checks import text
from megatron_tst.checks.blends import read_blends, training_blend
from megatron_tst.checks.conflicts import captures_whole_steps
from megatron_tst.checks.files import (
    check_data_files,
    check_load_folder,
    check_output_folder,
    check_tokenizer,
)
from megatron_tst.checks.refusals import check_arguments, check_sizes
from megatron_tst.checks.space import check_space
from megatron_tst.config import TSTConfig, add_tst_arguments, check_spelling
from megatron_tst.data.dataset import phased_provider
from megatron_tst.errors import one_line_errors, refuse
from megatron_tst.loop import entered, patch, seams
from megatron_tst.loop.graphs import check_resettable
from megatron_tst.loop.resume import check_restorable, check_resume, verify_load
from megatron_tst.loop.run import Run

# what prepare() replaces, once for all runs of a process
_PREPARED = (
    seams.ADD_ARGUMENTS,
    seams.VALIDATE_ARGUMENTS,
    seams.PRETRAIN,
    seams.BUILD_HELPERS,
)
_OUTPUTS = ("save", "tensorboard_dir", "data_cache_path", "tst_stock_index")


def prepare() -> None:
    """Give scripts the --tst flags and TST's pretrain. Call before the script imports
    megatron.training.

    Also asks for CPU training where the environment does (cpu.py), and survives a half-installed
    Transformer Engine. Ends the process with one line on stderr and exit code 2 where Megatron's
    functions are not those that were tested.
    """
    cpu.enable_if_asked()
    compat.hide_broken_transformer_engine()
    with one_line_errors():
        patch.install(
            {
                seams.ADD_ARGUMENTS: _add_arguments,
                seams.VALIDATE_ARGUMENTS: _validate_args,
                seams.PRETRAIN: lambda stock: pretrain,
                seams.BUILD_HELPERS: build_dataset_helpers,
            }
        )


def check(args: argparse.Namespace) -> TSTConfig:
    """The TST settings of Megatron's arguments, after every check that needs no data: flags,
    conflicts, the checkpoint to go on from, output folders (rank 0 makes missing ones).

    Args:
        args: Megatron's, validated. The same object is checked once.

    Returns:
        the settings.

    Raises:
        TSTError: what cannot work, with what was expected, what was got and what to do.
    """
    config = TSTConfig.from_args(args)
    if entered.here.checked is not args:
        backend = getattr(args, "distributed_backend", None)
        if cpu.asked_for() and backend == "nccl":
            do = "Leave it out: gloo is the default there."
            refuse(f"--distributed-backend with {cpu.SWITCH}", "gloo", backend, do)
        check_arguments(config, args)
        if config.enabled:
            check_load_folder(getattr(args, "load", None), getattr(args, "ckpt_step", None))
            check_restorable(args)
            check_tokenizer(getattr(args, "tokenizer_model", None))
        if config.verify_load:
            verify_load(args)
        if args.rank == 0:
            for name in _OUTPUTS:
                check_output_folder("--" + name.replace("_", "-"), getattr(args, name, None))
        entered.here.checked = args
    return config


def mend(args: argparse.Namespace) -> None:
    """Write --load's tracker file anew where a killed run has left it empty, and say so; on rank 0
    of a run with TST.
    """
    folder = getattr(args, "load", None)
    if args.rank or not folder or not TSTConfig.from_args(args).enabled:
        return
    iteration = mend_tracker(folder)
    if iteration is not None:
        print(f" [tst] {emptied(folder, iteration)}", flush=True)


def _add_arguments(stock):
    def add_megatron_arguments(parser):
        parser = add_tst_arguments(stock(parser))
        if cpu.asked_for():
            parser.set_defaults(distributed_backend="gloo")
        with one_line_errors():
            check_spelling(parser, sys.argv[1:])
        return parser

    return add_megatron_arguments


def _validate_args(stock):
    def validate_args(args, *rest, **named):
        with one_line_errors():
            check_sizes(TSTConfig.from_args(args), args)
            read_blends(args)
        result = stock(args, *rest, **named)
        with one_line_errors():
            mend(args)
            check(args)
        return result

    return validate_args


def pretrain(*positional: object, **named: object) -> object:
    """megatron.training.pretrain with TST: the same arguments, the same return value, on every
    rank (megatron/training/training.py).

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

    if entered.here.pretrain:  # the hooks of an earlier run of this process hold its phases
        patch.remove(keep=_PREPARED)
    entered.here.pretrain = True
    call = inspect.signature(loop.pretrain).bind(*positional, **named)
    args = get_args()
    mend(args)
    config = check(args)
    found = _check_data(args, config, call.arguments["train_valid_test_dataset_provider"])
    if config.enabled and args.rank == 0:
        check_space(args)
    patch.install({seams.BUILD_HELPERS: build_dataset_helpers})
    if config.enabled:
        _superpose(args, config, call.arguments, found)
    else:
        resume = _before(lambda checkpoint_args: check_resume(args, checkpoint_args))
        patch.install({seams.CHECK_CHECKPOINT: resume})
    return loop.pretrain(*call.args, **call.kwargs)


def _superpose(args, config, given, found):
    """Patch the model and the loop, and change what Megatron's pretrain is given."""
    batches = _batches_of(given["forward_step_func"], args)
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
            seams.BUILDER: run.dataset_builder,
            seams.SKIPPED_BATCH: lambda stock: run.get_batch_on_this_tp_rank(stock, trained=False),
            **{seam: run.get_batch_on_this_tp_rank for seam in batches},
        }
    )
    if captures_whole_steps(args):
        check_resettable(config, schedule)
        patch.install({seams.FULL_GRAPH: run.full_iteration_graph})
    given["train_valid_test_dataset_provider"] = phased_provider(
        given["train_valid_test_dataset_provider"],
        args,
        config,
        lambda: run.schedule,
        lambda *pair: run.datasets.append(pair),
        run.build_training_alone,
    )
    run.report.announce(schedule)
    run.report.text(schedule, found)


def _batches_of(forward_step, args) -> list[seams.ScriptSeam]:
    """Where the script's get_batch looks up get_batch_on_this_tp_rank: the script's own globals.
    Nowhere in a script that brings batches to its ranks in another way, which is refused where
    tensor-parallel ranks need them.
    """
    script = inspect.unwrap(forward_step).__globals__
    seam = seams.batches_of(script)
    if seam.attribute in script:
        return [seam]
    if args.tensor_model_parallel_size > 1:
        refuse(
            "tensor parallelism with this script",
            f"a forward_step whose module calls {seam.attribute} by that name",
            f"none in {script.get('__name__')}",
            "Import it from megatron.core.utils as pretrain_gpt.py does, so that bags reach every "
            "tensor-parallel rank.",
        )
    return []


def _before(ours):
    """Wrap Megatron's check of a checkpoint's arguments: `ours` is called with them first."""

    def wrapped(stock):
        def check_checkpoint_args(checkpoint_args, *rest, **named):
            ours(checkpoint_args)
            return stock(checkpoint_args, *rest, **named)

        return check_checkpoint_args

    return wrapped


def build_dataset_helpers(stock: Callable) -> Callable:
    """Megatron's function that builds its dataset helpers (megatron/core/datasets/utils.py): leave
    built ones alone, and build missing ones for the Python that runs.

    Megatron's wheel has them built but no Makefile, and the stock function ends the process when
    make fails. In a source checkout the Makefile asks whichever python3 and python3-config come
    first on PATH.
    """

    def compile_helpers():
        with one_line_errors():
            entered.here.require_pretrain()
        try:
            import megatron.core.datasets.helpers_cpp  # noqa: F401
        except ImportError:
            before = {name: os.environ.get(name) for name in ("PATH", "MAKEFLAGS")}
            python = os.path.dirname(sys.executable)
            os.environ["PATH"] = os.pathsep.join([python, before["PATH"] or os.defpath])
            os.environ["MAKEFLAGS"] = f"LIBEXT={sysconfig.get_config_var('EXT_SUFFIX')}"
            try:
                stock()
            finally:
                for name, value in before.items():
                    os.environ.pop(name) if value is None else os.environ.update({name: value})

    return compile_helpers


def _check_data(args, config, provider) -> list[text.Reading]:
    """Look at the data arguments, the files that they name and, with TST, at how often each corpus
    is read. -> the latter; empty where that is not counted
    """
    if getattr(args, "mock_data", False):
        return []
    blend, per_split = read_blends(args)
    # a script that does not ask for Megatron's data flags has data of its own
    asks = "get_blend_and_blend_per_split" in getattr(inspect.unwrap(provider), "__globals__", {})
    if asks and not blend and not per_split:
        do = "Name the text to train on, or try with --mock-data."
        refuse("--data-path", "a corpus, here or in another of Megatron's data flags", "none", do)
    prefixes = [prefix for part in [blend, *(per_split or [])] if part for prefix in part[0]]
    exact = args.vocab_size if args.tokenizer_type == "NullTokenizer" else None
    check_data_files(prefixes, exact or getattr(args, "padded_vocab_size", None))
    training = training_blend(args, blend, per_split) if config.enabled else None
    corpora = text.count(*training) if training else None
    return text.check_text(config, corpora, config.schedule(args)) if corpora else []
