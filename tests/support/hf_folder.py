"""Tiny folders of released models, as they are downloaded: config.json, safetensors, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch

SMALL = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)


def config_of(kind: str = "llama", **changes) -> dict:
    """config.json of a small model; a change of `...` leaves the key out."""
    config = {"model_type": kind} | SMALL | (MOE if kind == "qwen3_moe" else {}) | changes
    return {key: value for key, value in config.items() if value is not ...}


def tensors_of(config: dict, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict:
    """name -> tensor, the names and shapes as transformers has them, random."""
    c = config.get
    h, heads, d = c("hidden_size"), c("num_attention_heads"), c("head_dim", 8)
    groups, kind = c("num_key_value_heads", heads), config["model_type"]
    shapes = {"model.embed_tokens.weight": (c("vocab_size"), h), "model.norm.weight": (h,)}
    if not c("tie_word_embeddings"):
        shapes["lm_head.weight"] = (c("vocab_size"), h)
    for n in range(c("num_hidden_layers")):
        a = f"model.layers.{n}."
        for name, rows in zip("qkv", (heads, groups, groups)):
            shapes[f"{a}self_attn.{name}_proj.weight"] = rows * d, h
        shapes[f"{a}self_attn.o_proj.weight"] = h, heads * d
        for name in ("input", "post_attention"):
            shapes[f"{a}{name}_layernorm.weight"] = (h,)
        for name in "" if kind == "llama" else "qk":
            shapes[f"{a}self_attn.{name}_norm.weight"] = (d,)
        moe, width = "", c("intermediate_size")
        experts = [""]
        if kind == "qwen3_moe" and n not in (c("mlp_only_layers") or []):
            moe, width = "experts.", c("moe_intermediate_size")
            experts = [f"{e}." for e in range(c("num_experts"))]
            shapes[f"{a}mlp.gate.weight"] = c("num_experts"), h
        for e in experts:
            for name, shape in (("gate", (width, h)), ("up", (width, h)), ("down", (h, width))):
                shapes[f"{a}mlp.{moe}{e}{name}_proj.weight"] = shape
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=draw) / 4).to(dtype) for name, shape in shapes.items()
    }


def write_folder(folder: Path, config: dict, tensors: dict, files: int = 0) -> Path:
    """model.safetensors, or so many files with their index."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if not files:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    where = {}
    for i in range(files):
        name = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = dict(list(tensors.items())[i::files])
        save_file(part, folder / name, {"format": "pt"})
        where |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def word_tokenizer(path: Path, ids, **settings) -> Path:
    """A tokenizer.json of the tokens w0, w1, ... at these ids; settings: tokenizer_config.json."""
    from tokenizers import Tokenizer, models

    path.mkdir(parents=True, exist_ok=True)
    words = ids if isinstance(ids, dict) else {f"w{i}": i for i in ids}
    unknown = next(iter(words))
    Tokenizer(models.WordLevel(words, unk_token=unknown)).save(str(path / "tokenizer.json"))
    if settings:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path
