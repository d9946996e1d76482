"""What a run that goes on from a checkpoint may change (loop/resume.py): settings of the switch,
layouts between which Megatron does not carry the optimizer, and which checkpoint is looked at.
test_config.py has the phases.
"""

import argparse

import pytest
import torch

from megatron_tst.checkpoint.format import TRACKER
from megatron_tst.checkpoint.phases import store
from megatron_tst.checkpoint.write import write_checkpoint
from megatron_tst.config import TSTConfig
from megatron_tst.errors import TSTError
from megatron_tst.loop.resume import check_optimizer, check_restorable, check_resume, verify_load


def arguments(config, consumed=0, **changes):
    """As a run of 1000 iterations of 8 samples stores them after so many samples."""
    fine = dict(train_iters=1000, train_samples=None, global_batch_size=8, seq_length=128)
    args = argparse.Namespace(**fine | changes, consumed_train_samples=consumed)
    for name, value in vars(config).items():
        setattr(args, f"tst_{name}", value)
    store(args, config.schedule(args), planned=config.schedule(args))
    return args


AUTO = dict(bag_size=6, iters=300, switch="auto")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(switch_slope=0.001), "another tst_switch_slope: expected 0.002 as in the checkpoint"),
        (dict(switch_window=0.02), "another tst_switch_window: expected 0.01 as in the checkpoint"),
        (dict(switch="fixed"), "another tst_switch: expected auto as in the checkpoint, got fixed"),
    ],
)
def test_settings_of_the_switch(change, message):
    before = arguments(TSTConfig(**AUTO), 800)
    plan = TSTConfig(**AUTO).schedule(before)
    assert check_resume(arguments(TSTConfig(**AUTO)), before) == plan
    with pytest.raises(TSTError, match=f"resuming with {message}.*or --tst-override"):
        check_resume(arguments(TSTConfig(**AUTO | change)), before)
    assert check_resume(arguments(TSTConfig(**AUTO | change, override=True)), before) == plan


def test_an_override_of_the_switch_takes_the_phases_of_the_flags():
    """auto had ended superposition at iteration 250: with a fixed switch it is 300 again, with auto
    what was decided stays.
    """
    before = arguments(TSTConfig(**AUTO), 200 * 8)
    plan = TSTConfig(**AUTO).schedule(before)
    store(before, plan.ending(plan.phases[0], 250 * 8))
    for switch, iterations in (("fixed", 300), ("auto", 250)):
        settings = AUTO | dict(switch=switch, override=True)
        found = check_resume(arguments(TSTConfig(**settings)), before)
        assert found.superposition_samples == iterations * 8


def test_any_bag_size_of_targets_can_follow():
    """With single tokens in, a sample is as long in each phase: 5 and 4 do not divide 6."""
    before = arguments(TSTConfig(6, iters=300, superpose="output"), 250 * 8)
    config = TSTConfig((6, 5, 4), iters=(250, 30, 20), superpose="output", override=True)
    found = check_resume(arguments(config), before)
    assert found.bag_sizes == (6, 5, 4, 1) and found.samples == (2000, 240, 160, 5600)


# ---- the optimizer


def of(**changes):
    return argparse.Namespace(**changes)


@pytest.mark.parametrize(
    "checkpoint, run, message",
    [
        (1, 1, None),
        (2, 4, None),
        (4, 2, None),
        (1, 2, "--expert-model-parallel-size .*: expected 1, as the checkpoint's 1, got 2"),
        (4, 1, "--expert-model-parallel-size .*: expected more than 1, as the checkpoint's 4, got"),
    ],
)
def test_experts_of_the_optimizer(checkpoint, run, message):
    args = of(expert_model_parallel_size=run), of(expert_model_parallel_size=checkpoint)
    if not message:
        check_optimizer(*args)
        return
    with pytest.raises(TSTError, match=message):
        check_optimizer(*args)
    args[0].no_load_optim = True  # weights alone go between all layouts
    check_optimizer(*args)


@pytest.mark.parametrize("theirs, ours", [(False, True), (True, False), (True, True)])
def test_kinds_of_optimizer(theirs, ours):
    args = of(use_distributed_optimizer=ours), of(use_distributed_optimizer=theirs)
    if theirs == ours:
        check_optimizer(*args)
        return
    got = "got it" if ours else "got none"
    with pytest.raises(TSTError, match=f"--use-distributed-optimizer .* in the checkpoint, {got}"):
        check_optimizer(*args)
    args[0].no_load_optim = True
    check_optimizer(*args)


# ---- which checkpoint


@pytest.fixture
def two(tmp_path):
    """Iteration 2 with experts on one rank, iteration 4, the latest, with experts on two."""
    for iteration, experts in ((2, 1), (4, 2)):
        folder = tmp_path / f"iter_{iteration:07d}"
        folder.mkdir()
        tensor = torch.ones(iteration, 3)
        args = of(expert_model_parallel_size=experts)
        items = [("weight", tensor.shape, (0, 0), tensor)]
        write_checkpoint(folder, items, args, lambda done: None)
    (tmp_path / TRACKER).write_text("4")
    return tmp_path


@pytest.mark.parametrize("step, experts", [(None, 2), (4, 2), (2, 1)])
def test_the_checkpoint_that_ckpt_step_names(two, capsys, step, experts):
    run = of(load=str(two), ckpt_step=step, rank=0, world_size=1, expert_model_parallel_size=1)
    verify_load(run)
    assert f"{two}/iter_{step or 4:07d}: 2 items" in capsys.readouterr().out
    if experts == 1:
        check_restorable(run)
        return
    with pytest.raises(TSTError, match="expected more than 1, as the checkpoint's 2, got 1"):
        check_restorable(run)
    for name in ("finetune", "no_load_optim"):  # weights alone
        check_restorable(of(**vars(run) | {name: True}))


def test_each_rank_reads_its_share(two, capsys):
    for rank in range(2):
        verify_load(of(load=str(two), ckpt_step=2, rank=rank, world_size=2))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "rank 0's share (1 of 2), 1 items" in said
