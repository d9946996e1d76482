"""Validate a training command on a machine without GPUs: nothing is trained, started, opened or
written.

    python examples/dry_run.py --world-size 8 --gpu h100 -- <the flags of pretrain_gpt.py>

The flags go through Megatron's own parser, validate_args and configurations (transformer,
optimizer, data parallelism) and through TST's refusals, for the real number of processes, with the
megatron-core that is installed or the one in --megatron-lm. The recipes call it under DRY_RUN=1.
Exit code 0: accepted. 2: refused, with the message of whoever refused it.

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
import types
import warnings
from unittest import mock

from megatron_tst.checks import refusals
from megatron_tst.config import TSTConfig, add_tst_arguments
from megatron_tst.errors import TSTError

CAPABILITY = {"h100": (9, 0), "b200": (10, 0)}
CUDA = "13.0"  # assumed
# assumed where there is none; its own floors: tensorwise 2.2, mxfp8 2.1, blockwise 2.3
TRANSFORMER_ENGINE = "2.14.0"


class Refused(Exception):
    """The flags were refused; the text is the message of whoever refused them."""


def validate(flags: list[str], world_size: int, gpu: str) -> argparse.Namespace:
    """Megatron's arguments of a command, after every check that needs no GPU.

    Raises:
        Refused: with the message of Megatron's parser, of Megatron's validation, or of TST.
    """
    from megatron.training import arguments
    from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config

    printed = io.StringIO()
    with _machine(world_size, gpu), mock.patch.object(sys, "argv", ["dry_run", *flags]):
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                args = arguments.parse_args(add_tst_arguments)
                config = TSTConfig.from_args(args)
                refusals.check_sequence_length(config, args)
                arguments.validate_args(args)
                _pad_vocabulary(args)
                arguments.core_transformer_config_from_args(args)
                get_megatron_optimizer_config(args)
                get_megatron_ddp_config(args)
                _check_batches(args)
                refusals.check_arguments(config, args)
            except SystemExit:  # argparse, after a thousand lines of usage
                raise Refused(printed.getvalue().strip().splitlines()[-1]) from None
            except TSTError as error:
                raise Refused(f"megatron_tst: {error}") from error
            except (
                AssertionError,
                ValueError,
                RuntimeError,
                NotImplementedError,
                TypeError,
            ) as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                raise Refused(
                    f"{os.path.basename(where.filename)}:{where.lineno}: "
                    f"{str(error).strip() or where.line}"
                ) from error
    return args


@contextlib.contextmanager
def _machine(world_size: int, gpu: str):
    """Answer Megatron's questions about the machine: how many processes, which GPU, which
    Transformer Engine where there is none.
    """
    import torch
    from megatron.core import utils
    from megatron.core.models.common.embeddings import rope_utils
    from packaging.version import Version

    major, minor = CAPABILITY[gpu]
    version, rope = utils.get_te_version(), rope_utils.fused_apply_rotary_pos_emb
    if not _installed():
        version, rope = (
            Version(TRANSFORMER_ENGINE),
            "Transformer Engine's",
        )  # asked for: is it there
    environment = {"WORLD_SIZE": str(world_size), "RANK": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *device: (major, minor)),
        mock.patch.object(
            torch.cuda,
            "get_device_properties",
            lambda *device: types.SimpleNamespace(major=major, minor=minor),
        ),
        mock.patch.object(refusals, "_gpu", lambda: ((major, minor), CUDA)),
        mock.patch.object(utils, "_te_version", version),
        mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb", rope),
    ):
        yield


def _installed() -> str | None:
    """Version of the Transformer Engine that Megatron finds here."""
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.utils import get_te_version

    return str(get_te_version()) if HAVE_TE else None


def _pad_vocabulary(args) -> None:
    """What building the tokenizer would set; Llama 3's size where the command does not say."""
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    args.padded_vocab_size = -(-(args.vocab_size or 128256) // multiple) * multiple


def _check_batches(args) -> None:
    """Megatron's micro-batch calculator, which is set up after validate_args."""
    share = args.micro_batch_size * args.data_parallel_size
    if args.global_batch_size % share:
        raise Refused(
            f"--global-batch-size: expected a multiple of --micro-batch-size x data-parallel size "
            f"= {args.micro_batch_size} x "
            f"{args.data_parallel_size}, got {args.global_batch_size}"
        )


def parameters(args) -> int:
    """Of a model without biases, with RMSNorm, SwiGLU and untied output layer, as the recipes' are."""
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    attention = 2 * args.hidden_size * args.kv_channels * (args.num_attention_heads + groups)
    norms = 2 * args.hidden_size + (2 * args.kv_channels if args.qk_layernorm else 0)
    ffn = 3 * args.hidden_size * args.ffn_hidden_size
    if args.num_experts:
        ffn = args.num_experts * (
            3 * args.hidden_size * args.moe_ffn_hidden_size + args.hidden_size
        )
    return (
        args.num_layers * (attention + norms + ffn)
        + args.hidden_size
        + 2 * args.hidden_size * args.padded_vocab_size
    )


def report(args, gpu: str) -> str:
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
    return f"""\
dry run: accepted
  model       {parameters(args) / 1e6:,.1f} M parameters, vocabulary {args.padded_vocab_size}
  machine     {args.world_size} {gpu} as {layout}; {precision}
  batch       {args.global_batch_size} samples x {args.seq_length} positions = {args.global_batch_size * args.seq_length:,}, in {micro} micro-batches of {args.micro_batch_size}
  steps       {steps}
  text        {text:,} tokens ({text / 1e9:,.1f} B) are trained on; --split keeps more for validation
  checked     by Megatron-Core {__version__}: its parser, validate_args, transformer, optimizer and data-parallel configurations;
              by TST: its refusals, the layout, FP8 shapes; by this script: micro-batches
  NOT checked GPU (compute capability {".".join(map(str, CAPABILITY[gpu]))}, CUDA {CUDA} assumed), Transformer Engine ({_installed() or TRANSFORMER_ENGINE + " assumed"}), NCCL, memory, speed,
              tokenizer, data files, folders, the checkpoint in --load"""


def main(argv: list[str]) -> int:
    """Exit code: 0 accepted, 2 refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world-size", type=int, required=True, help="processes, one for each GPU")
    parser.add_argument("--gpu", choices=CAPABILITY, required=True)
    parser.add_argument(
        "--megatron-lm", metavar="CHECKOUT", help="take Megatron from there, as its own scripts do"
    )
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="after --: the flags to validate")
    options = parser.parse_args(argv)
    if options.megatron_lm:
        sys.path.insert(0, os.path.abspath(options.megatron_lm))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not installed here
        try:
            args = validate(
                [flag for flag in options.flags if flag != "--"], options.world_size, options.gpu
            )
        except Refused as refused:
            print(f"dry run: REFUSED: {refused}", file=sys.stderr)
            return 2
    print(report(args, options.gpu))
    return 0


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # torch on a machine without CUDA
    sys.exit(main(sys.argv[1:]))
