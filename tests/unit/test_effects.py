"""Flags that would do nothing are refused, and mistyped ones named."""

import argparse
import dataclasses
import types

import pytest

from megatron_tst.checks import refusals
from megatron_tst.checks.effects import NEEDS, check_effects
from megatron_tst.checks.refusals import check_arguments
from megatron_tst.config import TSTConfig, add_tst_arguments, check_spelling
from megatron_tst.errors import TSTError

# a value of each setting that is not its default
GIVEN = {
    "step_ratio": 0.3,
    "iters": 3,
    "target_weighting": "power-law",
    "superpose": "output",
    "loss": "mce-alt",
    "exit_at_boundary": True,
    "switch": "auto",
    "switch_slope": 0.1,
    "switch_window": 0.05,
    "override": True,
    "kernel": "torch",
    "kernel_in_recovery": True,
    "fused_linear_loss": True,
    "stock_index": "somewhere",
    "max_epochs": 9,
    "verify_load": True,
}


def megatron(**changes):
    fine = dict(train_iters=1000, train_samples=None, global_batch_size=8, seq_length=128)
    return argparse.Namespace(**fine | changes)


def test_every_flag_is_in_the_table_and_in_this_test():
    parser = add_tst_arguments(argparse.ArgumentParser(add_help=False))
    flags = {action.dest.removeprefix("tst_") for action in parser._actions}
    assert flags == {"bag_size", *NEEDS} == {"bag_size", *GIVEN}
    assert flags == set(TSTConfig.__dataclass_fields__)
    with pytest.raises(dataclasses.FrozenInstanceError):
        NEEDS["loss"][0].expected = ""


@pytest.mark.parametrize("name", [name for name in GIVEN if name != "verify_load"])
@pytest.mark.parametrize("bag_size", [None, 1])
def test_without_bags(name, bag_size):
    settings = {} if bag_size is None else dict(bag_size=bag_size)
    with pytest.raises(
        TSTError,
        match=f"--tst-{name.replace('_', '-')}: expected --tst-bag-size of 2 or more beside it, "
        "got 1. The run would be stock Megatron: add it, or drop the --tst- flags.$",
    ):
        check_arguments(TSTConfig(**settings, **{name: GIVEN[name]}), megatron())


@pytest.mark.parametrize(
    "settings, changes, message",
    [
        (dict(verify_load=True), {}, "--tst-verify-load: expected --load beside it, got none"),
        (dict(switch_slope=0.1), {}, "--tst-switch-slope: expected --tst-switch auto .* got fixed"),
        (dict(switch_window=0.05), {}, "--tst-switch-window: expected --tst-switch auto"),
        (dict(superpose="input", loss="mce-alt"), {}, "--tst-loss: expected .* got input"),
        (
            dict(superpose="input", target_weighting="exponential"),
            {},
            "--tst-target-weighting: expected --tst-superpose both or output",
        ),
        (
            dict(kernel_in_recovery=True, fused_linear_loss=True),
            {},
            "--tst-kernel-in-recovery: expected no --tst-fused-linear-loss",
        ),
        (dict(override=True), {}, "--tst-override: expected --load beside it, .* got none"),
        (dict(override=True), dict(load="x", finetune=True), "--tst-override: .* got --finetune"),
        (dict(stock_index="x"), dict(mock_data=True), "--tst-stock-index: .* got --mock-data"),
        (dict(max_epochs=9), dict(mock_data=True), "--tst-max-epochs: expected a corpus"),
        (dict(iters=0), {}, "--tst-iters: expected more than 0, got 0"),
        (dict(step_ratio=0.0), {}, "--tst-step-ratio: expected more than 0, got 0.0"),
        (
            dict(iters=0),
            {},
            r"got 0\. No iteration would be superposed: raise it, or drop the --tst- flags\.$",
        ),
        (
            dict(switch_slope=0.1),
            {},
            r"got fixed\. It would have no effect: drop one of the two\.$",
        ),
        (
            dict(fused_linear_loss=True, kernel_in_recovery=True),
            {},
            "which computes recovery's loss too, got both. It would have no effect",
        ),
    ],
)
def test_combinations_without_effect(settings, changes, message):
    length = {} if {"iters", "step_ratio"} & set(settings) else dict(step_ratio=0.3)
    with pytest.raises(TSTError, match=message):
        check_arguments(TSTConfig(6, **length, **settings), megatron(**changes))


@pytest.mark.parametrize(
    "settings, changes",
    [
        (dict(switch="auto", switch_slope=0.1, switch_window=0.05), {}),
        (dict(superpose="output", loss="mce-alt", target_weighting="exponential"), {}),
        (dict(superpose="both", loss="mce-alt", target_weighting="exponential"), {}),
        (dict(superpose="output", kernel="torch"), {}),
        (dict(superpose="both", kernel="torch"), {}),
        (dict(superpose="input", kernel="torch"), {}),
        (dict(superpose="input", kernel="torch", fused_linear_loss=True), {}),
        (dict(override=True), dict(load="x")),
        (dict(stock_index="x", max_epochs=9), {}),
        (dict(exit_at_boundary=True), {}),
        (dict(superpose="input", kernel="torch", kernel_in_recovery=True), {}),
        (dict(verify_load=True), dict(load="x", finetune=True)),
    ],
)
def test_flags_with_effect_are_let_through(settings, changes):
    check_effects(TSTConfig(6, step_ratio=0.3, **settings), megatron(**changes))
    check_effects(TSTConfig(), megatron())  # the defaults


