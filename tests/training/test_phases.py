"""A schedule of bag sizes, and the switch that the loss decides: in one process, in layouts, over
restarts.
"""

import re
import shutil

import pytest
from support.close import close
from support.runs import TINY, data, losses_close
from support.tiers import tiers

pytestmark = pytest.mark.numeric

LAYOUTS = {
    "tp2 sp": (
        2,
        [
            "--tensor-model-parallel-size",
            "2",
            "--make-vocab-size-divisible-by",
            "64",
            "--sequence-parallel",
        ],
    ),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "dp2, prefetch workers": (2, ["--num-workers", "2"]),
    "tp2 pp2, fused linear": (
        4,
        "--tensor-model-parallel-size 2 --make-vocab-size-divisible-by 64 "
        "--pipeline-model-parallel-size 2 --tst-fused-linear-loss".split(),
    ),
}
SEVERAL = ["--tst-bag-size", "8,4,2", "--tst-iters", "3,2,2"]
# the two averages are over 3 and 6 iterations and have settled after 12; no loss falls by so much
LONG = [*TINY, "--train-iters", "30", "--eval-interval", "10"]
AUTO = (
    "--tst-bag-size 4 --tst-iters 25 --tst-switch auto --tst-switch-window 0.1 --tst-switch-slope 5"
).split()


