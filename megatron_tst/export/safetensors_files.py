"""safetensors files, read and written a tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_tst.checkpoint.atomic import flush, write_json
from megatron_tst.errors import optional, refuse, warn
from megatron_tst.json_file import entry, read_json, shown

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_NAMES = {"bfloat16": "BF16", "float32": "F32"}
_ALONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# safetensors' names of what an import takes
_STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}  # files that may be a model
_AGAIN = "Download the model again."


@dataclass(frozen=True)
class Weight:
    """One tensor of the export: its Hugging Face name, shape, and how to read it, in the dtype of
    the checkpoint; dtype: in which it is stored, where it is not that of the others.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    dtype: str | None = None

    def stored_in(self, dtype: str) -> str:
        """The dtype in a file whose others have `dtype`, "bfloat16" or "float32"."""
        return self.dtype or dtype

    def bytes_in(self, dtype: str) -> int:
        """Its size in such a file."""
        return DTYPES[self.stored_in(dtype)].itemsize * math.prod(self.shape)


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
    shards, where, done = _shards(weights, dtype, shard_bytes), {}, 0
    for i, shard in enumerate(shards):
        file = _ALONE
        if len(shards) > 1:
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        with open(folder / file, "wb") as out:
            for content in _content(shard, dtype):
                out.write(content)
                progress(done := done + len(content))
            flush(out)
        where |= {weight.name: file for weight in shard}
    if len(shards) > 1:
        size = sum(weight.bytes_in(dtype) for shard in shards for weight in shard)
        write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def _shards(weights, dtype, limit):
    """Weights in order, as many to a file as fit."""
    shards, size = [[]], 0
    for weight in weights:
        more = weight.bytes_in(dtype)
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1].append(weight)
        size += more
    return shards


