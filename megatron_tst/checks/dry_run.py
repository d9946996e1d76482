"""Validate a training command on a machine without GPUs: nothing is trained, started, opened or
written.

    python -m megatron_tst.checks.dry_run --world-size 8 --gpu h100 -- <pretrain_gpt.py's flags>

The flags go through Megatron's own parser, validate_args and configurations (transformer,
optimizer, data parallelism) and through TST's refusals, for the real number of processes, with the
megatron-core that is installed, or the checkout that PYTHONPATH names. The launch scripts call it
under DRY_RUN=1. Exit code 0: accepted. 2: refused, with the message of whoever refused it.

Two questions that Megatron asks the machine are answered by assumption, and named in the output:
the GPU's compute capability and, where there is no Transformer Engine, its version.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator

from megatron_tst import cpu
from megatron_tst.checks import refusals
from megatron_tst.config import TSTConfig, add_tst_arguments, check_spelling
from megatron_tst.errors import TSTError
from megatron_tst.hardware import ASSUMED_CUDA, GPUS
from megatron_tst.model_size import (
    LLAMA_3_VOCABULARY,
    padded_vocabulary,
    parameters,
    uncounted,
)

# assumed where there is none; its own floors: tensorwise 2.2, mxfp8 2.1, blockwise 2.3
TRANSFORMER_ENGINE = "2.14.0"


class Refused(Exception):
    """The flags were refused; the text is the message of whoever refused them."""


def validate(
    flags: list[str], world_size: int, gpu: str, vocabulary: int = LLAMA_3_VOCABULARY
) -> argparse.Namespace:
    """Megatron's arguments of a command, after every check that needs no GPU.

    Args:
        flags: of the training script.
        world_size: processes, one for each GPU.
        gpu: kind, one of hardware.GPUS.
        vocabulary: ids of the tokenizer, which is not opened; --vocab-size counts before it.

    Raises:
        Refused: with the message of Megatron's parser, of Megatron's validation, or of TST.
    """
    from megatron.training import arguments
    from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config

    capability, printed = GPUS[gpu].capability, io.StringIO()
    with (
        cpu.assumed_gpu(capability, None if _installed() else TRANSFORMER_ENGINE),
        _process(["dry_run", *flags], world_size),
    ):
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                args = arguments.parse_args(lambda parser: _with_ours(parser, flags))
                config = TSTConfig.from_args(args)
                refusals.check_sizes(config, args)
                arguments.validate_args(args)
                args.padded_vocab_size = padded_vocabulary(  # as building the tokenizer does
                    args.vocab_size or vocabulary,
                    args.make_vocab_size_divisible_by,
                    args.tensor_model_parallel_size,
                )
                arguments.core_transformer_config_from_args(args)
                get_megatron_optimizer_config(args)
                get_megatron_ddp_config(args)
                _check_batches(args)
                _check_experts(args)
                refusals.check_arguments(config, args, lambda: (capability, ASSUMED_CUDA))
            except SystemExit:  # argparse, after a thousand lines of usage
                raise Refused(printed.getvalue().strip().splitlines()[-1]) from None
            except TSTError as error:
                raise Refused(f"megatron_tst: {error}") from error
            except (AssertionError, ValueError, RuntimeError, TypeError) as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                raise Refused(
                    f"{os.path.basename(where.filename)}:{where.lineno}: "
                    f"{str(error).strip() or where.line}"
                ) from error
    return args


def _with_ours(parser, flags):
    check_spelling(add_tst_arguments(parser), flags)
    return parser


@contextlib.contextmanager
def _process(argv: list[str], world_size: int) -> Iterator[None]:
    """The command line and the environment of the first of so many processes."""
    before = sys.argv, dict(os.environ)
    sys.argv = argv
    os.environ.update(WORLD_SIZE=str(world_size), RANK="0", CUDA_DEVICE_MAX_CONNECTIONS="1")
    try:
        yield
    finally:
        sys.argv, environment = before
        os.environ.clear()
        os.environ.update(environment)


def _installed() -> str | None:
    """Version of the Transformer Engine that Megatron finds here."""
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.utils import get_te_version

    return str(get_te_version()) if HAVE_TE else None


def _check_batches(args) -> None:
    """Megatron's micro-batch calculator, which is set up after validate_args."""
    share = args.micro_batch_size * args.data_parallel_size
    if args.global_batch_size % share:
        raise Refused(
            f"--global-batch-size: expected a multiple of --micro-batch-size x data-parallel size "
            f"= {args.micro_batch_size} x "
            f"{args.data_parallel_size}, got {args.global_batch_size}"
        )


