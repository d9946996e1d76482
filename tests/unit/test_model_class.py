"""What Megatron translates of a GPTModel's checkpoint into a HybridModel, and what is refused
(loop/model_class.py). tests/checkpoint/test_class_change.py trains it.
"""

import argparse
import sys
import warnings

import pytest
import torch

from megatron_tst.checkpoint.format import TRACKER, Checkpoint
from megatron_tst.checkpoint.inspect import describe
from megatron_tst.checkpoint.write import write_checkpoint
from megatron_tst.errors import TSTError
from megatron_tst.loop.model_class import check_model_class
from megatron_tst.loop.resume import check_restorable

pytest.importorskip("megatron.core.dist_checkpointing.gpt_checkpoint_interop")  # not in 0.18

OVER = "--hybrid-layer-pattern over a GPTModel's checkpoint"
STAY = "Go on with GPTModel: leave the flag out."
QKV = "decoder.layers.self_attention.linear_qkv.weight"
ROUTER, LOCAL_NORM, NORM = (
    f"decoder.layers.{name}"
    for name in (
        "mlp.router.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "pre_mlp_layernorm.weight",
    )
)


def saved(tmp_path, *more, **args):
    """A checkpoint of two layers with these tensors."""
    folder = tmp_path / "iter_0000004"
    folder.mkdir()
    args = argparse.Namespace(**dict(num_layers=2, seq_length=8) | args)
    ones = torch.ones(2, 3)
    items = [(name, ones.shape, (0, 0), ones) for name in (QKV, *more)]
    write_checkpoint(folder, items, args, lambda done: None)
    (tmp_path / TRACKER).write_text("4")
    return Checkpoint(folder)


def run(pattern=None, **changes):
    return argparse.Namespace(**dict(hybrid_layer_pattern=pattern, rank=0) | changes)


def said(args, checkpoint):
    with pytest.raises(TSTError) as refused:
        check_model_class(args, checkpoint)
    return str(refused.value)


