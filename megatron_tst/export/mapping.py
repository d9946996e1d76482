"""Which Hugging Face tensors each of Megatron's is made of. Export reads the list one way, import
the other, so that what one writes the other finds.

Names and layouts (Megatron: queries, keys and values of each group of heads together; gate above
up):

    model.embed_tokens.weight         embedding.word_embeddings.weight, without the rows that pad
                                      the vocabulary
    layers.N.self_attn.{q,k,v}_proj   self_attention.linear_qkv, a group after the other [q.. k v]
    layers.N.self_attn.q_proj         self_attention.linear_q_proj   (multi-latent attention)
                      .q_a_proj       ....linear_q_down_proj
                      .q_b_proj       ....linear_q_up_proj           a head after the other:
                                                                     without positions, with them
                      .kv_a_proj_...  ....linear_kv_down_proj        latents, positions
                      .kv_b_proj      ....linear_kv_up_proj          a head after the other: keys,
                                                                     values
    layers.N.mlp.{gate,up}_proj       mlp.linear_fc1 [gate; up], or each expert's
    layers.N.mlp.shared_experts       mlp.shared_experts
    layers.N.mlp.gate                 mlp.router.weight; its bias is mlp.router.expert_bias
    layers.L+K                        mtp.layers.K, of multi-token prediction after L layers
    lm_head.weight                    output_layer.weight, unless tied
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_tst.checkpoint.boundary import EXPERT_NORM
from megatron_tst.errors import refuse
from megatron_tst.export.architectures import Architecture

SPECS = tuple(EXPERT_NORM)  # in the order of a Pair's names
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROUTER_BIAS = "mlp.gate.e_score_correction_bias"


@dataclass(frozen=True)
class Pair:
    """One tensor of Megatron's, or an expert's part of it, and the Hugging Face tensors in it.

    Args:
        ours: its names: in the local layer spec, in Transformer Engine's where that differs, in
            others. What stands before them is `block`, and the layer where there is one.
        theirs: (name, shape) of each, which lie one after the other along the first dimension.
        block: what stands before Megatron's name, "decoder.layers" or "mtp.layers.0".
        layer: in the block, from 0.
        expert: whose part it is.
        groups: the first dimension is cut into so many, each with its part of every tensor.
        padded: Megatron's may have more rows, which pad the vocabulary.
        fp32: it is stored in float32 whatever the dtype of the others.
        copy: it is another name of a tensor that is there already.
    """

    ours: tuple[str, ...]
    theirs: tuple[tuple[str, tuple[int, ...]], ...]
    block: str = ""
    layer: int | None = None
    expert: int | None = None
    groups: int = 1
    padded: bool = False
    fp32: bool = False
    copy: bool = False

    def ours_in(self, layer_spec: str) -> str:
        """Megatron's name in a layer spec, "local" or "transformer_engine"."""
        return self.ours[min(SPECS.index(layer_spec), len(self.ours) - 1)]

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Megatron's tensor -> Hugging Face's, in the order of `theirs`.

        Raises:
            TSTError: it has another number of rows.
        """
        if len(self.theirs) == 1:
            return [tensor[: self.theirs[0][1][0]] if self.padded else tensor]
        rows = [shape[0] for _, shape in self.theirs]
        if tensor.shape[0] != sum(rows):
            name, shape = self.theirs[0]
            got = f"{tensor.shape[0]} rows in Megatron's with {len(rows)} such tensors"
            do = "The model is of another kind than its arguments say."
            refuse(name, f"shape {shape}", got, do)
        cut = tensor.view(self.groups, -1, *tensor.shape[1:])
        parts = cut.split([n // self.groups for n in rows], 1)
        return [part.reshape(-1, *tensor.shape[1:]) for part in parts]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Hugging Face's tensors, in the order of `theirs` -> Megatron's."""
        if len(tensors) == 1:
            return tensors[0]
        cut = [tensor.view(self.groups, -1, *tensor.shape[1:]) for tensor in tensors]
        return torch.cat(cut, 1).reshape(-1, *tensors[0].shape[1:])


def pairs(arch: Architecture) -> Iterator[Pair]:
    """Every tensor of the model, in the order of its layers."""
    h, table = arch.hidden, (arch.vocab, arch.hidden)
    embedding, head = "embedding.word_embeddings.weight", "output_layer.weight"
    yield Pair((embedding,), ((EMBEDDING, table),), padded=True)
    for n in range(arch.layers):
        # a HybridModel has attention and MLP in layers of their own
        places = (2 * n, 2 * n + 1) if arch.hybrid else (n, n)
        at = [("decoder.layers", place) for place in places]
        yield from _layer(arch, f"model.layers.{n}.", *at, n in arch.expert_layers)
    norm = "decoder.final_norm" if arch.hybrid else "decoder.final_layernorm"
    yield Pair((f"{norm}.weight",), (("model.norm.weight", (h,)),))
    if not arch.tied:
        yield Pair((head,), ((HEAD, table),), padded=True)
    for k in range(arch.mtp_layers):
        theirs, ours = f"{mtp_layer(arch, k)}.", f"mtp.layers.{k}"
        for name in ("enorm", "hnorm"):
            yield Pair((f"{name}.weight",), ((f"{theirs}{name}.weight", (h,)),), ours)
        # the embedding's half first, in both
        yield Pair(("eh_proj.weight",), ((f"{theirs}eh_proj.weight", (h, 2 * h)),), ours)
        at = [(f"{ours}.transformer_layer", None)] * 2
        if arch.hybrid:
            at = [(f"{ours}.mtp_model_layer.layers", place) for place in (0, 1)]
        # a layer as the last one is
        yield from _layer(arch, theirs, *at, arch.layers - 1 in arch.expert_layers)
        norm = f"{theirs}shared_head.norm.weight"
        yield Pair(("final_layernorm.weight",), ((norm, (h,)),), ours)
        for name, of in (("embed_tokens", embedding), ("shared_head.head", head)):
            of = embedding if arch.tied else of
            yield Pair((of,), ((f"{theirs}{name}.weight", table),), padded=True, copy=True)


