"""Write a torch_dist checkpoint of weights anew, without building a model."""

from __future__ import annotations

import argparse
import io
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_tst.checkpoint.atomic import flush
from megatron_tst.checkpoint.format import COMMON
from megatron_tst.checkpoint.rewrite import read_back, write_description


def write_checkpoint(
    folder: Path, items: Iterable[tuple], args: argparse.Namespace, progress: Callable[[int], None]
) -> None:
    """Write an iteration's folder of these items and arguments, one item in memory at a time.

    Args:
        folder: the iteration's, empty.
        items: (name, whole shape, place of the shard in it, shard).
        args: Megatron's, to be stored.
        progress: gets the bytes done.
    """
    state, storage, sums = {}, {}, {}
    common = {
        "args": args,
        "iteration": 0,
        "checkpoint_version": 3.0,
        "content_metadata": {"singleton_local_shards": False},
    }
    with open(folder / "__0_0.distcp", "wb") as file:

        def put(index, content):
            buffer, start = io.BytesIO(), file.tell()
            torch.save(content, buffer)
            file.write(buffer.getbuffer())
            storage[index] = _StorageInfo("__0_0.distcp", start, file.tell() - start)
            sums[index] = zlib.crc32(buffer.getbuffer())
            return file.tell()

        for name, shape, place, shard in items:
            entry = state.setdefault(
                name,
                TensorStorageMetadata(TensorProperties(dtype=shard.dtype), torch.Size(shape), []),
            )
            entry.chunks.append(ChunkStorageMetadata(torch.Size(place), shard.shape))
            progress(put(MetadataIndex(name, torch.Size(place)), shard.contiguous()))
        state[f"{COMMON}/shard_0_1"] = BytesStorageMetadata()
        put(MetadataIndex(f"{COMMON}/shard_0_1"), [common])
        flush(file)
    write_description(folder, Metadata(state, storage_data=storage))
    read_back(folder, sums)
