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
# DeepSeek-V3's parts, each of a size of its own
DEEPSEEK = dict(
    num_key_value_heads=4,
    head_dim=...,
    q_lora_rank=20,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=4,
    moe_intermediate_size=24,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=0,
)
OF_KIND = {"qwen3_moe": MOE, "deepseek_v3": DEEPSEEK}


def config_of(kind: str = "llama", **changes) -> dict:
    """config.json of a small model; a change of `...` leaves the key out."""
    config = {"model_type": kind} | SMALL | OF_KIND.get(kind, {}) | changes
    return {key: value for key, value in config.items() if value is not ...}


def tensors_of(config: dict, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict:
    """name -> tensor, the names and shapes as transformers has them, random."""
    if config["model_type"] == "deepseek_v3":
        return _drawn(_deepseek_shapes(config), seed, dtype)
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
    return _drawn(shapes, seed, dtype)


def _drawn(shapes, seed, dtype):
    draw = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=draw) / 4 for name, shape in shapes.items()}
    # the router's bias is in fp32 always
    return {name: t if name.endswith("_bias") else t.to(dtype) for name, t in drawn.items()}


def _deepseek_shapes(config):
    c = config.get
    h, heads, rows, layers = (
        c(x) for x in ("hidden_size", "num_attention_heads", "vocab_size", "num_hidden_layers")
    )
    rank, kv_rank, width = c("q_lora_rank"), c("kv_lora_rank"), c("moe_intermediate_size")
    nope, rope, v = (c(f"{x}_head_dim") for x in ("qk_nope", "qk_rope", "v"))
    shapes = {"model.embed_tokens.weight": (rows, h), "model.norm.weight": (h,)}
    if not c("tie_word_embeddings"):
        shapes["lm_head.weight"] = rows, h
    mtp = range(layers, layers + c("num_nextn_predict_layers"))
    for n in [*range(layers), *mtp]:
        queries = {"q_proj": (heads * (nope + rope), h)}
        if rank is not None:
            queries = {"q_a_proj": (rank, h), "q_b_proj": (heads * (nope + rope), rank)}
            queries["q_a_layernorm"] = (rank,)
        attention = queries | {
            "kv_a_proj_with_mqa": (kv_rank + rope, h),
            "kv_a_layernorm": (kv_rank,),
            "kv_b_proj": (heads * (nope + v), kv_rank),
            "o_proj": (h, heads * v),
        }
        of = {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
        of |= {f"{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
        mlps = {"mlp.": c("intermediate_size")}
        if n >= c("first_k_dense_replace"):
            mlps = {f"mlp.experts.{e}.": width for e in range(c("n_routed_experts"))}
            mlps["mlp.shared_experts."] = width * c("n_shared_experts")
            of["mlp.gate.weight"] = c("n_routed_experts"), h
            of["mlp.gate.e_score_correction_bias"] = (c("n_routed_experts"),)
        for mlp, size in mlps.items():
            for name, shape in (("gate", (size, h)), ("up", (size, h)), ("down", (h, size))):
                of[f"{mlp}{name}_proj.weight"] = shape
        if n in mtp:
            of |= {f"{name}.weight": (h,) for name in ("enorm", "hnorm", "shared_head.norm")}
            of["eh_proj.weight"] = h, 2 * h
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in of.items()}
    return shapes


def with_copies(config: dict, tensors: dict) -> dict:
    """The tensors and, as DeepSeek-V3 has it, embedding and head once more in the layers of
    multi-token prediction.
    """
    first, copies = config["num_hidden_layers"], {}
    embedding = tensors["model.embed_tokens.weight"]
    for k in range(config["num_nextn_predict_layers"]):
        a = f"model.layers.{first + k}."
        copies[f"{a}embed_tokens.weight"] = embedding.clone()
        copies[f"{a}shared_head.head.weight"] = tensors.get("lm_head.weight", embedding).clone()
    return tensors | copies


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
