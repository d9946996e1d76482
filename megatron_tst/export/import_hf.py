"""A Hugging Face folder (Llama, Qwen3, Qwen3-MoE, DeepSeek-V3) -> a torch_dist checkpoint of
weights, to pre-train further with TST.

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
from megatron_tst.export.hf_config import arguments, blocks_of, flags, read_config
from megatron_tst.export.mapping import EMBEDDING, HEAD, mtp_layer, pairs
from megatron_tst.export.safetensors_files import SafetensorsFolder
from megatron_tst.export.tokenizer import FILES, check_end_ids, check_files
from megatron_tst.json_file import read_json

# How Megatron loads weights alone. An import has none of the empty extra states that each layer
# spec asks for; log_all names what is missing.
LOAD = ("--finetune", "--no-load-optim", "--no-load-rng", "--dist-ckpt-strictness", "log_all")


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
    folder_of_tensors = SafetensorsFolder(source, blocks_of(config))
    first = f"model.layers.{args.num_layers}.eh_proj.weight"
    if getattr(args, "mtp_num_layers", None) and first not in folder_of_tensors:
        args.mtp_num_layers = None  # transformers asks for none of them either
    arch = architecture_of(args, args.vocab_size, "float32")
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
        self._bare = EMBEDDING not in folder and _bare(EMBEDDING) in folder
        # transformers 5 ties whichever is there
        swapped = tied and self._name(EMBEDDING) not in folder and HEAD in folder
        self._names = {EMBEDDING: HEAD} if swapped else {}
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
        """What transformers leaves out may be there: buffers of rotary positions, the head of a
        tied model where it is the embedding, and both once more in layers of multi-token
        prediction.

        Raises:
            TSTError: another tensor, or a copy that is none.
        """
        source, unread = self.folder.source, self.folder.unread
        self._check_copies(arch)
        if arch.tied and HEAD in unread:
            shape = arch.vocab, arch.hidden
            head, embedding = (self.read(name, shape) for name in (HEAD, EMBEDDING))
            if not torch.equal(head.float(), embedding.float()):
                refuse(
                    f"{source}: {HEAD}",
                    "the embedding, since config.json has tie_word_embeddings",
                    "another tensor",
                    "transformers 4 leaves it out, transformers 5 uses it: set tie_word_embeddings "
                    "to false, or remove it.",
                )
        if rest := sorted(name for name in unread if not name.endswith("rotary_emb.inv_freq")):
            expected = "the tensors of its architecture alone"
            refuse(source, expected, f"{rest[0]} besides", "It is another model.")

    def _check_copies(self, arch):
        of = {"embed_tokens": EMBEDDING, "shared_head.head": EMBEDDING if arch.tied else HEAD}
        for k in range(arch.mtp_layers):
            for name, original in of.items():
                copy, shape = f"{mtp_layer(arch, k)}.{name}.weight", (arch.vocab, arch.hidden)
                if copy in self.folder.unread and not torch.equal(
                    self.folder.read(copy, shape).float(), self.read(original, shape).float()
                ):
                    expected = f"{original}, which multi-token prediction shares"
                    do = "Megatron's layers of multi-token prediction have no others."
                    refuse(f"{self.folder.source}: {copy}", expected, "another tensor", do)

    def _name(self, name):
        return _bare(name) if self._bare and name != HEAD else name

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

    Args:
        tensors: Hugging Face's.
        arch: the model, as GPTModel has it.
        layer_spec: "local" or "transformer_engine".

    Yields:
        (name, whole shape, place of the shard in it, shard).
    """
    mixed = 0 < len(arch.expert_layers) < arch.layers
    for pair in pairs(arch):
        if pair.copy:
            continue
        tensor = pair.join([tensors.read(name, shape) for name, shape in pair.theirs])
        if pair.fp32:
            tensor = tensor.float()
        name, whole, place = pair.ours_in(layer_spec), (*tensor.shape,), (0,) * tensor.dim()
        if pair.expert is not None:
            whole, place = (arch.experts, *whole), (pair.expert, *place)
        if pair.layer is not None and mixed:
            name = f"{pair.layer}.{name}"
        elif pair.layer is not None:
            whole, place = (arch.layers, *whole), (pair.layer, *place)
        name = f"{pair.block}.{name}" if pair.block else name
        yield name, whole, place, tensor.reshape(*(1,) * (len(whole) - tensor.dim()), *tensor.shape)
