"""Which Hugging Face architecture a Megatron model is, from the arguments of its run, and its
config.json.

Llama       RMSNorm, SwiGLU, rotary positions, grouped queries, no biases; tied or untied embeddings
Qwen3       the same with a norm on queries and keys
Qwen3-MoE   the same with experts, chosen by a softmax router, in some or all layers
DeepSeek-V3 RMSNorm, SwiGLU, multi-latent attention, experts and shared experts, chosen by a sigmoid
            router with a bias and a limit on groups, in all layers but the first ones

A HybridModel whose layers alternate between attention and MLP is one of these too. Anything else is
refused by the name of the argument that differs: an export that is nearly right is worse than none.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from megatron_tst.errors import refuse, warn

ROPE_FACTOR = 8.0  # of GPTModel; megatron.training never hands --rope-scaling-factor on
# Megatron's constants are Llama 3.1's (rotary_pos_embedding.py)
LLAMA3_ROPE = {
    "factor": ROPE_FACTOR,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# MLATransformerConfig's, for which megatron.training has no flags
YARN = {"original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
# transformers and DeepSeek's own code build the norms of the latents with it, whatever
# rms_norm_eps says
LATENT_NORM_EPSILON = 1e-6

# argument: what it must be in all (absent ones are not asked: other versions of Megatron have
# others). These are the arguments that change what a model computes. Those of training alone
# (losses that balance experts, dropout, jitter, initialisation, recomputation, dispatchers,
# precision) are not asked.
_PLAIN = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "rotary_percent": (1.0,),
    "position_embedding_type": ("rope",),
    "rotary_interleaved": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "use_mup": (False,),
    "softmax_type": ("vanilla",),
    "apply_residual_connection_post_layernorm": (False,),
    "window_size": (None,),
    "linear_attention_freq": (None,),
    "experimental_attention_variant": (None,),
    "attention_output_gate": (False,),
    "no_rope_freq": (None,),
    "qk_l2_norm": (False,),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0,),
    "quick_geglu": (False,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "softmax_scale": (None,),
}
# of a GPTModel
_GPT = {
    "spec": (None, "local"),
    "is_hybrid_model": (False,),
}
_EXPERTS = {
    "moe_router_topk_limited_devices": (None,),
    "moe_router_force_load_balancing": (False,),
    "moe_router_force_biased": (None,),
    "moe_expert_capacity_factor": (None,),
    "moe_expert_rank_capacity_factor": (None,),
    "moe_apply_probs_on_input": (False,),
    # losses alone; "sinkhorn" and "quantile_balancing" choose other experts
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    "moe_latent_size": (None,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_shared_expert_glu_interleave_size": (None,),
}
# of Qwen3-MoE
_SOFTMAX = {
    "moe_router_score_function": ("softmax",),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_shared_expert_intermediate_size": (None,),
}
# of DeepSeek-V3
_SIGMOID = {
    "moe_router_score_function": ("sigmoid",),
    "moe_shared_expert_gate": (False,),
}
_NOT = "This model has no counterpart among Llama, Qwen3, Qwen3-MoE and DeepSeek-V3."
# what the model has: (class, model_type) of transformers
_NAMES = {
    "neither": ("LlamaForCausalLM", "llama"),
    "qk_norm": ("Qwen3ForCausalLM", "qwen3"),
    "experts": ("Qwen3MoeForCausalLM", "qwen3_moe"),
    "latents": ("DeepseekV3ForCausalLM", "deepseek_v3"),
}


@dataclass(frozen=True)
class Architecture:
    """A model as Hugging Face names it.

    Args:
        name: class name, "LlamaForCausalLM" and so on.
        layers, heads, groups, head_dim, hidden: sizes; groups of queries share keys and values.
            head_dim with multi-latent attention: of queries and keys, positions included.
        experts: of a layer that has them, 0 for a dense model.
        expert_layers: the layers with experts.
        tied: the output layer is the embedding.
        vocab: rows of the embedding, without Megatron's padding: the largest id + 1, or more.
        config: what config.json holds.
        mtp_layers: of multi-token prediction that the export has, after the others.
        hybrid: the checkpoint is a HybridModel's, whose layers are attention or MLP: layer n's are
            its layers 2n and 2n + 1.
    """

    name: str
    layers: int
    heads: int
    groups: int
    head_dim: int
    hidden: int
    experts: int
    expert_layers: frozenset[int]
    tied: bool
    vocab: int
    config: dict
    mtp_layers: int = 0
    hybrid: bool = False

    @property
    def latent(self) -> bool:
        """Whether attention is multi-latent."""
        return self.name == "DeepseekV3ForCausalLM"

    @property
    def qk_norm(self) -> bool:
        """Whether each head's queries and keys are normalised."""
        return self.name.startswith("Qwen3")


