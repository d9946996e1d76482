"""What is looked at before a target is made: each refusal's whole sentence. With the work itself:
tests/checkpoint/test_targets.py.
"""

import os
import shutil
import socket
from pathlib import Path

import pytest

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
from megatron_tst.errors import TSTError


def said(function, *arguments):
    """The refusal, None where there is none."""
    try:
        function(*arguments)
    except TSTError as error:
        return str(error)


def test_the_place_itself(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b")
    for name in ("last", "-last"):
        (tmp_path / "a" / name).symlink_to("b")
    monkeypatch.chdir(tmp_path / "a")
    for target, place in (
        ("new", "a/new"),
        ("none/new", "a/none/new"),
        (".", "a"),
        ("b/..", "a"),
        ("../link/..", "a"),  # of b, where the link leads
        ("../link", "link"),
        ("../link/new", "a/b/new"),
        ("last", "a/last"),
        ("-last", "a/-last"),
        ("./b/../last", "a/last"),
        ("b/../none/../new", "a/new"),
        (tmp_path / "link" / "new", "a/b/new"),
        ("...", "a/..."),
    ):
        assert real_place(Path(target)) == tmp_path / place, target
    for root in ("/", "/..", "/usr/.."):
        assert said(real_place, Path(root)) == (
            f"{root}: expected a new name, got the root of all folders. Name another place."
        )


@pytest.mark.parametrize("force", [False, True])
def test_what_has_the_target_s_name(tmp_path, force):
    there = {name: tmp_path / name for name in ("file", "folder", "pipe", "socket", "link", "lost")}
    there["file"].write_text("")
    there["folder"].mkdir()
    os.mkfifo(there["pipe"])
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(there["socket"]))
    there["link"].symlink_to("folder")
    there["lost"].symlink_to("nowhere")
    there |= {"device": Path(os.devnull), "mount": Path("/proc")}
    got = {name: f"a {name}" for name in there}
    got |= {"link": "a link to folder", "lost": "a link to nowhere", "mount": "a mount point"}
    for kind, name in ((FILE, "file"), (FOLDER, "folder")):
        for what, place in there.items():
            if what == name:
                do = "Choose another one, or add --force to replace it."
                expected = "a target that is not there yet, got an existing one"
                refused = None if force else f"{place}: expected {expected}. {do}"
            else:
                of_kind = {"mount": "a folder"} if kind == FILE else {}
                refused = (
                    f"{place}: expected a new name or a {name}, got {of_kind.get(what, got[what])}."
                    " Name another place."
                )
                if what == "mount" and kind == FOLDER:
                    refused = refused.replace("another place", "a new one in it")
            assert said(check_place, place, kind, force) == refused, (what, name)
        for place in (tmp_path / "new", there["file"] / "new", tmp_path / "none" / "new"):
            assert check_place(place, kind, force) is None


def test_mounts_as_the_system_lists_them(tmp_path, monkeypatch):
    """The fifth field, where a blank is written as its number. Without /proc nothing is known."""
    bound = tmp_path / "a b"
    bound.mkdir()
    line = f"36 35 98:0 {tmp_path} {tmp_path}/a\\040b rw - ext4 /dev/root rw\n"
    read_text, listed = Path.read_text, [line]

    def read(path, *arguments, **more):
        if path != Path("/proc/self/mountinfo"):
            return read_text(path, *arguments, **more)
        if not listed:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return listed[0]

    monkeypatch.setattr(Path, "read_text", read)
    assert said(check_place, bound, FOLDER, True) == (
        f"{bound}: expected a new name or a folder, got a mount point. Name a new one in it."
    )
    check_place(tmp_path, FOLDER, True)
    listed.clear()
    check_place(bound, FOLDER, True)
    assert "add --force" in said(check_place, bound, FOLDER, False)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """ck/iter_1/weights; links to it, by folder and by file; `made`, which this tool wrote."""
    monkeypatch.chdir(tmp_path)
    for folder in ("ck/iter_1", "elsewhere", "blob", "made/below", "files"):
        Path(folder).mkdir(parents=True)
    Path("ck/iter_1/weights").write_text("dear")
    Path("link").symlink_to("ck")
    Path("files/model").symlink_to("../blob/model")
    Path("files/config").write_text("{}")
    Path("files/lost").symlink_to("nowhere")
    Path("blob/model").write_text("dear")
    Path("made", MARK).write_text("{}")
    Path("made/text").write_text("")
    os.link("made/text", "elsewhere/text")  # what a target's files are is not looked at
    return tmp_path


