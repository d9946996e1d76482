"""The one place that makes targets: what is refused, what is replaced, what is left when it is
stopped at any step. No model: a few small files stand for one. The verbs: test_killed_verbs.py.
"""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from support.kills import content, spread, stopped

from megatron_tst.checkpoint import atomic, renames
from megatron_tst.checkpoint.atomic import MARK, kept_folder, new_files, new_folder
from megatron_tst.cli.screen import Parser, call
from megatron_tst.errors import TSTError

pytestmark = pytest.mark.filterwarnings("ignore:megatron_tst. .* held what this tool did not")


@pytest.fixture(params=["renameat2", "renames alone"])
def system(request, monkeypatch):
    """With and without renameat2, as on NFS."""
    if request.param != "renameat2":
        monkeypatch.setattr(renames, "_renameat2", lambda *arguments: False)
    return request.param


def write(target, text="new", **more):
    with new_folder(target, 0, **more) as part:
        (part / "weights").write_text(text)
        (part / "below").mkdir()
        (part / "below" / "config").write_text(text)
    return 0


def write_files(prefix, text="new", force=False, endings=(".bin", ".idx"), **more):
    def ours(folder):
        return all(path.read_text().startswith("tool") for path in folder.iterdir())

    with new_files(prefix, endings, force, ours=ours, **more) as part:
        for ending in endings:
            (part / f"{prefix.name}{ending}").write_text(f"tool {text}")
    return 0


def whole(text="new"):
    return {"weights": text.encode(), "below": None, "below/config": text.encode()}


def names(folder):
    return sorted(os.listdir(folder))


# --- sources


def _bind(source, target):
    target.mkdir()
    if subprocess.run(["mount", "--bind", source, target], capture_output=True).returncode:
        pytest.skip("mounting takes root")


@pytest.mark.parametrize(
    "target, source",
    [
        ("ck", "ck"),
        ("ck/iter_1", "ck/iter_1"),
        ("ck", "ck/iter_1"),
        ("ck/hf", "ck"),
        ("ck/iter_1/hf", "ck"),
        ("ck/../ck", "ck"),
        ("other/../ck/hf", "ck"),
        ("link/iter_1", "ck/iter_1"),
        ("link/hf", "ck"),
        ("ck", "link/iter_1"),
        ("ck/hf", "link"),
        ("links", "blob"),  # a folder of links, whose file lies in the target
        ("bound/iter_1", "ck/iter_1"),
        ("bound/hf", "ck"),
        ("ck", "bound/iter_1"),
        ("ck", "bound"),
        ("written", "bound_below"),
    ],
)
def test_source_and_target_apart(tmp_path, monkeypatch, target, source):
    """The same, one in the other: by name, through links, through mounts. Whatever --force says."""
    (tmp_path / "ck" / "iter_1").mkdir(parents=True)
    (tmp_path / "ck" / "iter_1" / "weights").write_text("dear")
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("ck")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "weights").write_text("dear")
    (tmp_path / "blob").mkdir()
    (tmp_path / "blob" / "model").symlink_to(tmp_path / "links" / "weights")
    write(tmp_path / "written")
    bound = {"bound": "ck", "bound_below": "written/below"}
    used = [name for name in bound if name in (target.split("/")[0], source.split("/")[0])]
    try:
        for name in used:
            _bind(tmp_path / bound[name], tmp_path / name)
        before = content(tmp_path)
        monkeypatch.chdir(tmp_path)
        for force in (False, True):
            if not force and (tmp_path / target).exists():
                continue  # refused for that
            for place in (Path(target), tmp_path / target):
                with pytest.raises(TSTError, match="expected a target outside the source"):
                    write(place, force=force, sources=[Path(source)])
        assert content(tmp_path) == before
    finally:
        for name in used:
            subprocess.run(["umount", tmp_path / name])


def test_a_source_beside_the_target_is_none_of_its_business(tmp_path):
    (tmp_path / "ck" / "iter_1").mkdir(parents=True)
    (tmp_path / "link").symlink_to("ck")
    for target in ("ck_stock", "new/folder", "c", "ck2/../hf"):
        write(tmp_path / target, sources=[tmp_path / "ck", tmp_path / "link", tmp_path / "absent"])
    assert names(tmp_path) == ["c", "ck", "ck_stock", "hf", "link", "new"]


def test_files_are_not_written_over_their_sources(tmp_path):
    (tmp_path / "text.bin").write_text("dear")
    os.link(tmp_path / "text.bin", tmp_path / "hard")
    (tmp_path / "soft").symlink_to("text.bin")
    for source in ("text.bin", "hard", "soft", "../" + tmp_path.name + "/text.bin"):
        with pytest.raises(TSTError, match="outside the source .*, got the same file"):
            write_files(tmp_path / "text", force=True, sources=[tmp_path / source])
    assert (tmp_path / "text.bin").read_text() == "dear" and len(names(tmp_path)) == 3


# --- what has the target's name