def architecture_of(
    args: argparse.Namespace, vocab: int, dtype: str, end_of_text: int | None = None
) -> Architecture:
    """The architecture of a run's model.

    Args:
        args: Megatron's arguments from the checkpoint.
        vocab: rows of the embedding, without Megatron's padding.
        dtype: of the exported weights, "bfloat16" or "float32".
        end_of_text: the id that ends a document.

    Raises:
        TSTError: the model has no counterpart among the four, with the argument that differs.
    """
    hybrid = bool(_pattern_of(args))
    _check(args, _PLAIN if hybrid else _PLAIN | _GPT)
    layers, attention, expert_layers = _layers(args)
    latent = attention == "+"
    experts = args.num_experts if expert_layers else 0
    qk_norm = bool(getattr(args, "qk_layernorm", False))
    if expert_layers:
        _check(args, _EXPERTS | (_SIGMOID if latent else _SOFTMAX))
    if (experts or latent) and not qk_norm:
        flag, name = "--num-experts", "Qwen3-MoE"
        if latent:
            flag, name = "--multi-latent-attention", "DeepSeek-V3"
        do = f"{'Latents' if latent else 'Experts'} without it have no counterpart here."
        refuse(flag, f"--qk-layernorm beside it ({name})", "none", do)
    heads, hidden = args.num_attention_heads, args.hidden_size
    tied = not args.untie_embeddings_and_output_weights
    mtp = getattr(args, "mtp_num_layers", None) or 0
    config = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": args.ffn_hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "silu",
        "max_position_embeddings": args.max_position_embeddings,
        "rms_norm_eps": getattr(args, "norm_epsilon", None) or args.layernorm_epsilon,  # 0.18, 0.19
        "rope_theta": float(args.rotary_base),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "initializer_range": args.init_method_std,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if latent:
        has, groups = "latents", heads
        head_dim = args.qk_head_dim + args.qk_pos_emb_head_dim
        config |= _latent(args, config["rms_norm_eps"]) | _deepseek_experts(
            args, layers, expert_layers
        )
        if mtp > 1 and getattr(args, "mtp_use_repeated_layer", False):
            do = "DeepSeek-V3 has a layer for each further token."
            refuse("--mtp-use-repeated-layer", "none with --mtp-num-layers above 1", mtp, do)
        config["num_nextn_predict_layers"] = mtp
    else:
        groups, head_dim = _heads(args, qk_norm)
        has = "experts" if experts else "qk_norm" if qk_norm else "neither"
        config |= {
            "num_key_value_heads": groups,
            "head_dim": head_dim,
            "rope_scaling": _rope_scaling(args, hybrid),
        }
        if has == "neither":
            config["mlp_bias"] = False
        else:
            config |= {"use_sliding_window": False, "sliding_window": None}
        if experts:
            config |= _softmax_experts(args, layers, expert_layers)
        if mtp:
            warn(
                "the layers of multi-token prediction (--mtp-num-layers) are left out: "
                f"{_NAMES[has][0]} has none"
            )
            mtp = 0
    name, kind = _NAMES[has]
    return Architecture(
        name=name,
        layers=layers,
        heads=heads,
        groups=groups,
        head_dim=head_dim,
        hidden=hidden,
        experts=experts,
        expert_layers=expert_layers,
        tied=tied,
        vocab=vocab,
        config={"architectures": [name], "model_type": kind} | config,
        mtp_layers=mtp,
        hybrid=hybrid,
    )


