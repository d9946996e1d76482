"""What Megatron's loop is handed in each phase (loop/run.py), with a loop of the test's own: no
model, no data. tests/training has the real loop.
"""

import argparse

import pytest
import torch
from support.close import close

from megatron_tst.checkpoint.phases import store, stored
from megatron_tst.config import TSTConfig
from megatron_tst.loop import run as module
from megatron_tst.loop.entropy import MeanBagEntropy
from megatron_tst.loop.report import EXCESS_KEY, LOSS_KEY
from megatron_tst.loop.run import Run

CONFIG = TSTConfig(4, iters=6)
LOG_2 = 0.6931472


def arguments(consumed=0, config=CONFIG, **changes):
    """Of a run of 10 iterations of 4 samples, 6 of them in bags of 4."""
    fine = dict(
        train_iters=10,
        train_samples=None,
        global_batch_size=4,
        seq_length=32,
        consumed_train_samples=consumed,
        rank=0,
        log_interval=1,
        num_experts=None,
        num_workers=0,
        iterations_to_skip=None,
        exit_interval=None,
        lr_warmup_samples=0,
        lr_warmup_iters=0,
        lr_warmup_fraction=None,
        lr_decay_samples=None,
        lr_decay_iters=None,
    )
    args = argparse.Namespace(**fine | changes)
    for name, value in vars(config).items():
        setattr(args, f"tst_{name}", value)
    store(args, config.schedule(args), planned=config.schedule(args))
    return args


def run_of(consumed=0, config=CONFIG, **changes):
    args = arguments(consumed, config, **changes)
    return Run(args, config, config.schedule(args))


class Lines:
    """In the report's place: the names of what it is asked to say, with the iteration."""

    def __init__(self):
        self.said = []

    def __getattr__(self, name):
        return lambda *given: self.said.append((name, *(x for x in given if type(x) is int)))


def bags(*rows):
    return torch.tensor([rows])


# ---- the floor of the loss


def test_the_mean_entropy_of_bags_by_hand(megatron):
    """Bags a a b b (log 2), c c c c (0) and one that does not count, in two micro-batches."""
    seen = MeanBagEntropy("uniform")
    assert not seen.sees
    seen.see(bags([1, 1, 2, 2], [5, 6, 7, 8]), torch.tensor([[1.0, 0.0]]))
    seen.see(bags([3, 3, 3, 3], [9, 9, 9, 9]), torch.tensor([[1.0, 1.0]]))
    assert seen.sees
    kept = seen._seen
    close(seen.take(), torch.tensor(LOG_2 / 3), 1e-6)
    # the next step begins with nothing
    seen.see(bags([1, 1, 2, 2]), torch.tensor([[1.0]]))
    close(seen.take(), torch.tensor(LOG_2), 1e-6)
    assert seen.sees and seen._seen is kept  # a CUDA graph adds to this very tensor


def test_a_step_without_a_position_that_counts_has_no_entropy(megatron):
    seen = MeanBagEntropy("uniform")
    seen.see(bags([1, 1, 2, 2]), torch.tensor([[0.0]]))
    assert seen.take() == 0


@pytest.mark.parametrize(
    "changes, trained, superposed, noted",
    [
        ({}, True, True, True),
        ({}, False, True, False),  # an iteration that Megatron skips
        (dict(loss="mce-alt"), True, True, False),  # another objective: no such floor
        (dict(superpose="input"), True, True, False),  # one label a position
        ({}, True, False, False),  # recovery
    ],
)
def test_whose_entropy_is_noted(monkeypatch, changes, trained, superposed, noted):
    config = TSTConfig(4, iters=6, **changes)
    run = run_of(0 if superposed else 24, config)
    labels = torch.zeros((2, 32) if config.superpose == "input" else (2, 32, 4), dtype=torch.int64)
    got = dict(labels=labels, loss_mask=torch.ones(2, 32))
    asked = []

    def broadcast(batch, bag_size, superpose, **named):
        asked.append((bag_size, superpose, named))
        return got

    monkeypatch.setattr(module, "broadcast_bags", broadcast)
    ours = run.get_batch_on_this_tp_rank(lambda batch, **named: ("stock", batch, named), trained)
    answer = ours({"x": 1}, tp_rank=0)
    assert answer == (got if superposed else ("stock", {"x": 1}, {"tp_rank": 0}))
    assert asked == [(4, config.superpose, {"tp_rank": 0})] * superposed
    assert run.entropy.sees == noted
    with torch.no_grad():  # evaluation
        assert ours({}) == ("stock", {}, {})