def test_what_goes_on(tmp_path):
    gpt = saved(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pattern in (None, "*-*-", "*-|*-", "*E*E", "M*-M*-"):
            check_model_class(run(pattern), gpt)
    assert describe(gpt)["model"] == "GPTModel"


@pytest.mark.parametrize("name", ["hybrid_layer_pattern", "hybrid_override_pattern"])
def test_a_hybrid_model_goes_on_as_itself(tmp_path, name):
    checkpoint = saved(tmp_path, **{name: "*-|*E"})
    assert describe(checkpoint)["model"] == "HybridModel *-|*E"
    check_model_class(run("*-*E"), checkpoint)  # another cut into stages
    do = "Megatron reads a HybridModel's layers into the same layers alone."
    for pattern in ("*-*-", None):
        assert said(run(pattern), checkpoint) == (
            "--hybrid-layer-pattern: expected *-*E, as in the checkpoint, got "
            f"{pattern or 'none'}. {do}"
        )


def test_a_hybrid_model_goes_on_without_its_heads(tmp_path):
    checkpoint = saved(tmp_path, hybrid_layer_pattern="*-*E/*E/*E")
    for rank, warned in (0, 1), (1, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_model_class(run("*-|*E", rank=rank), checkpoint)
        assert len(caught) == warned
    with pytest.warns(UserWarning, match=r"without the checkpoint's /\*E/\*E: its layers of multi"):
        check_model_class(run("*-*E"), checkpoint)
    for pattern in "*-*E/*E", "*E*E", "*-*E/*E/*E/*E":
        assert f"expected *-*E/*E/*E, as in the checkpoint, got {pattern}." in said(
            run(pattern), checkpoint
        )


@pytest.mark.parametrize(
    "pattern, reason",
    [
        (
            "*-*-/*-",
            "contains MTP layers ('/*-'), which have no source weights in a GPT checkpoint",
        ),
        ("*-*E", "mixes dense ('-') and MoE ('E') MLP positions"),
        ("*-*", "has 2 attention ('*') and 1 MLP ('-'/'E') positions"),
        ("G-*-", "contains layer types ['G'] that cannot be translated from a GPT checkpoint"),
    ],
)
def test_patterns_that_megatron_does_not_translate(tmp_path, pattern, reason):
    assert said(run(pattern), saved(tmp_path)) == (
        f"{OVER}: expected a pattern of * with one of - or E each, without heads (/), got "
        f"{pattern}. Megatron: Hybrid layer pattern '{pattern}' {reason}. {STAY}"
    )


def test_another_number_of_layers(tmp_path):
    assert said(run("*-*-*-"), saved(tmp_path)) == (
        f"{OVER}: expected 2 times * and - or E, as many as it has layers, got *-*-*-. Correct the "
        "pattern."
    )


def test_dense_layers_beside_experts(tmp_path):
    checkpoint = saved(tmp_path, "decoder.layers.0.mlp.linear_fc1.weight")
    assert said(run("*E*E"), checkpoint) == (
        f"{OVER}: expected layers of one kind, got dense layers beside experts. {STAY}"
    )


def test_latent_attention(tmp_path):
    """Its symbol is no other's, and Megatron translates none of it."""
    checkpoint = saved(tmp_path, "decoder.layers.self_attention.linear_kv_up_proj.weight")
    assert said(run("*-*-"), checkpoint) == (
        f"{OVER}: expected attention with keys and values of its own, got multi-latent attention. "
        f"{STAY}"
    )
    assert said(run("+-+-"), checkpoint).startswith(f"{OVER}: expected a pattern of * with one of")


def test_the_norm_before_experts(tmp_path):
    """Dense layers of either spec name their norm alike."""
    local = saved(tmp_path, ROUTER, LOCAL_NORM)
    for spec in (None, ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]):
        assert said(run("*E*E", spec=spec), local) == (
            f"{OVER}: expected the norm before experts as Transformer Engine's layers name it, got "
            "Megatron's local layers' name. Write it for them with megatron-tst boundary "
            "--layer-spec transformer_engine."
        )
    check_model_class(run("*E*E", spec=["mine", "spec"]), local)  # which may name it as it likes
    for names in ((ROUTER, NORM), (LOCAL_NORM,)):
        folder = tmp_path / names[-1]
        folder.mkdir()
        check_model_class(run("*E*E"), saved(folder, *names))


def test_the_distributed_optimizer(tmp_path):
    checkpoint = saved(tmp_path)
    zero = run("*-*-", use_distributed_optimizer=True)
    for sharding in ("dp_reshardable", None):
        checkpoint.common["content_metadata"] = sharding and {
            "distrib_optim_sharding_type": sharding
        }
        assert said(zero, checkpoint) == (
            f"{OVER} with --use-distributed-optimizer: expected optimizer state by parameter, got "
            f"the sharding {sharding}. Save the GPTModel with --dist-ckpt-optim-fully-reshardable, "
            "or add --no-load-optim."
        )
    check_model_class(run("*-*-"), checkpoint)
    check_model_class(run("*-*-", use_distributed_optimizer=True, no_load_optim=True), checkpoint)
    for sharding in ("fully_reshardable", "fully_sharded_model_space"):
        checkpoint.common["content_metadata"] = {"distrib_optim_sharding_type": sharding}
        check_model_class(zero, checkpoint)
    checkpoint.common["content_metadata"], checkpoint.args.no_save_optim = None, True
    check_model_class(zero, checkpoint)


def test_heads_that_are_left_behind(tmp_path):
    checkpoint = saved(tmp_path, "mtp.layers.0.eh_proj.weight")
    with pytest.warns(UserWarning, match="its layers of multi-token prediction are left out"):
        check_model_class(run("*-*-"), checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_model_class(run("*-*-", rank=1), checkpoint)
        check_model_class(run(), checkpoint)


def test_weights_alone_are_looked_at_too(tmp_path):
    """--finetune and --no-load-optim: the model is translated as well."""
    checkpoint = saved(tmp_path, hybrid_layer_pattern="*-*-")
    for name in ("finetune", "no_load_optim"):
        with pytest.raises(TSTError, match="expected \\*-\\*-, as in the checkpoint, got \\*E\\*E"):
            check_restorable(run("*E*E", load=str(tmp_path), **{name: True}))
    del checkpoint.common["args"]
    check_model_class(run("*E*E"), checkpoint)  # of no run of Megatron's


def test_a_megatron_that_does_not_translate(tmp_path, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "megatron.core.dist_checkpointing.gpt_checkpoint_interop", None
    )
    assert said(run("*-*-"), saved(tmp_path)).startswith(
        f"{OVER}: expected megatron-core >= 0.19, got megatron-core "
    )