def _heads(args, qk_norm) -> tuple[int, int]:
    """(groups, width of a head) of attention with grouped queries"""
    heads, hidden = args.num_attention_heads, args.hidden_size
    groups = args.num_query_groups if getattr(args, "group_query_attention", False) else heads
    head_dim = args.kv_channels or hidden // heads
    if not qk_norm and hidden % heads:
        do = "transformers builds no Llama so."
        refuse("--hidden-size", f"a multiple of --num-attention-heads {heads}", hidden, do)
    _check_even("--kv-channels", head_dim)
    return groups, head_dim


def _check_even(flag, width):
    if width % 2:
        refuse(flag, "an even number", width, "transformers' rotary positions need it.")


def _softmax_experts(args, layers, expert_layers) -> dict:
    """Qwen3-MoE's part of config.json."""
    if _groups(args) != (1, 1):
        got = args.moe_router_group_topk
        refuse("--moe-router-group-topk", "none", got, _NOT)
    return {
        "num_experts": args.num_experts,
        "num_experts_per_tok": args.moe_router_topk,
        "moe_intermediate_size": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        "norm_topk_prob": not args.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(layers) if i not in expert_layers],
        "router_aux_loss_coef": _first(getattr(args, "moe_aux_loss_coeff", 0.0)),
        "output_router_logits": False,
    }


def _groups(args) -> tuple[int, int]:
    """(groups of experts, how many of them a token may use); (1, 1) without a limit."""
    groups = getattr(args, "moe_router_num_groups", None)
    chosen = getattr(args, "moe_router_group_topk", None)
    # Megatron asks --moe-router-group-topk alone (moe_utils.py, compute_topk)
    return (1, 1) if not chosen or groups == chosen else (groups, chosen)


def _deepseek_experts(args, layers, expert_layers) -> dict:
    """DeepSeek-V3's part of config.json about experts."""
    dense = layers - len(expert_layers)
    if expert_layers != frozenset(range(dense, layers)) or not expert_layers:
        refuse(
            "--num-experts and --moe-layer-freq",
            "experts in all layers but the first ones (DeepSeek-V3)",
            f"experts in layers {sorted(expert_layers)} of {layers}",
            "Multi-latent attention with other layers has no counterpart here.",
        )
    width = args.moe_ffn_hidden_size or args.ffn_hidden_size
    shared = getattr(args, "moe_shared_expert_intermediate_size", None) or 0
    if not shared or shared % width:
        refuse(
            "--moe-shared-expert-intermediate-size",
            f"a multiple of the {width} of an expert",
            shared or "none",
            "DeepSeek-V3 counts its shared experts by it.",
        )
    groups, chosen = _groups(args)
    # a group counts as much as its best --moe-router-topk / --moe-router-group-topk experts
    if groups > 1 and args.moe_router_topk // chosen != 2:
        refuse(
            "--moe-router-group-topk",
            f"half of --moe-router-topk {args.moe_router_topk}",
            chosen,
            "DeepSeek-V3 judges a group by its best two experts, Megatron by as many as are "
            "chosen in one.",
        )
    if args.num_experts // groups < 2:
        expected, do = f"at least two experts in each of {groups}", "DeepSeek-V3 asks for two."
        refuse("--num-experts", expected, args.num_experts, do)
    kinds = getattr(args, "moe_router_load_balancing_type", "aux_loss")
    scale = getattr(args, "moe_router_topk_scaling_factor", None)
    return {
        "n_routed_experts": args.num_experts,
        "n_shared_experts": shared // width,
        "num_experts_per_tok": args.moe_router_topk,
        "moe_intermediate_size": width,
        "first_k_dense_replace": dense,
        "n_group": groups,
        "topk_group": chosen,
        # moe_utils.py: the scores of several experts are normed, that of one is not
        "norm_topk_prob": args.moe_router_topk > 1,
        "routed_scaling_factor": float(scale or 1.0),
        # DeepSeek's own code asks these too
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "aux_loss_alpha": _first(getattr(args, "moe_aux_loss_coeff", 0.0)),
        "seq_aux": "seq_aux_loss" in ([kinds] if isinstance(kinds, str) else kinds),
    }


