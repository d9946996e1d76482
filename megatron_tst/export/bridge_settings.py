"""What a Megatron model computes, read from its settings, and held against what Megatron-Bridge
builds from a config.json. Plain values: no Bridge, no torch.

Two models with the same tensors can compute different things: another base of the rotary positions,
another router. So every field of Megatron's TransformerConfig and GPTModelConfig is compared, but
for those that change how or how fast a model is trained, and not what it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from megatron_tst.errors import refuse

# Fields of training, layout, precision and kernels, by how their names begin. What is not here is
# compared, so a field of a later Megatron is refused where it differs, and not overlooked.
_TRAINING = """
    tensor_ gtp_ pipeline_ virtual_ sequence_parallel context_parallel hierarchical_ max_seqlen_
    hybrid_context_parallel expert_ tp_ overlap_ delay_ ep_overlap_ variable_seq_ batch_p2p_
    use_ring_ deallocate_ defer_ wgrad_ microbatch_ cpu_offloading _ barrier_ num_layers_in_
    account_for_ cp_comm_ high_priority_ symmetric_ nccl_

    fp16 bf16 params_dtype autocast_ enable_autocast fp8 fp4 first_last_ num_layers_at_
    attention_softmax_in_fp32 fp32_residual_connection disable_ moe_router_dtype use_kitchen
    kitchen_ quant_recipe apply_query_key_layer_scaling batch_invariant_

    perform_initialization use_cpu_initialization init_ embedding_init_ output_layer_init_ timers
    finalize_ grad_ moe_grad_ mtp_grad_ no_sync_ param_sync_ deterministic_ num_microbatches_
    hidden_dropout attention_dropout recompute_ distribute_ calculate_per_token_loss test_mode
    config_logger_ mtp_loss_scaling_factor mtp_detach_heads mtp_standalone mtp_enabled
    moe_aux_loss_coeff moe_z_loss_ moe_input_jitter_ moe_router_bias_update_rate moe_token_drop
    moe_per_layer_ moe_enable_routing_replay moe_router_quantile_ dsa_indexer_loss_
    dsa_indexer_use_sparse_loss dsa_kernel_ experimental_attention_variant_loss_ qk_clip log_max_

    cross_entropy_ masked_softmax_fusion persist_layer_norm memory_efficient_ bias_activation_
    bias_dropout_ apply_rope_fusion use_fused_ fused_ gradient_accumulation_ use_te_
    use_transformer_engine_ transformer_impl transformer_layer_spec moe_permute_ moe_grouped_gemm
    moe_token_dispatcher_ moe_enable_deepep moe_flex_ moe_deepep_ moe_hybridep_ moe_ncclep_
    moe_router_fusion moe_router_padding_ moe_shared_expert_overlap use_grouped_gemm_ moe_single_
    moe_pad_ moe_layer_recompute moe_paged_ cuda_graph_ enable_cuda_graph external_cuda_ inference_
    flash_ use_inference_ attention_backend clone_ fine_grained_ offload_ min_offloaded_
    delta_offload_ activation_offload_ activation_func_fp8_ cache_mla_ mla_down_proj_ dense_grouped_
    mlp_chunks_ hetereogenous_dist_ use_mamba_

    hf_model_ make_vocab_ vocab_size should_pad_ seq_length parallel_output scatter_ restore_
    use_arbitrary_
""".split()
_IS_OF_TRAINING = re.compile("|".join(map(re.escape, _TRAINING)))
# Of multi-latent attention alone
_LATENT = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rope_type",
)
_LATENT_YARN = (
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
# Losses: they choose no other experts
_BALANCING = {"aux_loss", "seq_aux_loss", "global_aux_loss", "none"}
# Where a field is asked for by an argument of another name
_ARGUMENTS = {
    "num_moe_experts": "num_experts",
    "share_embeddings_and_output_weights": "untie_embeddings_and_output_weights",
    "layernorm_epsilon": "norm_epsilon",
    "activation_func": "swiglu, squared_relu or quick_geglu",
    "gated_linear_unit": "swiglu or quick_geglu",
    "add_bias_linear": "disable_bias_linear",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "yarn_rotary_scaling_factor": "rotary_scaling_factor",
    "yarn_mscale": "mscale and mscale_all_dim",
    "is_hybrid_model": "hybrid_layer_pattern",
}


def of_training(name: str) -> bool:
    """Whether a field of a config changes nothing of what the model computes."""
    return _IS_OF_TRAINING.match(name) is not None


def computed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a model computes: its fields in one spelling, without those that have no effect.

    Example: a router with one group is one without groups, and a dense model has no router.

    Args:
        fields: name -> value, of a TransformerConfig and what GPTModel takes besides.
    """
    got = {name: value for name, value in fields.items() if not of_training(name)}
    get = got.get
    got["activation_func"] = getattr(get("activation_func"), "__name__", get("activation_func"))
    got["add_qkv_bias"] = bool(get("add_qkv_bias") or get("add_bias_linear"))
    got["num_query_groups"] = get("num_query_groups") or get("num_attention_heads")
    got["kv_channels"] = get("kv_channels") or get("hidden_size") // get("num_attention_heads")
    got["window_size"] = tuple(get("window_size")) if get("window_size") else None
    got["mtp_num_layers"] = get("mtp_num_layers") or None
    drop = {
        "window_attn_skip_freq": not got["window_size"],
        "mtp_": not got["mtp_num_layers"],
        "dsa_": not get("experimental_attention_variant"),
        "linear_": not get("linear_attention_freq"),
        "mup_": not get("use_mup"),
        "mamba_": not get("is_hybrid_model"),
        "rope_scaling_factor": not get("rope_scaling"),
        "moe_": not get("num_moe_experts"),
    }
    _positions(got)
    if get("num_moe_experts"):
        _experts(got)
    without = tuple(start for start, yes in drop.items() if yes)
    return {name: value for name, value in got.items() if not name.startswith(without)}


