"""config.json of a Hugging Face folder -> the arguments and flags of a Megatron run.

Read as transformers reads it: a key that is absent stands for the default of its config class, and
rope is spelled as transformers 4 does (rope_theta, rope_scaling) or as 5 does (rope_parameters).
What Megatron would compute otherwise than config.json says is refused.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from megatron_tst.errors import refuse, warn
from megatron_tst.export.architectures import LLAMA3_ROPE, YARN, yarn_attention
from megatron_tst.json_file import entry, read_json, shown

_LARGEST = 1 << 31  # of a size; above it Megatron's indices overflow
_LAYERS = 1 << 16
# What transformers' config classes (LlamaConfig, DeepseekV3Config and so on) take an absent key
# for. None: it follows from the others. Sizes of the model without which the file is not one of a
# model must be there.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
    },
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
        "mlp_only_layers": None,
    },
    "deepseek_v3": {
        "num_key_value_heads": 128,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_nextn_predict_layers": 1,
    },
}
for _of_kind in DEFAULTS.values():  # in all
    _of_kind |= {
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }
# Names of the same model elsewhere: Kimi K2's own.
_ALSO = {"kimi_k2": "deepseek_v3"}
_ROPE_THETA = 10000.0
# (kind, key) that may be null, which is the same as absent or follows from the others
_NULLABLE = {
    ("llama", "num_key_value_heads"),
    ("llama", "head_dim"),
    ("qwen3", "num_key_value_heads"),
    ("qwen3_moe", "mlp_only_layers"),
    ("deepseek_v3", "num_key_value_heads"),
    ("deepseek_v3", "q_lora_rank"),
}
_NO = "Megatron's GPTModel cannot be built so here."
# values of keys with which Megatron computes the same; an absent key is one of them
_SAME = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "shared_expert_intermediate_size": (None, 0),
    "per_layer_config": (None, {}),
    "is_causal": (True, None),
    "transformers_weights": (None, "model.safetensors", "model.safetensors.index.json"),
    "partial_rotary_factor": (1.0, 1, None),
    # of DeepSeek-V3; DeepSeek's own code asks all but the first
    "rope_interleave": (True,),
    "scoring_func": ("sigmoid", None),
    "topk_method": ("noaux_tc", None),
    "moe_layer_freq": (1, None),
}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        TSTError: there is none, or it is no JSON object.
    """
    do = "Give a folder as it was downloaded, with config.json and safetensors."
    return read_json(folder / "config.json", do=do)


def arguments(config: dict[str, Any], path: object = "config.json") -> argparse.Namespace:
    """Megatron's arguments of a model with this config.json.

    Args:
        config: what it holds.
        path: of the file, for messages.

    Raises:
        TSTError: a value of another kind or out of bounds, or settings that Megatron's GPTModel
            does not have.
    """
    model = _Config(config, path)
    blocks_of(config, path)
    hidden, layers = model.size("hidden_size"), model.size("num_hidden_layers", _LAYERS)
    heads = model.size("num_attention_heads")
    attention = (_latents if model.kind == "deepseek_v3" else _grouped)(model, hidden, heads)
    return argparse.Namespace(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=model.size("intermediate_size"),
        max_position_embeddings=model.size("max_position_embeddings"),
        normalization="RMSNorm",
        layernorm_epsilon=model.number("rms_norm_eps", most=1),
        swiglu=True,
        add_bias_linear=False,
        attention_dropout=model.number("attention_dropout", 0.0, most=1),
        hidden_dropout=0.0,
        position_embedding_type="rope",
        rotary_percent=1.0,
        **attention,
        untie_embeddings_and_output_weights=not model.flag("tie_word_embeddings"),
        qk_layernorm=model.kind != "llama",
        vocab_size=model.size("vocab_size"),
        init_method_std=model.number("initializer_range", most=1),
        **_EXPERTS[model.kind](model, layers),
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )


