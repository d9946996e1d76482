"""Free space is looked at before a run saves."""

import argparse
import shutil
import warnings

import pytest
import torch

from megatron_tst.checks import space
from megatron_tst.errors import TSTError

GB = 10**9


def arguments(folder, **changes):
    """A dense model of 1,181,952 weights."""
    fine = dict(
        save=str(folder),
        params_dtype=torch.float32,
        optimizer="adam",
        hidden_size=128,
        kv_channels=32,
        num_attention_heads=4,
        num_query_groups=None,
        group_query_attention=False,
        qk_layernorm=False,
        untie_embeddings_and_output_weights=True,
        padded_vocab_size=2048,
        num_experts=None,
        swiglu=False,
        ffn_hidden_size=512,
        num_layers=3,
        train_iters=100,
        train_samples=None,
        global_batch_size=4,
        save_interval=10,
        world_size=1,
    )
    return argparse.Namespace(**fine | changes)


WEIGHTS = 3 * (4 * 128 * 128 + 2 * 128 + 2 * 128 * 512) + 128 + 2 * 128 * 2048


@pytest.mark.parametrize(
    "changes, each",
    [
        ({}, 12),
        (dict(moe_layer_freq=1, mtp_num_layers=None, hybrid_layer_pattern=None), 12),
        (dict(no_save_optim=False, use_precision_aware_optimizer=False), 12),
        (dict(params_dtype=torch.bfloat16), 14),
        (dict(no_save_optim=True), 4),
        (dict(params_dtype=torch.float16, no_save_optim=True), 2),
        (dict(optimizer="sgd"), 8),
        (dict(optimizer="lion"), 8),
        (dict(optimizer="adaptive_muon"), 12),
        (dict(optimizer="muon", muon_scalar_optimizer="lion"), 8),
        (dict(optimizer="muon", no_save_optim=True), 4),
        (
            dict(
                params_dtype=torch.bfloat16,
                use_precision_aware_optimizer=True,
                main_params_dtype=torch.float16,
                exp_avg_dtype=torch.bfloat16,
                exp_avg_sq_dtype=torch.uint8,
            ),
            7,
        ),
    ],
)
def test_bytes_of_a_checkpoint(tmp_path, changes, each):
    assert space.checkpoint_bytes(arguments(tmp_path, **changes)) == each * WEIGHTS


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype, each", [(torch.float32, 8), (torch.bfloat16, 10)])
def test_beside_muon_the_tables_have_two_moments(tmp_path, dtype, each, tied):
    weights, tables = WEIGHTS - tied * 128 * 2048, (2 - tied) * 128 * 2048
    changes = dict(optimizer="muon", params_dtype=dtype)
    changes["untie_embeddings_and_output_weights"] = not tied
    args = arguments(tmp_path, **changes)
    assert space.checkpoint_bytes(args) == each * weights + 4 * tables
    args.muon_scalar_optimizer = "adam"
    assert space.checkpoint_bytes(args) == each * weights + 4 * tables


def test_every_expert_is_in_a_checkpoint(tmp_path):
    """Not those alone that a token is sent to."""
    experts = dict(num_experts=5, moe_ffn_hidden_size=64, moe_router_topk=2)
    more = 3 * (5 * 128 + 5 * 2 * 128 * 64 - 2 * 128 * 512)  # router, experts, no dense layer
    args = arguments(tmp_path, **experts, no_save_optim=True)
    assert space.checkpoint_bytes(args) == 4 * (WEIGHTS + more)


def test_all_layers_of_a_mixed_model_are_in_a_checkpoint(tmp_path):
    """Dense first layers, a shared expert, and a layer of multi-token prediction: three norms, the
    product of two hidden states, and a layer as the last.
    """
    experts = dict(num_experts=5, moe_ffn_hidden_size=64, moe_router_topk=2)
    experts |= dict(moe_layer_freq=[0, 1, 1], moe_shared_expert_intermediate_size=32)
    layer = 5 * 128 + 5 * 2 * 128 * 64 + 2 * 128 * 32
    more = 2 * (layer - 2 * 128 * 512)
    mtp = 4 * 128 * 128 + 2 * 128 + layer + 3 * 128 + 2 * 128 * 128
    args = arguments(tmp_path, **experts, mtp_num_layers=1, no_save_optim=True)
    assert space.checkpoint_bytes(args) == 4 * (WEIGHTS + more + mtp)


