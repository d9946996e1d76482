"""What is wrong ends the run with one line and exit code 2, before training starts."""

import os
import shutil

import pytest
from support.runs import SCRIPT, TINY, TST, data


def refused(run, *parts):
    assert run.codes == [2] * len(run.codes), (run.codes, run.log[-2000:])
    assert "Traceback" not in run.log and not run.losses, run.log[-2000:]
    line = run.error
    assert run.log.count("megatron_tst: error") == len(run.codes)
    for part in parts:
        assert part in line, line
    return line


@pytest.mark.parametrize(
    "flags, parts",
    [
        (
            ["--tst-bag-size", "0", "--tst-iters", "6"],
            ["--tst-bag-size: expected a whole number >= 1, got 0"],
        ),
        (["--tst-bag-size", "x", "--tst-iters", "6"], ["--tst-bag-size", "got x"]),
        (
            ["--tst-bag-size", "4", "--tst-step-ratio", "1.5"],
            ["--tst-step-ratio: expected a number in [0, 1), got 1.5"],
        ),
        (
            ["--tst-bag-size", "4", "--tst-step-ratio", "0.3", "--tst-iters", "6"],
            ["--tst-step-ratio and --tst-iters: expected one of the two"],
        ),
        (["--tst-bag-size", "4"], ["expected --tst-step-ratio or --tst-iters beside it"]),
        (
            ["--tst-bag-size", "4", "--tst-iters", "10"],
            ["--tst-iters: expected fewer than the 10 training iterations, got 10"],
        ),
        (
            [*TST, "--tst-loss", "mse"],
            ["--tst-loss: expected one of mce, mce-alt, bce, hinge, got 'mse'"],
        ),
        (
            [*TST, "--tst-loss", "bce", "--tst-fused-linear-loss"],
            ["--tst-fused-linear-loss with --tst-loss bce: expected --tst-loss mce or mce-alt"],
        ),
        ([*TST, "--tst-exit-at-boundary"], ["--tst-exit-at-boundary: expected --save beside it"]),
        (
            [*TST, "--dataloader-type", "cyclic"],
            ["--dataloader-type with TST: expected single, got cyclic"],
        ),
        ([*TST, "--reset-position-ids"], ["--reset-position-ids with TST"]),
        ([*TST, "--reset-attention-mask"], ["--reset-attention-mask with TST"]),
        ([*TST, "--rampup-batch-size", "2", "2", "8"], ["--rampup-batch-size with TST"]),
        (
            [*TST, "--mtp-num-layers", "1", "--tst-fused-linear-loss"],
            ["--mtp-num-layers with --tst-fused-linear-loss"],
        ),
    ],
)
def test_refusals_end_to_end(fork_server, corpus, flags, parts):
    refused(fork_server.train(*TINY, *data(corpus), *flags), *parts)


@pytest.mark.parametrize(
    "layout, length, multiple",
    [
        (["--context-parallel-size", "2"], 30, 4),
        (["--tensor-model-parallel-size", "2", "--sequence-parallel"], 31, 2),
    ],
)
def test_positions_that_the_layout_cannot_share_out(fork_server, corpus, layout, length, multiple):
    run = fork_server.train(
        *TINY, *TST, *data(corpus), *layout, "--seq-length", str(length), nproc=2
    )
    refused(run, "--seq-length with", layout[0], f"expected a multiple of {multiple}, got {length}")


def test_every_rank_says_so_and_exits(fork_server, corpus):
    refused(fork_server.train(*TINY, *data(corpus), "--tst-bag-size", "0", nproc=2))


@pytest.fixture
def copied(corpus, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus}{suffix}", tmp_path / f"text{suffix}")
    return tmp_path / "text"


@pytest.mark.parametrize("tst", [TST, []])
def test_missing_dataset(fork_server, tmp_path, tst):
    refused(
        fork_server.train(*TINY, *tst, *data(tmp_path / "no")),
        "--data-path: expected",
        "no.idx",
        "`megatron-tst corpus` makes such a pair",
    )


def test_truncated_dataset(fork_server, copied):
    os.truncate(f"{copied}.bin", 5000)
    refused(
        fork_server.train(*TINY, *TST, *data(copied)), "text.bin: expected", "got 5000", "truncated"
    )
    os.truncate(f"{copied}.idx", 50)
    refused(
        fork_server.train(*TINY, *TST, *data(copied)), "text.idx: expected a whole Megatron index"
    )


