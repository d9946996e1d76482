"""fp16 with Megatron's gradient scaler, and bf16: both phases and the switch, in every way that the
loss can be computed.

The scaler halves its scale where it finds an infinite or undefined gradient, and Megatron leaves
the optimizer's step out; the samples of such an iteration are consumed all the same.
"""

import re
import shutil

import pytest
import torch
from support.close import close
from support.runs import ROOT, TINY, TST, data
from support.tiers import tiers

from megatron_tst import extension

SUPERPOSED, ITERATIONS, BATCH, MICRO_BATCHES = 6, 10, 4, 2
TP2 = [
    "--tensor-model-parallel-size",
    "2",
    "--sequence-parallel",
    "--make-vocab-size-divisible-by",
    "64",
]
DYNAMIC = ["--fp16", "--initial-loss-scale", str(2**16)]
RUNS = {
    "fp32": [],
    "fp16": DYNAMIC,
    "fp16, torch": [*DYNAMIC, "--tst-kernel", "torch"],
    "fp16, constant scale, in recovery": [
        "--fp16",
        "--loss-scale",
        "1024",
        "--tst-kernel-in-recovery",
    ],
    "fp16, fused linear": [*DYNAMIC, "--tst-fused-linear-loss"],
    "fp16, fused linear, fp32 sums": [
        *DYNAMIC,
        "--tst-fused-linear-loss",
        "--accumulate-allreduce-grads-in-fp32",
    ],
    "bf16": ["--bf16"],
    "bf16, torch": ["--bf16", "--tst-kernel", "torch"],
    "bf16, in recovery": ["--bf16", "--tst-kernel-in-recovery"],
    "bf16, fused linear, bf16 sums": ["--bf16", "--tst-fused-linear-loss", "--grad-reduce-in-bf16"],
}
# relative distance of losses (training and validation) and of gradient norms: from the fp32 run,
# and from the torch kernel in the same precision
FROM_FP32 = {
    "fp16": (1e-5, 1e-3),  # largest seen 1e-6, 8e-5
    "bf16": (1e-4, 5e-3),  # largest seen 1e-5, 8e-4
}
FROM_TORCH = {
    "fp16": (5e-6, 2e-4),  # largest seen 6e-7, 2e-5
    "bf16": (5e-5, 1e-3),  # largest seen 6e-6, 2e-4
}
# overflows at first, and each time that two good iterations have doubled the scale, which falls
# from the second overflow on
FIRST_SCALE = 2.0**21
OVERFLOWING = [
    "--fp16",
    "--initial-loss-scale",
    str(FIRST_SCALE),
    "--loss-scale-window",
    "2",
    "--hysteresis",
    "2",
]

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.skipif(
        not extension.load().loaded,
        reason=f"NOT RUN: the extension is {extension.load().description}",
    ),
]


class Figures:
    """A run's unrounded figures (support/train.py) and its log."""

    def __init__(self, log, kept):
        self.log, self.scaler, self.batches = log, kept["scaler"], kept["batches"]
        self.losses = [losses["lm loss"] for losses, _ in kept["steps"]]
        self.norms = [norm for _, norm in kept["steps"]]
        self.validation = [losses["lm loss"] for losses in kept["validation"]]
        self.printed = [
            tuple(float(x) for x in line)
            for line in re.findall(
                r"consumed samples: +(\d+) .*loss scale: ([\d.]+) .*number of skipped iterations: "
                r"+(\d+)",
                log,
            )
        ]  # (consumed samples, loss scale, skipped iterations)


@pytest.fixture(scope="module")
def train(fork_server, corpus, tmp_path_factory):
    def run(*flags, nproc=1, kernel="extension"):
        folder = tmp_path_factory.mktemp("figures")
        kernel = [] if "--tst-kernel" in flags else ["--tst-kernel", kernel]
        script = str(ROOT / "tests/support/train.py")
        done = fork_server.train(
            folder,
            *TINY,
            *TST,
            *data(corpus),
            *kernel,
            *flags,
            nproc=nproc,
            script=script,
            env={"KEEP_BATCHES": "1"},
        )
        assert done.ok, done.log[-3000:]
        return Figures(done.log, torch.load(folder / f"rank{nproc - 1}.pt", weights_only=True))

    return run


@pytest.fixture(scope="module")
def run(train):
    """name of RUNS -> its figures, trained when first asked for."""
    made = {}

    def figures(name):
        if name not in made:
            made[name] = train(*RUNS[name])
        return made[name]

    return figures


@pytest.fixture(scope="module")
def overflowing(train, tmp_path_factory):
    """-> (figures, folder of checkpoints of every iteration)"""
    folder = tmp_path_factory.mktemp("overflowing")
    return train(
        *OVERFLOWING, "--tst-kernel-in-recovery", "--save", folder, "--save-interval", "1"
    ), folder


@pytest.mark.parametrize(
    "name",
    tiers([name for name in RUNS if name != "fp32"], {"fp16, fused linear", "bf16, in recovery"}),
)
def test_trains_as_fp32_and_as_the_torch_kernel(run, name):
    precision, got = name.split(",")[0], run(name)
    assert len(got.losses) == ITERATIONS and len(got.validation) == 2
    for want, allowed in ((run("fp32"), FROM_FP32), (run(f"{precision}, torch"), FROM_TORCH)):
        of_losses, of_norms = allowed[precision]
        close(got.losses + got.validation, want.losses + want.validation, of_losses)
        close(got.norms, want.norms, of_norms)
    assert got.losses != run("fp32").losses  # the precision that was asked for
    scale = 1024.0 if "constant" in name else 2.0**16 if precision == "fp16" else 1.0
    assert [(scale, 0.0)] * ITERATIONS == [printed[1:] for printed in got.printed]