def resume(fork_server, corpus, folder, iteration, tmp_path, *flags, nproc=1):
    here = tmp_path / "ck"
    shutil.copytree(folder / f"iter_{iteration:07d}", here / f"iter_{iteration:07d}")
    (here / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    run = fork_server.train(*data(corpus), *flags, "--load", here, nproc=nproc)
    assert run.ok, run.log[-3000:]
    return run


@pytest.fixture(scope="module")
def several(fork_server, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    run = fork_server.train(
        *TINY, *SEVERAL, *data(corpus), "--save", folder, "--save-interval", "1"
    )
    assert run.ok, run.log[-3000:]
    return run, folder


def test_a_schedule_of_bag_sizes(several):
    run, _ = several
    assert [bag for _, bag, _ in run.phases.values()] == [8] * 3 + [4] * 2 + [2] * 2 + [1] * 3
    raw = [128 * n for n in (8, 16, 24, 28, 32, 34, 36, 37, 38, 39)]
    assert [tokens for _, _, tokens in run.phases.values()] == raw
    assert (
        "on: bag size 8, 4, 2 (both superposed), 7 iterations of superposition (28 samples, 4608 "
        "raw tokens)" in run.log
    )
    ends = re.findall(
        r"\[tst\] boundary after iteration (\d+): ([^(]+) \(\d+ raw tokens\), ([^:;]+)", run.log
    )
    assert ends == [
        ("3", "bag size 8 is done", "bag size 4 begins"),
        ("5", "bag size 4 is done", "bag size 2 begins"),
        ("7", "superposition is done", "recovery begins"),
    ]
    excess = re.findall(r"iteration +(\d+)/.*mce minus bag entropy: ([\d.E+]+)", run.log)
    assert [int(i) for i, _ in excess] == list(range(1, 8))
    losses = {i: float(loss) for i, loss in run.losses.items()}
    assert (
        all(0 < float(x) < losses[int(i)] for i, x in excess if int(i) != 2)
        and losses[10] < losses[8]
    )


@pytest.mark.parametrize("iteration", tiers([2, 3, 4, 6, 7], {3, 4}))
def test_a_schedule_resumes_to_the_last_digit(fork_server, corpus, several, tmp_path, iteration):
    run, folder = several
    again = resume(fork_server, corpus, folder, iteration, tmp_path, *TINY, *SEVERAL)
    assert again.losses == {i: run.losses[i] for i in range(iteration + 1, 11)}
    assert again.phases == {i: run.phases[i] for i in range(iteration + 1, 11)}


@pytest.mark.parametrize("layout", tiers(LAYOUTS, {"tp2 pp2, fused linear"}))
def test_a_schedule_in_layouts(fork_server, corpus, several, tmp_path, layout):
    run, folder = several
    nproc, flags = LAYOUTS[layout]
    again = resume(fork_server, corpus, folder, 2, tmp_path, *TINY, *SEVERAL, *flags, nproc=nproc)
    assert again.phases == {i: run.phases[i] for i in range(3, 11)}
    losses_close(again, run, range(3, 11))


@pytest.mark.parametrize("superpose", tiers(["input", "output"], {"input"}))
def test_a_schedule_half_superposed(fork_server, corpus, superpose):
    run = fork_server.train(*TINY, *SEVERAL, *data(corpus), "--tst-superpose", superpose)
    assert run.ok and len(run.losses) == 10, run.log[-3000:]
    assert run.phases[7][2] == 128 * (36 if superpose == "input" else 7)


def test_exit_comes_after_the_last_bag_size(fork_server, corpus, several, tmp_path):
    flags = [
        *TINY,
        *SEVERAL,
        *data(corpus),
        "--tst-exit-at-boundary",
        "--save",
        tmp_path,
        "--save-interval",
        "1000",
    ]
    run = fork_server.train(*flags)
    assert run.ok and sorted(run.losses) == list(range(1, 8)), run.log[-3000:]
    again = fork_server.train(*flags, "--load", tmp_path)
    assert again.ok and {**run.losses, **again.losses} == several[0].losses


@pytest.fixture(scope="module")
def auto(fork_server, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto")
    run = fork_server.train(*LONG, *AUTO, *data(corpus), "--save", folder, "--save-interval", "1")
    assert run.ok, run.log[-3000:]
    return run, folder


DECIDED = re.compile(
    r"\[tst\] --tst-switch auto at iteration (\d+): the loss falls by ([-\d.e]+) nats in a "
    r"hundredth of the run, less than 5: "
    r"bag size 4 ends after iteration (\d+) instead of 25 \| now: bag size 4 for \3 iterations, "
    r"recovery for (\d+)"
)


def fall_of(losses, window, iterations):
    """What switch.py is to find: the line through two exponential averages, each at the mean age of
    what is in it.
    """
    averages, ages = [], []
    for n in (window, 2 * window):
        weights = [(1 - 1 / n) ** i for i in range(len(losses))]
        averages.append(sum(w * loss for w, loss in zip(weights, reversed(losses))) / sum(weights))
        ages.append(sum(w * i for i, w in enumerate(weights)) / sum(weights))
    return (averages[1] - averages[0]) / (ages[1] - ages[0]) * iterations / 100


def test_the_loss_decides_when(auto):
    run, _ = auto
    ((when, fall, end, rest),) = DECIDED.findall(run.log)
    assert (when, end, rest) == (
        "12",
        "17",
        "13",
    )  # as soon as the averages have settled, and five iterations to watch
    close(float(fall), fall_of([float(run.losses[i]) for i in range(1, 13)], 3, 30), 2e-3)
    assert [bag for _, bag, _ in run.phases.values()] == [4] * 17 + [1] * 13
    assert run.phases[30][2] == 128 * (17 * 4 + 13)
    assert (
        "switch: auto, when the loss falls by less than 5 nats in a hundredth of the run "
        "(smoothed over 3 iterations)" in run.log
    )


@pytest.mark.parametrize("iteration", tiers([8, 12, 14, 17, 20], {8, 14}))
def test_the_decision_survives_a_restart(fork_server, corpus, auto, tmp_path, iteration):
    """Before it (with half of the losses that it looks at), at it, before the boundary that it has
    set, at that and after it.
    """
    run, folder = auto
    again = resume(fork_server, corpus, folder, iteration, tmp_path, *LONG, *AUTO)
    assert again.losses == {i: run.losses[i] for i in range(iteration + 1, 31)}
    assert again.phases == {i: run.phases[i] for i in range(iteration + 1, 31)}
    assert DECIDED.findall(again.log) == (DECIDED.findall(run.log) if iteration < 12 else [])


@pytest.mark.parametrize("layout", tiers(LAYOUTS, {"pp2", "dp2, prefetch workers"}))
def test_the_loss_decides_in_layouts(fork_server, corpus, auto, tmp_path, layout):
    """The last stage has the loss, rank 0 decides, every rank's batches follow; workers have
    fetched ahead by then.
    """
    run, folder = auto
    nproc, flags = LAYOUTS[layout]
    again = resume(fork_server, corpus, folder, 8, tmp_path, *LONG, *AUTO, *flags, nproc=nproc)
    assert again.phases == {i: run.phases[i] for i in range(9, 31)}
    losses_close(again, run, range(9, 31))


@pytest.mark.slow
def test_the_loss_decides_with_virtual_pipeline_stages(fork_server, corpus, tmp_path):
    """The last stage's last chunk has the loss; both chunks of a rank read the batches."""
    flags = [*LONG, *AUTO, "--num-layers", "4", "--micro-batch-size", "1"]
    save = ["--save", tmp_path / "one", "--save-interval", "8"]
    run = fork_server.train(*flags, *data(corpus), *save)
    assert run.ok, run.log[-3000:]
    stages = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2".split()
    again = resume(fork_server, corpus, tmp_path / "one", 8, tmp_path, *flags, *stages, nproc=2)
    assert again.phases == {i: run.phases[i] for i in range(9, 31)}
    assert DECIDED.findall(again.log) == DECIDED.findall(run.log) != []
    losses_close(again, run, range(9, 31))


def test_more_workers_than_the_boundary_waits_for(fork_server, corpus, auto, tmp_path):
    """With one micro-batch an iteration and four workers eight iterations may have been fetched:
    the boundary waits for them.
    """
    run, folder = auto
    flags = ["--num-workers", "4", "--micro-batch-size", "4"]
    again = resume(fork_server, corpus, folder, 8, tmp_path, *LONG, *AUTO, *flags)
    assert [bag for _, bag, _ in again.phases.values()] == [4] * 12 + [1] * 10  # 12 + 8
    losses_close(again, run, range(9, 18))


def test_a_loss_that_falls_goes_on(fork_server, corpus):
    flags = [flag if flag != "5" else "1e-9" for flag in AUTO]
    run = fork_server.train(*LONG, *flags, *data(corpus))
    assert run.ok and [bag for _, bag, _ in run.phases.values()] == [4] * 25 + [1] * 5, run.log[
        -3000:
    ]
    assert "--tst-switch auto at" not in run.log


def test_the_loss_ends_each_of_several_bag_sizes(fork_server, corpus):
    """A later phase ends where its long samples are read to their ends: for pairs of samples after
    an even number of iterations.
    """
    flags = [
        *AUTO,
        "--tst-bag-size",
        "4,2",
        "--tst-iters",
        "22,22",
        "--tst-switch-window",
        "0.05",
    ]  # averages over 3 and 6 of 60
    run = fork_server.train(*LONG, *flags, "--train-iters", "60", *data(corpus))
    assert run.ok, run.log[-3000:]
    ends = re.findall(
        r"auto at iteration (\d+): .*: bag size (\d) ends after iteration (\d+) instead of (\d+)",
        run.log,
    )
    assert ends == [("12", "4", "17", "22"), ("29", "2", "35", "39")]
    assert [bag for _, bag, _ in run.phases.values()] == [4] * 17 + [2] * 18 + [1] * 25


def test_not_before_the_learning_rate_is_up(fork_server, corpus):
    run = fork_server.train(*LONG, *AUTO, "--lr-warmup-iters", "15", *data(corpus))
    assert run.ok and DECIDED.findall(run.log)[0][0] == "15", run.log[-3000:]


def test_the_stock_index_follows(fork_server, corpus, tmp_path):
    """The index for a stock recovery is written anew when the boundary has moved."""
    import numpy as np

    run = fork_server.train(*LONG, *AUTO, *data(corpus), "--tst-stock-index", tmp_path / "auto")
    fixed = [flag for flag in AUTO[:4] if flag != "25"]
    want = fork_server.train(
        *LONG, *fixed, "17", *data(corpus), "--tst-stock-index", tmp_path / "fixed"
    )
    assert run.ok and want.ok, run.log[-3000:]
    files = sorted((tmp_path / "fixed").glob("*train-*.npy"))
    assert len(files) == 3
    for file in files:
        ours, theirs = np.load(tmp_path / "auto" / file.name), np.load(file)
        if "shuffle" in file.name:
            ours, theirs = ours[17 * 4 : 120], theirs[17 * 4 : 120]  # what recovery reads
        assert np.array_equal(ours, theirs), file.name