def put(place, what):
    """Something that is no folder (file) of its own."""
    if what == "file":
        place.write_text("keep")
    elif what == "folder":
        place.mkdir()
    elif what == "pipe":
        os.mkfifo(place)
    elif what == "socket":
        socket.socket(socket.AF_UNIX).bind(str(place))
    elif what == "mount":
        other = place.parent.parent / "other"
        other.mkdir()
        _bind(other, place)  # which os.path.ismount does not see
    else:
        leads = {"link to a folder": "folder", "link to a file": "file", "dangling link": "none"}
        (place.parent / "folder").mkdir()
        (place.parent / "file").write_text("keep")
        place.symlink_to(leads[what])


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "what",
    ["file", "pipe", "socket", "link to a folder", "link to a file", "dangling link", "mount"],
)
def test_targets_that_are_no_folders(tmp_path, what, force):
    (tmp_path / "here").mkdir()
    target = tmp_path / "here" / "out"
    put(target, what)
    before = names(tmp_path / "here")
    try:
        with pytest.raises(TSTError, match="expected a new name or a folder, got a"):
            write(target, force=force)
        if what != "mount":
            with pytest.raises(TSTError, match="expected a new name or a folder, got a"):
                with kept_folder(target):
                    pass
        assert names(tmp_path / "here") == before
    finally:
        if what == "mount":
            subprocess.run(["umount", target])


@pytest.mark.parametrize("what", ["folder", "pipe", "link to a folder", "link to a file"])
def test_targets_that_are_no_files(tmp_path, what):
    put(tmp_path / "out.idx", what)
    before = names(tmp_path)
    with pytest.raises(TSTError, match="out.idx: expected a new name or a file, got a"):
        write_files(tmp_path / "out", force=True)
    assert names(tmp_path) == before


def test_places_that_are_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("keep")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    for target in ("/", "/proc/nowhere", "file/out", "loop/out", "x" * 300, "/dev/null/out"):
        for wanted in (write, write_files):
            with pytest.raises(TSTError, match="expected"):
                wanted(Path(target), force=True)
    assert names(tmp_path) == ["file", "loop"]
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    write(Path("../../c/./d"))
    assert content(tmp_path / "c" / "d") == whole()
    with pytest.raises(TSTError, match="an existing one"):
        write(Path(".."))
    assert names(tmp_path / "a") == ["b"]


# --- what is replaced


def photographs(folder):
    folder.mkdir()
    (folder / "photo").write_text("dear")


@pytest.mark.parametrize(
    "change",
    [
        "foreign",
        "a file more",
        "a hidden file more",
        "a folder more",
        "another size",
        "another size, before the mark",
        "the same size",
        "the same size and time",
        "a link for a file",
        "no mark",
        "a broken mark",
    ],
)
def test_what_this_tool_did_not_write_is_moved_aside(tmp_path, system, change, recwarn):
    target = tmp_path / "out"
    if change == "foreign":
        photographs(target)
    else:
        write(target, "old")
        if change == "a file more":
            (target / "below" / "notes").write_text("dear")
        elif change == "a hidden file more":
            (target / ".a").write_text("dear")
        elif change == "a folder more":
            (target / "iter_2").mkdir()
        elif change.startswith("another size"):
            (target / "weights").write_text("trained on")
            if change.endswith("mark"):  # as copies of both may have it
                os.utime(target / MARK)
        elif change == "the same size":
            (target / "weights").write_text("odd")
        elif change == "the same size and time":
            then = (target / "weights").stat().st_mtime_ns
            (target / "weights").write_text("odd")
            os.utime(target / "weights", ns=(then, then))
        elif change == "a link for a file":
            (target / "weights").unlink()
            (target / "weights").symlink_to("/etc/hostname")
        elif change == "no mark":
            (target / MARK).unlink()
        else:
            (target / MARK).write_text("[" * 100_000)
    old = content(target)
    with pytest.raises(TSTError, match="add --force"):
        write(target)
    assert content(target) == old
    write(target, force=True)
    assert content(target) == whole() and content(tmp_path / "out.old-1") == old
    assert names(tmp_path) == ["out", "out.old-1"]
    said = [str(warning.message) for warning in recwarn if "did not write" in str(warning.message)]
    assert len(said) == 1 and str(tmp_path / "out.old-1") in said[0]
    shutil.rmtree(target)
    photographs(target)
    write(target, force=True)
    assert names(tmp_path) == ["out", "out.old-1", "out.old-2"]
    assert content(tmp_path / "out.old-1") == old


