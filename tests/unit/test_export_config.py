"""What an export says a model is, from Megatron's arguments alone: what has no counterpart, and
every value of Bridge's run_config.yaml.
"""

import argparse
import functools

import pytest

from megatron_tst.errors import TSTError
from megatron_tst.export.architectures import architecture_of
from megatron_tst.export.nemo import provider

DENSE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --kv-channels 24 "
    "--group-query-attention --num-query-groups 2 --ffn-hidden-size 160 --seq-length 128 "
    "--max-position-embeddings 256 --position-embedding-type rope --rotary-base 500000 "
    "--normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--micro-batch-size 1"
)
EXPERTS = (
    "--qk-layernorm --num-experts 8 --moe-router-topk 3 --moe-ffn-hidden-size 48 "
    "--moe-aux-loss-coeff 0.01 --moe-router-load-balancing-type aux_loss"
)


@functools.cache
def parser():
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


def arguments(flags, **changes):
    """As Megatron's own parser makes them."""
    args = parser().parse_args(flags.split())
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def described(flags, **changes):
    args = arguments(flags, **changes)
    arch = architecture_of(args, 500, "bfloat16", 7)
    return arch, provider(args, arch, "transformer_engine")


def test_a_dense_model():
    arch, model = described(DENSE)
    assert (arch.name, arch.layers, arch.heads, arch.groups) == ("LlamaForCausalLM", 4, 4, 2)
    assert (arch.head_dim, arch.hidden, arch.experts, arch.tied) == (24, 64, 0, False)
    config = arch.config
    assert (config["rope_theta"], config["rope_scaling"]) == (500000.0, None)
    assert (config["rms_norm_eps"], config["eos_token_id"]) == (1e-6, 7)
    assert (config["vocab_size"], config["intermediate_size"]) == (500, 160)
    want = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 160,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 24,
        "qk_layernorm": False,
        "num_moe_experts": None,
        "layernorm_epsilon": 1e-6,
        "rotary_base": 500000.0,
        "rope_scaling": False,
        "share_embeddings_and_output_weights": False,
        "vocab_size": 500,
        "make_vocab_size_divisible_by": 4,
        "seq_length": 256,
        "gated_linear_unit": True,
    }
    assert {name: model.get(name) for name in want} == want
    assert not [name for name in model if name.startswith("moe_")]


def test_a_model_of_experts():
    tied = dict(untie_embeddings_and_output_weights=False)
    validated = dict(moe_aux_loss_coeff=0.01)  # Megatron takes a list of one apart
    arch, model = described(f"{DENSE} {EXPERTS}", **tied, **validated)
    assert (arch.name, arch.experts, arch.tied) == ("Qwen3MoeForCausalLM", 8, True)
    assert arch.expert_layers == {0, 1, 2, 3}
    config = arch.config
    assert (config["num_experts"], config["num_experts_per_tok"]) == (8, 3)
    assert (config["moe_intermediate_size"], config["norm_topk_prob"]) == (48, True)
    assert (config["router_aux_loss_coef"], config["mlp_only_layers"]) == (0.01, [])
    want = {
        "num_moe_experts": 8,
        "moe_router_topk": 3,
        "moe_ffn_hidden_size": 48,
        "moe_aux_loss_coeff": 0.01,
        "qk_layernorm": True,
        "share_embeddings_and_output_weights": True,
    }
    assert {name: model.get(name) for name in want} == want


def test_rope_that_is_scaled():
    arch, model = described(f"{DENSE} --use-rope-scaling")
    assert arch.config["rope_scaling"]["rope_type"] == "llama3"
    assert (model["rope_scaling"], model["rope_scaling_factor"]) == (True, 8.0)
    arch, model = described(f"{DENSE} --rotary-seq-len-interpolation-factor 4")
    assert arch.config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert (model["rope_scaling"], model["seq_len_interpolation_factor"]) == (False, 4)


# A value with which the model computes something else.
OTHERWISE = dict(
    normalization="LayerNorm",
    swiglu=False,
    add_bias_linear=True,
    add_qkv_bias=True,
    rotary_percent=0.5,
    position_embedding_type="none",
    rotary_interleaved=True,
    layernorm_zero_centered_gamma=True,
    use_mup=True,
    softmax_type="learnable",
    apply_residual_connection_post_layernorm=True,
    window_size=(128, 0),
    linear_attention_freq=4,
    experimental_attention_variant="gated_delta_net",
    attention_output_gate=True,
    no_rope_freq=4,
    qk_l2_norm=True,
    activation_func_clamp_value=7.0,
    glu_linear_offset=1.0,
    quick_geglu=True,
    hybrid_layer_pattern="M*",
    hybrid_override_pattern="M*",
    heterogeneous_layers_config_path="layers.json",
    heterogeneous_layers_config_encoded_json="{}",
    softmax_scale=0.1,
    spec=["my.specs", "layers"],
    is_hybrid_model=True,
)
OTHERWISE_OF_EXPERTS = dict(
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_topk_scaling_factor=2.5,
    moe_router_group_topk=True,
    moe_router_topk_limited_devices=2,
    moe_router_force_load_balancing=True,
    moe_router_force_biased=0.5,
    moe_expert_capacity_factor=1.0,
    moe_expert_rank_capacity_factor=1.0,
    moe_apply_probs_on_input=True,
    moe_router_load_balancing_type="sinkhorn",
    moe_latent_size=32,
    moe_shared_expert_intermediate_size=64,
    moe_mlp_glu_interleave_size=32,
)


@pytest.mark.parametrize("name", [*OTHERWISE, *OTHERWISE_OF_EXPERTS])
def test_what_has_no_counterpart_is_refused(name):
    value = (OTHERWISE | OTHERWISE_OF_EXPERTS)[name]
    flags = f"{DENSE} {EXPERTS}"
    described(flags)
    # a flag of experts means nothing where there are none
    for given in (DENSE, flags) if name in OTHERWISE else (flags,):
        with pytest.raises(TSTError, match=f"--{name.replace('_', '-')}: expected"):
            described(given, **{name: value})
    if name in OTHERWISE_OF_EXPERTS:
        described(DENSE, **{name: value})
