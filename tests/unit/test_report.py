"""The [tst] lines of a run and its scalars (loop/report.py), word by word. Expected figures: a run
of 40 samples in batches of 4, of 32 positions, 24 samples in bags of 4: 24 * 32 * 4 = 3072 raw
tokens, and 16 * 32 = 512 of recovery.
"""

import argparse
import re
import types

import pytest
import torch

from megatron_tst import extension
from megatron_tst.config import TSTConfig
from megatron_tst.loop import patch
from megatron_tst.loop.report import Report
from megatron_tst.loop.switch import LossTrend
from megatron_tst.schedule import Schedule

PLAN = Schedule.of(4, 6, 40, 32, 4)
SEVERAL = Schedule((8, 4, 1), (8, 16, 16), 32, 4)


@pytest.fixture
def said(megatron, capsys):
    """-> the lines since it was last asked"""
    return lambda: capsys.readouterr().out.splitlines()


def report(config=None, trend=None, **args):
    fine = dict(consumed_train_samples=24, log_interval=1, global_batch_size=4, rank=0)
    return Report(argparse.Namespace(**fine | args), config or TSTConfig(4, iters=6), trend)


def test_what_is_said_before_a_run(said, monkeypatch):
    monkeypatch.setattr("megatron_tst.compat.megatron_version", lambda: "0.0")
    monkeypatch.setattr(patch, "status", lambda: patch.Status(seams=("a.b", "c.d")))
    report().announce(PLAN)
    (line,) = said()
    assert re.fullmatch(
        r" \[tst\] on: bag size 4 \(both superposed\), 6 iterations of superposition \(24 samples, "
        r"3072 raw tokens\) then recovery to sample 40 \(3584 raw tokens in all\) \| bag size 4 "
        r"for 6 iterations, recovery for 4 \| switch: fixed \| loss mce, uniform weighting \| loss "
        r"kernel: \w+ \(extension: [^|]*\), in recovery Megatron's \| embedding kernel: \w+ \| "
        r"Megatron 0.0, patched: a.b, c.d",
        line,
    )
    config = TSTConfig(
        (8, 4),
        iters=(2, 4),
        superpose="output",
        loss="bce",
        kernel_in_recovery=True,
        switch="auto",
        switch_slope=0.25,
        switch_window=0.1,
        target_weighting="power-law",
    )
    report(config, LossTrend(config, 40)).announce(SEVERAL)
    (line,) = said()
    for part in (
        "on: bag size 8, 4 (output superposed), 6 iterations",
        "| switch: auto, when the loss falls by less than 0.25 nats in a hundredth of the run "
        "(smoothed over 4 iterations), at the latest after the iterations above |",
        "| loss bce, power-law weighting | loss kernel: torch (",  # ablations are in torch alone
        f"in recovery extension | embedding kernel: {extension.choose('auto', 'cpu')} |",
    ):
        assert part in line, line


@pytest.mark.parametrize(
    "consumed, loss, line",
    [
        (
            24,
            torch.tensor([2.5]),
            " [tst] iteration        6 | phase: superposition | bag size: 4 | raw tokens: 3072 | "
            "lm loss of this iteration: 2.500000E+00 |",
        ),
        (
            28,
            None,
            " [tst] iteration        7 | phase: recovery | bag size: 1 | raw tokens: 3200 |",
        ),
    ],
)
def test_the_line_of_an_iteration(said, consumed, loss, line):
    report(consumed_train_samples=consumed).iteration(
        PLAN, PLAN.phase_at(consumed - 4), consumed // 4, loss
    )
    assert said() == [line]


