"""Write a changed copy of a torch_dist checkpoint: bytes are copied, so memory holds a block or a
changed item, never the model.

Everything is written into a temporary folder beside the target, flushed to disk, read back and
compared, and renamed: whenever it is stopped, the source is untouched and the target is absent or
whole.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_tst.checkpoint.atomic import flush, flushed, new_folder, write_text
from megatron_tst.checkpoint.format import COMMON, TRACKER, Checkpoint, Item
from megatron_tst.errors import TSTError

_COMMON_OBJECT = f"{COMMON}/shard_0_1"  # Megatron's name for a ShardedObject of one part


@dataclass
class Changes:
    """What the copy has otherwise.

    Args:
        common: the common state to store in place of the source's.
        keep: names of tensors and objects that stay.
        name: old name -> new name.
        tensor: (name, place of the shard in the tensor, shard) -> the shard to store, called for
            the names in `edited` alone.
        edited: names of tensors whose shards go through `tensor`.
        legacy: store the common state as Megatron-Core <= 0.18 does, in common.pt; None: as the
            source does.
        more: writes further files into the iteration's folder that it is given, before anything is
            put in place.
    """

    common: dict
    keep: Callable[[str], bool] = lambda name: True
    name: Callable[[str], str] = lambda name: name
    tensor: Callable[[str, tuple, torch.Tensor], torch.Tensor] = lambda name, offset, shard: shard
    edited: frozenset[str] = field(default_factory=frozenset)
    legacy: bool | None = None
    more: Callable[[Path], None] = lambda folder: None


def rewrite(
    source: Checkpoint,
    target: Path,
    changes: Changes,
    *,
    force: bool = False,
    also_read: Iterable[Path] = (),
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Path:
    """Write the changed copy.

    Args:
        target: a folder that is not there yet, as --save names one: it gets the iteration's folder
            and the tracker file.
        force: replace a target that is there, after the new one is whole.
        also_read: files beside the source's that `changes` reads.
        progress: called with the bytes done and in all.

    Returns:
        the iteration's folder.

    Raises:
        TSTError: what was read back is not what was written, and atomic.new_folder's.
    """
    kept = [
        item for item in source.items if item is not source.common_item and changes.keep(item.name)
    ]
    total = sum(item.length for item in kept)
    with new_folder(target, total, force, [*source.folders, *also_read]) as part:
        folder = part / source.path.name
        folder.mkdir()
        _write(source, folder, kept, changes, lambda done: progress(done, total))
        changes.more(folder)
        iteration = source.path.name.removeprefix("iter_")
        write_text(part / TRACKER, str(int(iteration)) if iteration.isdigit() else iteration)
    return target / source.path.name


def _write(source, folder, kept, changes, progress):
    legacy = source.common_item is None if changes.legacy is None else changes.legacy
    storage, sums, done = {}, {}, 0
    one = next(iter(source.metadata.storage_data.values()))
    by_file: dict[str, list[Item]] = {}
    for item in kept:
        by_file.setdefault(item.file, []).append(item)
    for name, items in by_file.items():
        with open(folder / name, "wb") as file:
            for item in sorted(items, key=lambda item: item.offset):
                start, check = file.tell(), 0
                blocks = source.blocks(item)
                if item.name in changes.edited:
                    blocks = [_edited(source, item, changes)]
                for block in blocks:
                    file.write(block)
                    check = zlib.crc32(block, check)
                progress(done := done + item.length)
                index = dataclasses.replace(item.index, fqn=changes.name(item.name))
                storage[index] = dataclasses.replace(
                    one, relative_path=name, offset=start, length=file.tell() - start
                )
                sums[index] = check
            flush(file)
    state = {
        changes.name(name): entry
        for name, entry in source.metadata.state_dict_metadata.items()
        if name.split("/")[0] != COMMON and changes.keep(name)
    }
    if legacy:
        flushed(folder / "common.pt", lambda file: file.write(saved(changes.common)))
    else:
        common = saved([changes.common])
        flushed(folder / "__common_0.distcp", lambda file: file.write(common))
        index = MetadataIndex(_COMMON_OBJECT)
        state[_COMMON_OBJECT] = BytesStorageMetadata()
        storage[index] = dataclasses.replace(
            one, relative_path="__common_0.distcp", offset=0, length=len(common)
        )
        sums[index] = zlib.crc32(common)
    metadata = dataclasses.replace(
        source.metadata, state_dict_metadata=state, storage_data=storage, planner_data=None
    )
    flattened = getattr(source.metadata, "mcore_data", None)  # Megatron's flattened tensors
    if flattened is not None:
        metadata.mcore_data = {
            changes.name(name): entry for name, entry in flattened.items() if changes.keep(name)
        }
    write_description(folder, metadata)
    read_back(folder, sums)


def write_description(folder: Path, metadata: Metadata) -> None:
    """Write .metadata and metadata.json into an iteration's folder."""
    # each name twice in the pickle, which would share them: a changed bit in one is seen
    metadata.storage_data = {
        dataclasses.replace(index, fqn=index.fqn.encode().decode()): info
        for index, info in metadata.storage_data.items()
    }
    flushed(folder / ".metadata", lambda file: pickle.dump(metadata, file))
    about = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    write_text(folder / "metadata.json", json.dumps(about))


def _edited(source, item, changes):
    shard = source.tensor(item)
    new = changes.tensor(item.name, tuple(item.index.offset), shard)
    assert new.shape == shard.shape and new.dtype == shard.dtype, item.name
    return saved(new)


def saved(content: object) -> bytes:
    """torch.save's bytes. Into a file it would write them itself, and fail in ways of its own."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def read_back(folder: Path, sums: dict[MetadataIndex, int]) -> None:
    """Compare what is on the disk with what was written.

    Args:
        folder: an iteration's.
        sums: item -> crc32 of the bytes that were written.

    Raises:
        TSTError: an item has other bytes.
    """
    written = Checkpoint(folder)
    for item in written.items:
        check = 0
        for block in written.blocks(item, check=False):
            check = zlib.crc32(block, check)
        if check != sums[item.index]:
            raise TSTError(
                f"{folder / item.file}: expected {item.name} as it was written, got other bytes. "
                "The disk is faulty."
            )
