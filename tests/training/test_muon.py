"""Runs with --optimizer muon and dist_muon: both phases, the switch, resumes on both sides of it,
and layouts against one process, each measured without TST too. Which parameters are Muon's:
tests/unit/test_muon_parameters.py.

Megatron's Muon needs nothing on CPU that cpu.py does not give Adam too.
"""

import re

import pytest
from support.close import close
from support.runs import TINY, TST, data
from support.tiers import tiers

from megatron_tst import cli
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.inspect import parameter_of, state_of

pytestmark = pytest.mark.numeric
pytest.importorskip("emerging_optimizers")

MUON = ["--optimizer", "muon"]
# Newton-Schulz's products are bf16 unless told otherwise: sums that are cut differently are then
# rounded differently
EXACT = [*MUON, "--muon-fp32-matmul-prec", "high"]
DIST = ["--optimizer", "dist_muon", "--bf16"]
TP2 = ["--tensor-model-parallel-size", "2", "--make-vocab-size-divisible-by", "64"]
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-token-dispatcher-type "
    "alltoall"
).split()
EP2 = ["--expert-model-parallel-size", "2"]
MODES = {
    mode: [*TP2, "--muon-tp-mode", mode] for mode in ("duplicated", "distributed", "blockwise")
}
LAYOUTS = {
    "dp2": (2, []),
    "tp2": (2, MODES["duplicated"]),
    "tp2 sp": (2, [*MODES["duplicated"], "--sequence-parallel"]),
    "tp2, distributed": (2, MODES["distributed"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
}
KINDS = {"tst": TST, "stock": []}


def trained(fork_server, corpus, *flags, nproc=1):
    run = fork_server.train(*TINY, *data(corpus), *flags, nproc=nproc)
    assert run.ok, run.log[-3000:]
    return run


def said_of_the_optimizer(run):
    (row,) = re.findall(r"\[tst\]   optimizer +(.*)", run.log)
    return row


def go_on(fork_server, corpus, folder, iteration, *flags, nproc=1):
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return trained(fork_server, corpus, *flags, "--load", folder, nproc=nproc)


@pytest.fixture(scope="module")
def whole(fork_server, corpus, tmp_path_factory):
    """Of each kind, with and without TST, one process's run and its checkpoints."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            save = ["--save", folder, "--save-interval", "2"]
            made[kind] = trained(fork_server, corpus, *KINDS[kind], *EXACT, *save), folder
        return made[kind]

    return get


def figures(run, iterations):
    """Losses and gradient norms as Megatron prints them. The line of the second iteration after a
    start averages two losses.
    """
    losses = {i: float(run.stock_losses[i]) for i in iterations}
    return [losses[i] for i in iterations], [float(run.grad_norms[i]) for i in iterations]


def test_both_phases_and_the_block(whole):
    run, folder = whole("tst")
    assert [bag for _, bag, _ in run.phases.values()] == [4] * 6 + [1] * 4
    assert said_of_the_optimizer(run) == (
        "state kept: step 6 at the boundary, 10 now (Muon counts none)"
    )
    assert len(set(run.losses.values())) == 10 and float(run.losses[10]) < float(run.losses[7])
    assert Checkpoint(folder / "iter_0000006").args.tst_boundary["optimizer step"] == 6


@pytest.mark.parametrize("iteration", tiers([4, 6, 8], {6}))
def test_a_resume(fork_server, corpus, whole, iteration):
    """Before the boundary, at it, after it."""
    want, folder = whole("tst")
    run = go_on(fork_server, corpus, folder, iteration, *TST, *EXACT)
    assert run.losses == {i: want.losses[i] for i in range(iteration + 1, 11)}
    assert run.grad_norms == {i: want.grad_norms[i] for i in run.losses}
    assert said_of_the_optimizer(run) == said_of_the_optimizer(want)


@pytest.mark.parametrize("kind", tiers(KINDS, {"tst"}))
@pytest.mark.parametrize("name", tiers(LAYOUTS, {"tp2"}))
def test_a_layout_equals_one_process(fork_server, corpus, whole, name, kind):
    """The same weights and momentum from iteration 4 on. With TST as without it: the largest
    differences seen were 2e-7 and 0.
    """
    want, folder = whole(kind)
    nproc, layout = LAYOUTS[name]
    run = go_on(fork_server, corpus, folder, 4, *KINDS[kind], *EXACT, *layout, nproc=nproc)
    shown = (5, 7, 8, 9, 10)
    (losses, norms), (want_losses, want_norms) = (figures(it, shown) for it in (run, want))
    close(losses, want_losses, 2e-6)
    close(norms, want_norms, 2e-3)  # printed with three digits


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_blockwise_is_another_algorithm(fork_server, corpus, whole, kind):
    """Each rank's part of a matrix is orthogonalised by itself: the default of 0.18 and 0.19."""
    want, folder = whole(kind)
    flags = [*KINDS[kind], *EXACT, *MODES["blockwise"]]
    run = go_on(fork_server, corpus, folder, 4, *flags, nproc=2)
    (got, _), (one, _) = (figures(it, (5, 7, 8, 9, 10)) for it in (run, want))
    assert 5e-5 < max(abs(a / b - 1) for a, b in zip(got, one)) < 1e-3


DISTRIBUTED = {
    "dp2": (2, []),
    "dp2, by parameter": (2, ["--dist-ckpt-optim-fully-reshardable"]),
    "dp2, one buffer": (2, ["--no-use-layer-wise-param-layout"]),
    "dp2, overlap": (2, ["--overlap-grad-reduce", "--overlap-param-gather"]),
    "dp2 tp2": (4, MODES["duplicated"]),
    "ep2": (2, [*MOE, *EP2]),
    "one process": (1, []),
}


@pytest.mark.parametrize("name", tiers(DISTRIBUTED, {"dp2"}))
def test_dist_muon(fork_server, corpus, tmp_path, name):
    """Each matrix on one of the data-parallel ranks, Adam's part in the distributed optimizer: over
    the switch and over resumes the same digits.
    """
    nproc, layout = DISTRIBUTED[name]
    flags = [*TST, *DIST, *layout]
    save = ["--save", tmp_path, "--save-interval", "4"]
    want = trained(fork_server, corpus, *flags, *save, nproc=nproc)
    row = "state kept: step 6 at the boundary, 10 now (Muon counts none)"
    assert said_of_the_optimizer(want) == row
    run = go_on(fork_server, corpus, tmp_path, 4, *flags, nproc=nproc)
    assert run.losses == {i: want.losses[i] for i in range(5, 11)}
    assert said_of_the_optimizer(run) == row
    if name != "dp2":
        run = go_on(fork_server, corpus, tmp_path, 8, *flags, nproc=nproc)
        assert run.losses == {i: want.losses[i] for i in (9, 10)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_dist_muon_equals_muon_in_one_process(fork_server, corpus, tmp_path, kind):
    """Its checkpoints go both ways; bf16, where largest seen is 9e-6."""
    flags, save = [*KINDS[kind], "--bf16"], ["--save-interval", "4", "--save"]
    want = trained(fork_server, corpus, *flags, *MUON, *save, tmp_path / "muon")
    dist = trained(
        fork_server, corpus, *flags, "--optimizer", "dist_muon", *save, tmp_path / "dist", nproc=2
    )
    runs = [
        dist,
        go_on(fork_server, corpus, tmp_path / "muon", 4, *flags, *DIST, nproc=2),
        go_on(fork_server, corpus, tmp_path / "dist", 4, *flags, *MUON),
    ]
    shown = (5, 7, 8, 9, 10)
    (want, _), *others = (figures(run, shown) for run in (want, *runs))
    for losses, _ in others:
        close(losses, want, 3e-5)


HEADS = [*MOE, "--mtp-num-layers", "1"]
STATES = {
    "experts, heads": (1, [*HEADS, *MUON]),
    "experts of two ranks": (2, [*MOE, *EP2, *MUON]),
    "experts of two ranks, dist_muon": (2, [*MOE, *EP2, *DIST]),
    "tied, lion": (1, [*MUON, "--muon-scalar-optimizer", "lion"]),
}


@pytest.mark.parametrize("name", tiers(STATES, {"experts, heads"}))
def test_who_has_which_parameters_is_as_without_tst(fork_server, corpus, tmp_path, name):
    """The checkpoints of real runs: the same states of the same parameters, and of each parameter
    those of one optimizer.
    """
    nproc, flags = STATES[name]
    tiny = [*TINY]
    if "tied" in name:
        tiny.remove("--untie-embeddings-and-output-weights")
    found = {}
    for kind, more in KINDS.items():
        stop = ["--exit-interval", "2", "--save", tmp_path / kind, "--save-interval", "2"]
        run = fork_server.train(*tiny, *data(corpus), *flags, *more, *stop, nproc=nproc)
        assert run.ok, run.log[-3000:]
        names = Checkpoint(tmp_path / kind).tensors
        found[kind] = {}
        for tensor in filter(state_of, names):
            found[kind].setdefault(parameter_of(tensor), set()).add(state_of(tensor))
        assert found[kind].keys() == {name for name in names if not state_of(name)}
    assert found["tst"] == found["stock"]
    scalar = {"exp_avg"} if "lion" in name else {"exp_avg", "exp_avg_sq"}
    for parameter, states in found["tst"].items():
        table = parameter in ("embedding.word_embeddings.weight", "output_layer.weight")
        want = scalar if table or "norm" in parameter else {"momentum_buffer"}
        assert states - {"fp32_param"} == want, parameter
    assert any("router" in name for name in found["tst"]) == ("experts" in name)
    assert any("eh_proj" in name for name in found["tst"]) == ("heads" in name)


@pytest.mark.slow
def test_steps_where_nobody_counts_them(fork_server, corpus):
    run = trained(fork_server, corpus, *TST, *MUON, "--muon-scalar-optimizer", "lion")
    assert said_of_the_optimizer(run) == (
        "does not say how many steps it has made: Lion and Muon count none"
    )


@pytest.mark.slow
def test_an_optimizer_that_was_not_kept_is_named(fork_server, corpus, whole):
    _, folder = whole("tst")
    run = go_on(fork_server, corpus, folder, 6, *TST, *EXACT, "--no-load-optim")
    assert said_of_the_optimizer(run) == (
        "state NOT kept, or steps were skipped: step 6 at the boundary, 4 now (Muon counts none)"
    )


@pytest.mark.slow
def test_a_reset_at_the_boundary(fork_server, corpus, whole, tmp_path):
    """megatron-tst boundary --reset-optimizer: the first step after it is that of a new optimizer,
    Muon's too, as --no-load-optim makes one. (That begins the learning rate anew, so that it is
    held constant here.)
    """
    rate = ["--lr-decay-style", "constant", "--lr-warmup-iters", "0"]
    stop = ["--tst-exit-at-boundary", "--save", tmp_path / "ck", "--save-interval", "99"]
    trained(fork_server, corpus, *TST, *EXACT, *rate, *stop)
    for name, more in (("kept", []), ("reset", ["--reset-optimizer"])):
        assert cli.main(["boundary", str(tmp_path / "ck"), str(tmp_path / name), *more]) == 0
    kept, reset, anew = (
        trained(fork_server, corpus, *EXACT, *rate, "--load", tmp_path / name, *more)
        for name, more in (("kept", []), ("reset", []), ("kept", ["--no-load-optim"]))
    )
    assert reset.stock_losses == anew.stock_losses != kept.stock_losses
    assert reset.grad_norms == anew.grad_norms


@pytest.mark.slow
def test_fp32_with_the_distributed_form_is_refused(fork_server, corpus):
    run = fork_server.train(*TINY, *data(corpus), *TST, "--optimizer", "dist_muon")
    assert run.codes == [2] and "--optimizer muon with the distributed optimizer" in run.error


@pytest.mark.slow
def test_another_optimizer_after_the_boundary_is_refused(fork_server, corpus, whole):
    """Adam over Muon's state: a KeyError of Megatron's."""
    _, folder = whole("tst")
    (folder / "latest_checkpointed_iteration.txt").write_text("6")
    run = fork_server.train(*TINY, *data(corpus), *TST, "--load", folder)
    assert run.codes == [2] and "expected muon, as in the checkpoint, got adam" in run.error