@pytest.mark.parametrize(
    "plan, phase, interval, end, mixed",
    [
        (
            PLAN,
            0,
            1,
            "iteration 6: superposition is done (3072 raw tokens), recovery begins: plain "
            "next-token training on stock code",
            None,
        ),
        (PLAN, 0, 4, "iteration 6: superposition is done", 2),
        (PLAN, 0, 3, "iteration 6: superposition is done", None),
        (
            SEVERAL,
            0,
            1,
            "iteration 2: bag size 8 is done (2048 raw tokens), bag size 4 begins",
            None,
        ),
        (SEVERAL, 1, 1, "iteration 6: superposition is done (4096 raw tokens), recovery", None),
    ],
)
def test_the_end_of_a_phase(said, monkeypatch, plan, phase, interval, end, mixed):
    status = patch.Status(superposed_embeddings=12, multi_hot_losses=11)
    monkeypatch.setattr(patch, "status", lambda: status)
    phase = plan.phases[phase]
    report(log_interval=interval).phase_is_done(plan, phase, phase.end // 4)
    (line,) = said()
    assert line.startswith(f" [tst] boundary after {end}"), line
    assert "| superposed on this rank: 12 embedding and 11 loss calls |" in line
    tail = f" the next log line averages both phases ({mixed} iterations of the first) |"
    assert line.endswith(tail) if mixed else "averages" not in line


def test_calls_that_a_graph_replays_are_not_said_to_be_counted(said, monkeypatch):
    monkeypatch.setattr(patch, "status", lambda: patch.Status(superposed_embeddings=8))
    report(cuda_graph_impl="full_iteration").phase_is_done(PLAN, PLAN.phases[0], 6)
    (line,) = said()
    assert (
        "| superposed on this rank, outside of its CUDA graph's replays: 8 embedding and 0 loss "
        "calls |" in line
    )


def test_a_graph_that_is_reset(said):
    it = report(consumed_train_samples=24, cuda_graph_warmup_steps=3)
    it.graph_is_reset(PLAN, PLAN.phases[1], "bag size 4")
    it = report(consumed_train_samples=8, cuda_graph_warmup_steps=3)
    it.graph_is_reset(SEVERAL, SEVERAL.phases[1], "bag size 8")
    assert said() == [
        " [tst] full-iteration CUDA graph before iteration 7: that of bag size 4 is reset and its "
        "static buffers are emptied; recovery runs without one first (--cuda-graph-warmup-steps 3"
        "), then has its own",
        " [tst] full-iteration CUDA graph before iteration 3: that of bag size 8 is reset and its "
        "static buffers are emptied; bag size 4 runs without one first (--cuda-graph-warmup-steps "
        "3), then has its own",
    ]


def test_a_phase_that_ends_early(said):
    config = TSTConfig((8, 4), iters=(2, 4), switch="auto", switch_slope=0.25)
    it = report(config, LossTrend(config, 10))
    phase = SEVERAL.phases[1]
    it.phase_ends_early(SEVERAL.ending(phase, 8), phase, 8, 3, 0.125)
    assert said() == [
        " [tst] --tst-switch auto at iteration 3: the loss falls by 0.125 nats in a hundredth of "
        "the run, less than 0.25: bag size 4 ends after iteration 4 instead of 6 | now: bag size 8 "
        "for 2 iterations, bag size 4 for 2 iterations, recovery for 6"
    ]


def test_what_an_override_has_changed(said):
    report().overridden(PLAN, Schedule.of(4, 8, 40, 32, 4), 16)
    assert said() == [
        " [tst] --tst-override at iteration 4: bag size 4 for 6 iterations, recovery for 4 (3584 "
        "raw tokens in all) -> bag size 4 for 8 iterations, recovery for 2 (4352 raw tokens in all)"
    ]


def test_how_often_text_is_read_is_said_where_it_is_counted(said, monkeypatch):
    monkeypatch.setattr(
        "megatron_tst.checks.text.said", lambda found, plan: f"{found} {plan.width}"
    )
    report().text(PLAN, [])
    assert said() == []
    report().text(PLAN, [1])
    assert said() == [" [tst] text: [1] 4"]


@pytest.mark.parametrize("wandb", [False, True])
@pytest.mark.parametrize("iteration, written", [(5, False), (6, True)])
def test_scalars(monkeypatch, iteration, written, wandb):
    import megatron.training

    seen, logged = [], []
    writer = types.SimpleNamespace(add_scalar=lambda *given: seen.append(given))
    other = types.SimpleNamespace(log=lambda *given: logged.append(given)) if wandb else None
    monkeypatch.setattr(megatron.training, "get_tensorboard_writer", lambda: writer)
    monkeypatch.setattr(megatron.training, "get_wandb_writer", lambda: other)
    it = report(tensorboard_log_interval=3, consumed_train_samples=4 * iteration)
    it.scalars(PLAN, PLAN.phases[0], iteration)
    values = {"tst bag size": 4, "tst raw tokens": 512 * iteration}
    assert dict((name, value) for name, value, _ in seen) == (values if written else {})
    assert {at for _, _, at in seen} == ({iteration} if written else set())
    assert logged == ([(values, iteration)] if written and wandb else [])