def mtp_layer(arch: Architecture, k: int) -> str:
    """What Hugging Face's names of the k-th layer of multi-token prediction begin with."""
    return f"model.layers.{arch.layers + k}"


def _layer(arch, theirs, attention, mlp, experts) -> Iterator[Pair]:
    """A layer's pairs; attention, mlp: (block, layer) of each in Megatron's names."""

    def alone(place, name, shape, *ours, **more):
        return Pair(ours, ((f"{theirs}{name}", shape),), *place, **more)

    yield from (_latents if arch.latent else _grouped)(arch, theirs, attention, alone)
    h, config = arch.hidden, arch.config
    norm = "post_attention_layernorm.weight", (h,)
    fused, apart = (EXPERT_NORM[spec] for spec in ("local", "transformer_engine"))
    if arch.latent:  # whose local layer spec fuses none
        yield alone(mlp, *norm, apart, *(() if experts else (fused,)))
    elif experts:
        yield alone(mlp, *norm, EXPERT_NORM[SPECS[0]], EXPERT_NORM[SPECS[1]])
    else:
        yield alone(mlp, *norm, fused, fused, apart)
    if not experts:
        yield from _mlp(theirs + "mlp.", mlp, "mlp.", h, config["intermediate_size"])
        return
    yield alone(mlp, "mlp.gate.weight", (arch.experts, h), "mlp.router.weight")
    width = config["moe_intermediate_size"]
    if arch.latent:
        ours = "mlp.router.expert_bias"
        yield alone(mlp, ROUTER_BIAS, (arch.experts,), ours, fp32=True)
    for e in range(arch.experts):
        yield from _mlp(f"{theirs}mlp.experts.{e}.", mlp, "mlp.experts.experts.", h, width, e)
    if arch.latent:
        shared = config["n_shared_experts"] * width
        yield from _mlp(f"{theirs}mlp.shared_experts.", mlp, "mlp.shared_experts.", h, shared)


def _grouped(arch, theirs, place, alone) -> Iterator[Pair]:
    """Attention with grouped queries."""
    h, d, groups = arch.hidden, arch.head_dim, arch.groups
    fused = "self_attention.linear_qkv.layer_norm_weight"
    yield alone(place, "input_layernorm.weight", (h,), fused, fused, "input_layernorm.weight")
    rows = zip("qkv", (arch.heads * d, groups * d, groups * d))
    parts = tuple((f"{theirs}self_attn.{x}_proj.weight", (n, h)) for x, n in rows)
    yield Pair(("self_attention.linear_qkv.weight",), parts, *place, groups=groups)
    for x in "qk" if arch.qk_norm else "":
        ours = f"self_attention.{x}_layernorm.weight"
        yield alone(place, f"self_attn.{x}_norm.weight", (d,), ours)
    shape = h, arch.heads * d
    yield alone(place, "self_attn.o_proj.weight", shape, "self_attention.linear_proj.weight")


def _latents(arch, theirs, place, alone) -> Iterator[Pair]:
    """Multi-latent attention."""
    h, config = arch.hidden, arch.config
    rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, v = (config[f"{x}_head_dim"] for x in ("qk_nope", "qk_rope", "v"))
    queries, keys_and_values = arch.heads * (nope + rope), arch.heads * (nope + v)

    def part(name, shape, ours):
        ours = f"self_attention.{ours}.weight"
        return alone(place, f"self_attn.{name}.weight", shape, ours)

    def norm(x, width):
        local = f"self_attention.{x}_layernorm.weight"
        fused = f"self_attention.linear_{x}_up_proj.layer_norm_weight"
        return alone(place, f"self_attn.{x}_a_layernorm.weight", (width,), local, fused)

    yield alone(place, "input_layernorm.weight", (h,), "input_layernorm.weight")
    if rank is None:
        yield part("q_proj", (queries, h), "linear_q_proj")
    else:
        yield part("q_a_proj", (rank, h), "linear_q_down_proj")
        yield norm("q", rank)
        yield part("q_b_proj", (queries, rank), "linear_q_up_proj")
    yield part("kv_a_proj_with_mqa", (kv_rank + rope, h), "linear_kv_down_proj")
    yield norm("kv", kv_rank)
    yield part("kv_b_proj", (keys_and_values, kv_rank), "linear_kv_up_proj")
    yield part("o_proj", (h, arch.heads * v), "linear_proj")


def _mlp(theirs, place, ours, hidden, width, expert=None) -> Iterator[Pair]:
    """A gated MLP: dense, of an expert, or of the shared experts."""
    parts = tuple((f"{theirs}{x}_proj.weight", (width, hidden)) for x in ("gate", "up"))
    yield Pair((f"{ours}linear_fc1.weight",), parts, *place, expert)
    down = f"{theirs}down_proj.weight", (hidden, width)
    yield Pair((f"{ours}linear_fc2.weight",), (down,), *place, expert)
