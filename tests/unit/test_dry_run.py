"""The dry run of a command, in one process: what it says, what it refuses, what it leaves."""

import logging
import os
import re
import sys

import pytest
import torch
from support.plans import BESIDE, SMALL

from megatron_tst.checks import dry_run

RUN = [
    *SMALL,
    *BESIDE,
    *"--micro-batch-size 2 --max-position-embeddings 1024 --bf16".split(),
]
BAGS = "--tst-bag-size 6 --tst-iters 300".split()


def said(capsys, *more, world_size=8, gpu="h100"):
    """-> exit code, stdout, stderr"""
    before = list(sys.argv), dict(os.environ), torch.cuda.get_device_capability
    flags = ["--world-size", str(world_size), "--gpu", gpu, "--", *RUN, *more]
    code = dry_run.main(flags)
    assert (list(sys.argv), dict(os.environ), torch.cuda.get_device_capability) == before
    assert logging.root.manager.disable == logging.NOTSET
    return code, *capsys.readouterr()


def test_what_is_accepted(capsys):
    from megatron.core import __version__

    code, text, errors = said(capsys, *BAGS, "--tensor-model-parallel-size", "2")
    assert code == 0 and not errors
    engine = dry_run._installed() or "2.14.0 assumed"
    assert text.splitlines() == [
        "dry run: accepted",
        "  model       38.1 M parameters, vocabulary 50176",
        "  machine     8 h100 as TP 2 x PP 1 x CP 1 x DP 4, EP 1; bf16",
        "  batch       64 samples x 1024 positions = 65,536, in 8 micro-batches of 2",
        "  steps       300 with bags of 6, then 700 plain",
        "  text        163,840,000 tokens (0.2 B) are trained on; --split keeps more for "
        "validation",
        f"  checked     by Megatron-Core {__version__}: its parser, validate_args, transformer, "
        "optimizer",
        "              and data-parallel configurations; by TST: its refusals, the layout, FP8 "
        "shapes;",
        "              here: micro-batches",
        "  NOT checked GPU (compute capability 9.0, CUDA 13.0 assumed),",
        f"              Transformer Engine ({engine}), NCCL, memory, speed, tokenizer,",
        "              data files, folders, the checkpoint in --load",
    ]


def test_a_stock_run_in_fp8(capsys):
    flags = "--fp8-format hybrid --fp8-recipe mxfp8".split()
    code, text, _ = said(capsys, *flags, world_size=1, gpu="b200")
    assert code == 0
    for line in (
        "machine     1 b200 as TP 1 x PP 1 x CP 1 x DP 1, EP 1; mxfp8 FP8 over bf16",
        "in 32 micro-batches of 2",
        "steps       1,000 plain",
        "text        65,536,000 tokens (0.1 B)",
        "compute capability 10.0",
    ):
        assert line in text


@pytest.mark.parametrize(
    "more, message",
    [
        (
            "--global-batch-size 24 --eval-global-batch-size 64".split(),
            "--global-batch-size: expected a multiple of --micro-batch-size x data-parallel size = "
            "2 x 8, got 24",
        ),
        (["--global-batch-size", "60"], r"arguments.py:\d+: eval_global_batch_size .60. must be"),
        (["--num-attention-heads", "7"], r"arguments.py:\d+: assert args.hidden_size % args.num_a"),
        (["--no-such-flag"], "dry_run: error: unrecognized arguments: --no-such-flag"),
        (["--tst-bagsize", "4"], "megatron_tst: the command line: expected a flag of TST"),
        ([*BAGS, "--sft"], "megatron_tst: --sft with TST: expected plain pre-training data"),
        ([*BAGS, "--fp8-format", "e4m3", "--fp8-recipe", "mxfp8"], "expected sm_100 or newer"),
        (
            [*BAGS, *"--seq-length 1022 --context-parallel-size 2".split()],
            "megatron_tst: --seq-length with --context-parallel-size 2: expected a multiple of 4",
        ),
    ],
)
def test_what_is_refused(capsys, more, message):
    code, text, errors = said(capsys, *more)
    assert code == 2 and not text and errors.startswith("dry run: REFUSED: ")
    assert re.search(message, errors) and errors.count("\n") == 1, errors


def test_padding_follows_the_layout():
    args = dry_run.validate([*RUN, "--tensor-model-parallel-size", "8"], 8, "h100")
    assert args.padded_vocab_size == 50176 and args.world_size == 8
    without = RUN.index("--vocab-size")
    flags = RUN[:without] + RUN[without + 2 :]
    args = dry_run.validate(flags, 8, "h100")
    assert args.padded_vocab_size == 128256


def test_the_flags_are_handed_on_as_they_are(monkeypatch):
    seen = []

    def validate(*given):
        seen.append(given)
        raise dry_run.Refused("seen")

    monkeypatch.setattr(dry_run, "validate", validate)
    flags = ["--split", "", "--lr", "-1", "*", "x"]
    assert dry_run.main(["--gpu", "b200", "--world-size", "3", "--", *flags]) == 2
    assert seen == [(flags, 3, "b200")]
