"""GPTModel in superposition, HybridModel in recovery: Megatron translates the checkpoint, optimizer
state included, when the second run loads it, and the digits are those of GPTModel throughout.
tests/unit/test_model_class.py has what is refused.
"""

import re

import pytest
from support.runs import TINY, TST, data, losses_close
from support.tiers import tiers

from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.inspect import describe, parameter_of, state_of

pytestmark = pytest.mark.numeric
pytest.importorskip("megatron.core.dist_checkpointing.gpt_checkpoint_interop")  # not in 0.18

MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-token-dispatcher-type "
    "alltoall"
).split()
EP2 = [*MOE, "--expert-model-parallel-size", "2"]
TP2 = "--tensor-model-parallel-size 2 --make-vocab-size-divisible-by 64 --sequence-parallel".split()
ZERO = ["--use-distributed-optimizer"]
MUON = ["--optimizer", "muon"]
WITHOUT_LAYERS = [*TINY]
del WITHOUT_LAYERS[(at := WITHOUT_LAYERS.index("--num-layers")) : at + 2]
# name -> (processes, pattern, flags of both runs)
CASES = {
    "dense": (1, "*-*-", []),
    "experts": (1, "*E*E", MOE),
    "dense, muon": (1, "*-*-", MUON),
    "experts, muon": (1, "*E*E", [*MOE, *MUON]),
    "bf16": (1, "*-*-", ["--bf16"]),
    "tp2 sp": (2, "*-*-", TP2),
    "pp2": (2, "*-|*-", ["--pipeline-model-parallel-size", "2"]),
    "ep2": (2, "*E*E", EP2),
    "ep2, muon": (2, "*E*E", [*EP2, *MUON]),
    "dp2 zero": (2, "*-*-", [*ZERO, "--dist-ckpt-optim-fully-reshardable"]),
    "dp2, dist_muon": (2, "*-*-", ["--optimizer", "dist_muon", "--bf16"]),
}


def layers(pattern):
    """Of a HybridModel whose norms are named as GPTModel's local layers name them."""
    spec = ["support.hybrid_local_names", "hybrid_stack_spec"]
    return ["--hybrid-layer-pattern", pattern, "--spec", *spec]


def stopped_at_the_boundary(fork_server, corpus, folder, *flags, nproc=1):
    stop = ["--tst-exit-at-boundary", "--save", folder, "--save-interval", "100"]
    run = fork_server.train(*TINY, *TST, *data(corpus), *flags, *stop, nproc=nproc)
    assert run.ok, run.log[-3000:]


def hybrid(fork_server, corpus, folder, pattern, *flags, nproc=1):
    flags = [*WITHOUT_LAYERS, *TST, *data(corpus), *flags, *layers(pattern), "--load", folder]
    return fork_server.train(*flags, nproc=nproc)


def shown(run, after):
    return {i: (loss, run.grad_norms[i]) for i, loss in run.losses.items() if i > after}


@pytest.mark.parametrize("name", tiers(CASES, {"dense", "experts, muon"}))
def test_the_digits_of_gpt_model_throughout(fork_server, corpus, tmp_path, name):
    nproc, pattern, flags = CASES[name]
    whole = fork_server.train(*TINY, *TST, *data(corpus), *flags, nproc=nproc)
    assert whole.ok, whole.log[-3000:]
    stopped_at_the_boundary(fork_server, corpus, tmp_path, *flags, nproc=nproc)
    save = ["--save", tmp_path, "--save-interval", "8"]
    run = hybrid(fork_server, corpus, tmp_path, pattern, *flags, *save, nproc=nproc)
    assert run.ok, run.log[-3000:]
    assert shown(run, 6) == shown(whole, 6) and set(run.losses) == {7, 8, 9, 10}
    (row,) = re.findall(r"\[tst\]   optimizer +(.*)", run.log)
    assert row.startswith("state kept: step 6 at the boundary, 10 now")
    for what in ("expert load", "router entropy"):
        # a start does not count the experts of its first iteration
        (rows, others) = (
            [row.split(" before, ")[0] for row in re.findall(rf"\[tst\]   {what} +(.*)", it.log)]
            for it in (run, whole)
        )
        assert rows == others and len(rows) == ("E" in pattern)
    about = [describe(Checkpoint(tmp_path / f"iter_{i:07d}")) for i in (6, 8)]
    assert [it["model"] for it in about] == ["GPTModel", f"HybridModel {pattern}"]
    assert about[0]["parameters"] == about[1]["parameters"]
    assert about[0]["optimizer state"] == about[1]["optimizer state"]
    assert [it["phase"] for it in about] == ["boundary: bag size 4 done", "recovery"]


