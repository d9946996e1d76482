"""Put a folder or files where they belong: written beside, flushed, renamed. Stopped at any moment,
the target is absent or whole, and nothing is lost that this tool has not written.

- A target and what is read never lie in each other, through links and mounts too.
- What is replaced is deleted where every file in it is as this tool wrote it (MARK says so), and
  moved aside to TARGET.old-1 otherwise.
- Whether the target is there is looked at before the work, and again by the rename itself.
- A process that is killed leaves a temporary folder beside the target. The next try for the same
  target removes it, and puts back what was being replaced.

Temporary names: .TARGET.part-* is being written, .TARGET.whole-* is or was on its way to its place,
.TARGET.old-* had the place a moment ago (where the system cannot exchange two folders).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from megatron_tst.checkpoint.places import (
    FILE,
    FOLDER,
    MARK,
    check_place,
    check_sources,
    check_space,
    identity,
    real_place,
    refuse_source,
)
from megatron_tst.checkpoint.renames import exchange, left_over, rename_new, tag
from megatron_tst.errors import refuse, warn

_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_STATES = "part", "whole", "old"  # of a temporary name
_OLD = "replaced"  # folder of the files that new_files takes away


@contextlib.contextmanager
def new_folder(
    target: Path, needed: int, force: bool = False, sources: Iterable[Path] = ()
) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block ends, and is removed when it
    fails.

    Args:
        target: the folder to be; its parents are made.
        needed: bytes that will be written.
        force: replace a target that is there, after the new one is whole.
        sources: files and folders that are read for it.

    Raises:
        TSTError: the target exists (before the work, or meanwhile), is no folder of its own, or
            holds or lies in a source; too little space, or a file cannot be read or written.
    """
    with _in_words(target):
        target = real_place(target)
        _remove_leftovers(target)
        check_place(target, FOLDER, force)
        check_sources(target, sources)
        check_space(target, needed)
    with _work(target) as (part, whole, old):
        yield part
        _finish(part)
        os.rename(part, whole)
        _put_in_place(whole, target, FOLDER, force, old)
        if os.path.lexists(whole):  # what was replaced
            _dispose(whole, target)


@contextlib.contextmanager
def new_files(
    prefix: Path,
    endings: Iterable[str],
    force: bool = False,
    sources: Iterable[Path] = (),
    ours: Callable[[Path], bool] = lambda folder: False,
) -> Iterator[Path]:
    """A folder to write files into, which get their places beside it when the block ends: a single
    one in one step. Several get them in their order, so that the last one says whether all are
    there. Of an older set that one is taken away first.

    Args:
        prefix: the file named like `prefix` with an ending is to become the one beside `prefix`.
        endings: of the files, in the order in which they get their names.
        force: replace those that are there.
        sources: files that are read for them.
        ours: whether the files in a folder, which are to be replaced, may be deleted: this tool
            wrote them. Others are moved aside.

    Raises:
        TSTError: as new_folder.
    """
    with _in_words(prefix):
        prefix = real_place(prefix)
        targets = [prefix.with_name(prefix.name + ending) for ending in endings]
        _remove_leftovers(prefix, ours)
        for target in targets:
            check_place(target, FILE, force)
        replaced = {identity(target): target for target in targets if target.exists()}
        for source in sources:
            if (target := replaced.get(identity(source))) is not None:
                refuse_source(target, source, "the same file")
    with _work(prefix, ours) as (part, whole, _):
        yield part
        (part / _OLD).mkdir()
        _finish(part, [target.name for target in targets])
        os.rename(part, whole)
        if len(targets) > 1:
            _check_again(targets, FILE, force)
            for target in reversed(targets):
                if os.path.lexists(target):
                    rename_new(target, whole / _OLD / target.name)
        for target in targets:
            old = whole / _OLD / target.name
            _put_in_place(whole / target.name, target, FILE, force and len(targets) == 1, old)
        _settle_files(whole, prefix, ours)