@pytest.mark.parametrize(
    "line, message",
    [
        (
            "--tst-bagsize 4",
            "expected a flag of TST, got --tst-bagsize. Did you mean --tst-bag-siz",
        ),
        ("--tst_bag_size 4", "got --tst_bag_size. Did you mean --tst-bag-size"),
        ("--tst-ratio 0.3", "Did you mean --tst-step-ratio"),
        ("--tst-step-ration=0.3", "got --tst-step-ration. Did you mean --tst-step-ratio"),
        ("-tst-iters 3", "got -tst-iters. Did you mean --tst-iters"),
        ("--TST-ITERS 3", "Did you mean --tst-iters"),
        ("--tst-iter 3", "Did you mean --tst-iters"),
        ("--tst-exit", "got --tst-exit. Did you mean --tst-exit-at-boundary"),
        ("--tst-xyzxyzxyz 3", "got --tst-xyzxyzxyz. `megatron-tst plan --help` lists"),
        ("--tst", "expected a flag of TST, got --tst"),
        ("--tst-bag-size", "--tst-bag-size: expected a value, got none"),
        ("--tst-bag-size --tst-iters 3", "--tst-bag-size: expected a value, got none"),
        ("--tst-stock-index --bf16", "--tst-stock-index: expected a value, got none.* DIR"),
        ("--tst-override yes", "--tst-override: expected no value, got --tst-override yes"),
        ("--tst-override=1", "--tst-override: expected no value, got --tst-override=1"),
    ],
)
def test_mistyped_flags(line, message):
    parser = add_tst_arguments(argparse.ArgumentParser())
    with pytest.raises(TSTError, match=message):
        check_spelling(parser, ["--num-layers", "2", *line.split()])


@pytest.mark.parametrize(
    "line",
    [
        "--tst-bag-size 16,8 --tst-iters 3,4 --tst-override --bf16",
        "--tst-bag-size=4 --tst-iters -1",  # out of range, and said elsewhere
        "--tst-iters -.5",
        "--data-path tst-text --save tst",
        "--tstate 3 --testing",
    ],
)
def test_others_are_left_to_argparse(line):
    check_spelling(add_tst_arguments(argparse.ArgumentParser()), line.split())


@pytest.mark.parametrize(
    "config, message",
    [
        (TSTConfig(10**23, iters=3), "--tst-bag-size: expected a run of at most 9,223,372,036,854"),
        (TSTConfig(2**45, iters=900), "raw tokens, which Megatron can count, got 35184372088832"),
        (TSTConfig(2**45, iters=900), "at most 9,223,372,036,854,775,807 raw tokens"),
        (TSTConfig((10**9, 10**9 + 1), iters=(3, 3)), "got 1000000000,1000000001"),
        (
            TSTConfig(129, iters=3, superpose="output"),
            "--tst-bag-size with --tst-superpose output: expected at most --seq-length 128, got",
        ),
    ],
)
def test_bags_that_no_text_fills(config, message):
    with pytest.raises(TSTError, match=message):
        check_arguments(config, megatron(train_iters=10**6))


def test_the_most_tokens_that_megatron_counts():
    """Exactly int64's largest number; one more is refused."""
    for more in (0, 1):
        count = 2**63 - 1 + more
        schedule = types.SimpleNamespace(long_samples=count, long_sample_length=1, seq_length=1)
        if not more:
            refusals._check_bag_sizes(TSTConfig(6, iters=3), schedule)
            continue
        with pytest.raises(TSTError) as caught:
            refusals._check_bag_sizes(TSTConfig(6, iters=3), schedule)
    assert str(caught.value) == (
        "--tst-bag-size: expected a run of at most 9,223,372,036,854,775,807 raw tokens, which "
        "Megatron can count, got 6. Lower it: the paper found 4 to 8 robust."
    )


def test_the_largest_bags_that_single_tokens_predict():
    with pytest.warns(UserWarning, match="bag size 128"):
        check_arguments(TSTConfig(128, step_ratio=0.3, superpose="output"), megatron())


# Every refusal of the fused loss: a row that is dropped from checks/conflicts.py is missed here.
@pytest.mark.parametrize(
    "name",
    [
        "use_mup",
        "mtp_num_layers",
        "defer_embedding_wgrad_compute",
        "overlap_moe_expert_parallel_comm",
        "use_megatron_fsdp",
        "use_torch_fsdp2",
        "fp8_output_proj",
    ],
)
def test_what_the_fused_linear_loss_does_not_work_with(name):
    fused = TSTConfig(bag_size=6, step_ratio=0.3, fused_linear_loss=True)
    check_arguments(fused, megatron())
    check_arguments(TSTConfig(6, 0.3), megatron(**{name: 1}))
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(
        TSTError, match=f"{flag} with --tst-fused-linear-loss: expected unset, got set"
    ):
        check_arguments(fused, megatron(**{name: 1}))
