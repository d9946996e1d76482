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
import zipfile
from collections.abc import Iterator
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

from megatron_tst.checkpoint.trusted import MetadataUnpickler, load_trusted
from megatron_tst.errors import TSTError, refuse

TRACKER = "latest_checkpointed_iteration.txt"
COMMON = "common_state"  # the object, from 0.19 on
_BLOCK = 8 << 20


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
        TSTError: no torch_dist checkpoint, or files missing or shorter than its metadata says, each
            named.
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
        try:
            about = json.loads((self.path / "metadata.json").read_text())
        except (OSError, ValueError) as error:
            about = error
        got = f"{type(about).__name__}: {about}"
        if isinstance(about, dict):
            got = about.get("sharded_backend")
        if got != "torch_dist":
            expected = "a torch_dist checkpoint (metadata.json says so)"
            refuse(self.path, expected, got, "Save with --ckpt-format torch_dist.")
        try:
            with open(self.path / ".metadata", "rb") as file:
                metadata = MetadataUnpickler(file).load()
        except Exception as error:  # a truncated pickle fails in many ways
            refuse(
                self.path / ".metadata",
                "readable metadata",
                f"{type(error).__name__}: {error}",
                "The checkpoint is incomplete.",
            )
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
        needed: dict[str, int] = {}
        for item in self.items:
            needed[item.file] = max(needed.get(item.file, 0), item.offset + item.length)
        wrong = []
        for name, size in sorted(needed.items()):
            path = self.path / name
            if not path.is_file():
                wrong.append(f"{name} is missing")
            elif path.stat().st_size < size:
                wrong.append(f"{name} has {path.stat().st_size} of {size} bytes")
        objects = {name.split("/")[0] for name in self.metadata.state_dict_metadata}
        if COMMON not in objects and not (self.path / "common.pt").is_file():
            wrong.append("common.pt is missing")
        if wrong:
            do = "Copy it again or use another iteration."
            refuse(self.path, "every file that its metadata names", "; ".join(wrong), do)

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
        """Arguments, iteration, scheduler and the optimizer's scalars."""
        if self.common_item is None:
            return load_trusted(self.path / "common.pt")
        # objects are stored in lists of one
        (common,) = load_trusted(io.BytesIO(self.read(self.common_item)), self.path / COMMON)
        return common

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
        """The bytes of an item, checked against the checksums in them. TSTError where they are
        damaged.
        """
        with self.window(item) as window:
            _check(window, self.path / item.file, item)
            window.seek(0)
            return window.read()

    def tensor(self, item: Item) -> torch.Tensor:
        """The shard that an item holds, on CPU, in the dtype in which it was saved."""
        return torch.load(io.BytesIO(self.read(item)), map_location="cpu", weights_only=True)

    def blocks(self, item: Item, check: bool = True) -> Iterator[bytes]:
        """The bytes of an item a few MiB at a time, after its checksums were found right."""
        with self.window(item) as window:
            if check:
                _check(window, self.path / item.file, item)
                window.seek(0)
            while block := window.read(_BLOCK):
                yield block

    def window(self, item: Item) -> io.RawIOBase:
        """The bytes of an item as a file of their own, unchecked; to be closed."""
        return _Window(self.path / item.file, item.offset, item.length)


def iteration_folder(path: Path) -> Path:
    """The folder of the iteration that `path` stands for: such a folder, or the parent of several.

    Raises:
        TSTError: no such folder, or the tracker file names one that is not there.
    """
    if (path / "metadata.json").is_file():
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        refuse(
            path,
            f"a checkpoint folder, or one with {TRACKER}",
            "neither",
            "Give the folder of --save or one iter_... in it.",
        )
    text = tracker.read_text().strip()
    folder = path / (f"iter_{int(text):07d}" if text.isdigit() else text)
    if not folder.is_dir():
        refuse(
            path,
            f"the folder {folder.name} that {TRACKER} names",
            "none",
            "Give another iteration's folder.",
        )
    return folder


def mend_tracker(folder: str | os.PathLike) -> int | None:
    """Megatron empties its tracker file before it writes the new iteration into it: a run killed in
    between cannot be started again.

    Args:
        folder: what --load names.

    Returns:
        the iteration of the last whole checkpoint, which the tracker names now; None where nothing
        was amiss or no checkpoint is whole.
    """
    tracker = Path(folder) / TRACKER
    if not tracker.is_file() or tracker.read_text().strip():
        return None
    for path in sorted(Path(folder).glob("iter_*"), reverse=True):
        try:
            Checkpoint(path)
        except TSTError:
            continue
        iteration = int(path.name.removeprefix("iter_"))
        part = tracker.with_suffix(".part")
        part.write_text(str(iteration))
        os.replace(part, tracker)
        return iteration
    return None


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


def _check(window: _Window, path: Path, item: Item) -> None:
    """torch.save writes a zip archive with a checksum an entry; objects of older versions may be
    plain pickles.
    """
    if window.read(2) != b"PK":
        window.seek(0)
        return
    try:
        bad = zipfile.ZipFile(window).testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        bad = f"{type(error).__name__}: {error}"
    if bad:
        refuse(
            path,
            f"{item.name} at byte {item.offset} as it was written",
            f"damage ({bad})",
            "Copy it again or use another iteration.",
        )
    window.seek(0)
