"""Real training, real blends: which raw tokens a run has read, token by token, whoever read them
and however often it stopped.
"""

import collections
import json

import numpy as np
import pytest
from support.runs import ROOT, TINY
from support.tiers import tiers

WATCHED_SCRIPT = str(ROOT / "tests/support/watched.py")
TOKENS, L, BATCH = 6000, 32, 4
FLAGS = [*TINY, "--split", "100,0,0", "--eval-iters", "0", "--micro-batch-size", "1"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two corpora in which no token occurs twice, in documents of uneven lengths. -> prefixes"""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    lengths, prefixes = np.random.default_rng(0), []
    for i in range(2):
        prefixes.append(str(tmp_path_factory.mktemp("texts") / f"text{i}"))
        builder = IndexedDatasetBuilder(prefixes[-1] + ".bin", dtype=np.int32)
        first, end = i * TOKENS, (i + 1) * TOKENS
        while first < end:
            length = min(int(lengths.integers(1, 400)), end - first)
            builder.add_document(np.arange(first, first + length), [length])
            first += length
        builder.finalize(prefixes[-1] + ".idx")
    return prefixes


class Reader:
    """A run in as many starts as wanted, and what it has read."""

    def __init__(self, fork_server, texts, folder, *flags):
        blend = [] if "--data-path" in flags else ["--data-path", "0.3", texts[0], "0.7", texts[1]]
        self.fork_server, self.folder = fork_server, folder
        self.flags = [*FLAGS, *blend, "--vocab-size", str(2 * TOKENS), *flags]
        self.starts = 0

    def train(self, *flags, nproc=1, until=None):
        self.starts += 1
        here = self.folder / f"start{self.starts}"
        here.mkdir(parents=True)
        save = [
            "--save",
            self.folder / "ck",
            "--load",
            self.folder / "ck",
            "--save-interval",
            "1000",
        ]
        stop = ["--exit-interval", str(until)] if until else []
        run = self.fork_server.train(
            *self.flags,
            *save,
            *stop,
            *flags,
            script=WATCHED_SCRIPT,
            nproc=nproc,
            env={"TOKENS": str(here)},
        )
        assert run.ok, run.log[-3000:]
        return run

    @property
    def read(self):
        """iteration -> the raw tokens of its batch, sorted"""
        found = collections.defaultdict(list)
        for file in self.folder.glob("start*/rank*.jsonl"):
            for line in file.read_text().splitlines():
                iteration, tokens = json.loads(line)
                found[iteration] += tokens
        return {iteration: sorted(found[iteration]) for iteration in sorted(found)}


def each_once(read):
    tokens = [token for batch in read.values() for token in batch]
    assert len(tokens) == len(set(tokens))
    return len(tokens)


SAMPLES = ["--train-samples", "40", "--lr-wsd-decay-samples", "16", "--lr-warmup-samples", "8"]


def without(flags, *names):
    """Flags without some that take one value."""
    drop = {i + j for i, flag in enumerate(flags) if flag in names for j in (0, 1)}
    return [flag for i, flag in enumerate(flags) if i not in drop]


ONE, SEVERAL = "--tst-bag-size 4 --tst-iters 6", "--tst-bag-size 4,2 --tst-iters 3,2"
LENGTHS = [(tst, length) for tst in (ONE, SEVERAL) for length in ("iterations", "samples")]


@pytest.mark.parametrize("case", tiers(LENGTHS, {(SEVERAL, "samples")}))
def test_every_raw_token_once(fork_server, texts, tmp_path, case):
    """A blend; one process against three starts on 2, 4 and 1 data-parallel ranks, with and without
    prefetch workers.
    """
    tst, length = case
    more = SAMPLES if length == "samples" else []
    whole = Reader(fork_server, texts, tmp_path / "whole", *tst.split(), *more)
    parts = Reader(fork_server, texts, tmp_path / "parts", *tst.split(), *more)
    if length == "samples":
        for reader in (whole, parts):
            reader.flags = without(
                reader.flags, "--train-iters", "--lr-wsd-decay-iters", "--lr-warmup-iters"
            )
    run = whole.train()
    raw = run.phases[10][2]
    assert (
        each_once(whole.read)
        == raw
        == L * BATCH * (34 - 6 if "," not in tst else 3 * 4 + 2 * 2 + 5)
    )
    share = sum(token < TOKENS for batch in whole.read.values() for token in batch) / raw
    assert 0.2 < share < 0.4  # the blend's 0.3
    parts.train("--num-workers", "2", nproc=2, until=4)
    parts.train(nproc=4, until=8)
    parts.train("--num-workers", "2")
    assert parts.read == whole.read


def test_nothing_is_left_out(fork_server, texts, tmp_path):
    """One corpus read to its end, 46 long samples of 128 tokens: every token of it but for what
    does not fill a long sample.
    """
    flags = ["--tst-bag-size", "4,2", "--tst-iters", "6,6", "--train-iters", "22"]
    reader = Reader(fork_server, texts, tmp_path, "--data-path", texts[0], *flags)
    reader.train(nproc=2)
    assert each_once(reader.read) == L * BATCH * (6 * 4 + 6 * 2 + 10) == 46 * 128 > TOKENS - 128


def test_a_boundary_moved_to_now(fork_server, texts, tmp_path):
    reader = Reader(fork_server, texts, tmp_path)
    reader.train("--tst-bag-size", "4", "--tst-iters", "6", until=3)
    run = reader.train("--tst-bag-size", "4", "--tst-iters", "3", "--tst-override")
    assert (
        "[tst] --tst-override at iteration 3: bag size 4 for 6 iterations, recovery for 4 (3584 "
        "raw tokens in all) -> "
        "bag size 4 for 3 iterations, recovery for 7 (2432 raw tokens in all)"
    ) in run.log and [run.phases[i][0] for i in run.phases] == ["recovery"] * 7
    assert each_once(reader.read) == run.phases[10][2] == 2432


def test_a_later_boundary_and_a_longer_recovery(fork_server, texts, tmp_path):
    flags = ["--tst-override", "--override-opt_param-scheduler"]
    reader = Reader(fork_server, texts, tmp_path, *flags)
    reader.train("--tst-bag-size", "4", "--tst-iters", "6", until=5)
    later = reader.train("--tst-bag-size", "4,2", "--tst-iters", "7,2", nproc=2, until=8)
    assert (
        "-> bag size 4 for 7 iterations, bag size 2 for 2 iterations, recovery for 1 (" in later.log
    )
    assert [later.phases[i][1] for i in (6, 7, 8)] == [4, 4, 2]
    reader.train("--tst-bag-size", "4,2", "--tst-iters", "7,2")
    longer = reader.train("--tst-bag-size", "4,2", "--tst-iters", "7,2", "--train-iters", "12")
    assert [longer.phases[i][0] for i in (11, 12)] == ["recovery"] * 2
    assert each_once(reader.read) == longer.phases[12][2] == L * BATCH * (7 * 4 + 2 * 2 + 3)


def test_a_later_boundary_that_would_read_text_twice(fork_server, texts, tmp_path):
    """Where the longer run needs another epoch, Megatron would shuffle everything anew."""
    flags = [
        "--data-path",
        texts[0],
        "--tst-bag-size",
        "8",
        "--train-iters",
        "12",
        "--tst-override",
    ]
    reader = Reader(fork_server, texts, tmp_path, *flags)
    reader.train("--tst-iters", "3", until=2)  # 12 + 5 long samples of 256; the corpus has 23
    reader.starts += 1
    save = ["--load", tmp_path / "ck"]
    run = fork_server.train(*reader.flags, *save, "--tst-iters", "6")
    assert (
        run.codes == [2]
        and "--tst-override: expected at most the 17 long samples of 256 tokens" in run.error
    ), run.log[-2000:]
    assert "text would be read twice" in run.error
    assert fork_server.train(*reader.flags, *save, "--tst-iters", "4").ok


def test_control_the_observer_sees_text_read_twice(fork_server, texts, tmp_path):
    """More epochs than one: the same check fails."""
    reader = Reader(
        fork_server,
        texts,
        tmp_path,
        "--data-path",
        texts[0],
        "--tst-bag-size",
        "8",
        "--tst-iters",
        "8",
    )
    reader.train()
    with pytest.raises(AssertionError):
        each_once(reader.read)