@pytest.mark.parametrize("change", ["as it was", "empty", "a file less", "renamed"])
def test_what_this_tool_wrote_is_replaced(tmp_path, system, change):
    target = tmp_path / "out"
    write(target, "old")
    if change == "empty":
        shutil.rmtree(target)
        target.mkdir()
    elif change == "a file less":
        (target / "weights").unlink()
    elif change == "renamed":
        target.rename(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").rename(target)
    write(target, force=True)
    assert names(tmp_path) == ["out"] and content(target) == whole()


def test_files_that_are_replaced(tmp_path, system):
    prefix = tmp_path / "text"
    write_files(prefix, "old")
    with pytest.raises(TSTError, match="text.bin: .*add --force"):
        write_files(prefix)
    (tmp_path / "text.bin").unlink()
    with pytest.raises(TSTError, match="text.idx: .*add --force"):
        write_files(prefix)
    write_files(prefix, force=True)
    files = {"text.bin": b"tool new", "text.idx": b"tool new"}
    assert content(tmp_path) == files
    (tmp_path / "text.idx").write_text("dear")
    write_files(prefix, force=True)
    assert content(tmp_path) == files | {
        "text.bin.old-1": b"tool new",
        "text.idx.old-1": b"dear",
    }
    for path in tmp_path.iterdir():
        path.unlink()
    for before, left in (("tool old", []), ("dear", ["a.png.old-1"])):
        (tmp_path / "a.png").write_text(before)
        write_files(tmp_path / "a.png", force=True, endings=[""])
        assert names(tmp_path) == ["a.png", *left]
        assert (tmp_path / "a.png").read_text() == "tool new"


def test_what_is_deleted_is_deleted_whole(tmp_path, system, recwarn):
    """Names before and after MARK's in the alphabet, folders in folders."""
    target = tmp_path / "out"
    for _ in range(2):
        with new_folder(target, 0, force=True) as part:
            for name in (".gitattributes", "A", "model-1", "a/b/.c", "~"):
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (part / name).write_text("tool")
    assert names(tmp_path) == ["out"] and not recwarn


def test_a_failure_in_a_thread(tmp_path):
    """Only the main thread may set signals' handlers: the others clean up all the same."""
    caught = []

    def fail():
        try:
            with new_folder(tmp_path / "new" / "out", 0):
                raise KeyError
        except Exception as error:
            caught.append(type(error))

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert caught == [KeyError] and not names(tmp_path)


def test_a_kept_folder(tmp_path, system):
    """Written in its place: the next one takes the place of what the last one has left."""
    with kept_folder(tmp_path / "of" / "several" / "names"):
        pass
    shutil.rmtree(tmp_path / "of")
    target = tmp_path / "demo"
    for _ in range(2):
        with pytest.raises(KeyError), kept_folder(target) as folder:
            assert not names(folder)
            (folder / "log").write_text("what went wrong")
            (folder / "empty" / "too").mkdir(parents=True)
            raise KeyError
        assert names(tmp_path) == ["demo"] and names(target) == [MARK, "empty", "log"]
    (target / "notes").write_text("dear")
    with kept_folder(target):
        pass
    assert names(tmp_path) == ["demo", "demo.old-1"] and names(target) == [MARK]
    with kept_folder(target):
        pass
    assert names(tmp_path) == ["demo", "demo.old-1"]


def test_links_in_what_is_replaced(tmp_path, system):
    """This tool writes none: not to what it wrote, not to a folder like its own, not in a circle.
    What they lead to stays.
    """
    target, kept = tmp_path / "out", tmp_path / "kept"
    for number, (name, to) in enumerate(
        [("weights", "weights"), ("below", "below"), ("below/config", "../.."), ("weights", "none")]
    ):
        write(target, "old")
        shutil.copytree(target, kept)
        write(target, "old", force=True)  # so that what the link leads to is older than MARK
        shutil.rmtree(target / name) if name == "below" else (target / name).unlink()
        (target / name).symlink_to(Path(to) if to.startswith(".") else kept / to)
        write(target, force=True)
        assert names(tmp_path) == ["kept", "out", "out.old-1"], number
        assert (tmp_path / "out.old-1" / name).is_symlink()
        assert content(target) == whole() and content(kept) == whole("old")
        for path in (kept, target, tmp_path / "out.old-1"):
            shutil.rmtree(path)


@pytest.mark.parametrize(
    "mark",
    [
        "[]",
        "{}",
        "7",
        '{"files": {}}',
        '{"folders": ["below"]}',
        '{"files": ["weights"], "folders": ["below"]}',
        '{"files": {"weights": 3, "below/config": 3}, "folders": "below"}',
        "{",
        b"\xff{}",
        "a pipe",
        "a link",
        "a folder",
    ],
)
def test_marks_that_say_nothing(tmp_path, mark):
    """The folder is taken for somebody else's. One with a sound mark is not, whoever wrote that."""
    target = tmp_path / "out"
    write(target, "old")
    good = (target / MARK).read_bytes()
    (target / MARK).unlink()
    if mark == "a pipe":
        os.mkfifo(target / MARK)
    elif mark == "a folder":
        (target / MARK).mkdir()
    elif mark == "a link":
        (target / "mark").write_bytes(good)
        (target / MARK).symlink_to("mark")
    else:
        (target / MARK).write_bytes(mark if isinstance(mark, bytes) else mark.encode())
    write(target, force=True)
    assert names(tmp_path) == ["out", "out.old-1"]
    assert (tmp_path / "out.old-1" / "weights").read_text() == "old"
    write(tmp_path / "sound", "old")
    (tmp_path / "sound" / MARK).write_bytes(good)
    write(tmp_path / "sound", force=True)
    assert names(tmp_path) == ["out", "out.old-1", "sound"]


def test_a_file_of_the_same_tick_as_the_mark(tmp_path):
    """The system's clock is coarse: a file that was written just before has the mark's time. Here
    it is the mark by another name, which has as many bytes as it says of that one.
    """
    target, size = tmp_path / "out", 100
    for _ in range(3):
        with new_folder(target, 0, force=True) as part:
            (part / "weights").write_text("x" * size)
        size = (target / MARK).stat().st_size
    (target / "weights").unlink()
    os.link(target / MARK, target / "weights")
    write(target, force=True)
    assert names(tmp_path) == ["out"] and content(target) == whole()


def test_files_of_nobody_are_moved_aside(tmp_path, system):
    """A caller that cannot say which are its own: none is deleted."""
    (tmp_path / "text.bin").write_text("1")
    with new_files(tmp_path / "text", [".bin"], force=True) as part:
        (part / "text.bin").write_text("2")
    assert content(tmp_path) == {"text.bin": b"2", "text.bin.old-1": b"1"}


# --- what comes meanwhile


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("comes", ["foreign", "ours", "empty", "file", "dangling link", "source"])
def test_a_target_that_appears_meanwhile(tmp_path, system, comes, force):
    target = tmp_path / "out"

    def try_it():
        with new_folder(target, 0, force=force, sources=[tmp_path / "ck"]) as part:
            (part / "weights").write_text("new")
            if comes == "foreign":
                photographs(target)
            elif comes == "ours":
                write(target, "theirs")
            elif comes == "empty":
                target.mkdir()
            elif comes == "file":
                target.write_text("dear")
            elif comes == "source":
                target.mkdir()
                (target / "weights").write_text("dear")
            else:
                target.symlink_to("none")

    if force and comes not in ("file", "dangling link"):
        try_it()
        assert content(target) == {"weights": b"new"}
        aside = ["out.old-1"] if comes in ("foreign", "source") else []
        assert names(tmp_path) == ["out", *aside]
        return
    with pytest.raises(TSTError, match="meanwhile, which stays|expected a new name or a folder"):
        try_it()
    assert names(tmp_path) == ["out"]
    if comes == "foreign":
        assert content(target) == {"photo": b"dear"}
    if comes == "ours":
        assert content(target) == whole("theirs")


def test_a_target_that_goes_meanwhile(tmp_path, system):
    target = tmp_path / "out"
    write(target, "old")
    with new_folder(target, 0, force=True) as part:
        (part / "weights").write_text("new")
        shutil.rmtree(target)
    assert names(tmp_path) == ["out"] and content(target) == {"weights": b"new"}


def test_a_target_that_goes_between_two_renames(tmp_path, monkeypatch, system):
    """There when the new one was to get its name, gone when the two were to be exchanged."""
    target, exchange = tmp_path / "out", atomic.exchange
    write(target, "old")

    def late(one, other, spare):
        shutil.rmtree(other, ignore_errors=True)
        exchange(one, other, spare)

    monkeypatch.setattr(atomic, "exchange", late)
    write(target, force=True)
    assert names(tmp_path) == ["out"] and content(target) == whole()


@pytest.mark.parametrize("force", [False, True])
def test_files_that_appear_meanwhile(tmp_path, system, force):
    """One of the set: nothing of the new one is left without force."""
    with new_files(tmp_path / "text", (".bin", ".idx"), force) as part:
        pass_on = pytest.raises(TSTError, match="meanwhile") if not force else None
        (part / "text.bin").write_text("new")
        (part / "text.idx").write_text("new")
        if force:
            (tmp_path / "text.bin").write_text("dear")
    if force:
        assert names(tmp_path) == ["text.bin", "text.bin.old-1", "text.idx"]
        return
    for path in tmp_path.iterdir():
        path.unlink()
    for late in ("text.bin", "text.idx"):
        with pass_on, new_files(tmp_path / "text", (".bin", ".idx")) as part:
            (part / "text.bin").write_text("new")
            (part / "text.idx").write_text("new")
            (tmp_path / late).write_text("dear")
        assert content(tmp_path) == {late: b"dear"}
        (tmp_path / late).unlink()


@pytest.mark.parametrize("late", ["text.bin", "text.idx"])
def test_a_file_that_appears_between_two_renames(tmp_path, monkeypatch, system, late):
    """The old set is back, the new one gone, and who came between stays."""
    write_files(tmp_path / "text", "old")
    rename = renames.rename_new

    def slow(one, other):
        rename(one, other)
        if one.name == "text.bin" and "replaced" in str(other):  # both have been taken away
            (tmp_path / late).write_text("dear")

    monkeypatch.setattr(atomic, "rename_new", slow)
    with pytest.raises(TSTError, match="meanwhile"):
        write_files(tmp_path / "text", force=True)
    monkeypatch.undo()
    other = {"text.bin": "text.idx", "text.idx": "text.bin"}[late]
    assert content(tmp_path) == {late: b"dear", f"{late}.old-1": b"tool old", other: b"tool old"}


# --- what is on the disk


@pytest.mark.parametrize("force", [False, True])
def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch, system, force):
    """Files and the folders' lists of them; the parent's own before anything is deleted."""
    target, flushed, log = tmp_path / "out", {}, []
    if force:
        write(target, "old")
    fsync = os.fsync

    def spy(handle):
        fsync(handle)
        about = os.fstat(handle)
        flushed[about.st_ino] = about.st_mtime_ns
        log.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))

    def look(function):
        def renamed(one, other, *rest):
            if Path(other) == target and ".whole-" in str(one):
                for path in (one, *Path(one).rglob("*")):
                    about = os.stat(path)
                    assert flushed.get(about.st_ino) == about.st_mtime_ns, path
            answer = function(one, other, *rest)
            if Path(other) == target:
                log.append(("placed", str(other)))
            return answer

        return renamed

    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr(atomic, "rename_new", look(atomic.rename_new))
    monkeypatch.setattr(atomic, "exchange", look(atomic.exchange))
    rmtree = shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, *a, **k: (log.append(("gone", path)), rmtree(path, *a, **k))
    )
    write(target, force=force)
    placed = log.index(("placed", str(target)))
    assert ("fsync", str(tmp_path)) in log[placed:]
    if force:
        after = [what for what, path in log[placed:] if what == "gone" or path == str(tmp_path)]
        assert after == ["fsync", "gone"] or after == ["fsync", "gone", "gone"], log


