"""Whatever ends, skips or repeats iterations around the boundary: the run that goes on is the
undisturbed one, to the last digit.
"""

import re

import pytest
from support.runs import ROOT, TINY, TST, data
from support.tiers import tiers

WATCHED_SCRIPT = str(ROOT / "tests/support/watched.py")
PP2 = ["--pipeline-model-parallel-size", "2"]
# the boundary is after 6; an hour that passes before the validation after 5 ends that, as in stock
AROUND = 4, 6, 7


@pytest.fixture(scope="module")
def whole(fork_server, corpus):
    run = fork_server.train(*TINY, *TST, *data(corpus))
    assert run.ok, run.log[-3000:]
    return run


def train(fork_server, corpus, folder, *flags, **job):
    save = ["--save", folder, "--load", folder, "--save-interval", "1000"]
    return fork_server.train(
        *TINY, *TST, *data(corpus), *save, *flags, script=WATCHED_SCRIPT, **job
    )


def goes_on(fork_server, corpus, folder, whole, after, *flags, nproc=1):
    """The next start trains the rest as if nothing had happened."""
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == str(after)
    again = train(fork_server, corpus, folder, *flags, nproc=nproc)
    assert again.ok, again.log[-3000:]
    rest = range(after + 1, 11)
    assert again.phases == {i: whole.phases[i] for i in rest}
    assert (
        again.losses == {i: whole.losses[i] for i in rest}
        and again.validation[10] == whole.validation[10]
    )
    assert again.grad_norms == {i: whole.grad_norms[i] for i in rest}


@pytest.fixture(scope="module")
def whole_pp2(fork_server, corpus):
    run = fork_server.train(*TINY, *TST, *data(corpus), *PP2, nproc=2)
    assert run.ok, run.log[-3000:]
    return run


SIGNALS = [*(("term", when, 1) for when in AROUND), ("hour", 6, 1), ("hour", 7, 1)]
SIGNALS += [("term", 6, 2), ("hour", 6, 2)]


@pytest.mark.parametrize("signal", tiers(SIGNALS, {("term", 6, 2), ("hour", 7, 1)}))
def test_signal_and_duration(fork_server, corpus, whole, whole_pp2, tmp_path, signal):
    how, when, nproc = signal
    layout = PP2 if nproc == 2 else []
    flags = ["--exit-signal-handler"] if how == "term" else ["--exit-duration-in-mins", "30"]
    said = "after receiving SIGTERM" if how == "term" else "exiting program after"
    run = train(
        fork_server, corpus, tmp_path, *flags, *layout, nproc=nproc, env={"AT": f"{when}:{how}"}
    )
    assert run.ok and said in run.log and sorted(run.losses) == list(range(1, when + 1)), run.log[
        -3000:
    ]
    goes_on(
        fork_server,
        corpus,
        tmp_path,
        whole if nproc == 1 else whole_pp2,
        when,
        *layout,
        nproc=nproc,
    )


def test_signal_at_the_boundary_that_exits_anyway(fork_server, corpus, whole, tmp_path):
    run = train(
        fork_server,
        corpus,
        tmp_path,
        "--exit-signal-handler",
        "--tst-exit-at-boundary",
        env={"AT": "6:term"},
    )
    assert run.ok and sorted(run.losses) == [1, 2, 3, 4, 5, 6], run.log[-3000:]
    goes_on(fork_server, corpus, tmp_path, whole, 6, "--tst-exit-at-boundary")


@pytest.mark.parametrize("interval", tiers([5, 6, 7], {6}))
def test_exit_interval(fork_server, corpus, whole, tmp_path, interval):
    run = train(fork_server, corpus, tmp_path, "--exit-interval", str(interval))
    assert run.ok and sorted(run.losses) == list(range(1, interval + 1)), run.log[-3000:]
    goes_on(fork_server, corpus, tmp_path, whole, interval)


