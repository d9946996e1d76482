"""--cuda-graph-impl full_iteration over the switch of phases: Megatron's own training loop and its
own FullCudaGraphWrapper, with tapes in the place of CUDA graphs (support/graphs_on_cpu.py).
tests/gpu/test_full_iteration_graph.py has real ones.
"""

import re

import pytest
import torch
from support.paths import ROOT
from support.runs import TINY, TST, data

pytestmark = pytest.mark.numeric

SCRIPT = str(ROOT / "tests" / "support" / "train.py")
# One step of a phase runs as it is, the second is captured, the others are replays. Megatron says
# so at the level INFO, which emerging-optimizers hides where it is installed: absl sets up the root
# logger first.
GRAPHS = (
    "--cuda-graph-impl full_iteration --cuda-graph-warmup-steps 1 "
    "--no-check-for-nan-in-loss-and-grad --logging-level 20"
).split()
HEADS = re.compile(r"(mtp_\d[^:|]*: [\d.E+-]+)")  # Megatron's figures of multi-token prediction
RESET = re.compile(r"full-iteration CUDA graph before iteration (\d+): that of ([^,]+?) is reset")


def train(fork_server, folder, flags, env, nproc=1):
    folder.mkdir(exist_ok=True)
    run = fork_server.train(folder, *TINY, *flags, script=SCRIPT, env=env, nproc=nproc, seconds=60)
    assert run.ok, run.log[-3000:]
    return run


def figures(fork_server, folder, flags, **env):
    run = train(fork_server, folder, flags, env)
    return run, torch.load(folder / "rank0.pt", weights_only=False)


def same_bits(got, want):
    """Losses, the excess over the bags' entropy, gradient norms, validation and weights."""
    assert got["steps"] == want["steps"] and got["validation"] == want["validation"]
    assert len(got["weights"]) == len(want["weights"]) > 0
    for (*place, shard), (*wanted_place, wanted) in zip(got["weights"], want["weights"]):
        assert place == wanted_place and torch.equal(shard, wanted)


def captures(run, stage):
    return run.log.count(f"CUDA graph capture done for {stage}!!!")


@pytest.mark.parametrize(
    "flags, resets, calls",
    [
        (TST, [("7", "bag size 4")], (4, 4)),
        # a shape for each bag size; each phase of 3 has a step, a capture and a replay
        pytest.param(
            "--tst-bag-size 4,2 --tst-iters 3,3 --tst-kernel torch --mtp-num-layers 1".split(),
            [("4", "bag size 4"), ("7", "bag size 2")],
            # the heads of multi-token prediction embed, and take a loss, too
            (16, 16),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [*TST, "--tst-fused-linear-loss", "--bf16"],
            [("7", "bag size 4")],
            (4, 4),
            marks=pytest.mark.slow,
        ),
        # no step of Megatron's is made where the phase changes
        pytest.param(
            [*TST, "--iterations-to-skip", "6", "7"],
            [("8", "bag size 4")],
            (4, 4),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one bag size", "two bag sizes, mtp", "fused linear, bf16", "skipped iterations"],
)
def test_graphs_change_no_bit_of_a_run_over_the_switch(
    fork_server, corpus, tmp_path, flags, resets, calls
):
    flags = [*data(corpus), *flags]  # text, whose bags differ in their entropy
    plain, want = figures(fork_server, tmp_path / "plain", flags)
    run, got = figures(fork_server, tmp_path / "graphs", [*flags, *GRAPHS], GRAPHS_ON_CPU="1")
    same_bits(got, want)
    assert run.losses == plain.losses and run.phases == plain.phases
    assert HEADS.findall(run.log) == HEADS.findall(plain.log)
    assert bool(HEADS.findall(run.log)) == ("--mtp-num-layers" in flags)
    assert RESET.findall(run.log) == resets and not RESET.findall(plain.log)
    assert captures(run, "training") == 1 + len(resets) and captures(run, "validation") == 1
    # what Python knows of is the first step and the capture, of two micro-batches each
    said = f"outside of its CUDA graph's replays: {calls[0]} embedding and {calls[1]} loss calls"
    assert said in run.log and "replays" not in plain.log


@pytest.mark.slow
def test_two_ranks_reset_their_graphs_in_one_step(fork_server, corpus, tmp_path):
    """Bags come to the second rank inside the graph."""
    layout = "--tensor-model-parallel-size 2 --make-vocab-size-divisible-by 64"
    flags = [*data(corpus), *TST, *layout.split()]
    plain = train(fork_server, tmp_path / "plain", flags, {}, 2)
    flags += GRAPHS
    run = train(fork_server, tmp_path / "graphs", flags, {"GRAPHS_ON_CPU": "1"}, 2)
    for rank in ("rank0.pt", "rank1.pt"):
        want, got = (
            torch.load(tmp_path / name / rank, weights_only=False) for name in ("plain", "graphs")
        )
        same_bits(got, want)
    assert run.losses == plain.losses and len(run.losses) == 10
    assert RESET.findall(run.log) == [("7", "bag size 4")]
    assert captures(run, "training") == 2 * 2 and captures(run, "validation") == 2


@pytest.mark.slow
def test_a_process_for_each_phase_resets_nothing(fork_server, corpus, tmp_path):
    both = []
    for name, more, env in (("plain", [], {}), ("graphs", GRAPHS, {"GRAPHS_ON_CPU": "1"})):
        folder, save = tmp_path / name, str(tmp_path / f"{name}_checkpoints")
        flags = [
            *data(corpus),
            *TST,
            *more,
            "--tst-exit-at-boundary",
            "--save",
            save,
            "--save-interval",
            "100",
        ]
        runs = [train(fork_server, folder, [*flags, *load], env) for load in ([], ["--load", save])]
        both.append((*runs, torch.load(folder / "rank0.pt", weights_only=False)))
    (*plain, want), (*graphs, got) = both
    same_bits(got, want)  # of the second process; the first one ended at the boundary
    for run, steps, of_plain in zip(graphs, (6, 4), plain):
        assert run.losses == of_plain.losses and len(run.losses) == steps
        assert run.grad_norms == of_plain.grad_norms
        assert captures(run, "training") == 1 and not RESET.findall(run.log)