def _content(shard, dtype) -> Iterator[bytes]:
    """A file as safetensors' own save_file writes it (length, header, tensors by dtype, the wider
    first, and by name), a tensor at a time: save_file takes all at once.
    """
    widths = {weight: DTYPES[weight.stored_in(dtype)].itemsize for weight in shard}
    shard, end = sorted(shard, key=lambda weight: (-widths[weight], weight.name)), 0
    about = {"__metadata__": {"format": "pt"}}
    for weight in shard:
        start, end = end, end + weight.bytes_in(dtype)
        about[weight.name] = {
            "dtype": _NAMES[weight.stored_in(dtype)],
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
        stored = DTYPES[weight.stored_in(dtype)]
        yield tensor.to(stored).contiguous().flatten().view(torch.uint8).numpy().data


class SafetensorsFolder:
    """The tensors of a folder as transformers finds them, by name: those of model.safetensors, or
    of the files that model.safetensors.index.json names. What else lies there is ignored.

    Args:
        source: the folder.
        blocks: (rows, columns) of the blocks that a weight in float8 has a scale for each, in
            another tensor (DeepSeek-V3's weight_scale_inv); None: none is read.

    Attributes:
        files: that count.
        unread: names of the tensors that nobody has asked for.

    Raises:
        TSTError: safetensors is not installed, files are missing or not whole, or the index and
            they do not fit together.
    """

    def __init__(self, source: Path, blocks: tuple[int, int] | None = None):
        self._blocks = blocks
        safetensors = optional("safetensors", "megatron-tst[hf]")
        self.source, index = source, {}
        self.files = [source / _ALONE]
        if not self.files[0].is_file():
            self.files, index = self._of_index()
        beside = sorted(
            {p.name for p in source.glob("*.safetensors")} - {p.name for p in self.files}
        )
        if beside:
            which = _INDEX if index else _ALONE
            warn(f"{source}: ignored beside {which}: {', '.join(beside)}")
        self._where, self._file = {}, {}
        for path in self.files:
            try:
                opened = safetensors.safe_open(path, "pt")
            except (safetensors.SafetensorError, OSError) as error:
                refuse(path, "a whole safetensors file", error, _AGAIN)
            for name in opened.keys():
                if name in self._where or index.get(name, path.name) != path.name:
                    got = f"{path.name} {'too' if name in self._where else 'instead'}"
                    expected = f"it in {index.get(name, self._file.get(name))} alone"
                    refuse(f"{source}: {name}", expected, got, _AGAIN)
                self._where[name], self._file[name] = opened, path.name
        for name in index:
            if name not in self._where:
                refuse(source / index[name], f"{name} in it, as the index says", "none", _AGAIN)
        self.unread = set(self._where)

    def _of_index(self):
        """(files that it names, tensor -> name of its file)"""
        path = self.source / _INDEX
        if not path.exists():
            names = sorted(p.name for p in self.source.iterdir() if p.suffix in _WEIGHTS)
            do = "Save it with transformers' save_pretrained, or download it again."
            refuse(self.source, f"{_ALONE} or {_INDEX}", ", ".join(names[:3]) or "neither", do)
        index = entry(read_json(path, do=_AGAIN), "weight_map", dict, path, do=_AGAIN)
        if not index:
            refuse(f"{path}: weight_map", "the files of tensors", "none", _AGAIN)
        for name, file in index.items():
            # a name that leads out of the folder would read somebody else's file
            if not isinstance(file, str) or Path(file).name != file:
                refuse(f"{path}: {name}", "the name of a file", shown(file), _AGAIN)
        files = [self.source / name for name in sorted(set(index.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            expected = "every file that its index names"
            refuse(self.source, expected, f"no {', '.join(missing)}", _AGAIN)
        return files, index

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def dtypes(self) -> dict[str, torch.dtype]:
        """Name -> the dtype in which it is read, of those that read takes."""
        found = {name: self._dtype(name) for name in self._where}
        of = {name: _STORED[dtype] for name, dtype in found.items() if dtype in _STORED}
        return of | {name: torch.bfloat16 for name in found if self._scale_of(name)}

    def _dtype(self, name):
        return self._where[name].get_slice(name).get_dtype()

    def _shape(self, name):
        return tuple(self._where[name].get_slice(name).get_shape())

    def _scale_of(self, name):
        """Name of the scales of a weight in float8 that can be read."""
        scale = f"{name}_scale_inv"
        fits = self._blocks and scale in self._where and self._dtype(name) == "F8_E4M3"
        return scale if fits else None

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor in its own dtype, on CPU; of float8 with its scales, in bf16: their product in
        fp32, rounded once, as DeepSeek's own conversion does.

        Raises:
            TSTError: there is none, it has another shape, or it is quantised otherwise.
        """
        do = "It is another model than config.json says."
        if name not in self._where:
            refuse(self.source, f"a tensor {name}", "none", do)
        self.unread.discard(name)
        if (given := self._shape(name)) != shape:
            refuse(f"{self.source}: {name}", f"shape {shape}", given, do)
        if scale := self._scale_of(name):
            return self._scaled(name, scale)
        if (dtype := self._dtype(name)) not in _STORED:
            do = "Take the model as it was before it was quantised."
            refuse(f"{self.source}: {name}", " or ".join(_STORED), dtype, do)
        return self._where[name].get_tensor(name)

    def _scaled(self, name, scale):
        weight = self._where[name].get_tensor(name)
        self.unread.discard(scale)
        wanted = tuple(-(-n // block) for n, block in zip(weight.shape, self._blocks))
        if (given := self._shape(scale)) != wanted or self._dtype(scale) != "F32":
            expected = f"a scale in F32 for each block, {wanted}"
            got = f"{given} in {self._dtype(scale)}"
            refuse(f"{self.source}: {scale}", expected, got, _AGAIN)
        factors = self._where[scale].get_tensor(scale)
        for dim, block in enumerate(self._blocks):
            factors = factors.repeat_interleave(block, dim).narrow(dim, 0, weight.shape[dim])
        return (weight.float() * factors).bfloat16()