def test_a_replaced_target_is_there_at_every_step(tmp_path):
    """At each step the target is the old or the new one, whole."""
    target = tmp_path / "out"
    write(target, "old")
    seen = tmp_path / "seen"

    def look():
        found = content(target)
        assert found in (whole("old"), whole())
        with open(seen, "a") as file:
            file.write(found["weights"].decode() + "\n")

    code, steps = stopped(lambda: write(target, force=True), each=look)
    lines = seen.read_text().split()
    assert code == 0 and len(lines) == steps
    assert lines == sorted(lines, reverse=True) and set(lines) == {"old", "new"}


def test_a_replaced_file_is_there_at_every_step(tmp_path):
    """A single one, which changes places with the new one."""
    (tmp_path / "a.png").write_text("tool old")
    seen = tmp_path / "seen"

    def look():
        with open(seen, "a") as file:
            file.write((tmp_path / "a.png").read_text() + "\n")

    new = {"force": True, "endings": [""]}
    code, steps = stopped(lambda: write_files(tmp_path / "a.png", **new), each=look)
    lines = seen.read_text().splitlines()
    assert code == 0 and len(lines) == steps
    assert lines == sorted(lines, reverse=True) and set(lines) == {"tool old", "tool new"}


def test_files_that_are_written_are_on_the_disk(tmp_path, monkeypatch):
    """All bytes, when fsync is called; and nothing stays open."""
    sizes, fsync = [], os.fsync

    def spy(handle):
        fsync(handle)
        sizes.append(os.fstat(handle).st_size)

    monkeypatch.setattr(os, "fsync", spy)
    before = sorted(os.listdir("/proc/self/fd"))
    atomic.write_text(tmp_path / "text", "\xe4b\n")
    atomic.write_json(tmp_path / "json", {"a": 1})
    atomic.flushed(tmp_path / "bytes", lambda file: file.write(b"12"))
    assert sizes == [4, 13, 2]
    atomic.flush_folder(tmp_path)
    assert len(sizes) == 4 and sorted(os.listdir("/proc/self/fd")) == before
    assert content(tmp_path) == {
        "text": b"\xc3\xa4b\n",
        "json": b'{\n  "a": 1\n}\n',
        "bytes": b"12",
    }


