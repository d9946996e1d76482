"""The block that rank 0 writes a few iterations after a boundary: every figure of it, in one
process, over a restart, in layouts.
"""

import re

import pytest
from support.close import close
from support.runs import TINY, TST, data
from support.tiers import tiers

RUN = [*TINY, *TST, "--train-iters", "12"]
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-token-dispatcher-type "
    "alltoall"
).split()
LAYOUTS = {
    "dp2": (2, []),
    "tp2": (
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
    "ep2": (2, ["--expert-model-parallel-size", "2"]),
    "recomputed": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split(),
    ),
}


def blocks(run):
    """[(head, {row: text})]"""
    found, lines = [], run.log.splitlines()
    for i, line in enumerate(lines):
        if line.startswith(" [tst] boundary: "):
            rows = [re.match(r" \[tst\]   (.{14}) (.*)", row) for row in lines[i + 1 : i + 8]]
            found.append((line, {row[1].strip(): row[2] for row in rows if row}))
    return found


@pytest.fixture(scope="module")
def whole(fork_server, corpus):
    run = fork_server.train(*RUN, *data(corpus))
    assert run.ok, run.log[-3000:]
    return run


def test_every_figure(whole):
    ((head, rows),) = blocks(whole)
    assert (
        head == " [tst] boundary: recovery since iteration 7, after bag size 4; 5 iterations later"
    )
    rate = {
        int(i): float(x)
        for i, x in re.findall(r"iteration +(\d+)/.*?learning rate: ([\d.E+-]+)", whole.log)
    }
    assert rows.pop("learning rate") == f"{rate[6]:.6E} at the boundary, {rate[11]:.6E} now"
    losses = " ".join(whole.losses[i] for i in range(7, 12))
    assert (
        rows.pop("losses since")
        == f"{losses} | last validation loss: {whole.validation[5]} (next-token, iteration 5)"
    )
    assert rows == {
        "raw tokens": "3072 at the boundary, 3712 now, 3840 at the end",
        "optimizer": "state kept: step 6 at the boundary, 11 now",
        "data": "sample 44 of 48, next is piece 3 of long sample 26",
    }
    text = whole.log.splitlines()
    iterations = [i for i, line in enumerate(text) if line.startswith(" [tst] iteration")]
    assert iterations[10] < text.index(head) < iterations[11]


def test_after_a_restart_at_the_boundary(fork_server, corpus, whole, tmp_path):
    """What only the run before it knew comes from the checkpoint."""
    flags = [
        *RUN,
        *data(corpus),
        "--tst-exit-at-boundary",
        "--save",
        tmp_path,
        "--save-interval",
        "1000",
    ]
    first, second = fork_server.train(*flags), fork_server.train(*flags, "--load", tmp_path)
    assert first.ok and second.ok and not blocks(first) and blocks(second) == blocks(whole)


def test_an_optimizer_that_was_not_kept_is_named(fork_server, corpus, tmp_path):
    flags = [
        *RUN,
        *data(corpus),
        "--tst-exit-at-boundary",
        "--save",
        tmp_path,
        "--save-interval",
        "1000",
    ]
    first, second = (
        fork_server.train(*flags),
        fork_server.train(*flags, "--load", tmp_path, "--no-load-optim"),
    )
    assert first.ok and second.ok, second.log[-3000:]
    assert (
        blocks(second)[0][1]["optimizer"]
        == "state NOT kept, or steps were skipped: step 6 at the boundary, 5 now"
    )


def test_before_any_validation_and_at_the_end_of_the_run(fork_server, corpus):
    run = fork_server.train(
        *TINY, "--tst-bag-size", "4,2", "--tst-iters", "2,6", "--eval-iters", "0", *data(corpus)
    )
    assert run.ok, run.log[-3000:]
    (one, first), (two, second) = blocks(run)
    assert (
        one == " [tst] boundary: bag size 2 since iteration 3, after bag size 4; 5 iterations later"
    )
    assert (
        two == " [tst] boundary: recovery since iteration 9, after bag size 2; 2 iterations later"
    )
    assert (
        first["losses since"]
        == " ".join(run.losses[i] for i in range(3, 8)) + " | last validation loss: none yet"
    )
    assert second["losses since"].split(" | ")[0] == f"{run.losses[9]} {run.losses[10]}"


@pytest.fixture(scope="module")
def experts(fork_server, corpus, tmp_path_factory):
    """A run with experts from its checkpoint after iteration 3. -> (run, folder)"""
    folder = tmp_path_factory.mktemp("experts")
    save = ["--save", folder, "--save-interval", "3", "--exit-interval", "3"]
    assert fork_server.train(*RUN, *MOE, *data(corpus), *save).ok
    run = fork_server.train(*RUN, *MOE, *data(corpus), "--load", folder, "--no-load-optim")
    assert run.ok, run.log[-3000:]
    return run, folder


def test_expert_load(experts):
    load = blocks(experts[0])[0][1]["expert load"]
    figures = re.fullmatch(
        r"busiest expert over the mean, median of the layers: ([\d.]+) \(worst layer ([\d.]+)\) "
        r"before, ([\d.]+) \(worst layer ([\d.]+)\) since",
        load,
    )
    before, worst_before, since, worst_since = map(float, figures.groups())
    assert (
        1 < before <= worst_before < 2 and 1 < since <= worst_since < 2 and before != since
    )  # 2: top 2 of 4
    undecided = re.fullmatch(
        r"over log\(experts\), median of the layers: ([\d.]+) before, ([\d.]+) since",
        blocks(experts[0])[0][1]["router entropy"],
    )
    assert all(0.8 < float(x) <= 1 for x in undecided.groups())  # nearly untrained routers


@pytest.mark.parametrize("layout", tiers(LAYOUTS, {"pp2", "ep2"}))
def test_expert_load_is_the_same_in_layouts(fork_server, corpus, experts, layout):
    """Layers on other stages, tokens on other ranks, activations computed twice."""
    run, folder = experts
    nproc, flags = LAYOUTS[layout]
    other = fork_server.train(
        *RUN, *MOE, *data(corpus), "--load", folder, "--no-load-optim", *flags, nproc=nproc
    )
    assert other.ok, other.log[-3000:]
    ((head, rows),), ((want_head, want),) = blocks(other), blocks(run)
    assert head == want_head and rows.keys() == want.keys()
    assert {name: rows[name] for name in rows if name != "losses since"} == {
        name: want[name] for name in want if name != "losses since"
    }
    losses, others = (
        [float(x) for x in re.findall(r"\d\.\d+E[+-]\d+", each["losses since"])]
        for each in (want, rows)
    )
    close(others, losses, 2e-6)