# ---- the log


def logged(run, iteration, total=None, **named):
    """One iteration's call of the log. -> (what Megatron's own was given to print, its totals)"""
    printed, total = [], {} if total is None else total
    run.args.consumed_train_samples = 4 * iteration

    def stock(losses, totals, rate, iteration, *rest, **named):
        printed.append({name: float(loss) for name, loss in losses.items()})
        return "what Megatron returns"

    losses = {LOSS_KEY: torch.tensor(5.0)}
    assert run.training_log(stock)(losses, total, 1e-3, iteration, **named) == (
        "what Megatron returns"
    )
    return printed[0], total


def test_the_loss_is_shown_less_the_entropy(megatron):
    run = run_of()
    run.report = Lines()
    run.entropy.see(bags([1, 1, 2, 2]), torch.tensor([[1.0]]))
    printed, total = logged(run, 6, {EXCESS_KEY: 1.0})
    assert printed == {LOSS_KEY: 5.0, EXCESS_KEY: pytest.approx(5 - LOG_2)}
    assert total == {EXCESS_KEY: 1.0}
    # recovery has none, and Megatron is not to print the 0 that is left of it
    printed, total = logged(run, 7, {EXCESS_KEY: 0.0, LOSS_KEY: 5.0})
    assert printed == {LOSS_KEY: 5.0} and total == {LOSS_KEY: 5.0}


def test_what_the_log_says_in_each_iteration():
    run = run_of(log_interval=5)
    run.report = Lines()
    for iteration in range(1, 9):
        logged(run, iteration, is_first_iteration=iteration == 1)
    assert [line for line in run.report.said if line[0] != "scalars"] == [
        ("iteration", 1),
        ("iteration", 5),
        ("phase_is_done", 6),
    ]
    assert [line for line in run.report.said if line[0] == "scalars"] == [
        ("scalars", i) for i in range(1, 9)
    ]


def test_a_run_that_goes_on_does_not_end_its_phases_again():
    """From a checkpoint in recovery, and from one at the boundary, where the line has been said."""
    for iteration in (6, 8):
        run = run_of(4 * iteration)
        run.go_on_from(arguments(4 * iteration))
        run.report = Lines()
        logged(run, iteration + 1)
        assert "phase_is_done" not in dict(run.report.said)


def test_an_end_that_no_log_call_fell_on_is_said_later():
    """Iteration 6 was skipped: Megatron logs nothing there."""
    run = run_of()
    run.report = Lines()
    logged(run, 5)
    logged(run, 7)
    assert ("phase_is_done", 7) in run.report.said


# ---- what a checkpoint takes along


def test_what_is_taken_over_from_a_checkpoint():
    run = run_of(config=TSTConfig(4, iters=6, switch="auto"))
    theirs = arguments(8, TSTConfig(4, iters=6, switch="auto"))
    kept = dict(
        tst_long_samples="a digest",
        tst_boundary={"sample": 8},
        tst_switch_state=[1.0, 2.0, 3.0],
        tst_validation=(2, 4.5),
    )
    vars(theirs).update(kept)
    run.go_on_from(theirs)
    assert {name: getattr(run.args, name) for name in kept} == kept
    assert run.trend._state.tolist() == [1.0, 2.0, 3.0] and run.logged_to == 8
    # an older checkpoint has none: what this run has of its own is not kept
    run.go_on_from(arguments(8, TSTConfig(4, iters=6, switch="auto")))
    assert {name: getattr(run.args, name) for name in kept} == dict.fromkeys(kept)


