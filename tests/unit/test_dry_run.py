"""The dry run of a command, in one process: what it says, what it refuses, what it leaves."""

import logging
import os
import re
import runpy
import sys
import warnings

import pytest
import torch
from support.plans import BESIDE, EXPERTS, SMALL

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
    assert text.split("\n")[:-1] == [
        "dry run: accepted",
        "  model       38.7 M parameters, vocabulary 50176",
        "  machine     8 h100 as TP 2 x PP 1 x CP 1 x DP 4, EP 1; bf16",
        "  batch       64 samples x 1024 positions = 65,536, in 8 micro-batches of 2",
        "  steps       300 with bags of 6, then 700 plain",
        "  text        163,840,000 tokens (0.2 B) are trained on; --split keeps more for "
        "validation",
        f"  checked     by Megatron-Core {__version__}: its parser, validate_args, transformer, "
        "optimizer",
        "              and data-parallel configurations; by TST: its refusals, the layout, FP8 "
        "shapes;",
        "              here: micro-batches, groups of experts",
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
        (
            [*BAGS, "--micro-batch-size", "0"],
            "megatron_tst: --micro-batch-size: expected at least 1, got 0. Correct it.",
        ),
        # what Megatron finds in its configurations, after validate_args
        (
            ["--fp8-output-proj"],
            r"transformer_config.py:\d+: fp8_output_proj must be used together",
        ),
        (["--main-grads-dtype", "bf16"], r"optimizer_config.py:\d+: main_grads_dtype can only be"),
        (
            ["--ddp-num-buckets", "0"],
            r"distributed_data_parallel_config.py:\d+: num_buckets must be greater than 0",
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
    assert dry_run.validate(flags, 8, "h100", 1000).padded_vocab_size == 1024


def test_the_flags_are_handed_on_as_they_are(monkeypatch):
    seen = []

    def validate(*given):
        seen.append(given)
        raise dry_run.Refused("seen")

    monkeypatch.setattr(dry_run, "validate", validate)
    flags = ["--split", "", "--lr", "-1", "*", "x"]
    assert dry_run.main(["--gpu", "b200", "--world-size", "3", "--", *flags]) == 2
    assert seen == [(flags, 3, "b200", 128256)]
    more = ["--gpu", "b200", "--world-size", "3", "--vocabulary", "1000"]
    assert dry_run.main([*more, "--", *flags]) == 2 and seen[1][3] == 1000


@pytest.mark.parametrize(
    "kind", [AssertionError, ValueError, RuntimeError, NotImplementedError, TypeError]
)
def test_an_error_of_megatrons_is_said_with_its_place(monkeypatch, kind):
    from megatron.training import arguments

    def check():
        raise kind("heads do not divide")

    def validate_args(args):
        check()

    monkeypatch.setattr(arguments, "validate_args", validate_args)
    line = check.__code__.co_firstlineno + 1
    with pytest.raises(dry_run.Refused) as refused:
        dry_run.validate(RUN, 8, "h100")
    assert str(refused.value) == f"test_dry_run.py:{line}: heads do not divide"


def test_experts_count_all_of_them(capsys):
    """By hand: attention 4 * 512^2 a layer, 8 experts of 3 * 512 * 256 and a router of 512 * 8 in
    each of 4 layers, 2 norms a layer and the last one, each with a bias, one tied table of 50048
    rows, and a place for each of 1024 positions.
    """
    layer = 4 * 512**2 + 8 * 3 * 512 * 256 + 512 * 8 + 4 * 512
    count = 4 * layer + 2 * 512 + 50048 * 512 + 1024 * 512
    assert count == 42_951_680
    flags = RUN[len(SMALL) :]
    assert dry_run.main(["--world-size", "1", "--gpu", "h100", "--", *EXPERTS, *flags]) == 0
    assert "  model       43.0 M parameters, vocabulary 50048\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "processes, flags, product",
    [
        (2, "--expert-model-parallel-size 4", "4 x 1 x 1 = 4"),
        (4, "--expert-model-parallel-size 4 --pipeline-model-parallel-size 2", "4 x 1 x 2 = 8"),
        (
            4,
            "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4",
            "4 x 2 x 1 = 8",
        ),
    ],
)
def test_experts_on_more_processes_than_there_are(capsys, processes, flags, product):
    """Megatron stops there at its start only, when it makes its groups (parallel_state.py)."""
    run = [*EXPERTS, *RUN[len(SMALL) :], *flags.split()]
    machine = ["--world-size", str(processes), "--gpu", "h100"]
    assert dry_run.main([*machine, "--", *run]) == 2
    want = f"processes: expected a multiple of EP x expert TP x PP = {product}, got {processes}."
    assert want in capsys.readouterr().err


def test_no_processes(capsys):
    with pytest.raises(SystemExit, match="2"):
        said(capsys, world_size=0)
    assert "--world-size: expected a whole number above 0, got 0" in capsys.readouterr().err


def test_the_process_that_is_assumed(monkeypatch):
    """The first of the run, with the one connection that Megatron asks of tensor parallelism on a
    GPU older than B200, whatever this process has.
    """
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    flags = [*RUN, *"--tensor-model-parallel-size 2 --sequence-parallel".split()]
    args = dry_run.validate(flags, 8, "h100")
    assert (args.rank, args.world_size, args.data_parallel_size) == (0, 8, 4)
    assert os.environ["RANK"] == "3" and os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert "WORLD_SIZE" not in os.environ


def test_which_transformer_engine_is_there(monkeypatch):
    from megatron.core import utils
    from megatron.core.extensions import transformer_engine

    monkeypatch.setattr(utils, "get_te_version", lambda: "2.9.0")
    for there, version in ((True, "2.9.0"), (False, None)):
        monkeypatch.setattr(transformer_engine, "HAVE_TE", there)
        assert dry_run._installed() == version


def test_what_is_not_installed_is_no_matter_here(monkeypatch, capsys):
    """torch and Megatron log and warn of it: neither is shown, errors are."""

    def validate(*given):
        log = logging.getLogger("torch")
        assert not log.isEnabledFor(logging.WARNING) and log.isEnabledFor(logging.ERROR)
        warnings.warn("no apex", stacklevel=1)
        raise dry_run.Refused("seen")

    monkeypatch.setattr(dry_run, "validate", validate)
    with warnings.catch_warnings(action="error"):
        assert dry_run.main(["--world-size", "1", "--gpu", "h100"]) == 2
    assert capsys.readouterr().err == "dry run: REFUSED: seen\n"


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "dry_run: error: the following arguments are required: --world-size, --gpu"),
        (["--world-size", "8"], "dry_run: error: the following arguments are required: --gpu"),
        (
            ["--gpu", "h100", "--world-size", "two"],
            "dry_run: error: argument --world-size: invalid int value: 'two'",
        ),
        (
            ["--gpu", "a100", "--world-size", "8"],
            "dry_run: error: argument --gpu: invalid choice: 'a100'",
        ),
    ],
)
def test_its_own_flags(capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        dry_run.main(flags)
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_help(capsys):
    with pytest.raises(SystemExit):
        dry_run.main(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: dry_run ") and dry_run.__doc__.strip() in text
    for flag, words in (
        ("--world-size WORLD_SIZE", "processes, one for each GPU"),
        (r"--gpu {h100,h200,b200}", "kind"),
        ("flags", "after --: the flags to validate"),
    ):
        assert re.search(rf"^  {re.escape(flag)}\s+{words}$", text, re.M), text


def test_python_m(monkeypatch, capsys):
    argv = ["dry_run.py", "--world-size", "8", "--gpu", "h100", "--", *RUN, "--no-such-flag"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(dry_run.__file__, run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("unrecognized arguments: --no-such-flag\n")
