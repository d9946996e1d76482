"""config.json of a Hugging Face folder -> the arguments and flags of a Megatron run.

Read as transformers reads it: a key that is absent stands for the default of its config class, and
rope is spelled as transformers 4 does (rope_theta, rope_scaling) or as 5 does (rope_parameters).
What Megatron would compute otherwise than config.json says is refused.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_tst.errors import refuse
from megatron_tst.export.architectures import LLAMA3_ROPE
from megatron_tst.json_file import entry, read_json, shown

_LARGEST = 1 << 31  # of a size; above it Megatron's indices overflow
_LAYERS = 1 << 16
# What transformers' config classes (LlamaConfig, Qwen3Config, Qwen3MoeConfig) take an absent key
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
}
for _of_kind in DEFAULTS.values():  # in all three
    _of_kind |= {
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }
_ROPE_THETA = 10000.0
# (kind, key) that may be null, which is the same as absent or follows from the others
_NULLABLE = {
    ("llama", "num_key_value_heads"),
    ("llama", "head_dim"),
    ("qwen3", "num_key_value_heads"),
    ("qwen3_moe", "mlp_only_layers"),
}
_NO = "Megatron's GPTModel cannot be built so here."
# values of keys with which Megatron computes the same; an absent key is one of them
_SAME = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "shared_expert_intermediate_size": (None, 0),
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "is_causal": (True, None),
    "transformers_weights": (None, "model.safetensors", "model.safetensors.index.json"),
    "partial_rotary_factor": (1.0, 1, None),
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
    hidden, layers = model.size("hidden_size"), model.size("num_hidden_layers", _LAYERS)
    heads = model.size("num_attention_heads")
    groups = model.size("num_key_value_heads") or heads
    if heads % groups:
        model.refuse("num_key_value_heads", f"a divisor of the {heads} heads", groups)
    if not (head_dim := model.size("head_dim") or hidden // heads) or head_dim % 2:
        model.refuse("head_dim", "an even number, as rotary positions need it", head_dim)
    if model.kind == "llama" and hidden % heads:
        model.refuse("hidden_size", f"a multiple of the {heads} heads", hidden)
    rope = _rope(model)
    return argparse.Namespace(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        kv_channels=head_dim,
        group_query_attention=True,
        num_query_groups=groups,
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
        rotary_base=rope["rope_theta"],
        use_rope_scaling=rope["rope_type"] == "llama3",
        rope_scaling_factor=8.0,
        rotary_seq_len_interpolation_factor=rope.get("interpolation"),
        untie_embeddings_and_output_weights=not model.flag("tie_word_embeddings"),
        qk_layernorm=model.kind != "llama",
        vocab_size=model.size("vocab_size"),
        init_method_std=model.number("initializer_range", most=1),
        **_experts(model, layers),
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )


class _Config:
    """config.json with transformers' defaults, a value at a time."""

    def __init__(self, found, path):
        self.found, self.path = found, path
        self.kind = found.get("model_type")
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

    def size(self, key, most=_LARGEST):
        return self.get(key, int, least=1, most=most)

    def number(self, key, *default, most):
        more = {"default": default[0]} if default else {}
        return self.get(key, float, least=0, most=most, **more)

    def flag(self, key):
        return self.get(key, bool)

    def refuse(self, key, expected, got):
        refuse(f"{self.path}: {key}", expected, got, _NO)


def _rope(model) -> dict:
    """rope_theta, whole; rope_type; interpolation: the factor of "linear", whole."""
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
    if kind == "linear":
        factor = number("factor", 1, None)
        if factor is None or factor != int(factor):
            do = "Megatron's --rotary-seq-len-interpolation-factor is one."
            refuse(f"{path}: factor", "a whole number", shown(factor), do)
        found["interpolation"] = int(factor) if factor != 1 else None
    elif kind == "llama3":
        whole = model.size("max_position_embeddings")
        key = "original_max_position_embeddings"
        given = {key: whole} | rope | {k: v for k, v in model.found.items() if k == key}
        for key, value in LLAMA3_ROPE.items():  # the outer key counts where both are there
            if given.get(key) != value:
                do = "Megatron has Llama 3.1's constants alone."
                refuse(f"{path}: {key}", value, shown(given.get(key)), do)
    elif kind != "default":
        wrong = True
    if wrong:
        expected = f"default, linear, or Llama 3.1's {LLAMA3_ROPE}, for all dimensions and layers"
        refuse(f"{model.path}: rope", expected, shown(rope), "Megatron has these alone.")
    return found


def _experts(model, layers) -> dict:
    if model.kind != "qwen3_moe":
        return {
            "num_experts": None,
            "moe_router_topk": None,
            "moe_ffn_hidden_size": None,
            "moe_router_pre_softmax": False,
            "moe_layer_freq": [1] * layers,
            "moe_aux_loss_coeff": 0.0,
        }
    # transformers 5 writes the second, and reads either
    names = [name for name in ("num_experts", "num_local_experts") if name in model.found]
    experts = {model.size(name, _LAYERS) for name in names} or {model.size("num_experts")}
    if len(experts) > 1:
        model.refuse("num_experts", "what num_local_experts says", sorted(experts))
    (count,) = experts
    chosen = model.get("num_experts_per_tok", int, least=1, most=count)
    if chosen > count:  # what an absent key stands for
        model.refuse(
            "num_experts_per_tok", f"at most the {count} experts", f"{chosen}, its default"
        )
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
        "num_query_groups",
        "ffn_hidden_size",
        "max_position_embeddings",
        "normalization",
        "position_embedding_type",
        "rotary_base",
        "init_method_std",
        "attention_dropout",
        "hidden_dropout",
    ]
    on = ["swiglu", "group_query_attention"]
    if args.num_experts:
        names += ["num_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_aux_loss_coeff"]
        if not all(args.moe_layer_freq):  # a list makes Megatron name each layer apart
            names.append("moe_layer_freq")
    if args.rotary_seq_len_interpolation_factor:
        names.append("rotary_seq_len_interpolation_factor")
    asked = "untie_embeddings_and_output_weights", "qk_layernorm", "use_rope_scaling"
    on += [name for name in asked if getattr(args, name)]
    if args.num_experts and args.moe_router_pre_softmax:
        on.append("moe_router_pre_softmax")

    def flag(name):
        return f"--{name.replace('_', '-')}"

    return [
        *(f"{flag(name)} {str(getattr(args, name)).replace(' ', '')}" for name in names),
        *map(flag, on),
        f"--norm-epsilon {args.layernorm_epsilon!r}",
        "--disable-bias-linear",
        "--rotary-percent 1.0",
    ]
