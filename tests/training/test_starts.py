"""What happens when a run starts: how often its text is read, what is said of what it cannot start
with, a finished run started again, several runs in one process.
"""

import itertools
import json
import re
import shlex

import numpy as np
import pytest
from support.paths import ROOT
from support.runs import TINY, TST, data

from megatron_tst.doctor import report

TWICE = str(ROOT / "tests" / "support" / "twice.py")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Corpora of 60 tokens, less than a sample of bags, and of 400. -> folder"""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder, draw = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    for name, lengths in (("of60", [30, 30]), ("of400", [200, 200])):
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
        for length in lengths:
            builder.add_document(draw.integers(0, 500, length), [length])
        builder.finalize(str(folder / f"{name}.idx"))
    return folder


def without(flags, *names):
    """Without these flags and their values."""
    pairs = itertools.pairwise([None, *flags])
    return [flag for before, flag in pairs if flag not in names and before not in names]


def test_how_often_the_text_is_read(fork_server, corpus, small):
    run = fork_server.train(*TINY, *TST, *data(corpus))
    line = re.search(
        r"\[tst\] text: (\S+) is read (\S+) times \(3,584 tokens of ([\d,]+)\): (\S+) in bag size "
        r"4, (\S+) in recovery",
        run.log,
    )
    assert run.ok and line[1] == str(corpus) and run.log.count("[tst] text:") == 1
    times = 3584 / int(line[3].replace(",", ""))
    assert float(line[2]) == pytest.approx(times, rel=0.01)
    assert float(line[4]) + float(line[5]) == pytest.approx(times, rel=0.02)
    text = ["--data-path", small / "of400", "--split", "100,0,0", "--vocab-size", "512"]
    text += ["--eval-iters", "0"]
    run = fork_server.train(*TINY, *TST, *text)
    assert run.codes == [2] and "of400 is read 8.96 times (3,584 tokens of 400)" in run.error
    run = fork_server.train(*TINY, *TST, *text, "--tst-max-epochs", "9")
    assert run.ok and "megatron_tst: " in run.log and len(run.losses) == 10


def test_bag_sizes_that_hung(fork_server, corpus):
    for size, words in ((10**23, "raw tokens, which Megatron can count"), (10**9, "at most 14,")):
        flags = ["--tst-bag-size", str(size), "--tst-iters", "6"]
        run = fork_server.train(*TINY, *data(corpus), *flags, seconds=60)
        assert run.codes == [2] and words in run.error, run.error


VALID = "--train-data-path {corpus} --valid-data-path"


@pytest.mark.parametrize(
    "words",
    [
        f"{VALID} {{small}}/of60 {{small}}/of400",
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in (
                "--data-path {corpus} {corpus} --split 99.7,0.3,0",
                f"{VALID} {{small}}/of60 --full-validation",
                f"{VALID} {{small}}/of400 {{small}}/of60 --multiple-validation-sets "
                "--full-validation",
                f"{VALID} 1 {{small}}/of400 2 {{small}}/of60 --test-data-path {{small}}/of60",
            )
        ),
    ],
)
def test_validation_sets_smaller_than_a_long_sample(fork_server, corpus, small, words):
    """Of a model that is not trained (learning rate 0): TST's losses are stock's to the digit."""
    flags = words.format(corpus=corpus, small=small).split()
    flags += ["--vocab-size", "512", "--lr", "0", "--min-lr", "0", "--weight-decay", "0"]
    flags += ["--eval-iters", "1"]
    lines = []
    for tst in ([], TST):
        run = fork_server.train(*TINY, *flags, *tst)
        assert run.ok, run.log[-2000:]
        lines.append(re.findall(r"validation\S* loss at iteration .*?value: \S+", run.log))
    assert lines[0] == lines[1] and len(lines[0]) >= 2


def test_a_training_corpus_smaller_than_a_long_sample_is_named(fork_server, corpus, small):
    flags = ["--data-path", corpus, small / "of60", "--split", "100,0,0", "--vocab-size", "512"]
    run = fork_server.train(*TINY, *TST, *flags, "--eval-iters", "0")
    assert run.codes == [2] and "Traceback" not in run.log
    assert re.search(r"of60: expected training text for one sample of 128 tokens .* 60", run.error)


@pytest.mark.parametrize(
    "more, end",
    [
        (TST, []),
        pytest.param(TST, ["--num-workers", "2"], marks=pytest.mark.slow),
        pytest.param([*TST, "--tst-switch", "auto"], [], marks=pytest.mark.slow),
        pytest.param([*TST, "--tst-stock-index", "{folder}/index"], [], marks=pytest.mark.slow),
        pytest.param(["--tst-bag-size", "4,2", "--tst-iters", "3,3"], [], marks=pytest.mark.slow),
        pytest.param([*TST, "--micro-batch-size", "1"], [], marks=pytest.mark.slow),
        pytest.param([*TST, "--tst-exit-at-boundary"], [], marks=pytest.mark.slow),
    ],
)
def test_a_finished_run_started_again_ends_as_stocks_does(fork_server, corpus, tmp_path, more, end):
    def runs(tst, folder):
        flags = [*TINY, *data(corpus), *[word.format(folder=folder) for word in tst], *end]
        flags += ["--save", folder, "--load", folder, "--save-interval", "5"]
        done = [fork_server.train(*flags) for _ in range(2 + ("--tst-exit-at-boundary" in tst))]
        assert all(run.ok for run in done), done[-1].log[-3000:]
        return done[-2:]

    def ends(run):
        """What stock and TST print after the last iteration, but for numbers."""
        lines = run.log.splitlines()
        start = next(i for i, line in enumerate(lines) if "done with setup" in line)
        kept = [line for line in lines[start:] if not re.search(r"\[tst\]|INFO|WARN", line)]
        words = [re.sub(r"[\d.]+(E[+-]\d+)?", "N", line).strip("- ") for line in kept]
        return [line for line in words if re.match(r"validation loss|iteration|\[N-N", line)]

    _, stock = runs([], tmp_path / "stock")
    before, after = runs(more, tmp_path / "tst")
    assert not after.losses and ends(after) == ends(stock) != []
    last = r"validation loss at iteration 10 on validation set \| lm loss value: (\S+)"
    assert re.findall(last, after.log) == re.findall(last, before.log) != []


def test_several_runs_in_one_process(fork_server, corpus):
    """Each gets hooks of its own: the same lines as in a process of its own."""
    other = ["--tst-bag-size", "2", "--tst-iters", "4", "--tst-fused-linear-loss"]
    common = [*TINY, *data(corpus)]
    each = [TST, other, [], TST]
    flags = [[*common, *tst] for tst in each]
    flags[-1].append("--inprocess-restart")  # as far as it goes without nvidia-resiliency-ext
    run = fork_server.train(
        *itertools.chain.from_iterable([*part, "--then"] for part in flags[:-1]),
        *flags[-1],
        script=TWICE,
    )
    assert run.ok, run.log[-3000:]
    logs = re.split(r"run \d of this process\n", run.log)[1:]
    assert len(logs) == 4

    def figures(log):
        lines = re.findall(
            r"(\[tst\] (?:on|text|iteration|boundary)[^\n]*|lm loss: \S+ .*? grad norm: \S+)", log
        )
        return [line for line in lines if "restored" not in line]

    for log, tst in zip(logs, each):
        alone = fork_server.train(*common, *tst)
        assert figures(log) == figures(alone.log) and len(figures(log)) >= 10


def test_the_doctors_line_starts(fork_server):
    words = shlex.split(report.ON_CPU)
    # after those the fork server does what torchrun does
    assert words[:5] == [
        "MEGATRON_TST_CPU=1",
        "torchrun",
        "--standalone",
        "-m",
        "megatron_tst.pretrain_gpt",
    ]
    run = fork_server.train(*words[5:], env={"MEGATRON_TST_CPU": "yes"})
    assert run.ok and len(run.losses) == 10, run.log[-2000:]
    assert "distributed_backend ............................. gloo" in run.log


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tst-bag-sise", "4"], "got --tst-bag-sise. Did you mean --tst-bag-size?"),
        ([*TST, "--tst-step-ration", "0.3"], "Did you mean --tst-step-ratio?"),
        ([*TST, "--distributed-backend", "nccl"], "--distributed-backend with MEGATRON_TST_CPU"),
        (["--tst-iters", "4"], "--tst-iters: expected --tst-bag-size of 2 or more beside it"),
        ([*TST, "--tst-override"], "--tst-override: expected --load beside it"),
        ([*TST, "--data-path", "0", "{corpus}", "0", "{corpus}"], "expected weights above 0"),
        ([*TST, "--data-path", "nan", "{corpus}", "1", "{corpus}"], "expected weights above 0"),
        ([*TST, "--data-path", "x", "{corpus}", "1", "{corpus}"], "expected a weight before each"),
        ([*TST, "--data-path", "{corpus}.bin"], "no file"),
        ([*TST, "--data-path", "{folder}"], "no file"),
        ([*TST, "--data-path", "{folder}/empty"], "empty"),
        ([*TST, "--split", "0,100,0"], "--split: expected up to three numbers, the first above 0"),
        ([*TST, "--mock-data"], "the data: expected --mock-data alone, got --mock-data and --data"),
        ([*TST, "--split", "100,0,0", "--train-data-path", "{corpus}"], "the data: expected"),
    ],
)
def test_one_sentence_before_megatrons_traceback(fork_server, corpus, tmp_path, flags, message):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"empty{suffix}").write_bytes(b"")
    given = [flag.format(corpus=corpus, folder=tmp_path) for flag in flags]
    base = without(TINY, "--distributed-backend")
    run = fork_server.train(*base, *data(corpus), *given)
    assert run.codes == [2] and message in run.error, run.log[-2000:]
    assert "Traceback" not in run.log and "usage:" not in run.log
    assert run.log.count("megatron_tst: error") == 1 and not run.losses


@pytest.mark.parametrize("tst", [TST, []])
def test_no_data_at_all(fork_server, tst):
    run = fork_server.train(*TINY, *tst, "--vocab-size", "512")
    assert run.codes == [2] and "--data-path: expected a corpus, here or in" in run.error


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"train": ["x"], "valid": ["y"]', "expected JSON"),
        ('{"training": ["x"], "valid": ["y"], "test": null}', "keys train, valid, test"),
        (json.dumps({"train": [0, "x"], "valid": None, "test": None}), "weights above 0"),
    ],
)
def test_files_of_splits(fork_server, tmp_path, content, message):
    (tmp_path / "splits.json").write_text(content)
    flags = ["--vocab-size", "512", "--per-split-data-args-path", str(tmp_path / "splits.json")]
    run = fork_server.train(*TINY, *TST, *flags)
    assert run.codes == [2] and message in run.error and "Traceback" not in run.log


def test_a_switch_that_says_neither(fork_server):
    """Asked before megatron is imported."""
    run = fork_server.train(*TINY, *TST, "--mock-data", env={"MEGATRON_TST_CPU": "maybe"})
    assert run.codes == [2] and "MEGATRON_TST_CPU: expected one of 1, yes" in run.error