@pytest.mark.parametrize(
    "changes",
    [
        dict(hybrid_layer_pattern="M*"),
        dict(experimental_attention_variant="gated_delta_net"),
        dict(heterogeneous_block_specs=True),
        dict(optimizer="soap"),
    ],
)
def test_models_that_are_not_counted_are_let_through(tmp_path, changes, monkeypatch):
    looked(monkeypatch, 0)
    space.check_space(arguments(tmp_path, **changes))


@pytest.mark.parametrize(
    "changes, kept",
    [
        ({}, 10),
        (dict(save_interval=1), 100),
        (dict(save_interval=2), 50),
        (dict(save_interval=30), 4),
        (dict(save_interval=None), 1),
        (dict(save_interval=1000), 1),
        (dict(train_iters=None, train_samples=400), 10),
        (dict(train_iters=None, train_samples=403), 10),
        (dict(train_iters=None, train_samples=404), 11),
        (dict(train_iters=0, train_samples=0, save_interval=None), 1),
        (dict(save_retain_interval=20), 7),
        (dict(save_retain_interval=30), 5),
        (dict(save_retain_interval=5), 10),
    ],
)
def test_checkpoints_that_a_run_leaves(tmp_path, changes, kept):
    args = arguments(tmp_path, **changes)
    assert space.kept_checkpoints(args, tmp_path) == kept
    for name in ("iter_10", "iter_00000100", "iter_0000010.old", "latest_checkpointed_iteration"):
        (tmp_path / name).mkdir()
    assert space.kept_checkpoints(args, tmp_path) == kept
    for name in ("iter_0000010", "iter_0000020"):
        (tmp_path / name).mkdir()
    assert space.kept_checkpoints(args, tmp_path) == max(1, kept - 2)


def looked(monkeypatch, free):
    usage = shutil._ntuple_diskusage(10 * GB, 10 * GB - free, free)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda folder: usage)


def warned(args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        space.check_space(args)
    return " ".join(str(warning.message) for warning in caught)


def test_no_space_for_one_checkpoint(tmp_path, monkeypatch):
    size = 12 * WEIGHTS
    looked(monkeypatch, size - 1)
    with pytest.raises(
        TSTError,
        match="--save .*: expected 13,380.10 KB free for a checkpoint, got 13,380.09 KB",
    ):
        space.check_space(arguments(tmp_path))
    looked(monkeypatch, size // 3)
    with pytest.raises(
        TSTError, match="expected 13.38 MB free for a checkpoint, got 4.46 MB. Free"
    ):
        space.check_space(arguments(tmp_path))
    # of several nodes each may have a folder of its own
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    said = warned(arguments(tmp_path, world_size=2))
    assert "a checkpoint takes 13.38 MB, and 4.46 MB are free" in said and "more" not in said
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(TSTError, match="expected 13.38 MB free"):
        space.check_space(arguments(tmp_path, world_size=2))
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(TSTError, match="expected 13.38 MB free"):
        space.check_space(arguments(tmp_path, world_size=2))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # of an environment around it
    with pytest.raises(TSTError) as caught:
        space.check_space(arguments(tmp_path))
    assert str(caught.value) == (
        f"--save {tmp_path}: expected 13.38 MB free for a checkpoint, got 4.46 MB. "
        "Free some, or save elsewhere."
    )
    space.check_space(argparse.Namespace())
    space.check_space(arguments(tmp_path, save=""))
    space.check_space(arguments(tmp_path, save=None))
    space.check_space(arguments(tmp_path, save="s3://bucket/x"))


def test_no_space_for_all_checkpoints(tmp_path, monkeypatch):
    size = 12 * WEIGHTS
    looked(monkeypatch, 10 * size)
    assert warned(arguments(tmp_path)) == ""
    looked(monkeypatch, size)
    assert "take 133.80 MB, and 13.38 MB are free" in warned(arguments(tmp_path))
    looked(monkeypatch, 9 * size)
    said = warned(arguments(tmp_path))
    assert said == (
        f"megatron_tst: --save {tmp_path}: 10 more checkpoints of 13.38 MB take 133.80 MB, and "
        "120.42 MB are free. Raise --save-interval, or give --save-retain-interval"
    )
    assert warned(arguments(tmp_path, save_retain_interval=20)) == ""
    assert warned(arguments(tmp_path, save_interval=None)) == ""
    (tmp_path / "iter_0000010").mkdir()  # a restart: one of the ten is there
    assert warned(arguments(tmp_path)) == ""
    samples = dict(train_iters=None, train_samples=400)
    looked(monkeypatch, 8 * size)
    assert "9 more checkpoints" in warned(arguments(tmp_path, **samples))