def test_vocabulary_mismatch(fork_server, corpus):
    flags = data(corpus)
    flags[flags.index("512")] = "400"
    refused(fork_server.train(*TINY, *TST, *flags), "vocabulary of", "below the tokenizer's 400")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_foreign_tokens_are_named_by_the_dataset_too(fork_server, copied, workers):
    """The check at start-up looks at 256 documents; the dataset looks at every sample that it gives
    out (here the first is off).
    """
    with open(f"{copied}.bin", "r+b") as tokens:
        tokens.write(b"\xff\x7f" * (os.path.getsize(f"{copied}.bin") // 2))
    refused(
        fork_server.train(*TINY, *TST, *data(copied)),
        "token ids below the tokenizer's 512",
        "32767 in document 0",
    )
    script = copied.parent / "unchecked.py"
    script.write_text(
        open(SCRIPT)
        .read()
        .replace(
            "training.prepare()",
            "training.prepare()\nfrom megatron_tst.loop import entry\n"
            "entry.check_data_files = lambda *a: None\n",
            1,
        )
    )
    flags = list(TINY)
    flags[flags.index("--num-workers") + 1] = workers
    run = fork_server.train(*flags, *TST, *data(copied), script=str(script))
    refused(run, "training sample 0: expected token ids below the vocabulary size 512, got 32767")


def test_unwritable_output_folder(fork_server, corpus, tmp_path):
    (tmp_path / "file").write_text("")
    refused(
        fork_server.train(
            *TINY, *TST, *data(corpus), "--save", tmp_path / "file" / "ck", "--save-interval", "5"
        ),
        "--save: expected a folder that can be written to",
    )
    refused(
        fork_server.train(*TINY, *TST, *data(corpus), "--tensorboard-dir", "/proc/tb"),
        "--tensorboard-dir: expected a folder",
    )


def test_too_little_data(fork_server, corpus):
    """Several unweighted datasets are never repeated by Megatron: too few samples is said at
    start-up.
    """
    flags = data(corpus)
    flags.insert(2, str(corpus))
    refused(
        fork_server.train(
            *TINY, *TST, *flags, "--global-batch-size", "4096", "--micro-batch-size", "2"
        ),
        "training data: expected",
        "samples of 128 tokens",
    )


def test_resume_with_other_settings(fork_server, corpus, tmp_path):
    flags = [*TINY, *data(corpus)]
    save = ["--save", tmp_path / "ck", "--save-interval", "4", "--exit-interval", "4"]
    assert fork_server.train(*flags, *TST, *save).ok
    load = ["--load", tmp_path / "ck"]
    refused(
        fork_server.train(*flags, "--tst-bag-size", "2", "--tst-iters", "6", *load),
        "resuming with another tst_bag_size: expected 4 as in the checkpoint, got 2",
    )
    refused(
        fork_server.train(*flags, "--tst-bag-size", "4", "--tst-iters", "5", *load),
        "resuming with other phases: expected bag size 4 for 6 iterations, recovery for 4, got "
        "bag size 4 for 5",
        "or --tst-override",
    )
    refused(
        fork_server.train(*flags, *TST, "--tst-target-weighting", "power-law", *load),
        "tst_target_weighting",
    )
    refused(
        fork_server.train(*flags, *TST, *load, "--global-batch-size", "2", "--train-iters", "20"),
        "resuming with another global_batch_size: expected 4 as in the checkpoint, got 2",
    )
    refused(fork_server.train(*flags, *load), "resuming without TST", "Add --tst-bag-size 4")
    assert fork_server.train(
        *flags, *TST, "--tst-target-weighting", "power-law", *load, "--finetune"
    ).ok


def test_resume_of_a_stock_checkpoint_with_tst(fork_server, corpus, tmp_path):
    flags = [*TINY, *data(corpus)]
    assert fork_server.train(
        *flags, "--save", tmp_path / "ck", "--save-interval", "4", "--exit-interval", "4"
    ).ok
    refused(
        fork_server.train(*flags, *TST, "--load", tmp_path / "ck"),
        "resuming with TST: expected a checkpoint of a TST run",
        "--finetune",
    )


def test_a_script_that_took_stock_pretrain_is_stopped(fork_server, corpus, tmp_path):
    """Flags that would silently do nothing: the script binds Megatron's pretrain before
    megatron_tst is there.
    """
    script = tmp_path / "late.py"
    text = open(SCRIPT).read()
    script.write_text(
        text.replace(
            "from megatron_tst import training",
            "from megatron.training import pretrain as stock\nfrom megatron_tst import training",
        ).replace("= pretrain, None", "= stock, None")
    )
    run = fork_server.train(*TINY, *TST, *data(corpus), script=str(script))
    refused(
        run,
        "the --tst flags: expected a script that calls the pretrain",
        "prepare() before importing megatron.training",
    )


def test_launch_says_what_it_wants(fork_server):
    run = fork_server.launch("no_such_script.py")
    assert (
        run.codes == [2]
        and "expected the path of a Megatron script, got 'no_such_script.py'" in run.log
    )
