"""Exports through Megatron-Bridge, as far as they go without it: settings and tensors compared, and
what is refused. With it: tests/peers/test_through_bridge.py.
"""

import dataclasses
import json

import pytest

from megatron_tst import cli
from megatron_tst.errors import TSTError
from megatron_tst.export import bridge_model, through_bridge
from megatron_tst.export.bridge_settings import (
    check_settings,
    check_tensors,
    computed,
    of_training,
)

DENSE = dict(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=8,
    normalization="RMSNorm",
    layernorm_epsilon=1e-5,
    add_bias_linear=False,
    add_qkv_bias=True,
    gated_linear_unit=True,
    position_embedding_type="rope",
    rotary_base=10000,
    rotary_percent=1.0,
    rope_scaling=False,
    share_embeddings_and_output_weights=False,
)
EXPERTS = DENSE | dict(
    num_moe_experts=8,
    moe_ffn_hidden_size=32,
    moe_router_topk=2,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_load_balancing_type="seq_aux_loss",
    moe_layer_freq=[0, 1, 1, 1],
)
LATENT = EXPERTS | dict(
    multi_latent_attention=True,
    kv_lora_rank=16,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=8,
    rope_type="yarn",
    rotary_scaling_factor=4,
    original_max_position_embeddings=4096,
    beta_fast=32,
    beta_slow=1,
    mscale=0.9,
    mscale_all_dim=0.7,
)
YARN = DENSE | dict(
    position_embedding_type="yarn",
    yarn_rotary_scaling_factor=32.0,
    yarn_mscale=1.0,
    yarn_mscale_all_dim=0.0,
)


@pytest.mark.parametrize(
    ("fields", "said_otherwise"),
    [
        (DENSE, dict(window_size=None, window_attn_skip_freq=2, moe_router_topk=6)),
        (DENSE, dict(rope_scaling=False, rope_scaling_factor=1.0, mtp_num_layers=0)),
        (DENSE, dict(yarn_beta_fast=32.0, rotary_scaling_factor=40, kv_lora_rank=32)),
        (DENSE, dict(bf16=True, tensor_model_parallel_size=8, fp8="hybrid", hidden_dropout=0.1)),
        (DENSE | dict(add_bias_linear=True, add_qkv_bias=True), dict(add_qkv_bias=False)),
        (DENSE | dict(window_size=(7, 0)), dict(window_size=[7, 0])),
        (EXPERTS, dict(moe_router_num_groups=1, moe_router_group_topk=1)),
        (EXPERTS, dict(moe_router_topk_scaling_factor=1.0, moe_router_pre_softmax=True)),
        (EXPERTS, dict(moe_router_load_balancing_type=["none"], moe_aux_loss_coeff=0.1)),
        (EXPERTS | dict(moe_layer_freq=2), dict(moe_layer_freq=[1, 0, 1, 0])),
        (EXPERTS | dict(moe_layer_freq=1), dict(moe_layer_freq=[1] * 4, ffn_hidden_size=999)),
        (LATENT, dict(kv_channels=None, num_query_groups=8)),
        (LATENT | dict(rotary_scaling_factor=1), dict(rope_type="rope", mscale=1.0, beta_fast=1)),
        (YARN, dict(yarn_mscale=None, yarn_mscale_all_dim=None)),
    ],
)
def test_the_same_model_said_otherwise(fields, said_otherwise):
    check_settings(fields, fields | said_otherwise)