@pytest.mark.slow
@pytest.mark.parametrize("iteration", [4, 6, 8])
def test_from_any_iteration_and_on_from_there(fork_server, corpus, tmp_path, iteration):
    """In the midst of superposition too; and the HybridModel's own checkpoint goes on."""
    save = ["--save", tmp_path / "gpt", "--save-interval", "2"]
    whole = fork_server.train(*TINY, *TST, *data(corpus), *save)
    assert whole.ok, whole.log[-3000:]
    (tmp_path / "gpt" / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    stop = ["--save", tmp_path / "own", "--save-interval", "1", "--exit-interval", "9"]
    first = hybrid(fork_server, corpus, tmp_path / "gpt", "*-*-", *stop)
    second = hybrid(fork_server, corpus, tmp_path / "own", "*-*-")
    assert first.ok and second.ok, second.log[-3000:]
    assert shown(first, 0) | shown(second, 0) == shown(whole, iteration)
    assert set(second.losses) == {10}
    names = Checkpoint(tmp_path / "own").tensors
    assert any(state_of(name) for name in names) and not any(
        "final_layernorm" in parameter_of(name) for name in names
    )


@pytest.mark.slow
def test_into_another_layout(fork_server, corpus, tmp_path):
    whole = fork_server.train(*TINY, *TST, *data(corpus))
    stopped_at_the_boundary(fork_server, corpus, tmp_path)
    run = hybrid(fork_server, corpus, tmp_path, "*-*-", *TP2, nproc=2)
    assert run.ok, run.log[-3000:]
    losses_close(run, whole, range(7, 11))


@pytest.mark.slow
def test_what_megatron_does_not_translate_is_refused(fork_server, corpus, tmp_path):
    stopped_at_the_boundary(fork_server, corpus, tmp_path / "zero", *ZERO, nproc=2)
    run = hybrid(fork_server, corpus, tmp_path / "zero", "*-*-", *ZERO, nproc=2)
    assert set(run.codes) == {2} and "expected optimizer state by parameter" in run.error
    weights = hybrid(fork_server, corpus, tmp_path / "zero", "*-*-", *ZERO, "--no-load-optim")
    assert weights.ok, weights.log[-3000:]

    heads = ["--mtp-num-layers", "1"]
    stopped_at_the_boundary(fork_server, corpus, tmp_path / "heads", *heads)
    run = hybrid(fork_server, corpus, tmp_path / "heads", "*-*-/*-")
    assert run.codes == [2] and "Megatron: Hybrid layer pattern '*-*-/*-' contains" in run.error
    run = hybrid(fork_server, corpus, tmp_path / "heads", "*-*-")
    assert run.ok and run.log.count("its layers of multi-token prediction are left out") == 1

    first = ["--moe-layer-freq", "([0,1])"]
    stopped_at_the_boundary(fork_server, corpus, tmp_path / "first", *MOE, *first)
    run = hybrid(fork_server, corpus, tmp_path / "first", "*E*E", *MOE)
    assert run.codes == [2] and "got dense layers beside experts" in run.error

    stop = ["--tst-exit-at-boundary", "--save", tmp_path / "hybrid", "--save-interval", "100"]
    run = fork_server.train(*WITHOUT_LAYERS, *TST, *data(corpus), *layers("*-*-"), *stop)
    assert run.ok, run.log[-3000:]
    run = fork_server.train(*TINY, *TST, *data(corpus), "--load", tmp_path / "hybrid")
    assert run.codes == [2] and "expected *-*-, as in the checkpoint, got none" in run.error