SAME, IN_IT, HOLDS = "the same", "a place in it", "a folder that holds it"


@pytest.mark.parametrize(
    "target, source, got",
    [
        ("ck", "ck", SAME),
        ("ck", "link", SAME),
        ("ck/iter_1/weights", "link/iter_1/weights", SAME),
        ("ck/hf", "ck", IN_IT),
        ("ck/new/hf", "ck", IN_IT),
        ("ck/iter_1", "link", IN_IT),
        ("ck", "ck/iter_1", HOLDS),
        ("ck", "ck/iter_1/weights", HOLDS),
        ("ck", "link/iter_1/weights", HOLDS),
        ("blob", "files", HOLDS),  # a link in it leads there
        ("blob/model", "files", SAME),
        ("files", "files/model", None),  # the file is elsewhere
        ("made", "made/below", HOLDS),
        ("made", "elsewhere/text", None),
        ("new", "ck", None),
        ("ck_2", "ck", None),
        ("ck", "elsewhere", None),
        ("ck", "none", None),
        ("none/new", "none", None),
    ],
)
def test_sources_are_apart_from_the_target(tree, target, source, got):
    target, source = tree / target, Path(source)
    refused = got and (
        f"{target}: expected a target outside the source {source}, got {got}. Choose another one."
    )
    assert said(check_sources, target, [source]) == refused
    assert said(check_sources, target, [tree / "elsewhere", source]) == refused
    assert said(check_sources, target, []) is None


def test_a_mount_in_what_may_be_deleted(tree, monkeypatch):
    """A source is bound into the target: what is bound is the same folder by another name."""
    stat, below = os.stat, os.stat("made/below")

    def bound(path, **more):
        return below if Path(path) == tree / "elsewhere" else stat(path, **more)

    monkeypatch.setattr(os, "stat", bound)
    assert HOLDS in said(check_sources, tree / "made", [tree / "elsewhere"])
    (tree / "made" / MARK).unlink()  # then it is moved aside, not deleted
    check_sources(tree / "made", [tree / "elsewhere"])


def test_what_a_path_is(tree):
    about = os.stat("ck")
    assert identity(Path("ck")) == identity(tree / "link") == (about.st_dev, about.st_ino)
    assert identity(tree) != identity(tree / "ck")
    assert identity(tree / "none") is None and identity(Path("a\0b")) is None


def test_a_refusal_of_a_source():
    with pytest.raises(TSTError) as refused:
        refuse_source(Path("a"), Path("b"), "the same file")
    assert str(refused.value) == (
        "a: expected a target outside the source b, got the same file. Choose another one."
    )


def test_room_is_looked_for_in_the_lowest_folder_that_is_there(tmp_path, monkeypatch):
    asked, usage = [], shutil.disk_usage

    def spy(folder):
        asked.append(folder)
        return usage(folder)

    monkeypatch.setattr(shutil, "disk_usage", spy)
    (tmp_path / "a").mkdir()
    for target in ("a", "b", "a/b", "a/b/c/d"):
        check_space(tmp_path / target, 0)
    assert asked == [tmp_path, tmp_path, tmp_path / "a", tmp_path / "a"]


def test_a_disk_without_room(tmp_path, monkeypatch):
    """1 % more than was asked for, and 16 MiB, is looked for where the target is to be."""
    asked, needed = [], 1_010_000_000 + (16 << 20)
    frees = [500_000_000, needed - 1, needed, needed + 1]

    def usage(folder):
        free = frees[len(asked)]
        asked.append(folder)
        return shutil._ntuple_diskusage(2 * needed, 2 * needed - free, free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    do = "Make room or choose another disk."
    for refused in (
        f"{tmp_path}: expected 1.03 GB of free space, got 0.50 GB. {do}",
        f"{tmp_path}: expected 1,026,777.22 KB of free space, got 1,026,777.21 KB. {do}",
        None,
        None,
    ):
        assert said(check_space, tmp_path / "new" / "out", 1_000_000_000) == refused
    assert asked == [tmp_path] * 4