@contextlib.contextmanager
def kept_folder(target: Path) -> Iterator[Path]:
    """A new folder that is written in its place and stays, however the block ends. One that is
    there goes first, as it does for new_folder's `force`.

    Raises:
        TSTError: as new_folder.
    """
    with _in_words(target):
        target = real_place(target)
        _remove_leftovers(target)
        check_place(target, FOLDER, True)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            whole = _temporaries(target, tag())[1]
            try:
                os.rename(target, whole)
                _dispose(whole, target)
            except BaseException:
                if os.path.lexists(whole):
                    _dispose(whole, target)
                raise
        target.mkdir()
    try:
        yield target
    finally:
        with contextlib.suppress(OSError):
            _finish(target)


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


# --- the work, and what it leaves


@contextlib.contextmanager
def _work(target, ours=None):
    """A temporary folder beside the target, the name that it gets when it is whole, and a spare
    one. Whatever ends the block, none of them is left, nor are folders that were made for them.
    """
    mine, made = tag(), []
    temporaries = _temporaries(target, mine)
    try:
        with _in_words(target, *temporaries):
            made = [path for path in target.parents if not path.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            temporaries[0].mkdir()
            yield temporaries
    except BaseException:
        with _undisturbed():
            _settle(target, mine, ours)
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        raise


@contextlib.contextmanager
def _undisturbed():
    """Ignore further signals while a process that is ending cleans up."""
    caught = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not None:  # else it is not Python's
                caught[number] = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _in_words(target, *temporaries):
    """What the system refuses becomes one sentence, about the target or about what was read."""
    try:
        yield
    except BrokenPipeError:
        raise  # of the screen
    except OSError as error:
        places = [Path(os.path.abspath(path)) for path in (target, *temporaries)]
        named = places[0]
        if isinstance(error.filename, (str, os.PathLike)):
            named = Path(os.path.abspath(error.filename))
        written = named in places[0].parents
        if written or any(place in (named, *named.parents) for place in places):
            do = "Choose another one or mend its permissions."
            if error.errno in _ROOM:
                do = "Make room or choose another disk."
            refuse(target, "a place that can be written to", _said(error), do)
        do = "Mend its permissions or copy it again."
        refuse(named, "a file or folder that can be read", _said(error), do)


def _said(error):
    return error.strerror or str(error)


def _put_in_place(whole, target, kind, force, old):
    """Give what is whole its name. What had the name is at `whole` then, where `force` allows it.
    There is no moment without a target where the system can exchange two names.
    """
    while True:
        try:
            rename_new(whole, target)
            break
        except FileExistsError:
            _check_again([target], kind, force)
        try:
            exchange(whole, target, old)
            break
        except FileNotFoundError:
            continue  # it has gone meanwhile
    flush_folder(target.parent)


def _check_again(targets, kind, force):
    for target in targets:
        if os.path.lexists(target):
            check_place(target, kind, True)
            if not force:
                got = "one that has appeared meanwhile, which stays"
                do = "What was written is removed: choose another one, or add --force."
                refuse(target, "a target that is not there yet", got, do)


def _finish(folder, order=()):
    """Everything in a folder is on the disk, and MARK says what is in it.

    Args:
        order: names of files, where they get places of their own one after the other.
    """
    files, folders = {}, [folder]
    for path, found in _everything(folder):
        if stat.S_ISDIR(found.st_mode):
            folders.append(path)
        elif path != folder / MARK:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                files[str(path.relative_to(folder))] = os.fstat(file.fileno())
    about = {
        "written by": "megatron-tst",
        "folders": sorted(str(path.relative_to(folder)) for path in folders[1:]),
        "files": {name: files[name].st_size for name in sorted(files)},
    }
    about |= {"order": {name: _state(files[name]) for name in order}} if order else {}
    write_json(folder / MARK, about)
    for path in reversed(folders):
        flush_folder(path)


def _everything(folder):
    """(path, its lstat) of everything below a folder."""
    with os.scandir(folder) as entries:
        found = [(Path(entry.path), entry.stat(follow_symlinks=False)) for entry in entries]
    for path, about in found:
        yield path, about
        if stat.S_ISDIR(about.st_mode):
            yield from _everything(path)


def _marked(folder):
    """What MARK says, None where there is none that can be read."""
    try:
        if stat.S_ISREG(os.lstat(folder / MARK).st_mode):
            about = json.loads((folder / MARK).read_bytes())
            sound = isinstance(about["files"], dict) and isinstance(about["folders"], list)
            return about if sound else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def _written_here(folder):
    """Whether nothing is in a folder but what this tool wrote there, as it wrote it: of the same
    size, and not changed after MARK was. Files may be missing.
    """
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        return False
    about = _marked(folder)
    if about is None:
        return not os.listdir(folder)
    end = os.lstat(folder / MARK).st_ctime_ns
    for path, found in _everything(folder):
        name = str(path.relative_to(folder))
        if stat.S_ISDIR(found.st_mode):
            known = name in about["folders"]
        elif name == MARK:
            known = True
        else:
            known = stat.S_ISREG(found.st_mode) and about["files"].get(name) == found.st_size
            known = known and found.st_ctime_ns <= end
        if not known:
            return False
    return True


def _state(found):
    return [found.st_size, found.st_mtime_ns]


def _dispose(old, target):
    """Delete what was replaced, or move it aside where this tool did not write all of it, or may
    not delete it.
    """
    if _written_here(old):
        with contextlib.suppress(OSError):
            _remove(old)
    if os.path.lexists(old):
        _move_aside({old: target})


def _remove(folder):
    """Delete a folder, MARK last: stopped before, the rest is still known."""
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    (folder / MARK).unlink(missing_ok=True)
    folder.rmdir()


def _move_aside(names):
    """{path: the target that it was}; all get the same number."""
    for number in itertools.count(1):
        new = {path: was.with_name(f"{was.name}.old-{number}") for path, was in names.items()}
        if any(os.path.lexists(path) for path in new.values()):
            continue
        for path, was in names.items():
            rename_new(path, new[path])
            warn(f"{was} held what this tool did not write there: it is {new[path]} now")
        return


def _temporaries(target, its_tag):
    return tuple(target.with_name(f".{target.name}.{kind}-{its_tag}") for kind in _STATES)


def _remove_leftovers(target, ours=None):
    """Of earlier tries that were killed."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for its_tag in left_over(target, _STATES):
            _settle(target, its_tag, ours)


def _settle(target, its_tag, ours):
    """End a try, this process's own or one that was killed: remove what it wrote, finish what it
    was about to remove, put back what it has taken away.

    Args:
        ours: as new_files's; None where the target is a folder.
    """
    part, whole, old = _temporaries(target, its_tag)
    with contextlib.suppress(OSError):  # another process does the same
        shutil.rmtree(part, ignore_errors=True)
        if os.path.lexists(old):
            try:
                rename_new(old, target)
            except FileExistsError:
                _dispose(old, target)
        if os.path.lexists(whole):
            if ours is None:
                _dispose(whole, target)
            else:
                _settle_files(whole, target, ours)


def _settle_files(whole, prefix, ours):
    """The same for several files. They are in place when the last one is: then the old ones go,
    else the new ones.
    """
    about = _marked(whole)
    if about is None:
        return _dispose(whole, prefix)
    order, old = about["order"], whole / _OLD
    last = list(order)[-1]

    def is_new(path, name):
        return os.path.lexists(path) and _state(os.lstat(path)) == order[name]

    if done := not is_new(whole / last, last):
        if os.path.lexists(whole / last):  # exchanged
            os.rename(whole / last, old / last)
    else:
        for name in order:
            if is_new(prefix.with_name(name), name):
                prefix.with_name(name).unlink()
        for name in order:
            if os.path.lexists(old / name):
                with contextlib.suppress(FileExistsError):
                    rename_new(old / name, prefix.with_name(name))
    if rest := [name for name in order if os.path.lexists(old / name)]:
        if done and ours(old):
            os.rename(old, whole / "going")  # so that stopped before its end, the rest goes too
        else:
            _move_aside({old / name: prefix.with_name(name) for name in rest})
    return _remove(whole)
