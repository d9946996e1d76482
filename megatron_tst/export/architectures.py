"""Which Hugging Face architecture a Megatron model is, from the arguments of its run, and its
config.json.

Llama       RMSNorm, SwiGLU, rotary positions, grouped queries, no biases; tied or untied embeddings
Qwen3       the same with a norm on queries and keys
Qwen3-MoE   the same with experts, chosen by a softmax router, in some or all layers

Anything else is refused by the name of the argument that differs: an export that is nearly right is
worse than none.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass

from megatron_tst.errors import refuse

ROPE_FACTOR = 8.0  # of GPTModel; megatron.training never hands --rope-scaling-factor on
# Megatron's constants are Llama 3.1's (rotary_pos_embedding.py)
LLAMA3_ROPE = {
    "factor": ROPE_FACTOR,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# argument: what it must be in all three (absent ones are not asked: other versions of Megatron have
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
    "multi_latent_attention": (False,),
    "use_mup": (False,),
    "mtp_num_layers": (None, 0),
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
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "softmax_scale": (None,),
    "spec": (None, "local"),
    "is_hybrid_model": (False,),
}
_EXPERTS = {
    "moe_router_score_function": ("softmax",),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_num_groups": (None,),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_router_group_topk": (None,),
    "moe_router_topk_limited_devices": (None,),
    "moe_router_force_load_balancing": (False,),
    "moe_router_force_biased": (None,),
    "moe_expert_capacity_factor": (None,),
    "moe_expert_rank_capacity_factor": (None,),
    "moe_apply_probs_on_input": (False,),
    # losses alone; "sinkhorn" and "quantile_balancing" choose other experts
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    "moe_latent_size": (None,),
    "moe_shared_expert_intermediate_size": (None,),
    "moe_mlp_glu_interleave_size": (None,),
}
# what the model has: (class, model_type) of transformers
_NAMES = {
    "neither": ("LlamaForCausalLM", "llama"),
    "qk_norm": ("Qwen3ForCausalLM", "qwen3"),
    "experts": ("Qwen3MoeForCausalLM", "qwen3_moe"),
}


@dataclass(frozen=True)
class Architecture:
    """A model as Hugging Face names it.

    Args:
        name: class name, "LlamaForCausalLM" and so on.
        layers, heads, groups, head_dim, hidden: sizes; groups of queries share keys and values.
        experts: of a layer that has them, 0 for a dense model.
        expert_layers: the layers with experts.
        tied: the output layer is the embedding.
        vocab: rows of the embedding, without Megatron's padding: the largest id + 1, or more.
        config: what config.json holds.
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

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return self.name != "LlamaForCausalLM"


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
        TSTError: the model has no counterpart among the three, with the argument that differs.
    """
    _check(args, _PLAIN)
    experts = getattr(args, "num_experts", None) or 0
    qk_norm = bool(getattr(args, "qk_layernorm", False))
    if experts:
        _check(args, _EXPERTS)
    if experts and not qk_norm:
        do = "Experts without it have no counterpart here."
        refuse("--num-experts", "--qk-layernorm beside it (Qwen3-MoE)", "none", do)
    heads, hidden = args.num_attention_heads, args.hidden_size
    groups = args.num_query_groups if getattr(args, "group_query_attention", False) else heads
    head_dim = args.kv_channels or hidden // heads
    if not qk_norm and hidden % heads:
        do = "transformers builds no Llama so."
        refuse("--hidden-size", f"a multiple of --num-attention-heads {heads}", hidden, do)
    if head_dim % 2:
        refuse(
            "--kv-channels", "an even number", head_dim, "transformers' rotary positions need it."
        )
    tied = not args.untie_embeddings_and_output_weights
    has = "qk_norm" if qk_norm else "neither"
    if experts:
        has = "experts"
    name, kind = _NAMES[has]
    expert_layers = _expert_layers(args) if experts else frozenset()
    config = {
        "architectures": [name],
        "model_type": kind,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": args.ffn_hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": args.max_position_embeddings,
        "rms_norm_eps": getattr(args, "norm_epsilon", None) or args.layernorm_epsilon,  # 0.18, 0.19
        "rope_theta": float(args.rotary_base),
        "rope_scaling": _rope_scaling(args),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "initializer_range": args.init_method_std,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if kind == "llama":
        config["mlp_bias"] = False
    else:
        config |= {"use_sliding_window": False, "sliding_window": None}
    if experts:
        config |= {
            "num_experts": experts,
            "num_experts_per_tok": args.moe_router_topk,
            "moe_intermediate_size": args.moe_ffn_hidden_size or args.ffn_hidden_size,
            "norm_topk_prob": not args.moe_router_pre_softmax,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(args.num_layers) if i not in expert_layers],
            "router_aux_loss_coef": _first(getattr(args, "moe_aux_loss_coeff", 0.0)),
            "output_router_logits": False,
        }
    return Architecture(
        name=name,
        layers=args.num_layers,
        heads=heads,
        groups=groups,
        head_dim=head_dim,
        hidden=hidden,
        experts=experts,
        expert_layers=expert_layers,
        tied=tied,
        vocab=vocab,
        config=config,
    )


def _check(args, allowed):
    for name, values in allowed.items():
        given = getattr(args, name, values[0])
        # a list has one for each of several load-balancing types
        for got in given if isinstance(given, (list, tuple)) else [given]:
            if got not in values:
                do = "This model has no counterpart among Llama, Qwen3 and Qwen3-MoE."
                refuse(f"--{name.replace('_', '-')}", " or ".join(map(str, values)), got, do)


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


def _rope_scaling(args) -> dict | None:
    factor = getattr(args, "rotary_seq_len_interpolation_factor", None)
    if getattr(args, "use_rope_scaling", False):
        if factor not in (None, 1):
            do = "Megatron scales by both, which has no counterpart."
            refuse("--use-rope-scaling", "no --rotary-seq-len-interpolation-factor", factor, do)
        if args.rope_scaling_factor != ROPE_FACTOR:
            warnings.warn(
                f"megatron_tst: --rope-scaling-factor {args.rope_scaling_factor:g} in the "
                "checkpoint: Megatron 0.18 to 0.20 build their models "
                f"with {ROPE_FACTOR:g} whatever it says, so that is exported",
                stacklevel=4,
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