# --- killed


def tool(write_it):
    """As a verb ends: a signal is an exception, and what it raises is an exit code."""
    return call(Parser("tool", "A test's."), lambda options: write_it(), [])


def kills(tmp_path, write_it, prepare, check, times, signals=(signal.SIGKILL, signal.SIGTERM)):
    """Stop `write_it` all over; each time `check` gets how it ended, and a further try succeeds."""
    ended = set()
    prepare()
    code, steps = stopped(lambda: tool(write_it))
    assert code == 0
    for number in signals:
        for at in spread(steps, times):
            for path in tmp_path.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            prepare()
            code, _ = stopped(lambda: tool(write_it), at, number)
            assert code in (-number, 128 + number, 0), (code, at)
            check(code, at)
            ended.add(code)
            if code == -signal.SIGKILL:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(atomic, "_work", lambda *a: (_ for _ in ()).throw(Stop()))
                    with pytest.raises((Stop, TSTError)):
                        write_it()
                check(0, at)
    return ended


class Stop(Exception):
    """After the leftovers were looked at, before anything is written."""


@pytest.mark.parametrize("before", ["absent", "ours", "foreign"])
def test_a_folder_stopped_at_any_step(tmp_path, system, before):
    target = tmp_path / "out"

    def prepare():
        if before == "ours":
            write(target, "old")
        elif before == "foreign":
            photographs(target)

    old = {"absent": None, "ours": whole("old"), "foreign": {"photo": b"dear"}}[before]

    def check(code, at):
        """`code` 0: after the next try has looked at what was left."""
        there = content(target) if target.exists() else None
        rest = [name for name in names(tmp_path) if name != "out"]
        if code == -signal.SIGKILL:
            # without renameat2 the old one may lie beside for a moment
            if there is None and old is not None:
                assert system != "renameat2", at
                assert any(content(tmp_path / name) == old for name in rest), at
            assert there in (old, None, whole()), at
            return
        assert there in (old, whole()), at
        aside = there == whole() and before == "foreign"
        assert rest == (["out.old-1"] if aside else []), (at, rest)
        if aside:
            assert content(tmp_path / "out.old-1") == old

    ended = kills(tmp_path, lambda: write(target, force=True), prepare, check, 10)
    assert {-signal.SIGKILL, 128 + signal.SIGTERM} <= ended


