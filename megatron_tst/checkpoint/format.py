"""Megatron's torch_dist checkpoints as files: what is in them, checked, read item by item.

A checkpoint folder (iter_0000100) holds
    metadata.json         {"sharded_backend": "torch_dist", ...}
    .metadata             a pickled torch.distributed.checkpoint Metadata: names, shapes, and where
                          each item's bytes lie
    __<rank>_<n>.distcp   the items one after the other, each a torch.save of one tensor (a shard)
                          or object
    common.pt             Megatron-Core <= 0.18: arguments, iteration, scheduler; from 0.19 on the
                          object `common_state` instead

Nothing is unpickled but tensors, plain containers, torch's own metadata classes and the
enumerations in Megatron's arguments.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_tst.checkpoint.description import check_description
from megatron_tst.checkpoint.trusted import check_archive, load_metadata, load_trusted
from megatron_tst.errors import TSTError, refuse, warn

TRACKER = "latest_checkpointed_iteration.txt"
COMMON = "common_state"  # the object, from 0.19 on
_BLOCK = 8 << 20
_OTHER_FORMATS = "zarr", "torch_dcp", "fsdp_dtensor"  # Megatron's, with a metadata.json


@dataclass(frozen=True)
class Item:
    """One stored shard or object: its place in the state, and its bytes in a file of the folder."""

    index: MetadataIndex
    file: str
    offset: int
    length: int

    @property
    def name(self) -> str:
        """Of the tensor or object, as Megatron's state has it."""
        return self.index.fqn


