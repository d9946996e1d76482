"""Every layout trains as one process does: losses, gradient norms, validation losses and final
weights, through both phases.
"""

from dataclasses import asdict, astuple, replace

import pytest
from support.close import check
from support.harness import TOLERANCE, Difference, difference
from support.layouts import (
    BAGS_OF_ONE,
    CASES,
    FAST,
    FAST_BAGS_OF_ONE,
    SUPERPOSED,
    Case,
    Layout,
)
from support.tiers import tiers

from megatron_tst.loop.run import EXCESS_KEY

pytestmark = pytest.mark.numeric


# what a DeepSeek without one of its parts is given beside its flags
WITHOUT = [
    "--moe-router-num-groups 1",
    "--moe-router-bias-update-rate 0",
    "--moe-aux-loss-coeff 0",
    "--moe-router-topk-scaling-factor 1",
    "--mtp-loss-scaling-factor 0",
    "--rotary-base 100",
]


def name(case):
    return case.id


def within(found: Difference, allowed: Difference) -> bool:
    return all(a <= b for a, b in zip(astuple(found), astuple(allowed)))


def check_all(found: Difference, allowed: Difference) -> None:
    for name, figure in asdict(found).items():
        check(figure, getattr(allowed, name), name)


def needs(layout, trainer):
    """Skip what the machines here cannot hold."""
    nodes = trainer.fork_server.nodes
    if layout.world % nodes:
        pytest.skip(f"NOT RUN: {layout.world} processes cannot be spread over {nodes} nodes")
    if trainer.backend == "nccl":
        import torch

        if layout.world // nodes > torch.cuda.device_count():
            pytest.skip(
                f"NOT RUN: needs {layout.world // nodes} GPUs a node, {torch.cuda.device_count()} "
                f"are here (--backend gloo shares them)"
            )


@pytest.mark.parametrize("case", tiers(CASES, FAST, name))
def test_equals_one_process(trainer, report, case):
    layout = Layout(case.layout)
    needs(layout, trainer)
    want, got = trainer.reference(case), trainer.train(case, layout)
    found = difference(got, want)
    passed = within(found, TOLERANCE[case.precision])
    report("test_equals_one_process", case, found, "passed" if passed else "failed")
    check_all(found, TOLERANCE[case.precision])
    assert bool(got.weights) == (
        "fsdp" not in case.layout
    )  # there the validation loss after the last step stands for them
    assert (got.schedule_plans > 0) == ("ep-overlap" in case.layout)
    # the phases are what they claim to be: a superposed and an ordinary loss start apart by far
    # more than the tolerance
    assert case.s == 1 or got.losses[0] != got.losses[3]


@pytest.mark.parametrize("case", tiers(BAGS_OF_ONE, FAST_BAGS_OF_ONE, name))
def test_bag_of_one_is_stock_megatron(trainer, report, case):
    """Bag size 1 through the superposed code, against a run without TST in the same layout: bit for
    bit.
    """
    layout = Layout(case.layout)
    needs(layout, trainer)
    got, stock = trainer.train(case, layout), trainer.train(replace(case, s=0), layout)
    for losses in got.losses[:SUPERPOSED]:
        assert losses.pop(EXCESS_KEY) == losses["lm loss"]  # one label has no entropy
    found = difference(got, stock)
    passed = found == Difference(0, 0, 0, 0, 0, 0)
    report("test_bag_of_one_is_stock_megatron", case, found, "passed" if passed else "failed")
    assert passed, found


@pytest.mark.parametrize("without", tiers(WITHOUT, {"--moe-router-num-groups 1"}))
def test_every_part_of_deepseek_is_seen(trainer, without):
    """A layout that left one out would differ from one process by far more than is allowed."""
    if trainer.fork_server.nodes > 1:
        pytest.skip("NOT RUN: one process needs one node")
    case = Case("dp1", "deepseek")
    found = difference(trainer.reference(replace(case, options=without)), trainer.reference(case))
    assert found.norms > 10 * TOLERANCE["fp32"].norms, found