@pytest.mark.parametrize(
    ("fields", "changed", "argument"),
    [
        (DENSE, dict(num_layers=5), "--num-layers: expected num_layers 5"),
        (DENSE, dict(layernorm_epsilon=1e-6), "--norm-epsilon: expected"),
        (DENSE, dict(rotary_base=500000), "--rotary-base: expected rotary_base 500000"),
        (DENSE, dict(rotary_percent=0.5), "--rotary-percent: expected rotary_percent 0.5"),
        (DENSE, dict(add_qkv_bias=False), "--add-qkv-bias: expected"),
        (DENSE, dict(add_bias_linear=True), "--disable-bias-linear: expected"),
        (DENSE, dict(activation_func=len), "--swiglu, --squared-relu or --quick-geglu: expected"),
        (DENSE, dict(softmax_type="learnable"), "--softmax-type: expected softmax_type learnable"),
        (DENSE, dict(window_size=[7, 0]), r"--window-size: expected window_size \(7, 0\)"),
        (DENSE, dict(rope_scaling=True), "--use-rope-scaling: expected"),
        (DENSE, dict(mtp_num_layers=1), "--mtp-num-layers: expected mtp_num_layers 1"),
        (DENSE, EXPERTS, "--num-experts: expected num_moe_experts 8"),
        (
            DENSE,
            dict(share_embeddings_and_output_weights=True),
            "--untie-embeddings-and-output-weights: expected",
        ),
        (DENSE, dict(of_a_later_megatron=3), "--of-a-later-megatron: expected"),
        (EXPERTS, dict(moe_router_topk=4), "--moe-router-topk: expected moe_router_topk 4"),
        (EXPERTS, dict(moe_layer_freq=1), r"--moe-layer-freq: expected .*\[1, 1, 1, 1\]"),
        (EXPERTS, dict(moe_router_score_function="softmax"), "--moe-router-score-function: "),
        (EXPERTS, dict(moe_router_enable_expert_bias=False), "--moe-router-enable-expert-bias: "),
        (EXPERTS, dict(moe_router_num_groups=4), "--moe-router-num-groups: expected"),
        (EXPERTS, dict(moe_router_topk_scaling_factor=2.5), "--moe-router-topk-scaling-factor: "),
        (
            EXPERTS,
            dict(moe_router_load_balancing_type="sinkhorn"),
            "--moe-router-load-balancing-type: expected .*sinkhorn",
        ),
        (EXPERTS, dict(moe_shared_expert_intermediate_size=64), "--moe-shared-expert-inter"),
        (LATENT, dict(q_lora_rank=24), "--q-lora-rank: expected q_lora_rank 24"),
        (LATENT, dict(mscale_all_dim=1.0), "--mscale-all-dim: expected"),
        (LATENT, dict(rope_type="rope"), "expected"),
        (YARN, dict(yarn_rotary_scaling_factor=16.0), "--rotary-scaling-factor: "),
        (YARN, dict(yarn_mscale=2.0), "--mscale and --mscale-all-dim: expected"),
    ],
)
def test_another_model_is_refused_by_its_argument(fields, changed, argument):
    with pytest.raises(TSTError, match=argument):
        check_settings(fields, fields | changed)