class Checkpoint:
    """A torch_dist checkpoint folder, opened and checked; nothing large is read before it is asked
    for.

    Args:
        path: an iteration's folder, or the folder that --save names (then the iteration of its
            tracker file).

    Raises:
        TSTError: no torch_dist checkpoint, a description (.metadata) that does not fit together, or
            files that are missing or not as long as it says, each named.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = iteration_folder(Path(path))
        self.metadata = self._read_metadata()
        self.items = [
            Item(index, info.relative_path, info.offset, info.length)
            for index, info in self.metadata.storage_data.items()
        ]
        self._check_files()

    def _read_metadata(self) -> Metadata:
        got = _backend(self.path)
        if got != "torch_dist":
            expected = "a torch_dist checkpoint (metadata.json says so)"
            refuse(self.path, expected, got, "Save with --ckpt-format torch_dist.")
        described = self.path / ".metadata"
        if not described.is_file():  # a FIFO would be waited for
            do = "It is incomplete: copy it again or use another iteration."
            refuse(described, "readable metadata", "no file", do)
        try:
            metadata = load_metadata(described.read_bytes())
            check_description(metadata)
        except Exception as error:  # a truncated pickle fails in many ways
            got = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
            do = "It is incomplete or damaged: copy it again or use another iteration."
            refuse(described, "readable metadata that fit together", got, do)
        compressed = [
            index.fqn
            for index, info in metadata.storage_data.items()
            if getattr(info, "transform_descriptors", None)
        ]
        if compressed:
            got = f"compressed ones ({compressed[0]})"
            refuse(self.path, "plain items", got, "Save it without compression.")
        return metadata

    def _check_files(self):
        ends: dict[str, int] = {}
        for item in self.items:
            ends[item.file] = max(ends.get(item.file, 0), item.offset + item.length)
        wrong = []
        for name, size in sorted(ends.items()):
            path = self.path / name
            if not path.is_file():
                wrong.append(f"{name} is missing")
            elif (got := path.stat().st_size) < size:
                wrong.append(f"{name} has {got} of {size} bytes")
            elif got > size:  # what lies behind would be lost without a word
                wrong.append(f"{name} has {got} bytes, {size} of them named")
        if self.common_item is None and not (self.path / "common.pt").is_file():
            wrong.append("common.pt is missing")
        if wrong:
            do = "Copy it again or use another iteration."
            refuse(self.path, "every file as its metadata name it", "; ".join(wrong), do)

    @property
    def folders(self) -> list[Path]:
        """What it lies in: the iteration's folder, and the one with the tracker file, if any."""
        above = Path(os.path.realpath(self.path)).parent
        return [self.path, *([above] if (above / TRACKER).is_file() else [])]

    @cached_property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Name -> shape and type of every tensor, model and optimizer."""
        entries = self.metadata.state_dict_metadata.items()
        return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}

    @cached_property
    def objects(self) -> list[str]:
        """Names of what is no tensor."""
        entries = self.metadata.state_dict_metadata.items()
        return [name for name, entry in entries if isinstance(entry, BytesStorageMetadata)]

    @property
    def common_item(self) -> Item | None:
        """Where the common state lies from 0.19 on; None where it is common.pt."""
        return next((item for item in self.items if item.name.split("/")[0] == COMMON), None)

    @cached_property
    def common(self) -> dict:
        """Arguments, iteration, scheduler and the optimizer's scalars.

        Raises:
            TSTError: it is damaged, or something else lies in its place.
        """
        if self.common_item is None:
            found, name = load_trusted(self.path / "common.pt"), "common.pt"
        else:
            name = self.common_item.name
            found = load_trusted(io.BytesIO(self.read(self.common_item)), self.path / COMMON)
            if isinstance(found, list) and len(found) == 1:  # objects are stored so
                (found,) = found
        if not isinstance(found, dict):
            do = "It was not written by megatron.training."
            refuse(self.path / name, "Megatron's common state", type(found).__name__, do)
        return found

    @property
    def args(self) -> argparse.Namespace:
        """Megatron's arguments at the time of the save.

        Raises:
            TSTError: there are none.
        """
        args = self.common.get("args")
        if not isinstance(args, argparse.Namespace):
            refuse(
                self.path,
                "Megatron's arguments in it",
                type(args).__name__,
                "It was not written by megatron.training.",
            )
        return args

    def read(self, item: Item) -> bytes:
        """The bytes of an item, after `check`."""
        self.check(item)
        with self.window(item) as window:
            return window.read()

    def tensor(self, item: Item) -> torch.Tensor:
        """The shard that an item holds, on CPU, in the dtype in which it was saved; checked."""
        return torch.load(io.BytesIO(self.read(item)), map_location="cpu", weights_only=True)

    def blocks(self, item: Item, check: bool = True) -> Iterator[bytes]:
        """The bytes of an item a few MiB at a time, after `check`."""
        if check:
            self.check(item)
        with self.window(item) as window:
            while block := window.read(_BLOCK):
                yield block

    def check(self, item: Item) -> None:
        """Read an item once as torch would, and hold it against its checksums and the description.
        Memory: a MiB.

        Raises:
            TSTError: it is damaged, torch cannot read it, or it is of another dtype or shape than
                the description says.
        """
        with self.window(item) as window:
            try:
                check_archive(window)
                if item.name in self.tensors:
                    self._check_described(item, window)
            except Exception as error:
                expected = f"{item.name} at byte {item.offset} as it was written"
                got = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
                do = "Copy it again or use another iteration."
                refuse(self.path / item.file, expected, got, do)

    def _check_described(self, item, window):
        # on "meta" nothing is read but the description of the tensor: check_archive saw the rest
        shard = torch.load(window, map_location="meta", weights_only=True)
        if not isinstance(shard, torch.Tensor):
            raise ValueError(f"a {type(shard).__name__}")
        dtype = self.tensors[item.name].properties.dtype
        shape = self._shapes[item.name, tuple(item.index.offset)]
        if (shard.dtype, tuple(shard.shape)) != (dtype, shape):
            got = f"{shard.dtype} {list(shard.shape)}"
            raise ValueError(f"{got} where the description says {dtype} {list(shape)}")

    @cached_property
    def _shapes(self) -> dict[tuple[str, tuple], tuple[int, ...]]:
        return {
            (name, tuple(chunk.offsets)): tuple(chunk.sizes)
            for name, entry in self.tensors.items()
            for chunk in entry.chunks
        }

    def check_all(
        self,
        *,
        share: int = 0,
        of: int = 1,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> tuple[int, int]:
        """Check every item, or every `of`-th from the `share`-th on, and the common state.

        Args:
            share, of: this process and how many divide the work.
            progress: called with the bytes done and in all.

        Returns:
            items and bytes that were read.

        Raises:
            TSTError: check's.
        """
        assert self.common is not None
        mine = sorted(self.items, key=lambda item: -item.length)[share::of]
        total, done = sum(item.length for item in mine), 0
        for item in sorted(mine, key=lambda item: (item.file, item.offset)):
            self.check(item)
            progress(done := done + item.length, total)
        return len(mine), total

    def window(self, item: Item) -> io.RawIOBase:
        """The bytes of an item as a file of their own, unchecked; to be closed."""
        return _Window(self.path / item.file, item.offset, item.length)


def iteration_folder(path: Path) -> Path:
    """The folder of the iteration that `path` stands for: such a folder, or the parent of several,
    where the tracker file names it.

    Megatron empties the tracker before it writes the new iteration into it. Where a run was killed
    in between, the last whole checkpoint stands for it, with a warning.

    Raises:
        TSTError: no such folder, or the tracker file names one that is not there.
    """
    if (path / "metadata.json").is_file():
        return path
    if not (path / TRACKER).is_file():
        refuse(
            path,
            f"a checkpoint folder, or one with {TRACKER}",
            "neither",
            "Give the folder of --save or one iter_... in it.",
        )
    text = _tracked(path)
    if not text:
        folder = _last_whole(path)
        if folder is None:
            do = "Nothing can be read: use another folder."
            refuse(path / TRACKER, "an iteration", "an empty file beside no whole checkpoint", do)
        warn(emptied(path, _number(folder)))
        return folder
    folder = path / (f"iter_{int(text):07d}" if text.isdecimal() else text)
    if not folder.is_dir():
        last = _last_whole(path)
        do = f"The last whole one is {last.name}." if last else "No other one is whole."
        refuse(path, f"the folder {folder.name} that {TRACKER} names", "none", do)
    newest = next(iter(_iterations(path)), folder)
    if text.isdecimal() and _number(newest) > int(text):
        warn(f"{path / TRACKER} names {folder.name}; {newest.name} is there too")
    return folder


def emptied(path: str | os.PathLike, iteration: int) -> str:
    """What is said where the tracker file of `path` is empty and an iteration is taken anyway."""
    return (
        f"{path}: {TRACKER} was empty (a run killed while it wrote it); "
        f"going on from iteration {iteration}"
    )


def mend_tracker(folder: str | os.PathLike) -> int | None:
    """Write an empty tracker file anew: Megatron cannot start from it (iteration_folder).

    Args:
        folder: what --load names.

    Returns:
        the iteration of the last whole checkpoint, which the tracker names now; None where nothing
        was amiss or no checkpoint is whole.
    """
    tracker = Path(folder) / TRACKER
    if not tracker.is_file() or _tracked(Path(folder)):
        return None
    last = _last_whole(Path(folder))
    if last is None:
        return None
    part = tracker.with_suffix(".part")
    part.write_text(str(_number(last)))
    os.replace(part, tracker)
    return _number(last)


def checkpoint_to_load(path: str | os.PathLike) -> Checkpoint | None:
    """What a run with `--load path` goes on from; None where there is nothing yet, or a checkpoint
    of another format, of which Megatron says what it makes.

    Raises:
        TSTError: Checkpoint's.
    """
    path = Path(path)
    if not (path / "metadata.json").is_file() and not (path / TRACKER).is_file():
        return None
    folder = iteration_folder(path)
    other = not (folder / "metadata.json").is_file() or _backend(folder) in _OTHER_FORMATS
    return None if other else Checkpoint(folder)


def _tracked(path: Path) -> str:
    """The text of the tracker file: digits, "release", or nothing."""
    found = (path / TRACKER).read_bytes().strip()
    if found and not re.fullmatch(rb"[0-9]{1,18}|release", found):
        got = repr(found[:40].decode(errors="replace"))
        refuse(path / TRACKER, "an iteration", got, "Write the iteration to take into it.")
    return found.decode()


def _iterations(path: Path) -> list[Path]:
    """The folders of iterations, the newest first."""
    found = [folder for folder in path.glob("iter_*") if re.fullmatch(r"iter_[0-9]+", folder.name)]
    return sorted(found, key=_number, reverse=True)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("iter_"))


def _last_whole(path: Path) -> Path | None:
    for folder in _iterations(path):
        try:
            return Checkpoint(folder).path
        except TSTError:
            continue
    return None


def _backend(folder: Path) -> str:
    """What metadata.json says that a checkpoint is: "torch_dist", or what it is instead."""
    try:
        about = json.loads((folder / "metadata.json").read_text())
        found = about["sharded_backend"]
        version = about.get("sharded_backend_version", 1)
    except FileNotFoundError:
        old = any(folder.glob("mp_rank_*"))
        return "one of --ckpt-format torch (mp_rank_...)" if old else "no metadata.json in it"
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    if found == "torch_dist" and (version != 1 or version is True):
        return f"version {version!r} of it"
    return str(found)


class _Window(io.RawIOBase):
    """Bytes offset .. offset + length of a file, as a file of its own."""

    def __init__(self, path: Path, offset: int, length: int):
        self._file, self._offset, self._length, self._at = open(path, "rb"), offset, length, 0

    def close(self):
        self._file.close()
        super().close()

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self._at

    def seek(self, offset, whence=os.SEEK_SET):
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer):
        self._file.seek(self._offset + self._at)
        data = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
