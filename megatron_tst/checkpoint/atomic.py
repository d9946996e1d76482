"""Put a folder where it belongs: written beside, flushed, renamed. Killed at any moment, the target
is absent or whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_tst.errors import refuse


@contextlib.contextmanager
def new_folder(target: Path, needed: int, force: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends, and is removed when it
    fails.

    Args:
        target: the folder to be; its parents are made.
        needed: bytes that will be written.
        force: replace a target that is there, after the new one is whole.

    Raises:
        TSTError: the target exists, or too little space.
    """
    if target.exists() and not force:
        do = "Choose another one, or add --force to replace it."
        refuse(target, "a target that is not there yet", "an existing one", do)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < 1.01 * needed + (16 << 20):
        expected = f"{needed / 1e9:.2f} GB of free space"
        do = "Make room or choose another disk."
        refuse(target.parent, expected, f"{free / 1e9:.2f} GB", do)
    _remove_leftovers(target)
    part = target.parent / f".{target.name}.part-{os.getpid()}"
    part.mkdir()
    try:
        yield part
        flush_folder(part)
        _put_in_place(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def flushed(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Make a file: `write` is called with it, then its bytes are on the disk."""
    with open(path, "wb") as file:
        write(file)
        flush(file)


def write_json(path: Path, content: dict) -> None:
    """Make a file of JSON, its bytes on the disk."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Make a file of UTF-8 text, its bytes on the disk."""
    flushed(path, lambda file: file.write(text.encode()))


def flush(file: BinaryIO) -> None:
    """Bring what was written to an open file onto the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Bring a folder's list of files onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(part, target):
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    if target.exists():
        os.rename(target, old)
    os.rename(part, target)
    flush_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(target):
    """Temporary folders of earlier tries whose process is gone. A target that was being replaced is
    put back.
    """
    for path in target.parent.glob(f".{target.name}.*-*"):
        kind, _, process = path.name.removeprefix(f".{target.name}.").partition("-")
        ours = kind in ("part", "old") and process.isdigit()
        if not ours or Path(f"/proc/{process}").exists():
            continue
        if kind == "old" and not target.exists():
            os.rename(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)