def blocks_of(config: dict[str, Any], path: object = "config.json") -> tuple[int, int] | None:
    """(rows, columns) of a block of float8 weights with one scale, as DeepSeek-V3 was released;
    None: nothing is quantised.

    Args:
        config: what config.json holds.
        path: of the file, for messages.

    Raises:
        TSTError: it is quantised otherwise.
    """
    quantised = config.get("quantization_config")
    if quantised is None:
        return None
    named = quantised if isinstance(quantised, dict) else {}
    blocks = named.get("weight_block_size")
    sizes = isinstance(blocks, list) and [n for n in blocks if type(n) is int and n > 0]
    known = named.get("quant_method") == "fp8" and named.get("fmt") in (None, "e4m3")
    if not (known and isinstance(blocks, list) and len(blocks) == 2 and sizes == blocks):
        expected = 'null, or DeepSeek\'s "fp8" with "fmt" "e4m3" and a "weight_block_size"'
        do = "Take the model as it was before it was quantised."
        refuse(f"{path}: quantization_config", expected, shown(quantised), do)
    return tuple(blocks)


class _Config:
    """config.json with transformers' defaults, a value at a time."""

    def __init__(self, found, path):
        self.found, self.path = found, path
        self.kind = found.get("model_type")
        if isinstance(self.kind, str):
            self.kind = _ALSO.get(self.kind, self.kind)
        if not isinstance(self.kind, str) or self.kind not in DEFAULTS:
            do = "Other architectures are not imported."
            got = self.kind if isinstance(self.kind, str) else shown(self.kind)
            refuse(f"{path}: model_type", " or ".join(DEFAULTS), got, do)
        for key, allowed in _SAME.items():
            value = found.get(key, allowed[0])
            # True is 1 and False 0 in Python, but not in a config.json
            if not any(value == one and type(value) is type(one) for one in allowed):
                self.refuse(key, " or ".join(map(shown, allowed)), shown(value))
        kinds = self.get("layer_types", (list, type(None)), default=None) or ()
        if others := [kind for kind in kinds if kind != "full_attention"]:
            self.refuse("layer_types", "full_attention in all layers", shown(others[0]))
        if kinds and len(kinds) != (layers := self.size("num_hidden_layers", _LAYERS)):
            self.refuse("layer_types", f"one for each of the {layers} layers", len(kinds))

    def get(self, key, kind, **more):
        """The value, the default where the key is absent."""
        if key in DEFAULTS[self.kind]:
            more.setdefault("default", DEFAULTS[self.kind][key])
        if self.found.get(key, "") is None and (self.kind, key) in _NULLABLE:
            return None
        return entry(self.found, key, kind, self.path, **more)

    def size(self, key, most=_LARGEST, least=1):
        return self.get(key, int, least=least, most=most)

    def number(self, key, *default, most):
        more = {"default": default[0]} if default else {}
        return self.get(key, float, least=0, most=most, **more)

    def flag(self, key):
        return self.get(key, bool)

    def refuse(self, key, expected, got):
        refuse(f"{self.path}: {key}", expected, got, _NO)


