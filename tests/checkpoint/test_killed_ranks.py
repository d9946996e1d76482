"""Runs of four processes of which one is killed, in a step or at any moment of a save, and started
again: the same digits as the undisturbed run.
"""

import shutil
import subprocess
import sys

import pytest
from support.paths import environment
from support.runs import ROOT, TINY, TST, Run, data

from megatron_tst.checkpoint.format import TRACKER, Checkpoint
from megatron_tst.checkpoint.verify import differences

KILLED_SCRIPT = str(ROOT / "tests/support/killed.py")
TP2 = ["--tensor-model-parallel-size", "2"]
LAYOUTS = {
    "tp2 pp2": [*TP2, "--pipeline-model-parallel-size", "2"],
    "tp2 dp2 zero": [*TP2, "--use-distributed-optimizer"],
}
# moment, iteration, rank, signal; and the iteration from which the next start goes on. The boundary
# is after 6.
MOMENTS = [
    ("step:5:3:KILL", 4),
    ("step:7:1:TERM", 6),
    ("shard:6:2:KILL", 4),
    ("shard:8:0:TERM", 6),
    ("metadata:6:0:KILL", 4),
    ("emptied:6:0:KILL", 6),
    ("saved:6:0:KILL", 6),
]


def flags(corpus, layout, folder):
    save = ["--save", folder, "--load", folder, "--save-interval", "2"]
    return [*TINY, *TST, *data(corpus), *LAYOUTS[layout], *save]


@pytest.fixture(scope="module")
def whole(fork_server, corpus, tmp_path_factory):
    """layout -> the undisturbed run and its folder."""
    made = {}

    def train(layout):
        if layout not in made:
            folder = tmp_path_factory.mktemp("whole")
            run = fork_server.train(*flags(corpus, layout, folder), nproc=4)
            assert run.ok, run.log[-3000:]
            made[layout] = run, folder
        return made[layout]

    return train


def same(run, folder, want, last):
    """-> the first iteration that the run trained"""
    first = min(run.losses)
    rest = range(first, 11)
    assert run.losses == {i: want.losses[i] for i in rest}
    assert run.grad_norms == {i: want.grad_norms[i] for i in rest}
    assert run.phases == {i: want.phases[i] for i in rest}
    assert run.validation[10] == want.validation[10]
    # the distributed optimizer's flat buffers end in memory that nobody has written
    flat = any(name.startswith("optimizer.distributed.") for name in Checkpoint(last).tensors)
    assert not differences(Checkpoint(last), Checkpoint(folder), optimizer=not flat)
    return first


@pytest.mark.slow
@pytest.mark.parametrize("moment, after", MOMENTS, ids=[moment for moment, _ in MOMENTS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_and_started_again(fork_server, corpus, whole, tmp_path, layout, moment, after):
    want, last = whole(layout)
    folder = tmp_path / "ck"
    killed = fork_server.train(
        *flags(corpus, layout, folder), nproc=4, script=KILLED_SCRIPT, env={"AT": moment}
    )
    what, _, rank, how = moment.split(":")
    assert f"{how} at {what} of iteration" in killed.log and not killed.ok, killed.log[-3000:]
    assert killed.codes[int(rank)] == {"KILL": -9, "TERM": -15}[how], killed.codes
    if what == "emptied":
        assert (folder / TRACKER).read_text() == ""
        assert Checkpoint(folder).path.name == f"iter_{after:07d}"  # a tool takes the same one
    again = fork_server.train(*flags(corpus, layout, folder), nproc=4)
    assert again.ok, again.log[-3000:]
    assert same(again, folder, want, last) == after + 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_terminated_with_megatrons_handler(fork_server, corpus, whole, tmp_path, layout):
    """--exit-signal-handler: the iteration is finished and saved, also where the signal comes in
    the middle of a save.
    """
    want, last = whole(layout)
    for moment, after in (("step:6:3:TERM", 6), ("shard:6:2:TERM", 7)):
        folder = tmp_path / moment.partition(":")[0]
        job = dict(nproc=4, script=KILLED_SCRIPT, env={"AT": moment})
        given = [*flags(corpus, layout, folder), "--exit-signal-handler"]
        stopped = fork_server.train(*given, **job)
        assert stopped.ok and "after receiving SIGTERM" in stopped.log, stopped.log[-3000:]
        again = fork_server.train(*given, nproc=4)
        assert again.ok, again.log[-3000:]
        assert same(again, folder, want, last) == after + 1


@pytest.mark.slow
def test_restarted_by_torchrun(corpus, whole, tmp_path):
    """A rank is killed between the files of the boundary's checkpoint."""
    layout = "tp2 dp2 zero"
    want, last = whole(layout)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 4 --max-restarts 2".split()
    command = [sys.executable, *torchrun, KILLED_SCRIPT, *flags(corpus, layout, tmp_path / "ck")]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=environment(AT="shard:6:2:KILL", OMP_NUM_THREADS="1"),
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0 and "KILL at shard of iteration 6" in log, log[-3000:]
    restarted = Run([0], log[log.rindex("[tst] on:") :])
    assert same(restarted, tmp_path / "ck", want, last) == 5
    shutil.rmtree(tmp_path / "ck")
