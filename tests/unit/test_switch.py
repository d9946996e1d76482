"""The slope that --tst-switch auto looks at."""

import argparse

import pytest
import torch

from megatron_tst.config import TSTConfig
from megatron_tst.loop import run
from megatron_tst.loop.switch import SETTLED, LossTrend, first_end
from megatron_tst.schedule import Schedule


def trend(window=0.01, iterations=1000, **settings):
    return LossTrend(
        TSTConfig(8, iters=500, switch="auto", switch_window=window, **settings), iterations
    )


@pytest.mark.parametrize("window", [0.002, 0.01, 0.1])
def test_a_straight_line_has_its_own_slope(window):
    """Nats in a hundredth of the run: here 10 iterations, each of which the loss falls by 1e-4."""
    seen = trend(window)
    for i in range(1000):
        assert (seen.fall is None) == (i < SETTLED * seen.window)
        assert seen.fall is None or i % 50 or seen.fall == pytest.approx(1e-3, rel=2e-2)
        seen.see(torch.tensor(5.0 - 1e-4 * i))
    assert seen.fall == pytest.approx(1e-3, rel=1e-3)  # float32 losses


def test_a_loss_that_rises_falls_by_less_than_nothing():
    seen = trend()
    for i in range(100):
        seen.see(torch.tensor([3.0 + 1e-3 * i]))
    assert seen.fall < 0


def test_an_undefined_loss_is_left_out():
    one, other = trend(), trend()
    for i in range(60):
        one.see(torch.tensor(4.0 - 1e-3 * i))
        other.see(torch.tensor(4.0 - 1e-3 * i))
        if i % 7 == 0:
            other.see(torch.tensor(float("nan") if i % 2 else float("inf")))
    assert one.fall == other.fall


def test_it_goes_on_from_its_state(megatron):
    one, losses = trend(), [4.0 - 1e-3 * i + 0.01 * (i % 3) for i in range(80)]
    for loss in losses[:50]:
        one.see(torch.tensor(loss))
    other = trend()
    other.restart(one.share())
    for loss in losses[50:]:
        one.see(torch.tensor(loss))
        other.see(torch.tensor(loss))
    assert one.fall == other.fall
    one.restart()
    assert one.fall is None


def test_the_end_comes_after_what_is_fetched_and_on_a_whole_block():
    plan = Schedule((8, 4, 2, 1), (80, 160, 160, 400), 4, 8)
    one, two, three, _ = plan.phases
    assert (one.block, two.block, three.block) == (8, 16, 32)
    assert first_end(plan, one, 40, 24, set()) == 64
    assert first_end(plan, one, 40, 24, {8}) == 72  # not after iteration 8: Megatron skips it
    assert first_end(plan, two, 80 + 24, 8, set()) == 32
    assert first_end(plan, two, 80 + 24, 8, {4}) == 32  # iterations of the run, not of the phase
    assert first_end(plan, two, 80 + 24, 8, {14, 18}) == 48
    assert first_end(plan, two, 80 + 24, 8, {14, 16, 18}) == 80
    assert first_end(plan, three, 240 + 33, 0, set()) == 64


def test_the_earliest_end_of_the_docstrings_example(monkeypatch):
    """Run._earliest_end: four prefetch workers, 12 iterations behind."""
    monkeypatch.setattr(run, "_micro_batches", lambda: 1)
    args = argparse.Namespace(
        num_workers=4, global_batch_size=4, iterations_to_skip=None, consumed_train_samples=48
    )
    plan = Schedule.of(4, 50, 400, 32, 4)
    one = run.Run(args, TSTConfig(4, iters=50, switch="auto"), plan)
    assert one._earliest_end(plan.phases[0]) == 80
    args.num_workers = 1  # two micro-batches ahead: the five iterations of the log's block count
    assert one._earliest_end(plan.phases[0]) == 48 + 5 * 4