def test_overflows_are_skipped_in_both_phases(run, overflowing):
    got, _ = overflowing
    skipped = [norm is None for norm in got.norms]
    assert skipped[:2] == [True, True] and any(skipped[SUPERPOSED:])
    assert not all(skipped[:SUPERPOSED]) and not all(skipped[SUPERPOSED:])
    assert [bool(printed[2]) for printed in got.printed] == skipped  # Megatron's log says so
    scales = [FIRST_SCALE, *(state["scale"] for state in got.scaler)]
    for before, after, left_out in zip(scales, scales[1:], skipped):
        assert after in ((before, before / 2) if left_out else (before, before * 2))
    assert min(scales) < scales[0] and [printed[1] for printed in got.printed] == scales[1:]
    assert all(torch.tensor(got.losses).isfinite()) and got.losses[SUPERPOSED - 1] < got.losses[0]


def test_a_skipped_iteration_consumes_its_samples(run, overflowing):
    """Samples, raw tokens, the boundary and every batch are those of the run without overflows; the
    learning rate waits.
    """
    got, want = overflowing[0], run("fp32")
    assert [printed[0] for printed in got.printed] == [BATCH * i for i in range(1, ITERATIONS + 1)]
    steps = [
        re.findall(
            r"\[tst\] iteration +\d+ \| phase: \w+ \| bag size: \d+ \| raw tokens: \d+", r.log
        )
        for r in (got, want)
    ]
    assert len(steps[0]) == ITERATIONS and steps[0] == steps[1]
    boundary = "boundary after iteration 6: superposition is done (3072 raw tokens)"
    assert got.log.count(boundary) == want.log.count(boundary) == 1
    assert len(got.batches) == len(want.batches) == MICRO_BATCHES * ITERATIONS
    for mine, other in zip(got.batches, want.batches):
        assert mine.keys() == other.keys() and all(
            torch.equal(mine[key], other[key]) for key in mine
        )
    made = (
        sum(norm is not None for norm in got.norms[:SUPERPOSED]),
        sum(norm is not None for norm in got.norms),
    )
    assert "steps were skipped: step {} at the boundary, {} now".format(*made) in got.log


def test_the_torch_kernel_overflows_where_the_extension_does(train, overflowing):
    """In recovery that is Megatron's own loss."""
    got, want = overflowing[0], train(*OVERFLOWING, kernel="torch")
    assert got.scaler == want.scaler and got.printed == want.printed
    assert [norm is None for norm in got.norms] == [norm is None for norm in want.norms]
    close(got.losses, want.losses, FROM_TORCH["fp16"][0])


def test_the_scaler_goes_on_over_a_resume(train, overflowing, tmp_path):
    """From the middle of superposition, between two overflows: the second one halves the scale. To
    the last digit.
    """
    want, folder = overflowing
    stepped = next(
        i for i, norm in enumerate(want.norms, 1) if norm is not None
    )  # a checkpoint without Adam's state does not load
    at = next(
        i
        for i, state in enumerate(want.scaler, 1)
        if i > stepped and state["hysteresis_tracker"] == 1
    )
    assert (
        at < SUPERPOSED
        and want.norms[at - 1] is want.norms[at] is None
        and want.scaler[at]["scale"] < want.scaler[at - 1]["scale"]
    )
    again = resumed(train, folder, at, tmp_path, "--tst-kernel-in-recovery")
    assert (
        again.scaler == want.scaler[at:]
        and again.losses == want.losses[at:]
        and again.norms == want.norms[at:]
    )
    assert [line[:2] for line in again.printed] == [line[:2] for line in want.printed[at:]]


def test_tensor_parallel_ranks_share_the_scale(train, overflowing, tmp_path):
    """Resumed with two ranks between two good iterations: the second one doubles the scale."""
    want, folder = overflowing
    at = next(i for i, state in enumerate(want.scaler, 1) if state["growth_tracker"] == 1)
    assert at < SUPERPOSED
    again = resumed(train, folder, at, tmp_path, "--tst-kernel-in-recovery", *TP2, nproc=2)
    assert again.scaler == want.scaler[at:]
    close(again.losses, want.losses[at:], FROM_TORCH["fp16"][0])
    norms, expected = again.norms, want.norms[at:]
    assert [norm is None for norm in norms] == [norm is None for norm in expected]
    made = [pair for pair in zip(norms, expected) if None not in pair]
    close(*zip(*made), FROM_TORCH["fp16"][1])


def resumed(train, folder, iteration, here, *flags, nproc=1):
    shutil.copytree(folder / f"iter_{iteration:07d}", here / f"iter_{iteration:07d}")
    (here / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return train(*OVERFLOWING, *flags, "--load", here, nproc=nproc)


def test_a_skipped_boundary_is_still_the_boundary(fork_server, corpus, tmp_path):
    """Every iteration of superposition overflows with Megatron's default scale of 2^32: the run
    saves and exits where it was told to.
    """
    run = fork_server.train(
        *TINY,
        *TST,
        *data(corpus),
        "--tst-kernel",
        "extension",
        "--fp16",
        "--tst-exit-at-boundary",
        "--save",
        tmp_path,
        "--save-interval",
        "1000",
    )
    assert run.ok and run.phases.keys() == set(range(1, SUPERPOSED + 1)) and not run.grad_norms, (
        run.log[-3000:]
    )
    assert re.findall(r"loss scale: ([\d.]+)", run.log) == [
        str(2.0**scale) for scale in (32, 31, 30, 29, 28, 27)
    ]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(SUPERPOSED)
