"""Which arguments of a run are another architecture, and which are of training alone."""

import argparse

import pytest
from support.hf_folder import config_of

from megatron_tst.errors import TSTError
from megatron_tst.export.architectures import architecture_of
from megatron_tst.export.hf_config import arguments
from megatron_tst.export.nemo import provider


def run(kind="qwen3_moe", **changes):
    return argparse.Namespace(**vars(arguments(config_of(kind))) | changes)


def architecture(kind="qwen3_moe", **changes):
    return architecture_of(run(kind, **changes), 96, "float32")


@pytest.mark.parametrize(
    "changes",
    [
        dict(moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"]),
        dict(moe_router_load_balancing_type=["global_aux_loss"]),
        dict(moe_router_load_balancing_type="none"),
        dict(moe_router_load_balancing_type=("seq_aux_loss", "global_aux_loss", "aux_loss")),
        dict(moe_z_loss_coeff=1e-3),
        dict(moe_input_jitter_eps=0.01),
        dict(moe_router_dtype="fp32"),
        dict(moe_router_bias_update_rate=1e-2),
        dict(moe_router_topk_scaling_factor=1.0),
        dict(moe_router_num_groups=2),  # without --moe-router-group-topk
        dict(moe_router_num_groups=2, moe_router_group_topk=2),  # all groups
        dict(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="hybridep"),
        dict(moe_grouped_gemm=True, moe_permute_fusion=True, moe_router_fusion=True),
        dict(moe_router_padding_for_quantization=True),
        dict(moe_use_upcycling=True),
        dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
        dict(hidden_dropout=0.1, attention_dropout=0.1),
        dict(fp8="hybrid", fp8_recipe="mxfp8", first_last_layers_bf16=True),
        dict(fp4="e2m1", fp8_param_gather=True),
        dict(apply_query_key_layer_scaling=True, attention_softmax_in_fp32=True),
        dict(fp32_residual_connection=True, fused_residual_rmsnorm=True),
        dict(qk_clip=True, qk_clip_alpha=0.5, log_max_attention_logit=True),
        dict(init_method_xavier_uniform=True, embedding_init_method_std=1.0),
        dict(transformer_impl="local", attention_backend="flash", spec=["local"]),
        dict(calculate_per_token_loss=True, reset_position_ids=True, eod_mask_loss=True),
        dict(tensor_model_parallel_size=8, sequence_parallel=True, context_parallel_size=2),
        dict(rotary_seq_len_interpolation_factor=1),
    ],
)
def test_arguments_of_training_alone_are_no_other_architecture(changes):
    assert architecture(**changes).config == architecture().config


@pytest.mark.parametrize(
    "frequency, layers",
    [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), ([0, 1, 1, 0, 1], [1, 2, 4])],
)
def test_layers_with_experts(frequency, layers):
    """Megatron's --moe-layer-freq; those without are mlp_only_layers."""
    found = architecture(num_layers=5, moe_layer_freq=frequency)
    assert sorted(found.expert_layers) == layers
    assert found.config["mlp_only_layers"] == [i for i in range(5) if i not in layers]
    assert found.config["decoder_sparse_step"] == 1


@pytest.mark.parametrize("before, normed", [(False, True), (True, False)])
def test_whether_the_chosen_experts_weights_are_normed(before, normed):
    """A softmax over the chosen ones sums to one, and one over all experts does not."""
    assert architecture(moe_router_pre_softmax=before).config["norm_topk_prob"] is normed


@pytest.mark.parametrize("width, want", [(24, 24), (None, 48)])
def test_the_width_of_an_expert(width, want):
    assert architecture(moe_ffn_hidden_size=width).config["moe_intermediate_size"] == want


def test_the_two_names_of_the_norms_epsilon():
    """Megatron 0.18 stores what 0.19 calls layernorm_epsilon as norm_epsilon too."""
    assert architecture(norm_epsilon=3e-4, layernorm_epsilon=1e-5).config["rms_norm_eps"] == 3e-4
    assert architecture(norm_epsilon=None, layernorm_epsilon=2e-5).config["rms_norm_eps"] == 2e-5


@pytest.mark.parametrize("grouped, groups", [(True, 2), (False, 4)])
def test_groups_count_with_grouped_queries_alone(grouped, groups):
    found = architecture(group_query_attention=grouped, num_query_groups=2)
    assert found.groups == found.config["num_key_value_heads"] == groups


def test_heads_without_a_width_of_their_own():
    assert architecture(kv_channels=None).head_dim == 32 // 4
    assert architecture(kv_channels=6).config["head_dim"] == 6


