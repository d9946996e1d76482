"""Which optimizers can be built (checks/optimizer.py), and which of them can go on from a
checkpoint's state (loop/resume.py).
"""

import argparse

import pytest

from megatron_tst.checks import optimizer
from megatron_tst.errors import TSTError
from megatron_tst.loop.resume import check_optimizer


def of(**changes):
    return argparse.Namespace(**changes)


def said(call):
    with pytest.raises(TSTError) as refused:
        call()
    return str(refused.value)


IN_LAYERS = dict(optimizer="muon", use_layer_wise_distributed_optimizer=True)


@pytest.mark.parametrize(
    "run",
    [
        {},
        dict(optimizer="adam", fp16=True),
        dict(optimizer="sgd", fp16=True),
        dict(optimizer="muon"),
        dict(optimizer="muon", bf16=True),
        dict(optimizer="lion", use_layer_wise_distributed_optimizer=False),
        dict(IN_LAYERS, bf16=True),
    ],
)
def test_what_can_be_built(run):
    optimizer.check_optimizer_choice(of(**run))


@pytest.mark.parametrize(
    "run, message",
    [
        (
            dict(optimizer="muon", fp16=True),
            "--optimizer muon: expected --bf16 or fp32, got --fp16. Megatron builds it for these "
            "alone.",
        ),
        (
            IN_LAYERS,
            "--optimizer muon with the distributed optimizer (or dist_muon): expected --bf16, got "
            "fp32. Add --bf16, or leave the distributed optimizer out: --optimizer muon.",
        ),
    ],
)
def test_precisions_that_megatron_does_not_build(run, message):
    assert said(lambda: optimizer.check_optimizer_choice(of(**run))) == message


def test_without_its_package(monkeypatch):
    monkeypatch.setattr(optimizer, "find_spec", lambda name: None)
    for name in ("muon", "adaptive_muon", "lion", "soap"):
        assert said(lambda: optimizer.check_optimizer_choice(of(optimizer=name))) == (
            f"--optimizer {name}: expected the package emerging-optimizers, got none. Install it: "
            "pip install emerging-optimizers."
        )
    for name in ("adam", "sgd", None):
        optimizer.check_optimizer_choice(of(optimizer=name))


DO = (
    "Megatron does not load the state of one into another. Keep to the checkpoint's, or add "
    "--no-load-optim."
)


@pytest.mark.parametrize(
    "theirs, ours, message",
    [
        (
            dict(optimizer="adam"),
            dict(optimizer="muon"),
            "--optimizer with the optimizer's state: expected adam, as in the checkpoint, got "
            f"muon. {DO}",
        ),
        (
            dict(optimizer="muon", muon_scalar_optimizer="adam"),
            dict(optimizer="muon", muon_scalar_optimizer="lion"),
            "--muon-scalar-optimizer with the optimizer's state: expected adam, as in the "
            f"checkpoint, got lion. {DO}",
        ),
        (
            dict(optimizer="muon"),  # of a Megatron that knew no other
            dict(optimizer="adaptive_muon", muon_scalar_optimizer="adam"),
            "--optimizer with the optimizer's state: expected muon, as in the checkpoint, got "
            f"adaptive_muon. {DO}",
        ),
        (dict(optimizer="muon"), dict(optimizer="dist_muon", muon_scalar_optimizer="adam"), None),
        (dict(optimizer="dist_muon"), dict(optimizer="muon"), None),
        (
            dict(optimizer="adam", muon_scalar_optimizer="adam"),
            dict(optimizer="adam", muon_scalar_optimizer="lion"),
            None,
        ),
        (dict(), dict(optimizer="muon"), None),
    ],
)
def test_another_optimizer_than_the_checkpoint_s(theirs, ours, message):
    if message is None:
        check_optimizer(of(**ours), of(**theirs))
        return
    assert said(lambda: check_optimizer(of(**ours), of(**theirs))) == message
    check_optimizer(of(**ours, no_load_optim=True), of(**theirs))
