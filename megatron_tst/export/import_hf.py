"""A Hugging Face folder (Llama, Qwen3, Qwen3-MoE) -> a torch_dist checkpoint of weights, to
pre-train further with TST.

The way back of export/hf.py, over the same list of names, so that import and export give the bytes
that came in.
"""

from __future__ import annotations

import re
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
from megatron_tst.export.hf_config import arguments, flags, read_config
from megatron_tst.export.safetensors_files import SafetensorsFolder
from megatron_tst.export.tokenizer import FILES, check_end_ids, check_files
from megatron_tst.json_file import read_json

# How Megatron loads weights alone. An import has none of the empty extra states that each layer
# spec asks for; log_all names what is missing.
LOAD = ("--finetune", "--no-load-optim", "--no-load-rng", "--dist-ckpt-strictness", "log_all")
_GATED = "gate", "up"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
            unknown, a damaged file, safetensors is not installed, and atomic.new_folder's.
    """
    if layer_spec not in EXPERT_NORM:
        do = "Name the spec of the run that is to load it."
        refuse("--layer-spec", " or ".join(EXPERT_NORM), layer_spec, do)
    config = read_config(source)
    args = arguments(config, source / "config.json")
    kept = _kept_files(source, args.vocab_size)
    arch = architecture_of(args, args.vocab_size, "float32")
    folder_of_tensors = SafetensorsFolder(source)
    tensors = _Tensors(folder_of_tensors, arch.tied)
    total = sum(path.stat().st_size for path in folder_of_tensors.files)
    with new_folder(target, total, force, [source]) as part:
        folder = part / "release"
        folder.mkdir()
        write_checkpoint(
            folder,
            items(tensors, arch, layer_spec),
            args,
            lambda done: progress(min(done, total), total),
        )
        tensors.check_rest(arch)
        (folder / "hf").mkdir()
        for path in kept:  # for the way back
            flushed(
                folder / "hf" / path.name, lambda file, path=path: file.write(path.read_bytes())
            )
        write_text(part / TRACKER, "release")
    return flags(args)


def _kept_files(source, rows) -> list[Path]:
    """config.json, generation_config.json and the tokenizer's files, each found to be one."""
    if (source / "adapter_config.json").exists():
        do = "Merge the adapter into the model first."
        refuse(source, "a model", "an adapter (adapter_config.json), which changes it", do)
    kept = [source / "config.json"]
    if (source / "generation_config.json").exists():
        kept.append(source / "generation_config.json")
    for path in kept:
        check_end_ids(read_json(path), path, rows)
    files = [source / name for name in FILES if (source / name).exists()]
    check_files(files, rows)
    return kept + files


class _Tensors:
    """A folder's tensors under the names of the whole model, each kind of them in one dtype.

    Megatron stores all layers of a kind as one tensor. Where a folder has several dtypes in it,
    all become fp32, which changes no value.
    """

    def __init__(self, folder: SafetensorsFolder, tied: bool):
        self.folder = folder
        # of LlamaModel and so on, without the head: transformers takes it too
        self._bare = _EMBEDDING not in folder and _bare(_EMBEDDING) in folder
        # transformers 5 ties whichever is there
        swapped = tied and self._name(_EMBEDDING) not in folder and _HEAD in folder
        self._names = {_EMBEDDING: _HEAD} if swapped else {}
        self._dtypes = {}
        for name, dtype in folder.dtypes().items():
            kind = self._kind(name)
            other = self._dtypes.setdefault(kind, dtype)
            self._dtypes[kind] = dtype if dtype == other else torch.float32

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor, which must have this shape.

        Raises:
            TSTError: there is none, or it has another shape.
        """
        name = self._names.get(name) or self._name(name)
        tensor = self.folder.read(name, shape)
        return tensor.to(self._dtypes[self._kind(name)])

    def check_rest(self, arch: Architecture) -> None:
        """What transformers leaves out may be there: buffers of rotary positions, and the head of
        a tied model where it is the embedding.

        Raises:
            TSTError: another tensor, or a head that is not the embedding.
        """
        source, unread = self.folder.source, self.folder.unread
        if arch.tied and _HEAD in unread:
            shape = arch.vocab, arch.hidden
            head, embedding = (self.read(name, shape) for name in (_HEAD, _EMBEDDING))
            if not torch.equal(head.float(), embedding.float()):
                refuse(
                    f"{source}: {_HEAD}",
                    "the embedding, since config.json has tie_word_embeddings",
                    "another tensor",
                    "transformers 4 leaves it out, transformers 5 uses it: set tie_word_embeddings "
                    "to false, or remove it.",
                )
        if rest := sorted(name for name in unread if not name.endswith("rotary_emb.inv_freq")):
            expected = "the tensors of its architecture alone"
            refuse(source, expected, f"{rest[0]} besides", "It is another model.")

    def _name(self, name):
        return _bare(name) if self._bare and name != _HEAD else name

    @staticmethod
    def _kind(name):
        """Name of what becomes one tensor of Megatron's."""
        kind = re.sub(r"\.\d+\.", ".", name)
        kind = re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", kind)
        return re.sub(r"\.(gate|up)_proj\.", ".gate_up_proj.", kind)


def _bare(name):
    return name.removeprefix("model.")


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