def test_the_phases_of_the_checkpoint_are_those_of_the_run():
    """--tst-switch auto ended superposition at iteration 3 there: the flags still say 6."""
    theirs = arguments(16)
    plan = CONFIG.schedule(theirs)
    store(theirs, plan.ending(plan.phases[0], 12))
    run = run_of()
    run.report = Lines()
    run.go_on_from(theirs)
    assert run.schedule.samples == stored(run.args).samples == (12, 28)
    assert run.report.said == []  # nothing was overridden
    run = run_of(config=TSTConfig(4, iters=8, override=True))
    run.report = Lines()
    run.go_on_from(arguments(16))
    assert run.schedule.samples == (32, 8) and run.report.said == [("overridden", 16)]


def test_what_auto_has_seen_goes_into_the_checkpoint(megatron):
    run = run_of(config=TSTConfig(4, iters=6, switch="auto"))
    run.trend.see(torch.tensor(3.0))
    state = run.trend._state.tolist()
    saved = run.save_checkpoint_and_time(lambda *_, **__: run.args.tst_switch_state)
    assert saved("model") == state and state[2] == 1


@pytest.mark.parametrize("consumed, exits", [(20, False), (24, True), (28, False)])
def test_the_run_ends_at_the_boundary_alone(consumed, exits):
    run = run_of(config=TSTConfig(4, iters=6, exit_at_boundary=True), exit_interval=7)
    run.args.consumed_train_samples = consumed
    seen = []
    run.boundary_log.after_iteration = lambda *given: seen.append(given)
    decide = run.checkpoint_and_decide_exit(
        lambda *given, **named: (run.args.exit_interval, given, named)
    )
    want = 1 if exits else 7, ("model", "optimizer", "scheduler"), {"x": 1}
    assert decide("model", "optimizer", "scheduler", x=1) == want
    assert run.args.exit_interval == 7 and seen == [(run.schedule, "model", "optimizer")]


# ---- --tst-switch auto


@pytest.mark.parametrize(
    "changes, samples",
    [
        ({}, 0),
        (dict(lr_warmup_iters=3), 12),
        (dict(lr_warmup_samples=10), 10),
        (dict(lr_warmup_fraction=0.5), 20),  # of the run
        (dict(lr_warmup_fraction=0.5, lr_decay_iters=4), 8),  # of the decay
        (dict(lr_warmup_fraction=0.5, lr_decay_samples=36), 18),
    ],
)
def test_how_long_the_learning_rate_warms_up(changes, samples):
    run = run_of(**changes)
    for consumed in (samples - 1, samples):
        run.args.consumed_train_samples = consumed
        assert run._warmed_up() == (consumed >= samples)


@pytest.mark.parametrize(
    "workers, micro_batches, end",
    [
        (0, 1, 4 * 5),  # the block at the boundary watches 5 iterations
        (3, 1, 4 * 6),  # 6 micro-batches are fetched
        (8, 3, 4 * 6),  # 16 of them: 5 iterations and a third
        (8, 4, 4 * 5),
        (9, 3, 4 * 6),
    ],
)
def test_what_is_fetched_is_trained_on(monkeypatch, workers, micro_batches, end):
    monkeypatch.setattr(module, "_micro_batches", lambda: micro_batches)
    run = run_of(num_workers=workers)
    assert run._earliest_end(run.schedule.phases[0]) == end


def test_a_builder_leaves_the_configuration_as_it_is():
    """Megatron builds training, validation and test data from one object, and the script's too."""
    run, given = run_of(), []
    built = run.dataset_builder(lambda *rest: given.append(rest[-1]))
    config = argparse.Namespace(
        split_matrix=[(0, 0.9), (0.9, 1), None], blend_per_split=["a", "b", "c"]
    )
    before = dict(vars(config))
    with run.build_training_alone():
        built("builder", "cls", [1, 2, 3], lambda: True, config)
    built("builder", "cls", [1, 2, 3], lambda: True, config)
    alone, all_ = given
    assert alone.split_matrix == [(0, 0.9), None, None]
    assert alone.blend_per_split == ["a", None, None]
    assert all_ is config and vars(config) == before