@pytest.mark.parametrize("before", ["absent", "ours", "foreign"])
@pytest.mark.parametrize("endings", [(".bin", ".json", ".idx"), ("",)], ids=["several", "one"])
def test_files_stopped_at_any_step(tmp_path, system, before, endings):
    """All of a set, or none: what there was before is back when the next try has begun."""
    prefix = tmp_path / "out"
    new = {f"out{ending}": b"tool new" for ending in endings}
    kept = b"tool old" if before == "ours" else b"dear"
    old = {} if before == "absent" else dict.fromkeys(new, kept)

    def prepare():
        for name, text in old.items():
            (tmp_path / name).write_bytes(text)

    def check(code, at):
        found = content(tmp_path)
        if code == -signal.SIGKILL:
            if f"out{endings[-1]}" in found:  # else there is no corpus, as everybody sees
                there = {name: found[name] for name in new}
                assert there in (old, new), at
            return
        aside = {f"{name}.old-1": kept for name in new} if before == "foreign" else {}
        assert found in (old, new | aside), (at, found)

    def write_it():
        return write_files(prefix, force=True, endings=endings)

    ended = kills(tmp_path, write_it, prepare, check, 8)
    assert {-signal.SIGKILL, 128 + signal.SIGTERM} <= ended


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("before", ["ours", "foreign"])
def test_stopped_while_the_target_is_away(tmp_path, monkeypatch, before, number):
    """Without renameat2 there is such a moment. What was there comes back, at once or next time."""
    monkeypatch.setattr(renames, "_renameat2", lambda *arguments: False)
    target = tmp_path / "out"
    write(target, "old") if before == "ours" else photographs(target)
    old, sent = content(target), []

    def stop_there():
        if not target.exists() and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    code, _ = stopped(lambda: tool(lambda: write(target, force=True)), each=stop_there)
    if number == signal.SIGKILL:
        assert code == -number and not target.exists()
        with pytest.raises(TSTError, match="an existing one"):
            write(target)
    else:
        assert code == 128 + number
    assert names(tmp_path) == ["out"] and content(target) == old


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("away", ["text.bin", "text.json", "text.idx"])
def test_stopped_while_a_file_of_a_set_is_away(tmp_path, system, away, number):
    endings = ".bin", ".json", ".idx"
    write_files(tmp_path / "text", "old", endings=endings)
    old, sent = content(tmp_path), []

    def stop_there():
        if not (tmp_path / away).exists() and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    def try_it():
        return write_files(tmp_path / "text", force=True, endings=endings)

    code, _ = stopped(lambda: tool(try_it), each=stop_there)
    if number == signal.SIGKILL:
        assert code == -number and not (tmp_path / "text.idx").exists()
        with pytest.raises(TSTError, match="an existing one"):
            write_files(tmp_path / "text", endings=endings)
    else:
        assert code == 128 + number
    assert content(tmp_path) == old


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_while_an_older_set_is_deleted(tmp_path, system, number):
    """The rest of it goes too, though nobody could say of it alone whose it is."""
    endings, sent = (".bin", ".idx"), []

    def ours(folder):
        return names(folder) == ["text.bin", "text.idx"]

    def try_it():
        with new_files(tmp_path / "text", endings, force=True, ours=ours) as part:
            for ending in endings:
                (part / f"text{ending}").write_text("new")
        return 0

    def stop_there():
        kept = [path for path in tmp_path.glob(".text.whole-*/*/*") if path.suffix in endings]
        if len(kept) == 1 and kept[0].read_text() == "old" and (tmp_path / "text.idx").exists():
            if (tmp_path / "text.idx").read_text() == "new" and not sent:
                sent.append(number)
                os.kill(os.getpid(), number)

    for ending in endings:
        (tmp_path / f"text{ending}").write_text("old")
    code, _ = stopped(lambda: tool(try_it), each=stop_there)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    if number == signal.SIGKILL:
        with pytest.raises(TSTError, match="an existing one"):
            write_files(tmp_path / "text")
    assert content(tmp_path) == {"text.bin": b"new", "text.idx": b"new"}


def leave(target, kind="part", text="half", **changes):
    """A temporary folder as a try leaves it that was killed."""
    fields = dict(zip(("machine", "who", "process", "begun", "number"), renames.tag().split(".")))
    fields |= {name: str(value) for name, value in changes.items()}
    path = target.with_name(f".{target.name}.{kind}-{'.'.join(fields.values())}")
    path.mkdir(parents=True)
    (path / "weights").write_text(text)
    return path


def test_whose_leftovers_are_removed(tmp_path):
    target, dead = tmp_path / "out", 2**22 + 1  # above the largest process id
    write(tmp_path / "seed")
    gone = [
        leave(target, process=dead),
        leave(target, begun=1),  # the id has been given to another process since
        leave(target, "whole", process=dead, number=7),
    ]
    shutil.rmtree(gone[2])
    (tmp_path / "seed").rename(gone[2])
    week_old = [leave(target, machine="node1"), leave(target, who="00000000")]
    for path in week_old:
        for each in (path / "weights", path):
            os.utime(each, (time.time() - 7 * 24 * 3600 - 60,) * 2)
    stay = [
        leave(target),  # a live process's
        leave(target, machine="node2", process=dead),
        leave(target, who="0000aaaa", process=dead),  # another container of this machine
        leave(tmp_path / "out2", process=dead),
        leave(tmp_path / "o", process=dead),
    ]
    for each in (stay[1] / "weights", stay[1]):
        os.utime(each, (time.time() - 7 * 24 * 3600 + 60,) * 2)
    written_to = leave(target, machine="node3")
    os.utime(written_to, (0, 0))  # the folder is old, what is in it is not
    for name in (".out.part-1", ".out.part-notes", ".out.bak-1.2.3.4.5"):
        (tmp_path / name).mkdir()
        stay.append(tmp_path / name)
    write(target)
    assert not [path for path in (*gone, *week_old) if path.exists()]
    assert all(path.exists() for path in (*stay, written_to))
    assert not (tmp_path / "out.old-1").exists()


def test_what_the_system_refuses_names_both(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for flag in (1, 2):
        with pytest.raises(FileNotFoundError) as raised:
            renames._renameat2(one, other, flag)
        assert (raised.value.filename, raised.value.filename2) == (str(one), str(other))
    one.mkdir(), other.mkdir()
    with pytest.raises(FileExistsError):
        renames._renameat2(one, other, 1)


def test_foreign_things_among_leftovers_are_moved_aside(tmp_path):
    """Killed after the exchange: what lies there then was the target."""
    target = tmp_path / "out"
    write(target)
    leave(target, "whole", "dear", process=2**22 + 1)
    with pytest.raises(TSTError, match="an existing one"):
        write(target)
    assert content(tmp_path / "out.old-1") == {"weights": b"dear"}
    assert names(tmp_path) == ["out", "out.old-1"]


def test_two_at_once(tmp_path, system):
    """Twenty pairs of processes with one target: one wins, or with force one after the other."""
    target = tmp_path / "here" / "out"
    for force in [False, True] * 10:
        reading, writing = os.pipe()
        processes = []
        for text in ("one", "two"):
            if (process := os.fork()) == 0:
                os.read(reading, 1)
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), 2)
                code = 97
                try:
                    code = tool(lambda text=text: write(target, text, force=force))
                finally:
                    os._exit(code)
            processes.append(process)
        os.write(writing, b"..")
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        os.close(reading), os.close(writing)
        assert sorted(codes) == ([0, 0] if force else [0, 2]), codes
        assert content(target) in ([whole("one"), whole("two")])
        if not force:
            assert content(target) == whole(("one", "two")[codes.index(0)])
        assert names(tmp_path / "here") == ["out"]
        shutil.rmtree(tmp_path / "here")


