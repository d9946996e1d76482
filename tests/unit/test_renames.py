"""Renames that replace nothing, what is done where the system does not have them, and the names
that say which process works under them.
"""

import ctypes
import errno
import os
import re
import socket
import time
import types
from pathlib import Path

import pytest
from support.kills import content

from megatron_tst.checkpoint import renames
from megatron_tst.checkpoint.renames import STALE, exchange, left_over, rename_new, tag


@pytest.fixture(params=["renameat2", "renames alone"])
def system(request, monkeypatch):
    """With and without renameat2, as on NFS."""
    if request.param != "renameat2":
        monkeypatch.setattr(renames, "_renameat2", lambda *arguments: False)


def put(place, kind):
    """Something that says where it was made."""
    if kind == "file":
        place.write_text(place.name)
    elif kind == "link":
        place.symlink_to(f"to {place.name}")
    elif kind == "link to a folder":
        place.symlink_to(".")
    else:
        place.mkdir()
        if kind == "folder":
            (place / "file").write_text(place.name)


def look(place):
    if place.is_symlink():
        return os.readlink(place)
    return content(place) if place.is_dir() else place.read_text()


KINDS = ["file", "link", "link to a folder", "folder", "empty folder"]


# --- renames


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_name(tmp_path, monkeypatch, system, kind):
    """By a path from the working folder too."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "one", kind)
    was = look(tmp_path / "one")
    rename_new(Path("one"), Path("other"))
    assert os.listdir() == ["other"] and look(tmp_path / "other") == was
    rename_new(tmp_path / "other", tmp_path / "third")
    assert os.listdir() == ["third"] and look(tmp_path / "third") == was


@pytest.mark.parametrize("there", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_something_has(tmp_path, monkeypatch, system, kind, there):
    """Both stay. Also where it comes just after the look that renames alone begin with, but for an
    empty folder that a folder would replace then.
    """
    put(tmp_path / "one", kind)
    put(tmp_path / "other", there)
    was = [look(tmp_path / name) for name in ("one", "other")]
    for blind in (False, True):
        if blind and kind.endswith("folder") and "link" not in kind and there == "empty folder":
            continue
        with monkeypatch.context() as patch:
            if blind:
                patch.setattr(os.path, "lexists", lambda path: False)
            with pytest.raises(FileExistsError) as raised:
                rename_new(tmp_path / "one", tmp_path / "other")
        assert str(tmp_path / "other") in (raised.value.filename, raised.value.filename2)
        assert [look(tmp_path / name) for name in ("one", "other")] == was


def test_a_file_that_was_stopped_with_both_names(tmp_path, monkeypatch):
    """After the hard link, before the old name went."""
    monkeypatch.setattr(renames, "_renameat2", lambda *arguments: False)
    put(tmp_path / "one", "file")
    os.link(tmp_path / "one", tmp_path / "other")
    rename_new(tmp_path / "one", tmp_path / "other")
    assert content(tmp_path) == {"other": b"one"}


def test_a_file_where_there_are_no_hard_links(tmp_path, monkeypatch):
    """As on FAT and some network file systems, which have no renameat2 either."""

    def link(*arguments, **more):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(renames, "_renameat2", lambda *arguments: False)
    monkeypatch.setattr(os, "link", link)
    (tmp_path / "one").write_text("1")
    rename_new(tmp_path / "one", tmp_path / "other")
    assert content(tmp_path) == {"other": b"1"}
    (tmp_path / "one").write_text("2")
    with pytest.raises(FileExistsError):
        rename_new(tmp_path / "one", tmp_path / "other")
    assert content(tmp_path) == {"one": b"2", "other": b"1"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_cannot_be_renamed(tmp_path, system, kind):
    put(tmp_path / "one", kind)
    for one, other in (("none", "other"), ("one", "none/other")):
        with pytest.raises(FileNotFoundError):
            rename_new(tmp_path / one, tmp_path / other)
    assert os.listdir(tmp_path) == ["one"]


def test_an_exchange(tmp_path, monkeypatch, system):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "one", "folder")
    put(tmp_path / "other", "file")
    exchange(Path("one"), Path("other"), Path("spare"))
    assert content(tmp_path) == {"one": b"other", "other": None, "other/file": b"one"}
    for one, other in (("none", "one"), ("one", "none")):
        with pytest.raises(FileNotFoundError):
            exchange(tmp_path / one, tmp_path / other, tmp_path / "spare")
        assert content(tmp_path) == {"one": b"other", "other": None, "other/file": b"one"}


def test_an_exchange_in_one_step(tmp_path, monkeypatch):
    """With renameat2 neither name is ever free."""
    monkeypatch.setattr(renames, "rename_new", lambda *arguments: pytest.fail("several steps"))
    put(tmp_path / "one", "file")
    put(tmp_path / "other", "file")
    exchange(tmp_path / "one", tmp_path / "other", tmp_path / "spare")
    assert content(tmp_path) == {"one": b"other", "other": b"one"}


@pytest.mark.parametrize(
    "code", [None, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EEXIST]
)
def test_a_system_without_renameat2(tmp_path, monkeypatch, code):
    """The call is missing, or it, or the file system, does not know the flags."""

    def renameat2(*arguments):
        ctypes.set_errno(code)
        return -1

    library = (
        types.SimpleNamespace() if code is None else types.SimpleNamespace(renameat2=renameat2)
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: library)
    one, other = tmp_path / "one", tmp_path / "other"
    put(one, "file")
    if code in (errno.EXDEV, errno.EEXIST):
        with pytest.raises(OSError) as raised:
            rename_new(one, other)
        error = raised.value
        assert (error.errno, error.strerror) == (code, os.strerror(code))
        assert (error.filename, error.filename2) == (str(one), str(other))
        assert os.listdir(tmp_path) == ["one"]
        return
    rename_new(one, other)
    assert content(tmp_path) == {"other": b"one"}
    put(one, "file")
    exchange(one, other, tmp_path / "spare")
    assert content(tmp_path) == {"one": b"one", "other": b"one"}


# --- processes and their names


def test_when_a_process_began():
    """In ticks since the machine's start; nothing where it has ended, waited for or not."""

    def ticks():
        return time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")

    before, (reading, writing) = ticks(), os.pipe()
    process = os.fork()
    if process == 0:
        os.read(reading, 1)
        os._exit(0)
    after = ticks()
    assert before - 1 <= int(renames._begun(process)) <= after + 1
    os.write(writing, b".")
    os.close(reading), os.close(writing)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert renames._begun(process) is None
    os.waitpid(process, 0)
    assert renames._begun(process) is None