def _check_experts(args) -> None:
    """Megatron's groups of experts (parallel_state.py), which are set up after validate_args."""
    ep, etp = args.expert_model_parallel_size, args.expert_tensor_parallel_size
    pp = args.pipeline_model_parallel_size
    if args.world_size % (ep * etp * pp):
        raise Refused(
            f"processes: expected a multiple of EP x expert TP x PP = {ep} x {etp} x {pp} = "
            f"{ep * etp * pp}, got {args.world_size}. Change one of them."
        )


def report(args: argparse.Namespace, gpu: str) -> str:
    """What was accepted, and what could not be looked at."""
    from megatron.core import __version__

    config, samples = TSTConfig.from_args(args), args.train_iters * args.global_batch_size
    steps, text = f"{args.train_iters:,} plain", samples * args.seq_length
    if config.enabled:
        schedule = config.schedule(args)
        superposed = schedule.superposition_samples // args.global_batch_size
        steps = (
            f"{superposed:,} with bags of {config.bag_size}, then "
            f"{args.train_iters - superposed:,} plain"
        )
        text = schedule.raw_tokens(samples)
    micro = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    precision = f"{args.fp8_recipe} FP8 over bf16" if args.fp8 else "bf16"
    layout = (
        f"TP {args.tensor_model_parallel_size} x PP {args.pipeline_model_parallel_size} x CP "
        f"{args.context_parallel_size} x "
        f"DP {args.data_parallel_size}, EP {args.expert_model_parallel_size}"
    )
    positions = args.global_batch_size * args.seq_length
    assumed = f"compute capability {'.'.join(map(str, GPUS[gpu].capability))}, CUDA {ASSUMED_CUDA}"
    engine = _installed() or f"{TRANSFORMER_ENGINE} assumed"
    others = " and ".join(uncounted(args))
    size = f"not counted, with {others}" if others else f"{parameters(args)[0] / 1e6:,.1f} M"
    rows = {
        "model": f"{size}{' parameters' * (not others)}, vocabulary {args.padded_vocab_size}",
        "machine": f"{args.world_size} {gpu} as {layout}; {precision}",
        "batch": f"{args.global_batch_size} samples x {args.seq_length} positions = "
        f"{positions:,}, in {micro} micro-batches of {args.micro_batch_size}",
        "steps": steps,
        "text": f"{text:,} tokens ({text / 1e9:,.1f} B) are trained on; --split keeps more for "
        "validation",
        "checked": f"by Megatron-Core {__version__}: its parser, validate_args, transformer, "
        "optimizer\nand data-parallel configurations; by TST: its refusals, the layout, FP8 "
        "shapes;\nhere: micro-batches, groups of experts",
        "NOT checked": f"GPU ({assumed} assumed),\nTransformer Engine ({engine}), NCCL, memory, "
        "speed, tokenizer,\ndata files, folders, the checkpoint in --load",
    }
    lines = [f"  {name:12}{row.replace(chr(10), chr(10) + 14 * ' ')}" for name, row in rows.items()]
    return "\n".join(["dry run: accepted", *lines])


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 accepted, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="dry_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--world-size", type=int, required=True, help="processes, one for each GPU")
    parser.add_argument("--gpu", choices=GPUS, required=True, help="kind")
    parser.add_argument(
        "--vocabulary",
        type=int,
        default=LLAMA_3_VOCABULARY,
        help="ids of the tokenizer, which is not opened (default: Llama 3's)",
    )
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="after --: the flags to validate")
    options = parser.parse_args(argv)
    if options.world_size < 1:
        parser.error(f"--world-size: expected a whole number above 0, got {options.world_size}")
    logging.disable(logging.WARNING)  # torch on a machine without CUDA
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not installed here
        try:
            args = validate(
                [flag for flag in options.flags if flag != "--"],
                options.world_size,
                options.gpu,
                options.vocabulary,
            )
        except Refused as refused:
            print(f"dry run: REFUSED: {refused}", file=sys.stderr)
            return 2
        finally:
            logging.disable(logging.NOTSET)
    print(report(args, options.gpu))
    return 0


if __name__ == "__main__":
    sys.exit(main())
