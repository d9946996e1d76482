"""Whether a checkpoint's description (.metadata) fits together.

The pickle has no checksum. It says most things twice, though: each name as a key of the state and
with the item that holds the bytes, each shape in the tensor and in its shards, each place in a file
in the item and in its neighbours. A changed bit contradicts one of these, or the item itself once
that is opened.
"""

from __future__ import annotations

import math
from pathlib import PurePath

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

_MOST_CELLS = 100_000_000


def check_description(metadata: Metadata) -> None:
    """Hold the parts of a description against each other; no file is opened.

    Args:
        metadata: as unpickled, possibly of another type or without some of its fields.

    Raises:
        ValueError: the first thing that does not fit, as a phrase. AttributeError or TypeError:
            a field is missing or of another type.
    """
    if not isinstance(metadata, Metadata):
        raise ValueError(f"a {type(metadata).__name__} in place of a description")
    state, storage = metadata.state_dict_metadata, metadata.storage_data
    if not isinstance(state, dict) or not isinstance(storage, dict):
        raise ValueError("no table of tensors and items")
    wanted = {}
    for name, entry in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{name!r} as a tensor's name")
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(name, entry)
            for chunk in entry.chunks:
                smallest = math.prod(chunk.sizes) * entry.properties.dtype.itemsize
                wanted[name, tuple(chunk.offsets)] = smallest
        elif isinstance(entry, BytesStorageMetadata):
            wanted[name, None] = 0
        else:
            raise ValueError(f"{name} as a {type(entry).__name__}")
    stored = {
        (index.fqn, None if index.offset is None else tuple(index.offset)): info
        for index, info in storage.items()
    }
    for one, other, what in (
        (wanted, stored, "is described but not stored"),
        (stored, wanted, "is stored but not described"),
    ):
        if missing := one.keys() - other.keys():
            name, place = min(missing, key=str)
            raise ValueError(f"{name}{'' if place is None else f' at {list(place)}'} {what}")
    _check_places(stored, wanted)


def _check_tensor(name, entry):
    size, dtype = entry.size, entry.properties.dtype
    if not isinstance(size, torch.Size) or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} without a shape or dtype")
    boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
    for place, shape in boxes:
        if not len(place) == len(shape) == len(size) or any(
            o < 0 or n < 0 or o + n > whole for o, n, whole in zip(place, shape, size)
        ):
            raise ValueError(f"{name}: a shard {list(shape)} at {list(place)} of {list(size)}")
    covered = sum(math.prod(shape) for _, shape in boxes)
    if covered != math.prod(size):
        raise ValueError(f"{name}: shards of {covered} elements for {math.prod(size)}")
    if _overlap(boxes, range(len(size))):
        raise ValueError(f"{name}: shards that overlap")


def _overlap(boxes, dimensions) -> bool:
    """Whether two of the boxes (place, shape) share a cell of the grid that their edges make."""
    edges = [sorted({e for o, n in boxes for e in (o[d], o[d] + n[d])}) for d in dimensions]
    if math.prod(map(len, edges)) > _MOST_CELLS:  # no real cut: the number of elements must do
        return False
    at = [{edge: i for i, edge in enumerate(row)} for row in edges]
    cells = np.zeros([len(row) for row in edges], dtype=bool)
    for place, shape in boxes:
        box = tuple(slice(at[d][place[d]], at[d][place[d] + shape[d]]) for d in dimensions)
        if cells[box].any():
            return True
        cells[box] = True
    return False


def _check_places(stored, smallest):
    """Items lie in plain files of the folder one after the other, from the first byte on."""
    files: dict[str, list[tuple[int, int, str]]] = {}
    for key, info in stored.items():
        file, offset, length = info.relative_path, info.offset, info.length
        if not isinstance(file, str) or PurePath(file).name != file or "\0" in file:
            raise ValueError(f"{file!r} as the file of {key[0]}")
        if length < max(1, smallest[key]):
            raise ValueError(f"{length} bytes for the {smallest[key]} of {key[0]}")
        files.setdefault(file, []).append((offset, offset + length, key[0]))
    for file, places in files.items():
        end = 0
        for start, stop, name in sorted(places):
            if start != end:
                raise ValueError(f"{name} at byte {start} of {file}, where byte {end} is the next")
            end = stop