@pytest.mark.parametrize("kind", ["folder", "link to a folder", "file"])
def test_leftovers_that_are_no_folders_of_their_own(tmp_path, kind):
    """What a link leads to is not what is left over."""
    (tmp_path / "made").mkdir()
    target, left = tmp_path / "made" / "out", leave(tmp_path / "made" / "out", "whole", process=1)
    write(tmp_path / "kept", "dear")
    shutil.rmtree(left)
    if kind == "folder":
        shutil.copytree(tmp_path / "kept", left)
        (left / "weights").write_text("dear!")
    elif kind == "file":
        left.write_text("dear")
    else:
        left.symlink_to(tmp_path / "kept")
    write(target)
    assert names(tmp_path / "made") == ["out", "out.old-1"]
    assert content(tmp_path / "kept") == whole("dear")
    assert (tmp_path / "made" / "out.old-1").is_symlink() == (kind == "link to a folder")


def test_what_was_away_while_another_took_the_place(tmp_path):
    """Killed without a target, where the system cannot exchange two: a new one has come since."""
    target = tmp_path / "out"
    write(target)
    leave(target, "old", "dear", process=2**22 + 1)
    with pytest.raises(TSTError, match="an existing one"):
        write(target)
    assert content(tmp_path / "out.old-1") == {"weights": b"dear"}
    assert content(target) == whole() and names(tmp_path) == ["out", "out.old-1"]


def test_files_of_which_nothing_says_what_they_are(tmp_path):
    """Left by a try that was killed, but without a mark."""
    leave(tmp_path / "text", "whole", "dear", process=2**22 + 1)
    write_files(tmp_path / "text")
    assert names(tmp_path) == ["text.bin", "text.idx", "text.old-1"]
    assert content(tmp_path / "text.old-1") == {"weights": b"dear"}


@pytest.mark.parametrize("before", ["ours", "foreign"])
def test_a_kept_folder_stopped_while_the_old_one_goes(tmp_path, monkeypatch, before):
    """By a signal it goes on; killed, what is left counts as what was on its way."""
    target = tmp_path / "demo"
    write(target, "old") if before == "ours" else photographs(target)
    old, dispose, calls = content(target), atomic._dispose, []

    def once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        dispose(*arguments)

    aside = ["demo.old-1"] if before == "foreign" else []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic, "_dispose", once)
        with kept_folder(target):
            pass
    assert len(calls) == 2 and names(tmp_path) == aside

    def stop_there():
        if not target.exists():
            os.kill(os.getpid(), signal.SIGKILL)

    def try_it():
        with kept_folder(target):
            pass

    write(target, "old") if before == "ours" else photographs(target)
    assert stopped(try_it, each=stop_there)[0] == -signal.SIGKILL
    assert [name[:12] for name in names(tmp_path)] == [".demo.whole-", *aside]
    try_it()
    aside += ["demo.old-2"] if before == "foreign" else []
    assert names(tmp_path) == ["demo", *aside] and names(target) == [MARK]
    assert all(content(tmp_path / name) == old for name in aside)


def test_a_kept_folder_whose_old_one_cannot_go(tmp_path, monkeypatch):
    target = tmp_path / "demo"
    write(target, "old")

    def rename(one, other):
        raise PermissionError(13, "Permission denied", str(one))

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(TSTError) as refused, kept_folder(target):
        raise AssertionError
    assert str(refused.value) == (
        f"{target}: expected a place that can be written to, got Permission denied. Choose another "
        "one or mend its permissions."
    )
    assert names(tmp_path) == ["demo"] and content(target) == whole("old")


def test_folders_above_the_target(tmp_path):
    """Those that were made for it go with it, those that were there stay, though empty."""
    (tmp_path / "there").mkdir()
    for target in ("there/out", "there/a/b/out", "a/b/out"):
        with pytest.raises(KeyError), new_folder(tmp_path / target, 0):
            raise KeyError
        assert [*content(tmp_path)] == ["there"]
    write(tmp_path / "a" / "b" / "out")
    write_files(tmp_path / "c" / "d" / "text")
    assert names(tmp_path / "a" / "b") == ["out"] and len(names(tmp_path / "c" / "d")) == 2


def test_signals_while_it_cleans_up():
    """They are ignored, and mean afterwards what they meant before."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    heard, was = [], {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            signal.signal(number, lambda number, frame: heard.append(number))
        with pytest.raises(KeyError), atomic._undisturbed():
            for number in numbers:
                signal.raise_signal(number)
            raise KeyError
        assert heard == [signal.SIGUSR1]
        for number in numbers:
            signal.raise_signal(number)
        assert heard == [signal.SIGUSR1, *numbers]
    finally:
        for number, handler in was.items():
            signal.signal(number, handler)


def test_a_signal_whose_handler_is_not_python_s(monkeypatch):
    """Python could not put it back."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *arguments: pytest.fail("a handler was set"))
    with atomic._undisturbed():
        pass


# --- places that take nothing


PERMISSIONS = "Choose another one or mend its permissions."
ROOM = "Make room or choose another disk."