def test_the_factor_of_scaled_positions_is_megatrons():
    """--rope-scaling-factor never reaches the model, which is built with 8."""
    with pytest.warns(UserWarning, match="--rope-scaling-factor 4 in the checkpoint"):
        found = architecture("llama", use_rope_scaling=True, rope_scaling_factor=4.0)
    assert found.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_a_list_of_coefficients_gives_the_first():
    types = dict(moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"])
    config = architecture(moe_aux_loss_coeff=[1e-2, 1e-3], **types).config
    assert config.pop("router_aux_loss_coef") == 1e-2
    assert config.items() <= architecture().config.items()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(moe_router_topk_scaling_factor=2.5), "expected None or 1.0, got 2.5"),
        (dict(moe_router_load_balancing_type="sinkhorn"), "expected aux_loss or .*, got sinkhorn"),
        (dict(moe_router_load_balancing_type=["aux_loss", "sinkhorn"]), ", got sinkhorn"),
        (dict(moe_router_load_balancing_type="quantile_balancing"), ", got quantile_balancing"),
        (dict(moe_router_score_function="sigmoid"), "expected softmax, got sigmoid"),
        (dict(moe_router_enable_expert_bias=True), "expected False, got True"),
        (dict(moe_router_group_topk=2, moe_router_num_groups=4), "expected none, got 2"),
        (dict(moe_router_topk_limited_devices=2), "expected None, got 2"),
        (dict(moe_router_force_load_balancing=True), "expected False, got True"),
        (dict(moe_router_force_biased=0.5), "expected None, got 0.5"),
        (dict(moe_expert_capacity_factor=1.5), "expected None, got 1.5"),
        (dict(moe_expert_rank_capacity_factor=1.5), "expected None, got 1.5"),
        (dict(moe_apply_probs_on_input=True), "expected False, got True"),
        (dict(moe_shared_expert_intermediate_size=64), "expected None, got 64"),
        (dict(moe_latent_size=8), "expected None, got 8"),
        (dict(softmax_scale=0.5), "expected None, got 0.5"),
        (dict(softmax_type="off-by-one"), "expected vanilla, got off-by-one"),
        (dict(spec=["my.specs", "layers"]), "expected None or local, got my.specs"),
        (dict(is_hybrid_model=True), "expected False, got True"),
        (dict(window_size=(128, 0)), "expected None, got 128"),
        (dict(no_rope_freq=[0, 1]), "expected None, got 0"),
        (dict(use_mup=True), "expected False, got True"),
        (dict(kv_channels=7), "expected an even number, got 7"),
    ],
)
def test_arguments_that_change_the_model_are_refused_by_name(changes, message):
    flag = "--" + next(iter(changes)).replace("_", "-")
    with pytest.raises(TSTError, match=f"^{flag}: .*{message}"):
        architecture(**changes)


def test_a_llama_that_transformers_does_not_build():
    with pytest.raises(TSTError, match="^--hidden-size: expected a multiple of .* 4, got 34"):
        architecture("llama", hidden_size=34)
    assert architecture("qwen3", hidden_size=34).config["hidden_size"] == 34


def test_two_ways_of_scaling_positions_are_refused():
    with pytest.raises(TSTError, match="--use-rope-scaling: expected no --rotary-seq-len-interp"):
        architecture("llama", use_rope_scaling=True, rotary_seq_len_interpolation_factor=4)


@pytest.mark.parametrize("spec", ["local", "transformer_engine"])
def test_dense_layers_among_experts_in_run_config(spec):
    args = run(num_layers=3, moe_layer_freq=[0, 1, 1], add_qkv_bias=False)
    found = provider(args, architecture_of(args, 96, "bfloat16"), spec)
    assert found["moe_layer_freq"] == [0, 1, 1]
    assert found["transformer_layer_spec"] == {
        "_target_": "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec",
        "_partial_": True,
        "use_transformer_engine": spec == "transformer_engine",
    }


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("spec", ["local", "transformer_engine"])
def test_run_config_says_the_same_model(kind, spec):
    """run_config.yaml's GPTModelProvider, value by value; Bridge itself: tests/peers."""
    changes = dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0})
    if kind == "llama":
        changes = {
            "tie_word_embeddings": True,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "rope_theta": 50000.0,
        }
    args = arguments(config_of(kind, rms_norm_eps=3e-5, num_hidden_layers=3, **changes))
    args.add_qkv_bias = False
    found = provider(args, architecture_of(args, 96, "bfloat16"), spec)
    experts = {
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 24,
        "moe_router_topk": 2,
        "moe_router_pre_softmax": False,
        "moe_layer_freq": [1, 1, 1],
    }
    assert (
        found.items()
        >= {
            "num_layers": 3,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 8,
            "normalization": "RMSNorm",
            "layernorm_epsilon": 3e-5,
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "position_embedding_type": "rope",
            "rotary_percent": 1.0,
            "rotary_base": 50000.0,
            "rope_scaling": kind == "llama",
            "rope_scaling_factor": 8.0,
            "seq_len_interpolation_factor": None if kind == "llama" else 4,
            "share_embeddings_and_output_weights": kind == "llama",
            "qk_layernorm": kind != "llama",
            "vocab_size": 96,
            "seq_length": 64,
            "params_dtype": {"_target_": "torch.bfloat16", "_call_": False},
            **(experts if kind == "qwen3_moe" else {"num_moe_experts": None}),
        }.items()
    )
    if kind != "qwen3_moe":  # of its settings of experts none but a kernel's switch
        assert {name for name in found if name.startswith("moe_")} <= {"moe_permute_fusion"}
    assert 96 % found["make_vocab_size_divisible_by"] == 0
    assert found["transformer_layer_spec"]["_target_"].endswith(f".{spec}_layer_spec")
    assert (found.get("apply_rope_fusion") is False) == (spec == "local")