@pytest.mark.parametrize("skipped", tiers([(6,), (5, 6, 7)], {(5, 6, 7)}))
def test_skipped_iterations(fork_server, corpus, whole, tmp_path, skipped):
    """The skipped batches are read and dropped: phases and raw tokens stay, and a restart in
    between changes nothing.
    """
    skip = ["--iterations-to-skip", *map(str, skipped)]
    run = train(fork_server, corpus, tmp_path / "a", *skip)
    assert run.ok, run.log[-3000:]
    left = [i for i in range(1, 11) if i not in skipped]
    assert run.phases == {i: whole.phases[i] for i in left} and sorted(run.losses) == left
    assert {i: run.losses[i] for i in left if i < 6} == {i: whole.losses[i] for i in left if i < 6}
    assert (
        run.log.count("[tst] boundary after iteration 6: superposition is done (3072 raw tokens)")
        == 1
    )
    stopped = train(fork_server, corpus, tmp_path / "b", *skip, "--exit-interval", "4")
    again = train(fork_server, corpus, tmp_path / "b", *skip)
    assert stopped.ok and again.ok and {**stopped.losses, **again.losses} == run.losses


def test_rerunning_every_iteration(fork_server, corpus, whole, tmp_path):
    """Megatron's report of determinism computes each iteration twice, the second time from the
    micro-batches that it has kept.
    """
    run = train(fork_server, corpus, tmp_path, "--check-for-spiky-loss", env={"AT": "1:twice"})
    assert run.ok and "REPORT_DETERMINISM_STATS" in run.log, run.log[-3000:]
    assert (
        run.losses == whole.losses
        and run.grad_norms == whole.grad_norms
        and run.phases == whole.phases
    )
    excess = [re.findall(r"mce minus bag entropy: ([\d.E+-]+)", r.log) for r in (run, whole)]
    assert excess[0] == excess[1] and len(excess[0]) == 6


@pytest.mark.parametrize("when", tiers([6, 7], {6}))
def test_an_undefined_loss_that_goes_away(fork_server, corpus, whole, tmp_path, when):
    """Megatron runs the iteration again, finds another result and ends the job; the next start goes
    on from the last checkpoint.
    """
    run = train(fork_server, corpus, tmp_path, "--save-interval", "2", env={"AT": f"{when}:nan"})
    assert run.codes == [17] and "Possible transient error" in run.log, run.log[-3000:]
    goes_on(fork_server, corpus, tmp_path, whole, (when - 1) // 2 * 2)


@pytest.mark.parametrize("when", tiers([6, 7], {7}))
def test_an_undefined_loss_that_stays(fork_server, corpus, whole, tmp_path, when):
    """Megatron saves before the iteration, its micro-batches included, and asks for another
    machine: there it computes the same batch.
    """
    run = train(fork_server, corpus, tmp_path, env={"AT": f"{when}:nans"})
    assert run.codes == [16] and "rerun the last iteration" in run.log, run.log[-3000:]
    judged = train(fork_server, corpus, tmp_path, env={"AT": f"{when}:elsewhere"})
    assert judged.codes == [17] and "Possible persistent error" in judged.log, judged.log[-3000:]
    goes_on(fork_server, corpus, tmp_path, whole, when - 1, "--rerun-mode", "disabled")


def test_asynchronous_saves(fork_server, corpus, whole, tmp_path):
    """Written by another process while training goes on, over the boundary too: what is in a
    checkpoint is its own iteration's.
    """
    persistent = ["--async-save", "--async-strategy", "mcore", "--use-persistent-ckpt-worker"]
    run = train(
        fork_server, corpus, tmp_path, *persistent, "--save-interval", "3", "--exit-interval", "7"
    )
    assert run.ok and run.log.count("scheduled an async checkpoint save") == 3, run.log[-3000:]
    for after in (7, 6, 3):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(after))
        goes_on(fork_server, corpus, tmp_path, whole, after)