def _latent(args, epsilon) -> dict:
    """DeepSeek-V3's part of config.json about attention."""
    _check_even("--qk-pos-emb-head-dim", args.qk_pos_emb_head_dim)
    if epsilon != LATENT_NORM_EPSILON:
        warn(
            f"--norm-epsilon {epsilon:g}: transformers normalises the latents of DeepSeek-V3 with "
            f"{LATENT_NORM_EPSILON:g} whatever rms_norm_eps says, Megatron with {epsilon:g}"
        )
    return {
        "num_key_value_heads": args.num_attention_heads,
        "q_lora_rank": getattr(args, "q_lora_rank", None),
        "kv_lora_rank": args.kv_lora_rank,
        "qk_nope_head_dim": args.qk_head_dim,
        "qk_rope_head_dim": args.qk_pos_emb_head_dim,
        "v_head_dim": args.v_head_dim,
        # Megatron's too: pairs of neighbours are rotated (rope_utils.py, mla_rotary_interleaved)
        "rope_interleave": True,
        "rope_scaling": _yarn(args),
    }


def _yarn(args) -> dict | None:
    """rope_scaling of multi-latent attention, which has frequencies of its own and asks neither
    --use-rope-scaling nor --rotary-seq-len-interpolation-factor.
    """
    factor, mscale, all_dim = (
        float(getattr(args, name, value))
        for name, value in (
            ("rotary_scaling_factor", 1.0),
            ("mscale", 1.0),
            ("mscale_all_dim", 0.0),
        )
    )
    if getattr(args, "rope_type", None) == "rope":
        # the softmax is scaled by it without YaRN too (multi_latent_attention.py)
        if factor > 1 and all_dim:
            do = "Without YaRN it has no counterpart."
            refuse("--mscale-all-dim", "0 with --rope-type rope", all_dim, do)
        return None
    if factor == 1:  # YaRN, Megatron's default, changes nothing
        return None
    found = {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": factor,
        "mscale": mscale,
        "mscale_all_dim": all_dim,
        **{key: getattr(args, key, value) for key, value in YARN.items()},
    }
    ours, theirs = yarn_attention(factor, mscale, all_dim)
    return found if math.isclose(ours, theirs) else found | {"attention_factor": ours}


def yarn_attention(factor: float, mscale: float, all_dim: float) -> tuple[float, float]:
    """What YaRN multiplies cosines and sines by: (in Megatron, in transformers where
    attention_factor is absent).
    """

    def of(m):
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    ours = of(mscale) / of(all_dim)
    return ours, ours if mscale and all_dim else of(1.0)


def _check(args, allowed):
    for name, values in allowed.items():
        given = getattr(args, name, values[0])
        # a list has one for each of several load-balancing types
        for got in given if isinstance(given, (list, tuple)) else [given]:
            if got not in values:
                flag = f"--{name.replace('_', '-')}"
                refuse(flag, " or ".join(map(str, values)), got, _NOT)


_PATTERNS = "hybrid_layer_pattern", "hybrid_override_pattern"