@pytest.mark.parametrize("mscale", [None, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("all_dim", [None, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("factor", [1.0, 4.0, 32.0])
def test_the_scale_of_yarn_is_megatrons(factor, mscale, all_dim):
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as theirs

    got = computed(
        YARN
        | dict(yarn_rotary_scaling_factor=factor, yarn_mscale=mscale, yarn_mscale_all_dim=all_dim)
    )
    want = theirs._yarn_get_concentration_factor(factor, mscale, all_dim)
    assert got["yarn_mscale"] == pytest.approx(want, rel=1e-9)


def test_what_a_model_computes_is_no_field_of_training():
    """Of Megatron's own fields: the arguments that export-hf looks at are compared here too."""
    from megatron.core.transformer import MLATransformerConfig

    from megatron_tst.export import architectures

    fields = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    asked = {
        name
        for table in vars(architectures).values()
        if isinstance(table, dict)
        for name in table
        if name in fields
    }
    assert len(asked) > 20
    assert [name for name in sorted(asked) if of_training(name)] == []
    assert of_training("moe_grouped_gemm") and of_training("tensor_model_parallel_size")


def test_tensors_are_compared_by_name_and_shape():
    want = {"a": (4, 2), "b": (3,)}
    check_tensors(want, dict(want), "ck")
    for stored, said in [
        ({"a": (4, 2)}, r"ck: expected a tensor b \[3\], as config.json says, got none"),
        (
            want | {"a": (2, 4)},
            r"ck: expected a of shape \[4, 2\], as config.json says, got \[2, 4",
        ),
        (want | {"c": (1,)}, r"expected the tensors of config.json's model alone, got c \[1\] too"),
    ]:
        with pytest.raises(TSTError, match=said):
            check_tensors(want, stored, "ck")


@pytest.mark.parametrize("flags", [["--through-bridge"], ["--hf-config", "folder"]])
def test_the_two_flags_go_together(flags, capsys):
    assert cli.main(["export-hf", "ck", "hf", *flags]) == 2
    assert "Give both or neither" in capsys.readouterr().err


def test_without_bridge(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "megatron.bridge", None)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Glm4MoeForCausalLM"]}))
    said = "Megatron-Bridge: expected an installed package .*pip install megatron-bridge==0.6.2"
    with (
        pytest.raises(TSTError, match=said),
        through_bridge.bridged(None, tmp_path, 500),
    ):
        pass


def test_without_config_json(tmp_path):
    with (
        pytest.raises(TSTError, match=r"config\.json: expected"),
        through_bridge.bridged(None, tmp_path, 500),
    ):
        pass


def test_names_in_the_layouts_that_bridge_knows():
    """The module's own, Transformer Engine's, grouped experts'."""
    name = "decoder.layers.3.mlp.experts.local_experts.7.linear_fc1.weight"
    assert list(through_bridge._names(name)) == [
        name,
        "decoder.layers.3.mlp.experts.linear_fc1.weight7",
    ]
    name = "decoder.layers.0.input_layernorm.weight"
    fused = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    assert list(through_bridge._names(name)) == [name, fused]
    assert through_bridge._canonical(fused) == through_bridge._canonical(name) == name
    one, other = (f"mtp.layers.0.{layer}.mlp" for layer in ("mtp_model_layer", "transformer_layer"))
    assert list(through_bridge._names(one)) == [one, other]
    assert through_bridge._canonical(one) == through_bridge._canonical(other) == other


def test_names_of_code_are_no_reason_where_transformers_has_the_class(tmp_path, monkeypatch):
    """DeepSeek-V3's config.json has them. Without the class the code would have to be run."""
    raw = {"architectures": ["DeepseekV3ForCausalLM"], "auto_map": {"AutoConfig": "mine.Config"}}
    asked = []

    def stop():
        asked.append(True)
        raise ImportError("far enough")

    monkeypatch.setattr(bridge_model, "_auto_bridge", stop)
    path = tmp_path / "config.json"
    for kind, message in (
        ("deepseek_v3", "far enough"),
        ("mine", 'auto_map: expected a model_type that transformers has, got "mine". Code from'),
        (None, "auto_map: expected a model_type that transformers has, got null"),
        (["mine"], "auto_map: expected a model_type that transformers has"),
    ):
        path.write_text(json.dumps(raw | {"model_type": kind}))
        with pytest.raises(TSTError, match=message):
            bridge_model.known(raw | {"model_type": kind}, path)
    assert asked == [True]


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(scoring_func="softmax"), 'scoring_func: expected "sigmoid", got "softmax"'),
        (dict(topk_method="greedy"), 'topk_method: expected "noaux_tc", got "greedy"'),
        (dict(moe_layer_freq=2), "moe_layer_freq: expected 1, got 2"),
        (dict(moe_layer_freq=True), "moe_layer_freq: expected 1, got true"),
        (dict(scoring_func=["sigmoid"]), "scoring_func: expected"),
    ],
)
def test_what_deepseeks_own_code_alone_reads(tmp_path, changed, message):
    """Written into the folder it would be another model there, and transformers would not tell."""
    own = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    with pytest.raises(TSTError, match=message):
        bridge_model.known(own | changed, tmp_path / "config.json")