AUTO = TSTConfig(4, iters=60, switch="auto", switch_slope=0.5, switch_window=0.01)


def auto(fall, iteration, config=AUTO, **changes):
    """A run of 100 iterations whose loss has fallen by so much in the last hundredth of it."""
    run = run_of(4 * iteration, config, train_iters=100, **changes)
    run.report, trend = Lines(), run.trend
    run.trend = argparse.Namespace(fall=fall, least=0.5, see=trend.see, happened=[])
    for name in ("share", "restart"):
        setattr(run.trend, name, lambda name=name: run.trend.happened.append(name))
    return run


@pytest.mark.parametrize(
    "fall, iteration, changes, end",
    [
        (0.6, 20, {}, 60),  # it falls
        (0.5, 20, {}, 60),
        (0.4, 20, {}, 25),
        (-0.1, 20, {}, 25),
        (None, 20, {}, 60),  # not known yet
        (0.4, 20, dict(lr_warmup_iters=21), 60),  # the learning rate is not up
        (0.4, 20, dict(lr_warmup_iters=20), 25),
        (0.4, 54, {}, 59),
        (0.4, 55, {}, 60),  # at its end anyway
        (0.4, 58, {}, 60),  # never later than planned
    ],
)
def test_when_a_flat_loss_ends_the_phase(megatron, monkeypatch, fall, iteration, changes, end):
    monkeypatch.setattr(module, "_micro_batches", lambda: 1)
    run = auto(fall, iteration, **changes)
    followed = []
    run.datasets.append((argparse.Namespace(follow=followed.append), "stock"))
    run._follow_the_loss(run.schedule.phases[0], iteration, None, False, True)
    assert run.schedule.superposition_samples == 4 * end
    assert stored(run.args) == run.schedule  # the checkpoints to come say so
    assert stored(run.args, "tst_planned").superposition_samples == 4 * 60
    assert run.trend.happened == ["share"]
    changed = end < 60
    assert followed == [run.schedule] * changed
    assert run.report.said == [("phase_ends_early", 4 * end, iteration)] * changed


def test_the_trend_of_a_phase_begins_anew(megatron):
    seen = []
    run = auto(0.1, 20)
    run.trend.see = seen.append
    phase, loss = run.schedule.phases[0], torch.tensor(3.0)
    run._follow_the_loss(phase, 20, loss, True, True)  # the last iteration of a phase
    run._follow_the_loss(phase, 21, None, False, False)  # a rank without the loss, no log line
    assert run.trend.happened == ["restart"] and seen == [loss]
    assert run.schedule.superposition_samples == 4 * 60


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("folder", [None, "index"])
def test_the_stock_index_follows_on_rank_0(monkeypatch, rank, folder):
    written = []
    monkeypatch.setattr(module.stock_index, "write", lambda *given: written.append(given))
    run = run_of(config=TSTConfig(4, iters=6, stock_index=folder), rank=rank)
    dataset = argparse.Namespace(follow=lambda plan: None, long_samples="long")
    run.datasets.append((dataset, "stock"))
    plan = run.schedule.ending(run.schedule.phases[0], 12)
    run.follow(plan)
    assert written == [("long", "stock", plan)] * (folder is not None and rank == 0)


@pytest.mark.parametrize(
    "answer, loss", [(({LOSS_KEY: 4.5, "x": 1}, 2), 4.5), (({}, 2), None), ((None, None), None)]
)
def test_the_validation_loss_is_noted(answer, loss):
    run, seen = run_of(), []
    run.boundary_log.saw_validation = lambda *given: seen.append(given)
    assert run.evaluate(lambda *given, **named: (*answer, given, named))("a", b=1) == (
        *answer,
        ("a",),
        {"b": 1},
    )
    assert seen == [(loss, run.schedule)]