def test_a_process_whose_name_looks_like_the_fields_behind_it():
    comm = Path(f"/proc/{os.getpid()}/comm")
    was, begun = comm.read_text(), renames._begun(os.getpid())
    try:
        for name in ("a) Z 1", "((", "a b c"):
            comm.write_text(name)
            assert renames._begun(os.getpid()) == begun
    finally:
        comm.write_text(was.strip())


def test_names_of_this_process():
    machine, who, process, begun, number = tag().split(".")
    assert (process, begun) == (str(os.getpid()), renames._begun(os.getpid()))
    assert f"{machine}.{who}" == renames._machine()
    assert tag().split(".") == [machine, who, process, begun, str(int(number) + 1)]


@pytest.fixture
def no_proc(monkeypatch):
    """As where /proc is not mounted."""
    read_text = Path.read_text

    def read(path, *arguments, **more):
        if path.parts[1] == "proc":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return read_text(path, *arguments, **more)

    monkeypatch.setattr(Path, "read_text", read)
    renames._machine.cache_clear()
    yield
    renames._machine.cache_clear()


def test_without_proc_nobody_else_is_of_this_machine(tmp_path, no_proc):
    """Not even what another process leaves here."""
    mine = renames._machine()
    assert renames._machine() == mine and tag().startswith(f"{mine}.{os.getpid()}.0.")
    part = tmp_path / f".out.part-{tag()}"
    part.mkdir()
    renames._machine.cache_clear()
    assert renames._machine() != mine
    assert left_over(tmp_path / "out", ["part"]) == []
    os.utime(part, (0, 0))
    assert left_over(tmp_path / "out", ["part"]) == [part.name.removeprefix(".out.part-")]


