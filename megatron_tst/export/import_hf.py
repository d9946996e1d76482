"""A Hugging Face folder (Llama, Qwen3, Qwen3-MoE) -> a torch_dist checkpoint of weights, to
pre-train further with TST.

The way back of export/hf.py, over the same list of names, so that import and export give the bytes
that came in.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch

from megatron_tst.checkpoint.atomic import flushed, new_folder, write_text
from megatron_tst.checkpoint.boundary import EXPERT_NORM
from megatron_tst.checkpoint.format import TRACKER
from megatron_tst.checkpoint.write import write_checkpoint
from megatron_tst.errors import refuse
from megatron_tst.export.architectures import Architecture, architecture_of
from megatron_tst.export.safetensors_files import SafetensorsFolder
from megatron_tst.export.tokenizer import FILES

# How Megatron loads weights alone. An import has none of the empty extra states that each layer
# spec asks for; log_all names what is missing.
LOAD = ("--finetune", "--no-load-optim", "--no-load-rng", "--dist-ckpt-strictness", "log_all")
_GATED = "gate", "up"
_KINDS = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def import_(
    source: Path,
    target: Path,
    *,
    layer_spec: str = "transformer_engine",
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[str]:
    """Write a checkpoint that Megatron loads with the flags LOAD.

    Args:
        source: a folder with config.json and safetensors.
        target: a new folder, for --load.
        layer_spec: "transformer_engine" or "local": which names the norm before experts
            differently.
        force: replace an existing target.

    Returns:
        the flags of a Megatron run with this model.

    Raises:
        TSTError: another architecture or layer spec, a tensor that is missing, of another shape or
            unknown, safetensors is not installed, and atomic.new_folder's.
    """
    if layer_spec not in EXPERT_NORM:
        do = "Name the spec of the run that is to load it."
        refuse("--layer-spec", " or ".join(EXPERT_NORM), layer_spec, do)
    config = _config(source)
    args = arguments(config)
    arch = architecture_of(args, config["vocab_size"], "float32")
    tensors = SafetensorsFolder(source)
    total = sum(path.stat().st_size for path in tensors.files)
    with new_folder(target, total, force, [source]) as part:
        folder = part / "release"
        folder.mkdir()
        write_checkpoint(
            folder,
            items(tensors, arch, layer_spec),
            args,
            lambda done: progress(min(done, total), total),
        )
        if tensors.unread:
            refuse(
                source,
                "the tensors of its architecture alone",
                f"{sorted(tensors.unread)[0]} besides",
                "It is another model.",
            )
        (folder / "hf").mkdir()
        for name in ("config.json", "generation_config.json", *FILES):
            if (source / name).is_file():  # for the way back
                flushed(
                    folder / "hf" / name,
                    lambda file, name=name: file.write((source / name).read_bytes()),
                )
        write_text(part / TRACKER, "release")
    return flags(args)


def arguments(config: dict) -> argparse.Namespace:
    """Megatron's arguments of a model with this config.json.

    Raises:
        TSTError: settings that Megatron's GPTModel does not have.
    """
    kind, c = config.get("model_type"), config.get
    if kind not in _KINDS:
        refuse(
            "config.json's model_type",
            " or ".join(_KINDS),
            kind,
            "Other architectures are not imported.",
        )
    rope = c("rope_parameters")
    if not rope:  # before transformers 5
        rope = (c("rope_scaling") or {}) | {"rope_theta": c("rope_theta", 10000.0)}
    for name, allowed in (
        ("hidden_act", ("silu",)),
        ("attention_bias", (False, None)),
        ("mlp_bias", (False, None)),
        ("use_sliding_window", (False, None)),
        ("decoder_sparse_step", (1, None)),
        ("shared_expert_intermediate_size", (None, 0)),
    ):
        if c(name) not in allowed:
            refuse(
                f"config.json's {name}",
                " or ".join(map(str, allowed)),
                c(name),
                "Megatron's GPTModel cannot be built so here.",
            )
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    scaled = rope_type == "llama3" and rope["factor"] == 8.0
    scaled = scaled and rope["original_max_position_embeddings"] == 8192
    if rope_type not in ("default", "linear") and not scaled:
        refuse(
            "config.json's rope",
            "default, linear, or Llama 3.1's (factor 8, 8192 positions)",
            rope,
            "Megatron has these alone.",
        )
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    experts = c("num_experts") or c("num_local_experts")
    dense = set(c("mlp_only_layers") or ())
    return argparse.Namespace(
        num_layers=layers,
        hidden_size=config["hidden_size"],
        num_attention_heads=heads,
        kv_channels=c("head_dim") or config["hidden_size"] // heads,
        group_query_attention=True,
        num_query_groups=c("num_key_value_heads") or heads,
        ffn_hidden_size=config["intermediate_size"],
        max_position_embeddings=config["max_position_embeddings"],
        normalization="RMSNorm",
        layernorm_epsilon=config["rms_norm_eps"],
        swiglu=True,
        add_bias_linear=False,
        position_embedding_type="rope",
        rotary_percent=1.0,
        rotary_base=_whole(rope["rope_theta"]),
        use_rope_scaling=scaled,
        rope_scaling_factor=8.0,
        rotary_seq_len_interpolation_factor=rope["factor"] if rope_type == "linear" else None,
        untie_embeddings_and_output_weights=not c("tie_word_embeddings", False),
        qk_layernorm=kind != "llama",
        vocab_size=config["vocab_size"],
        init_method_std=c("initializer_range", 0.02),
        num_experts=experts if kind == "qwen3_moe" else None,
        moe_router_topk=c("num_experts_per_tok"),
        moe_ffn_hidden_size=c("moe_intermediate_size"),
        moe_router_pre_softmax=not c("norm_topk_prob", True),
        moe_layer_freq=[int(i not in dense) for i in range(layers)],
        moe_aux_loss_coeff=c("router_aux_loss_coef", 0.0),
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )


def _whole(base):
    if base != int(base):
        refuse(
            "config.json's rope_theta", "a whole number", base, "Megatron's --rotary-base is one."
        )
    return int(base)


def flags(args: argparse.Namespace) -> list[str]:
    """The flags of a Megatron run with this model, a flag with its value each."""
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
        f"--norm-epsilon {args.layernorm_epsilon:g}",
        "--disable-bias-linear",
        "--rotary-percent 1.0",
    ]


def _config(source):
    try:
        return json.loads((source / "config.json").read_text())
    except (OSError, ValueError) as error:
        return refuse(
            source,
            "a Hugging Face folder with config.json",
            f"{type(error).__name__}: {error}",
            "Download the model again.",
        )


class Readable(Protocol):
    """Hugging Face's tensors by name; of a folder, or made for a test or a benchmark."""

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor, which must have this shape."""


def items(
    tensors: Readable, arch: Architecture, layer_spec: str
) -> Iterator[tuple[str, tuple, tuple, torch.Tensor]]:
    """Every tensor that Megatron stores, made of Hugging Face's.

    Layers of one kind are stored as one tensor [layers, ...], a shard [1, ...] a layer. Layers of
    several kinds have a name each. Experts have one more dimension (checkpoint/tensors.py).

    Yields:
        (name, whole shape, place of the shard in it, shard).
    """
    d, h, per = arch.head_dim, arch.hidden, arch.heads // arch.groups
    mixed = 0 < len(arch.expert_layers) < arch.layers

    def of_layer(n, name, tensor, *expert):
        whole, place = (*tensor.shape,), (0,) * tensor.dim()
        if expert:
            whole, place = (arch.experts, *whole), (*expert, *place)
        if not mixed:
            whole, place = (arch.layers, *whole), (n, *place)
        leading = len(whole) - tensor.dim()
        shard = tensor.reshape(*(1,) * leading, *tensor.shape)
        return f"decoder.layers.{f'{n}.' if mixed else ''}{name}", whole, place, shard

    def alone(name, tensor):
        return name, tuple(tensor.shape), (0,) * tensor.dim(), tensor

    yield alone(
        "embedding.word_embeddings.weight",
        tensors.read("model.embed_tokens.weight", (arch.vocab, h)),
    )
    for n in range(arch.layers):
        a = f"model.layers.{n}."
        q, k, v = (
            tensors.read(f"{a}self_attn.{x}_proj.weight", (rows * d, h)).view(arch.groups, -1, h)
            for x, rows in zip("qkv", (arch.groups * per, arch.groups, arch.groups))
        )
        qkv = torch.cat([q, k, v], 1).reshape(-1, h)
        yield of_layer(n, "self_attention.linear_qkv.weight", qkv)
        yield of_layer(
            n,
            "self_attention.linear_qkv.layer_norm_weight",
            tensors.read(a + "input_layernorm.weight", (h,)),
        )
        yield of_layer(
            n,
            "self_attention.linear_proj.weight",
            tensors.read(a + "self_attn.o_proj.weight", (h, arch.heads * d)),
        )
        for x in "qk" if arch.qk_norm else "":
            yield of_layer(
                n,
                f"self_attention.{x}_layernorm.weight",
                tensors.read(f"{a}self_attn.{x}_norm.weight", (d,)),
            )
        has = n in arch.expert_layers
        norm = EXPERT_NORM[layer_spec] if has else EXPERT_NORM["local"]
        yield of_layer(n, norm, tensors.read(a + "post_attention_layernorm.weight", (h,)))
        if has:
            router = tensors.read(a + "mlp.gate.weight", (arch.experts, h))
            yield of_layer(n, "mlp.router.weight", router)
        width = arch.config["moe_intermediate_size"] if has else arch.config["intermediate_size"]
        for e in range(arch.experts) if has else (None,):
            theirs, ours, at = a + "mlp.", "mlp.", ()
            if has:
                theirs, ours, at = f"{theirs}experts.{e}.", "mlp.experts.experts.", (e,)
            gate, up = (tensors.read(f"{theirs}{x}_proj.weight", (width, h)) for x in _GATED)
            down = tensors.read(theirs + "down_proj.weight", (h, width))
            yield of_layer(n, ours + "linear_fc1.weight", torch.cat([gate, up]), *at)
            yield of_layer(n, ours + "linear_fc2.weight", down, *at)
    yield alone("decoder.final_layernorm.weight", tensors.read("model.norm.weight", (h,)))
    if not arch.tied:
        yield alone("output_layer.weight", tensors.read("lm_head.weight", (arch.vocab, h)))
