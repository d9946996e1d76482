"""Renames that put nothing in place of what is there, two that change places, and names that say
which process works under them.

Linux's renameat2 does both renames in one step. NFS and old systems do not have it: what is done
there instead, and what can come in between, stands at each function.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import itertools
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

STALE = 7 * 24 * 3600  # seconds after which another machine's temporary folder counts as left over
_NOREPLACE, _EXCHANGE, _HERE = 1, 2, -100  # of linux/fs.h and fcntl.h
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
_number = itertools.count()  # of the tries of this process


def _renameat2(old: Path, new: Path, flag: int) -> bool:
    """Rename by the system's renameat2. -> whether system and file system have it

    Raises:
        OSError: they have it, and it failed.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_HERE, os.fsencode(old), _HERE, os.fsencode(new), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(old), None, str(new))


def rename_new(old: Path, new: Path) -> None:
    """Rename where nothing has the new name.

    Without renameat2 a file gets its name by a hard link, which is as strict. A folder is renamed
    after a look: an empty folder, and nothing else, that comes after the look is replaced.

    Raises:
        FileExistsError: something has the name.
    """
    if _renameat2(old, new, _NOREPLACE):
        return
    there = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
    if not os.path.isdir(old) or os.path.islink(old):
        try:
            os.link(old, new, follow_symlinks=False)
        except FileExistsError:
            if not os.path.samestat(os.lstat(old), os.lstat(new)):
                raise
            os.unlink(old)  # this was stopped before: it has both names
        except OSError:  # a file system without hard links: only the look is left
            if os.path.lexists(new):
                raise there from None
            os.rename(old, new)
        else:
            os.unlink(old)
        return
    if os.path.lexists(new):
        raise there
    try:
        os.rename(old, new)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise there from error
        raise


def exchange(one: Path, other: Path, spare: Path) -> None:
    """Let two change places.

    Without renameat2 these are three renames. Between the first two nobody has the name `other`,
    and a process that is killed then leaves what had it at `spare`.

    Args:
        one, other: both are there.
        spare: a name for the moments in between.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    if _renameat2(one, other, _EXCHANGE):
        return
    rename_new(other, spare)
    try:
        rename_new(one, other)
    except BaseException:
        rename_new(spare, other)
        raise
    rename_new(spare, one)


@functools.cache
def _machine() -> str:
    """Of this start of this machine and this container, whose process ids are comparable."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text()
        container = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # then each process is taken for one of another machine
        start = container = uuid.uuid4()
    name = re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())[:40]
    return f"{name}.{hashlib.sha256(f'{start} {container}'.encode()).hexdigest()[:8]}"


def _begun(process: int) -> str | None:
    """When a process began, in ticks since the machine's start; None where it has ended. A process
    id is given again, the two together are not.
    """
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def tag() -> str:
    """What this try's temporary names end in: machine, process and when that began."""
    return f"{_machine()}.{os.getpid()}.{_begun(os.getpid()) or 0}.{next(_number)}"


def left_over(target: Path, kinds: Iterable[str]) -> list[str]:
    """Tags of temporary names (.TARGET.KIND-TAG) beside `target` whose process has ended. On this
    machine the process is looked for. On another one it counts as ended when nothing was written
    for STALE seconds.
    """
    names = re.compile(
        rf"{re.escape(f'.{target.name}.')}(?:{'|'.join(kinds)})-"
        r"(?P<tag>(?P<machine>.+)\.(?P<process>\d+)\.(?P<begun>\d+)\.\d+)"
    )
    found = set()
    with os.scandir(target.parent) as entries:
        for entry in entries:
            if match := names.fullmatch(entry.name):
                if match["machine"] == _machine():
                    ended = _begun(int(match["process"])) != match["begun"]
                else:
                    ended = time.time() - _last_written(Path(entry.path)) > STALE
                if ended:
                    found.add(match["tag"])
    return sorted(found)


def _last_written(path: Path) -> float:
    """When a file, or anything in a folder, was changed last."""
    times = [os.lstat(path).st_mtime]
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            try:
                times.append(os.lstat(os.path.join(folder, name)).st_mtime)
            except FileNotFoundError:
                continue  # so somebody works in it
    return max(times)
