"""safetensors files, read and written a tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_tst.checkpoint.atomic import flush, write_json
from megatron_tst.errors import optional, refuse

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_NAMES = {"bfloat16": "BF16", "float32": "F32"}
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Weight:
    """One tensor of the export: its Hugging Face name, shape, and how to read it, in the dtype of
    the checkpoint.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def write_weights(
    folder: Path,
    weights: Iterable[Weight],
    dtype: str,
    shard_bytes: int,
    progress: Callable[[int], None],
) -> None:
    """Write a folder's safetensors files, and their index where there are several.

    Args:
        weights: in the order in which they are to lie.
        dtype: "bfloat16" or "float32".
        shard_bytes: most bytes of one file; a larger tensor has one alone.
        progress: gets the bytes done.

    Raises:
        TSTError: a tensor has another shape than it is said to have.
    """
    shards, where, done = _shards(weights, DTYPES[dtype].itemsize, shard_bytes), {}, 0
    for i, shard in enumerate(shards):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        with open(folder / file, "wb") as out:
            for content in _content(shard, dtype):
                out.write(content)
                progress(done := done + len(content))
            flush(out)
        where |= {weight.name: file for weight in shard}
    if len(shards) > 1:
        size = DTYPES[dtype].itemsize * sum(math.prod(w.shape) for shard in shards for w in shard)
        write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _shards(weights, itemsize, limit):
    """Weights in order, as many to a file as fit."""
    shards, size = [[]], 0
    for weight in weights:
        more = itemsize * math.prod(weight.shape)
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += more
    return shards


def _content(shard, dtype) -> Iterator[bytes]:
    """A file as safetensors' own save_file writes it (length, header, tensors by name), a tensor at
    a time: save_file takes all at once.
    """
    shard, end = sorted(shard, key=lambda weight: weight.name), 0
    about = {"__metadata__": {"format": "pt"}}
    for weight in shard:
        start, end = end, end + DTYPES[dtype].itemsize * math.prod(weight.shape)
        about[weight.name] = {
            "dtype": _NAMES[dtype],
            "shape": weight.shape,
            "data_offsets": [start, end],
        }
    header = json.dumps(about, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for weight in shard:
        tensor = weight.read()
        if tuple(tensor.shape) != weight.shape:
            do = "The model is of another kind than its arguments say."
            refuse(weight.name, f"shape {weight.shape}", tuple(tensor.shape), do)
        yield tensor.to(DTYPES[dtype]).contiguous().flatten().view(torch.uint8).numpy().data


class SafetensorsFolder:
    """The tensors of a folder's safetensors files, by name.

    Args:
        source: the folder.

    Raises:
        TSTError: safetensors is not installed, or files are missing or not whole.
    """

    def __init__(self, source: Path):
        safetensors = optional("safetensors", "megatron-tst[hf]")
        self.files = sorted(source.glob("*.safetensors"))
        if not self.files:
            refuse(source, "safetensors files", "none", "Download the model again.")
        index = source / _INDEX
        named = set()
        if index.is_file():
            named = set(json.loads(index.read_text())["weight_map"].values())
        if missing := named - {path.name for path in self.files}:
            got = f"no {', '.join(sorted(missing))}"
            refuse(source, "every file that its index names", got, "Download the model again.")
        self._where = {}
        for path in self.files:
            try:
                opened = safetensors.safe_open(path, "pt")
            except safetensors.SafetensorError as error:
                refuse(path, "a whole safetensors file", error, "Download the model again.")
            self._where |= dict.fromkeys(opened.keys(), opened)
        self.source = source
        self.unread = set(self._where)  # those that nobody has asked for

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor in its own dtype, on CPU.

        Raises:
            TSTError: there is none, or it has another shape.
        """
        do = "It is another model than config.json says."
        if name not in self._where:
            refuse(self.source, f"a tensor {name}", "none", do)
        self.unread.discard(name)
        tensor = self._where[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            refuse(f"{self.source}: {name}", f"shape {shape}", tuple(tensor.shape), do)
        return tensor
