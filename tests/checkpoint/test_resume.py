"""A checkpoint saved in one layout resumes in another, with its optimizer, on both sides of the
boundary.
"""

import os
import shutil
from pathlib import Path

import pytest
from support.runs import TINY, TST, data

TP2 = ["--tensor-model-parallel-size", "2", "--make-vocab-size-divisible-by", "64"]
PP2 = ["--pipeline-model-parallel-size", "2"]
ZERO = ["--use-distributed-optimizer"]
FULLY = [*ZERO, "--dist-ckpt-optim-fully-reshardable"]
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-token-dispatcher-type "
    "alltoall"
).split()
EP2 = [*MOE, "--expert-model-parallel-size", "2"]
DENSE_TO = {"tp2": (2, TP2), "pp2": (2, PP2), "dp2": (2, [])}


def saved(fork_server, corpus, folder, nproc, layout):
    run = fork_server.train(
        *TINY, *TST, *data(corpus), *layout, "--save", folder, "--save-interval", "4", nproc=nproc
    )
    assert run.ok, run.log[-3000:]
    return run


def resumed(fork_server, corpus, folder, iteration, nproc, layout):
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return fork_server.train(*TINY, *TST, *data(corpus), *layout, "--load", folder, nproc=nproc)


def check(fork_server, corpus, folder, want, nproc, layout):
    for iteration in (4, 8):  # the boundary is after 6
        run = resumed(fork_server, corpus, folder, iteration, nproc, layout)
        assert run.ok, run.log[-3000:]
        assert set(run.losses) == set(range(iteration + 1, 11))
        for i in run.losses:
            assert float(run.losses[i]) == pytest.approx(float(want.losses[i]), rel=1e-6), (
                iteration,
                i,
            )


@pytest.fixture(scope="module")
def whole(fork_server, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return saved(fork_server, corpus, folder, 1, []), folder


@pytest.mark.parametrize("layout", DENSE_TO)
def test_from_one_process(fork_server, corpus, whole, layout):
    check(fork_server, corpus, whole[1], whole[0], *DENSE_TO[layout])


@pytest.mark.parametrize(
    "there, here",
    [
        ((2, TP2), (1, ["--make-vocab-size-divisible-by", "128"])),
        ((2, PP2), (2, TP2)),
        ((2, ZERO), (2, ZERO)),
        ((2, FULLY), (1, FULLY)),
        ((4, [*TP2, *FULLY]), (2, FULLY)),
        ((2, EP2), (4, [*EP2, *PP2])),
    ],
    ids=[
        "tp2 to one",
        "pp2 to tp2",
        "zero",
        "zero to one",
        "tp2 dp2 zero to dp2 zero",
        "ep2 to ep2 pp2",
    ],
)
def test_from_one_layout_to_another(fork_server, corpus, tmp_path, there, here):
    """With the distributed optimizer too: the second and third step after a resume show a wrong
    step of Adam (cpu.py).
    """
    check(fork_server, corpus, tmp_path, saved(fork_server, corpus, tmp_path, *there), *here)


@pytest.mark.parametrize(
    "there, here, flag",
    [
        ((2, EP2), (1, MOE), "--expert-model-parallel-size"),
        ((1, MOE), (2, EP2), "--expert-model-parallel-size"),
        ((2, ZERO), (2, []), "--use-distributed-optimizer"),
        ((2, []), (2, FULLY), "--use-distributed-optimizer"),
    ],
    ids=["ep2 to one", "one to ep2", "zero to dp2", "dp2 to zero"],
)
def test_where_megatron_cannot(fork_server, corpus, tmp_path, there, here, flag):
    want = saved(fork_server, corpus, tmp_path, *there)
    run = resumed(fork_server, corpus, tmp_path, 4, *here)
    assert set(run.codes) == {2} and f"{flag} with the optimizer's state: expected" in run.error
    weights_alone = resumed(
        fork_server, corpus, tmp_path, 4, here[0], [*here[1], "--no-load-optim"]
    )
    assert weights_alone.ok and float(weights_alone.losses[5]) == pytest.approx(
        float(want.losses[5]), rel=1e-6
    )


def test_a_tracker_that_was_emptied_is_mended(fork_server, corpus, whole, tmp_path):
    """Killed between Megatron's emptying of the file and its writing: the run goes on from the last
    checkpoint that is whole.
    """
    folder = Path(shutil.copytree(whole[1], tmp_path / "ck"))
    shutil.rmtree(folder / "iter_0000010")
    os.truncate(folder / "iter_0000008" / "__0_0.distcp", 1000)
    (folder / "latest_checkpointed_iteration.txt").write_text("")
    run = fork_server.train(*TINY, *TST, *data(corpus), "--load", folder)
    assert (
        run.ok
        and "was empty (a run killed while it wrote it); going on from iteration 4" in run.log
    ), run.log[-3000:]
    assert set(run.losses) == set(range(5, 11)) and run.losses[10] == whole[0].losses[10]
