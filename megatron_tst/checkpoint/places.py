"""Where a target may come to be: what is looked at before anything is written (atomic.py)."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from megatron_tst.errors import refuse
from megatron_tst.sizes import sizes

MARK = ".megatron_tst.json"  # in every folder that is written, last: its files and their sizes
FILE, FOLDER = stat.S_IFREG, stat.S_IFDIR
_KINDS = {FILE: "a file", FOLDER: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def real_place(target: Path) -> Path:
    """The place itself: no link in the folders above, no `..`. A link at the end is kept, and
    refused later.

    Raises:
        TSTError: it is the root of all folders.
    """
    real = Path(target).absolute()
    last = real.name if real.name != ".." else ""
    real = Path(os.path.realpath(real.parent if last else real), last)
    if not real.name:
        refuse(target, "a new name", "the root of all folders", "Name another place.")
    return real


def check_place(target: Path, kind: int, force: bool) -> None:
    """Refuse a target that may not be replaced; one that is not there may be made.

    Args:
        target: real_place's.
        kind: FILE or FOLDER, what it is to be.
        force: whether one that is there may be replaced.

    Raises:
        TSTError: what is there is of another kind or a mount, or `force` does not allow it.
    """
    try:
        found = stat.S_IFMT(os.lstat(target).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    expected, got = f"a new name or {_KINDS[kind]}", _KINDS.get(found, "a device")
    if found == stat.S_IFLNK:
        got = f"a link to {os.readlink(target)}"
    if found != kind:
        refuse(target, expected, got, "Name another place.")
    if os.path.ismount(target) or str(target) in _mounts():
        refuse(target, expected, "a mount point", "Name a new one in it.")
    if not force:
        do = "Choose another one, or add --force to replace it."
        refuse(target, "a target that is not there yet", "an existing one", do)


def _mounts():
    """Where something is mounted; os.path.ismount does not see binds within a file system."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return set()
    return {line.split()[4].encode().decode("unicode_escape") for line in lines}


def check_sources(target: Path, sources: Iterable[Path]) -> None:
    """Refuse a target that is a source, holds one or lies in one. Folders are compared by what they
    are, not by their names, so that links and mounts are seen through.

    Args:
        target: real_place's.
        sources: files and folders that are read.

    Raises:
        TSTError: naming the source.
    """
    above = {identity(path): path for path in (target, *target.parents) if path.exists()}
    there = set()
    if target.exists():
        there = {identity(target)}
        if (target / MARK).exists():  # it may be deleted: so nothing in it may be read
            there |= {identity(Path(folder)) for folder, _, _ in os.walk(target)}
    for source in sources:
        for path in _with_links(source):
            if identity(path) in above:
                same = identity(path) == identity(target)
                refuse_source(target, source, "the same" if same else "a place in it")
            if any(identity(parent) in there for parent in (path, *path.parents)):
                refuse_source(target, source, "a folder that holds it")


def _with_links(source):
    """A source as it lies on the disk, and what links in a source's folder lead to."""
    real = Path(os.path.realpath(source))
    if not real.exists():
        return []
    links = []
    with contextlib.suppress(OSError):
        if real.is_dir():
            with os.scandir(real) as entries:
                links = [Path(os.path.realpath(e.path)) for e in entries if e.is_symlink()]
    return [real, *(path for path in links if path.exists())]


def refuse_source(target: Path, source: Path, got: str) -> NoReturn:
    """Refuse a target that would replace what is read.

    Raises:
        TSTError: always.
    """
    refuse(target, f"a target outside the source {source}", got, "Choose another one.")


def identity(path: Path) -> tuple[int, int] | None:
    """What a path is on this machine, whatever it is called; None where there is nothing."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # nobody may look, or a null byte in the name
        return None
    return found.st_dev, found.st_ino


def check_space(target: Path, needed: int) -> None:
    """Refuse a disk without room for the target.

    Args:
        target: real_place's; the folders above it may be missing.
        needed: bytes.

    Raises:
        TSTError: there is too little room.
    """
    folder = next(path for path in target.parents if path.exists())
    needed, free = int(1.01 * needed) + (16 << 20), shutil.disk_usage(folder).free
    if free < needed:
        expected, got = sizes(needed, free)
        do = "Make room or choose another disk."
        refuse(folder, f"{expected} of free space", got, do)