def _pattern_of(args) -> str | None:
    """--hybrid-layer-pattern, under its older name too."""
    return next((found for name in _PATTERNS if (found := getattr(args, name, None))), None)


def _layers(args) -> tuple[int, str, frozenset[int]]:
    """How many, the kind of attention ("*", or "+": multi-latent), and those with experts.

    A HybridModel's i-th attention and i-th MLP are one layer (Megatron's own rule,
    gpt_checkpoint_interop.py), where they alternate.
    """
    has = bool(getattr(args, "num_experts", None))
    if (pattern := _pattern_of(args)) is None:
        attention = "+" if getattr(args, "multi_latent_attention", False) else "*"
        return args.num_layers, attention, _expert_layers(args) if has else frozenset()
    main, *mtp = pattern.split("/")
    main = main.replace("|", "")
    attention, mlps = set(main[::2]), main[1::2]
    alternate = len(main) % 2 == 0 and attention in ({"*"}, {"+"}) and set(mlps) <= set("-E")
    # one layer each, of the kind of the last, as GPTModel's are
    alternate &= all(depth == main[-2:] for depth in mtp if depth)
    if not main or not alternate:
        expected = "attention and MLP by turns (*- or *E, +- or +E)"
        name = next(name for name in _PATTERNS if getattr(args, name, None))
        refuse(f"--{name.replace('_', '-')}", expected, pattern, _NOT)
    if "*" in attention and getattr(args, "multi_latent_attention", False):
        do = "Its layers are written +."
        refuse("--multi-latent-attention", "none with layers *", "both", do)
    spec = getattr(args, "spec", None) or ()
    spec = [spec] if isinstance(spec, str) else spec
    if not str(spec[-1] if spec else "").endswith("stack_spec"):
        do = "A spec of one's own may compute something else."
        refuse("--spec", "Megatron's hybrid_stack_spec", " ".join(spec) or "none", do)
    experts = frozenset(i for i, mlp in enumerate(mlps) if mlp == "E")
    return len(mlps), attention.pop(), experts


def _expert_layers(args) -> frozenset[int]:
    """Layers with experts, from 0 (Megatron's --moe-layer-freq).

    Example: 4 layers with frequency 2 have them in layers 0 and 2, every second from the first. The
    list [0, 1, 1, 1] says it layer by layer: all but the first.

    >>> sorted(_expert_layers(argparse.Namespace(num_layers=4, moe_layer_freq=2)))
    [0, 2]
    >>> sorted(_expert_layers(argparse.Namespace(num_layers=4, moe_layer_freq=[0, 1, 1, 1])))
    [1, 2, 3]
    """
    frequency = getattr(args, "moe_layer_freq", 1)
    if isinstance(frequency, (list, tuple)):
        return frozenset(i for i, has in enumerate(frequency) if has)
    return frozenset(range(0, args.num_layers, frequency))


def _rope_scaling(args, hybrid) -> dict | None:
    factor = getattr(args, "rotary_seq_len_interpolation_factor", None)
    if getattr(args, "use_rope_scaling", False) and not hybrid:  # which HybridModel does not ask
        if factor not in (None, 1):
            do = "Megatron scales by both, which has no counterpart."
            refuse("--use-rope-scaling", "no --rotary-seq-len-interpolation-factor", factor, do)
        if args.rope_scaling_factor != ROPE_FACTOR:
            warn(
                f"--rope-scaling-factor {args.rope_scaling_factor:g} in the "
                "checkpoint: Megatron 0.18 to 0.20 build their models "
                f"with {ROPE_FACTOR:g} whatever it says, so that is exported"
            )
        return {"rope_type": "llama3", **LLAMA3_ROPE}
    if factor not in (None, 1):
        return {"rope_type": "linear", "factor": float(factor)}
    return None


def _first(value) -> float:
    """Of one value for each load-balancing type; None is 0."""
    if isinstance(value, (list, tuple)):
        value = value[0]
    return float(value or 0.0)