@pytest.mark.parametrize(
    "filename, code, do",
    [
        ("here/out", 13, PERMISSIONS),
        ("here/out/weights", 13, PERMISSIONS),
        ("here/.out.part-1/weights", 13, PERMISSIONS),
        ("here/.out.whole-1", 13, PERMISSIONS),
        ("here", 13, PERMISSIONS),
        ("", 13, PERMISSIONS),
        ("here/out", 28, ROOM),
        ("here/.out.part-1/weights", 122, ROOM),
        ("here/.out.whole-1", 27, ROOM),
        (None, 5, PERMISSIONS),
        (None, 28, ROOM),
        (7, 28, ROOM),  # a file's number
        ("here/source", 13, None),
        ("other/out", 28, None),
        ("here/ou", 5, None),
    ],
)
def test_what_the_system_refuses_in_words(tmp_path, monkeypatch, filename, code, do):
    """About the target where it is that, something in it or above it, or nothing is named; else
    about what was read.
    """
    monkeypatch.chdir(tmp_path)
    target, more = Path("here/out"), (Path("here/.out.part-1"), Path("here/.out.whole-1"))
    got = os.strerror(code)
    for name in (filename, Path(filename) if isinstance(filename, str) else None):
        with pytest.raises(TSTError) as refused, atomic._in_words(target, *more):
            raise OSError(code, got, name)
        if do or name is None:
            do = do or PERMISSIONS
            expected = f"{target}: expected a place that can be written to, got {got}. {do}"
        else:
            expected = (
                f"{tmp_path / name}: expected a file or folder that can be read, got {got}. Mend "
                "its permissions or copy it again."
            )
        assert str(refused.value) == expected


def test_what_has_no_number_in_words(tmp_path):
    with pytest.raises(TSTError, match="out: expected .*, got something of its own. Choose"):
        with atomic._in_words(tmp_path / "out"):
            raise OSError("something of its own")


def test_a_screen_that_is_gone_is_no_file(tmp_path):
    with pytest.raises(BrokenPipeError), atomic._in_words(tmp_path / "out"):
        raise BrokenPipeError(32, "Broken pipe")


def as_nobody(call_it):
    """In a fork without root's rights. -> exit code"""
    process = os.fork()
    if process == 0:
        code = 97
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            code = call_it()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("wanted", [write, write_files])
@pytest.mark.parametrize("case", ["read-only", "unreadable", "source", "sticky"])
def test_permissions(tmp_path, capfd, case, wanted):
    for folder in (tmp_path, *tmp_path.parents):  # nobody may come here
        if folder.stat().st_uid == os.getuid() and len(folder.parts) > 2:
            folder.chmod(0o755)
    here = tmp_path / "here"
    here.mkdir()
    (here / "source").write_text("secret")
    (here / "source").chmod(0)
    here.chmod({"read-only": 0o555, "unreadable": 0, "source": 0o777, "sticky": 0o1777}[case])
    if case == "sticky":
        write(here / "out") if wanted is write else write_files(here / "out")  # of another owner

    def read():
        with new_folder(here / "new" / "out", 0) as part:
            (part / "copy").write_bytes((here / "source").read_bytes())
        return 0

    calls = {
        "read-only": lambda: wanted(here / "new" / "out"),
        "unreadable": lambda: wanted(here / "out"),
        "source": read,
        "sticky": lambda: wanted(here / "out", force=True),
    }
    assert as_nobody(lambda: tool(calls[case])) == 2
    here.chmod(0o755)
    error = capfd.readouterr().err
    assert error.count("\n") == 1, error
    assert (f"{here / 'source'}: " in error) == (case == "source"), error
    assert "permi" in error, error
    left = {"out", "out.bin", "out.idx"} & set(names(here)) if case == "sticky" else set()
    assert set(names(here)) == {"source", *left}


@pytest.mark.parametrize("wanted", [write, write_files])
def test_a_disk_that_fills_up(tmp_path, capfd, wanted):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        return tool(lambda: wanted(tmp_path / "new" / "out", "x" * 100_000))

    code, _ = stopped(limited)
    error = capfd.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "Make room" in error, error
    assert "expected a place that can be written to, got File too large" in error
    assert not names(tmp_path)


def test_a_disk_without_room(tmp_path):
    """Seen before anything is written."""
    with pytest.raises(TSTError, match=f"^{tmp_path}: expected 1,164,450.72 TB of free space"):
        with new_folder(tmp_path / "new" / "out", 1 << 60):
            raise AssertionError
    assert not names(tmp_path)


@pytest.mark.parametrize("where", ["_finish", "rename_new", "flush_folder"])
def test_a_full_disk_at_the_end(tmp_path, monkeypatch, where):
    """No room for MARK, for the new name, for the folder's list of files."""
    target, function = tmp_path / "out", getattr(atomic, where)

    def fails(path, *more):
        if where != "flush_folder" or path == tmp_path:
            raise OSError(28, "No space left on device")
        function(path, *more)

    monkeypatch.setattr(atomic, where, fails)
    with pytest.raises(TSTError, match="got No space left on device. Make room"):
        write(target)
    assert names(tmp_path) == (["out"] if where == "flush_folder" else [])


def test_mark_says_what_is_there(tmp_path):
    """The same bytes whenever it is written, so that two exports of one checkpoint are the same."""
    for name in "ab":
        write(tmp_path / name)
    about = [(tmp_path / name / MARK).read_bytes() for name in "ab"]
    assert about[0] == about[1]
    said = json.loads(about[0])
    assert about[0].decode() == json.dumps(said, indent=2) + "\n"  # people look into it
    assert [*said] == ["written by", "folders", "files"]
    assert said["files"] == {"weights": 3, "below/config": 3} and said["folders"] == ["below"]