def test_a_machine_of_any_name(monkeypatch):
    """It stays short, and has no dot or slash, which would be read as something else."""
    found = {}
    try:
        for host in ("node-1_A", "node.of/a cluster", "x" * 100):
            monkeypatch.setattr(socket, "gethostname", lambda: host)
            renames._machine.cache_clear()
            found[host] = re.fullmatch(r"(.*)\.([0-9a-f]{8})", renames._machine())
    finally:
        renames._machine.cache_clear()
    assert [match[1] for match in found.values()] == ["node-1_A", "node_of_a_cluster", "x" * 40]
    assert len({match[2] for match in found.values()}) == 1


def test_whose_process_has_ended(tmp_path):
    """One of another beginning has another process's number, be it before or after."""
    machine, who, mine, begun, _ = tag().split(".")
    dead = str(2**22 + 1)  # above the largest number
    for process, begins, ended in (
        (mine, begun, False),
        (mine, "1", True),
        (mine, "9" * 12, True),
        (mine, f"{begun}0", True),
        (dead, begun, True),
        (dead, "0", True),
    ):
        part = tmp_path / f".out.part-{machine}.{who}.{process}.{begins}.7"
        part.mkdir()
        found = [part.name.removeprefix(".out.part-")] if ended else []
        assert left_over(tmp_path / "out", ["part"]) == found
        part.rmdir()


@pytest.mark.parametrize("seconds, ended", [(STALE - 1, False), (STALE, False), (STALE + 1, True)])
def test_what_another_machine_has_not_written_to(tmp_path, monkeypatch, seconds, ended):
    assert STALE == 7 * 24 * 60 * 60
    tags = ["-.0a.1.2.3", "~.0a.1.2.3"]  # before and after this one in the alphabet
    for its_tag in tags:
        folder = tmp_path / f".out.part-{its_tag}"
        folder.mkdir()
        os.utime(folder, (1000, 1000))
    monkeypatch.setattr(time, "time", lambda: 1000.0 + seconds)
    assert left_over(tmp_path / "out", ["whole", "part"]) == (tags if ended else [])
    assert left_over(tmp_path / "out", ["whole"]) == []


def test_the_order_of_what_is_left_over(tmp_path):
    tags = ["node.0a.1.2.3", "node.0a.1.2.4", "edon.0a.1.2.3"]
    for number in (1, 0, 2):
        for kind in ("part", "whole"):
            (tmp_path / f".out.{kind}-{tags[number]}").mkdir()
            os.utime(tmp_path / f".out.{kind}-{tags[number]}", (0, 0))
    assert left_over(tmp_path / "out", ["whole", "part"]) == sorted(tags)


def test_the_last_change_in_a_folder(tmp_path, monkeypatch):
    """Of itself, a file or folder at any depth, though one goes while they are looked at."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("")
    everything = [tmp_path, *tmp_path.rglob("*")]
    for newest in everything:
        for path in everything:
            os.utime(path, (20, 20 if path == newest else 10))
        assert renames._last_written(newest if newest.is_file() else tmp_path) == 20
    walk = os.walk

    def gone(folder):
        for path, folders, files in walk(folder):
            yield path, folders, ["gone", *files]

    monkeypatch.setattr(os, "walk", gone)
    assert renames._last_written(tmp_path) == 20  # of the deepest file, behind one that is gone