def _positions(got):
    """Rotary positions as they come out."""
    latent = bool(got.get("multi_latent_attention"))
    yarn = {name: got.pop(name, None) for name in list(got) if name.startswith("yarn_")}
    of_latent = {name: got.pop(name, None) for name in _LATENT + _LATENT_YARN}
    if latent:
        del got["kv_channels"], got["num_query_groups"]  # it has sizes of its own
        factor = of_latent["rotary_scaling_factor"]
        # of the attention's scale, whatever the type of rope (multi_latent_attention.py)
        got["mscale_all_dim"] = _mscale(factor, of_latent["mscale_all_dim"])
        if of_latent["rope_type"] == "yarn" and factor != 1:
            got |= {name: of_latent[name] for name in _LATENT_YARN if name != "mscale_all_dim"}
        else:
            of_latent["rope_type"] = "rope"  # which yarn is with a factor of 1
        got |= {name: of_latent[name] for name in _LATENT}
    elif got.get("position_embedding_type") == "yarn":
        factor, all_dim = yarn["yarn_rotary_scaling_factor"], yarn.pop("yarn_mscale_all_dim", None)
        mscale = yarn["yarn_mscale"]
        if mscale is None or all_dim is None:  # yarn_rotary_pos_embedding.py
            mscale, all_dim = 1, 0
        got |= yarn | {"yarn_mscale": _mscale(factor, mscale) / _mscale(factor, all_dim)}


def _mscale(factor, mscale):
    return round(0.1 * mscale * math.log(factor) + 1.0, 12) if factor > 1 else 1.0


def _experts(got):
    """The router and which layers have experts, each in one spelling."""
    layers, frequency = got["num_layers"], got.get("moe_layer_freq", 1)
    if not isinstance(frequency, (list, tuple)):
        frequency = [int(i % frequency == 0) for i in range(layers)]
    got["moe_layer_freq"] = list(frequency)
    got["moe_ffn_hidden_size"] = got.get("moe_ffn_hidden_size") or got["ffn_hidden_size"]
    if all(frequency):
        del got["ffn_hidden_size"]
    kinds = got.get("moe_router_load_balancing_type")
    kinds = set(kinds) if isinstance(kinds, (list, tuple)) else {kinds}
    got["moe_router_load_balancing_type"] = sorted(kinds - _BALANCING) or "a loss"
    got["moe_router_topk_scaling_factor"] = got.get("moe_router_topk_scaling_factor") or 1.0
    if got.get("moe_router_score_function") != "softmax":
        got.pop("moe_router_pre_softmax", None)
    if got.get("moe_router_num_groups") in (None, 1):
        got.pop("moe_router_num_groups", None)
        got.pop("moe_router_group_topk", None)


def check_settings(run: Mapping[str, Any], bridge: Mapping[str, Any]) -> None:
    """Refuse a run whose model computes something else than config.json says.

    Args:
        run, bridge: the fields of the run's model, and of what Bridge builds from config.json.

    Raises:
        TSTError: they differ, with the argument that does.
    """
    ours, theirs = computed(run), computed(bridge)
    # first what the rest follows from: whether there are experts before what they are

    def follows(name):
        return name not in ours or name not in theirs, name.startswith("moe_"), "mscale" in name

    names = sorted(ours.keys() | theirs.keys(), key=lambda name: (follows(name), name))
    for name in names:
        got, expected = ours.get(name), theirs.get(name)
        if got != expected:
            argument = _ARGUMENTS.get(name, name).replace("_", "-").replace(", ", ", --")
            argument = argument.replace(" or ", " or --").replace(" and ", " and --")
            refuse(
                f"--{argument}",
                f"{name} {expected}, as Megatron-Bridge reads config.json",
                got,
                "Give the config.json of the model that was trained.",
            )


def check_tensors(
    wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], where: object
) -> None:
    """Refuse a checkpoint that has not the tensors of the model, each by name and shape.

    Args:
        wanted, stored: name -> shape, of the model that Bridge builds and of the checkpoint.
        where: the checkpoint.

    Raises:
        TSTError: one is missing, or there, or of another shape.
    """
    do = "Give the config.json of the model that was trained."
    for name, shape in wanted.items():
        if name not in stored:
            refuse(where, f"a tensor {name} {list(shape)}, as config.json says", "none", do)
        if stored[name] != shape:
            expected = f"{name} of shape {list(shape)}, as config.json says"
            refuse(where, expected, list(stored[name]), do)
    for name in stored:
        if name not in wanted:
            expected = "the tensors of config.json's model alone"
            refuse(where, expected, f"{name} {list(stored[name])} too", do)