def _grouped(model, hidden, heads) -> dict:
    """Arguments of attention with grouped queries, and of its positions."""
    groups = model.size("num_key_value_heads") or heads
    if heads % groups:
        model.refuse("num_key_value_heads", f"a divisor of the {heads} heads", groups)
    if not (head_dim := model.size("head_dim") or hidden // heads) or head_dim % 2:
        model.refuse("head_dim", "an even number, as rotary positions need it", head_dim)
    if model.kind == "llama" and hidden % heads:
        model.refuse("hidden_size", f"a multiple of the {heads} heads", hidden)
    rope = _rope(model, ("linear", "llama3"))
    return {
        "kv_channels": head_dim,
        "group_query_attention": True,
        "num_query_groups": groups,
        "rotary_base": rope["rope_theta"],
        "use_rope_scaling": rope["rope_type"] == "llama3",
        "rope_scaling_factor": 8.0,
        "rotary_seq_len_interpolation_factor": rope.get("interpolation"),
    }


def _latents(model, hidden, heads) -> dict:
    """The same of multi-latent attention."""
    if model.size("num_key_value_heads") not in (None, heads):
        got = model.size("num_key_value_heads")
        model.refuse("num_key_value_heads", f"the {heads} heads", got)
    width = model.size("qk_rope_head_dim")
    if width % 2:
        model.refuse("qk_rope_head_dim", "an even number, as rotary positions need it", width)
    rank = model.size("q_lora_rank")
    if rank is None:
        warn(
            f"{model.path}: q_lora_rank is null: Megatron-Core 0.19 puts a norm of its own before "
            "linear_q_proj, which this model does not have (Megatron-Bridge#5261). Run it with "
            "0.18, or with a --spec whose attention has none"
        )
    rope = _rope(model, ("yarn",))
    yarn = rope.get("yarn", {})
    return {
        "multi_latent_attention": True,
        "q_lora_rank": rank,
        "kv_lora_rank": model.size("kv_lora_rank"),
        "qk_head_dim": model.size("qk_nope_head_dim"),
        "qk_pos_emb_head_dim": width,
        "v_head_dim": model.size("v_head_dim"),
        "kv_channels": model.size("v_head_dim"),  # which multi-latent attention does not ask
        "group_query_attention": False,
        "num_query_groups": 1,
        "rotary_base": rope["rope_theta"],
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "rotary_seq_len_interpolation_factor": None,
        "rope_type": "yarn" if yarn else "rope",
        "rotary_scaling_factor": yarn.get("factor", 1.0),
        "mscale": yarn.get("mscale", 1.0),
        "mscale_all_dim": yarn.get("mscale_all_dim", 0.0),
    }


def _rope(model, kinds) -> dict:
    """rope_theta, whole; rope_type, "default" or one of `kinds`; interpolation: the factor of
    "linear", whole; yarn: factor, mscale and mscale_all_dim of "yarn".
    """
    # the older key counts where both are there (RotaryEmbeddingConfigMixin)
    name = "rope_scaling" if model.found.get("rope_scaling") else "rope_parameters"
    rope = model.get(name, (dict, type(None)), default=None) or {}
    path = f"{model.path}: {name}"

    def number(key, least, default):
        return entry(rope, key, float, path, default=default, least=least)

    outer = entry(model.found, "rope_theta", float, model.path, default=_ROPE_THETA, least=1)
    theta = outer if rope.get("rope_theta", None) is None else number("rope_theta", 1, outer)
    if theta != int(theta):
        do = "Megatron's --rotary-base is one."
        refuse(f"{model.path}: rope_theta", "a whole number", theta, do)
    kind = rope.get("rope_type", rope.get("type", "default"))
    found = {"rope_theta": int(theta), "rope_type": kind}
    wrong = any(isinstance(value, dict) for value in rope.values())  # one for each kind of layer
    wrong |= rope.get("partial_rotary_factor") not in (None, 1.0)
    whole = model.size("max_position_embeddings")
    key = "original_max_position_embeddings"
    # the outer key counts where both are there
    given = {key: whole} | rope | {k: v for k, v in model.found.items() if k == key}
    if kind not in ("default", *kinds):
        wrong = True
    elif kind == "linear":
        factor = number("factor", 1, None)
        if factor is None or factor != int(factor):
            do = "Megatron's --rotary-seq-len-interpolation-factor is one."
            refuse(f"{path}: factor", "a whole number", shown(factor), do)
        found["interpolation"] = int(factor) if factor != 1 else None
    elif kind == "llama3":
        for key, value in LLAMA3_ROPE.items():
            if given.get(key) != value:
                do = "Megatron has Llama 3.1's constants alone."
                refuse(f"{path}: {key}", value, shown(given.get(key)), do)
    elif kind == "yarn":
        found["yarn"] = _yarn(model, given, path)
    if wrong:
        known = {"linear": "linear", "yarn": "yarn", "llama3": f"Llama 3.1's {LLAMA3_ROPE}"}
        *some, last = ("default", *(known[one] for one in kinds))
        expected = f"{', '.join(some)}{',' * (len(some) > 1)} or {last}"
        expected += ", for all dimensions and layers"
        refuse(f"{model.path}: rope", expected, shown(rope), "Megatron has these alone.")
    return found


def _yarn(model, rope, path) -> dict[str, float]:
    """Megatron's factor, mscale and mscale_all_dim of YaRN in multi-latent attention."""

    def number(key, default):
        found = entry(rope, key, (float, type(None)), path, default=None, least=0)
        return default if found is None else found

    factor = entry(rope, "factor", float, path, least=1)
    # beta_fast and beta_slow of 0 are the defaults too
    for key, value in YARN.items():
        if (got := number(key, value) or value) != value:
            do = "Megatron's arguments have no other for multi-latent attention."
            refuse(f"{path}: {key}", f"{value:g}", f"{got:g}", do)
    if rope.get("truncate", True) is not True:
        do = "Megatron rounds the range of dimensions."
        refuse(f"{path}: truncate", "true", shown(rope["truncate"]), do)
    mscale, all_dim = number("mscale", 0.0), number("mscale_all_dim", 0.0)
    _, theirs = yarn_attention(factor, mscale, all_dim)
    wanted = number("attention_factor", theirs)
    for ours in (mscale, 1.0):
        if math.isclose(yarn_attention(factor, ours, all_dim)[0], wanted):
            return {"factor": factor, "mscale": ours, "mscale_all_dim": all_dim}
    expected = "cosines and sines multiplied by mscale's part over mscale_all_dim's"
    return refuse(path, expected, f"by {wanted:g}", "Megatron has no other.")


def _no_experts(model, layers) -> dict:
    return {
        "num_experts": None,
        "moe_router_topk": None,
        "moe_ffn_hidden_size": None,
        "moe_router_pre_softmax": False,
        "moe_layer_freq": [1] * layers,
        "moe_aux_loss_coeff": 0.0,
    }


def _counted(model, key) -> tuple[int, int]:
    """(experts, how many of them are chosen)"""
    # transformers 5 writes the second, and reads either
    names = [name for name in (key, "num_local_experts") if name in model.found]
    experts = {model.size(name, _LAYERS) for name in names} or {model.size(key)}
    if len(experts) > 1:
        model.refuse(key, "what num_local_experts says", sorted(experts))
    (count,) = experts
    chosen = model.get("num_experts_per_tok", int, least=1, most=count)
    if chosen > count:  # what an absent key stands for
        model.refuse(
            "num_experts_per_tok", f"at most the {count} experts", f"{chosen}, its default"
        )
    return count, chosen


def _softmax(model, layers) -> dict:
    """Arguments of Qwen3-MoE's experts."""
    count, chosen = _counted(model, "num_experts")
    normed = model.flag("norm_topk_prob")
    if chosen == 1 and normed:  # Megatron: "Please use --moe-router-pre-softmax when topk is 1"
        model.refuse("norm_topk_prob", "false where one expert is chosen", "true")
    step = model.size("decoder_sparse_step")
    dense = model.get("mlp_only_layers", list) or ()
    if not all(type(layer) is int for layer in dense):
        model.refuse("mlp_only_layers", "numbers of layers", shown(dense))
    dense = set(dense)
    has = [int(i not in dense and (i + 1) % step == 0) for i in range(layers)]
    if not any(has):
        model.refuse("mlp_only_layers and decoder_sparse_step", "some layer with experts", "none")
    return {
        "num_experts": count,
        "moe_router_topk": chosen,
        "moe_ffn_hidden_size": model.size("moe_intermediate_size"),
        "moe_router_pre_softmax": not normed,
        "moe_layer_freq": has,
        "moe_aux_loss_coeff": model.number("router_aux_loss_coef", most=None),
    }


def _sigmoid(model, layers) -> dict:
    """Arguments of DeepSeek-V3's experts, and its layers of multi-token prediction."""
    count, chosen = _counted(model, "n_routed_experts")
    if model.flag("norm_topk_prob") != (chosen > 1):
        expected = f"{shown(chosen > 1)} where {chosen} of the experts are chosen"
        model.refuse("norm_topk_prob", expected, shown(chosen == 1))
    groups, allowed = model.size("n_group"), model.size("topk_group")
    if count % groups or count // groups < 2 or allowed > groups:
        expected = f"groups of two or more of the {count} experts, and topk_group at most as many"
        model.refuse("n_group", expected, f"{groups}, and topk_group {allowed}")
    limited = allowed < groups
    if limited and chosen // allowed != 2:
        expected = f"half of num_experts_per_tok {chosen}"
        model.refuse("topk_group", expected, allowed)
    dense = model.size("first_k_dense_replace", _LAYERS, least=0)
    if dense >= layers:
        model.refuse("first_k_dense_replace", f"fewer than the {layers} layers", dense)
    # Megatron takes 0 for none, which is 1
    if not (scale := model.number("routed_scaling_factor", most=None)):
        model.refuse("routed_scaling_factor", "a number above 0", shown(scale))
    width = model.size("moe_intermediate_size")
    balanced = model.get("seq_aux", bool, default=True)
    return {
        "num_experts": count,
        "moe_router_topk": chosen,
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": width * model.size("n_shared_experts", _LAYERS),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": groups if limited else None,
        "moe_router_group_topk": allowed if limited else None,
        "moe_router_topk_scaling_factor": scale,
        "moe_router_pre_softmax": False,
        "moe_layer_freq": [int(i >= dense) for i in range(layers)],
        "moe_router_load_balancing_type": "seq_aux_loss" if balanced else "aux_loss",
        "moe_aux_loss_coeff": model.number("aux_loss_alpha", 0.0, most=None),
        "mtp_num_layers": model.size("num_nextn_predict_layers", _LAYERS, least=0) or None,
    }


_EXPERTS = {
    "llama": _no_experts,
    "qwen3": _no_experts,
    "qwen3_moe": _softmax,
    "deepseek_v3": _sigmoid,
}


def flags(args: argparse.Namespace) -> list[str]:
    """The flags of a Megatron run with this model, a flag with its value each.

    Args:
        args: arguments' Namespace.
    """
    names = [
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "kv_channels",
        "ffn_hidden_size",
        "max_position_embeddings",
        "normalization",
        "position_embedding_type",
        "rotary_base",
        "init_method_std",
        "attention_dropout",
        "hidden_dropout",
    ]
    on = ["swiglu"]
    if getattr(args, "multi_latent_attention", False):
        on.append("multi_latent_attention")
        names += ["kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type"]
        names += ["rotary_scaling_factor", "mscale", "mscale_all_dim"]
        if args.rope_type == "rope":  # Megatron fuses YaRN alone
            on.append("no_rope_fusion")
    else:
        on.append("group_query_attention")
        names.append("num_query_groups")
    if args.num_experts:
        names += ["num_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_aux_loss_coeff"]
        if not all(args.moe_layer_freq):  # a list makes Megatron name each layer apart
            names.append("moe_layer_freq")
    # of some kinds of models, and None where it does not apply
    some = (
        "q_lora_rank",
        "moe_shared_expert_intermediate_size",
        "moe_router_score_function",
        "moe_router_num_groups",
        "moe_router_group_topk",
        "moe_router_topk_scaling_factor",
        "moe_router_load_balancing_type",
        "mtp_num_layers",
        "rotary_seq_len_interpolation_factor",
    )
    names += [name for name in some if getattr(args, name, None)]
    asked = (
        "untie_embeddings_and_output_weights",
        "qk_layernorm",
        "use_rope_scaling",
        "moe_router_enable_expert_bias",
    )
    on += [name for name in asked if getattr(args, name, False)]
    if args.num_experts and args.moe_router_pre_softmax:
        on.append("moe_router_pre_softmax")
    if getattr(args, "rope_type", None) == "rope":  # Megatron's kernel for latents is YaRN's alone
        on.append("no_rope_fusion")

    def flag(name):
        return f"--{name.replace('_', '-')}"

    return [
        *(f"{flag(name)} {str(getattr(args, name)).replace(' ', '')}" for name in names),
        *map(flag, on),
        f"--norm-epsilon {args.layernorm_epsilon!r}",
        "--disable-bias-linear",
        "--rotary-percent 1.0",
    ]
