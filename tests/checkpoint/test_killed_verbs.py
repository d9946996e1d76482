"""Every verb that writes, stopped sixty times and raced twenty times: the source is whole, the
target is absent or whole (the old or the new one), nothing foreign is gone, nothing is left.

The same without a model, at more steps and more places: test_targets.py. By time, not by steps:
test_export_hf.py and test_convert.py.
"""

import functools
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from support.kills import content, spread, stopped
from support.runs import TINY, TST
from support.trained import corpus_below, known

from megatron_tst import cli
from megatron_tst.checkpoint import atomic, rewrite, write
from megatron_tst.export import nemo  # noqa: F401  before the forks

pytestmark = pytest.mark.filterwarnings("ignore:megatron_tst. .* held what this tool did not")
FOLDERS = "boundary", "export-hf", "export-nemo", "import-hf"
VERBS = *FOLDERS, "corpus", "plot"
WORD = "abcdefghijklmnopqrstuvwxyz "


@pytest.fixture(scope="module")
def sources(fork_server, tmp_path_factory):
    """verb -> what it reads, in a folder of its own: (folder, arguments before the target's)"""
    here = tmp_path_factory.mktemp("sources")
    (here / "data").mkdir()
    flags = [*TINY, *TST, *known(corpus_below(here / "data"))]
    run = fork_server.train(*flags, "--save", here / "ck", "--save-interval", "5")
    assert run.ok, run.log[-3000:]
    (here / "run.log").write_text(run.log)
    assert cli.main(["export-hf", str(here / "ck"), str(here / "hf")]) == 0
    (here / "text").mkdir()
    for i in range(20):
        words = " ".join(WORD[j % 26 :] for j in range(i, 300))
        (here / "text" / f"{i}.txt").write_text(words)
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import tokenizers  # noqa: F401  before the forks
    import yaml  # noqa: F401

    found = {verb: ("ck", [str(here / "ck")]) for verb in FOLDERS}
    found["import-hf"] = "hf", [str(here / "hf")]
    found["corpus"] = "text", ["--vocab-size", "300", "--input", str(here / "text"), "--output"]
    found["plot"] = "run.log", [f"run={here / 'run.log'}", "--output"]
    return {verb: (here / name, arguments) for verb, (name, arguments) in found.items()}


@pytest.fixture
def verb(request, sources, tmp_path):
    return Verb(request.param, *sources[request.param], tmp_path / "place")


class Verb:
    """One of them: how it is called, and what it makes in a place of its own."""

    def __init__(self, name, source, arguments, place):
        self.name, self.source, self.arguments, self.place = name, source, arguments, place
        self.target = place / ("out.png" if name == "plot" else "out")
        self.before = self._source()

    def __call__(self, *more):
        force = ["--force"] if "force" in more and self.name != "plot" else []
        return cli.main([self.name, *self.arguments, str(self.target), *force])

    def _source(self):
        return content(self.source) if self.source.is_dir() else self.source.read_bytes()

    @functools.cached_property
    def new(self):
        """What is in the place when it has run."""
        self.empty()
        code, _ = stopped(lambda: self())
        assert code == 0
        return self.found()

    def empty(self):
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()

    def found(self):
        """Without the hidden names, of which `left` tells."""
        return {name: what for name, what in content(self.place).items() if name[0] != "."}

    @property
    def left(self):
        return [name for name in os.listdir(self.place) if name[0] == "."]

    def put(self, kind):
        """Before it runs. -> what is in the place then"""
        assert self.new  # found out in this place
        self.empty()
        if kind == "ours":
            code, _ = stopped(lambda: self())
            assert code == 0
        elif kind == "foreign" and self.name in FOLDERS:
            self.target.mkdir()
            (self.target / "photo").write_text("dear")
        elif kind == "foreign":
            for name in self.new:
                (self.place / name).write_text("dear")
        return self.found()

    def aside(self, old):
        """Names of what was foreign, when it has been replaced."""
        top = {name.split("/")[0] for name in self.new}
        return {
            "/".join([f"{first}.old-1", *rest]): what
            for (first, *rest), what in ((name.split("/"), what) for name, what in old.items())
            if first in top
        }

    def check(self, old, kind, killed):
        """The source is whole, and the place holds the old or the new."""
        assert self._source() == self.before
        found, new = self.found(), self.new
        states = [old, new] if kind != "foreign" else [old, new | self.aside(old)]
        if killed and found not in states:
            # a corpus whose last file is away is none; what was moved aside may lie beside yet
            last = self.target.name + (".idx" if self.name == "corpus" else "")
            gone = self.name == "corpus" and last not in found
            halfway = kind == "foreign" and {name: found.get(name) for name in new} == new
            assert gone or halfway, found.keys()
        elif not killed:
            assert found in states, found.keys()
            assert not self.left


def next_try(verb):
    """What the next call finds and puts in order, before it writes anything."""

    def stop(*arguments):
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "_work", stop)
        verb("force")


@pytest.mark.parametrize("verb", VERBS, indirect=True)
@pytest.mark.parametrize(
    "kind, times",
    [
        ("absent", 1),
        *(pytest.param(kind, 10, marks=pytest.mark.slow) for kind in ("absent", "ours", "foreign")),
    ],
)
def test_stopped_at_any_step(verb, kind, times):
    """By SIGKILL and by SIGTERM, each so many times; twice that in all."""
    old = verb.put(kind)
    _, steps = stopped(lambda: verb("force"))
    ended = []
    for number in (signal.SIGKILL, signal.SIGTERM):
        for at in spread(steps, times):
            verb.put(kind)
            code, _ = stopped(lambda: verb("force"), at, number)
            ended.append(code)
            assert code in (-number, 128 + number, 0), (at, code)
            verb.check(old, kind, killed=code == -signal.SIGKILL)
            if code == -signal.SIGKILL:
                next_try(verb)
                verb.check(old, kind, killed=False)
    assert ended.count(-signal.SIGKILL) >= times - 1, ended
    assert ended.count(128 + signal.SIGTERM) >= times - 1, ended


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS, indirect=True)
def test_two_at_once(verb):
    """Ten pairs of processes with one target, without force and with it."""
    for force in [(), ("force",)] * 5:
        verb.put("absent")
        processes = []
        for _ in range(2):
            if (process := os.fork()) == 0:
                code = 97
                try:
                    code = verb(*force)
                finally:
                    os._exit(code)
            processes.append(process)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        # the second may come after the first has ended; a corpus may see the other half way
        assert sorted(codes) in ([0, 0], [0, 2]), codes
        assert force or verb.name == "plot" or sorted(codes) == [0, 2], codes
        verb.check({}, "absent", killed=False)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS, indirect=True)
@pytest.mark.parametrize("force", [(), ("force",)])
def test_somebody_comes_before_it(verb, force):
    """At ten steps something foreign takes the target's name: it stays, under it or aside."""
    verb.put("absent")
    _, steps = stopped(lambda: verb(*force))
    name = sorted(verb.new)[0].split("/")[0]  # the target, or one of several files
    for at in spread(steps, 5):
        verb.put("absent")
        counted = iter(range(1, steps + 100))

        def comes(counted=counted, at=at):
            if next(counted) == at and not os.path.lexists(verb.place / name):
                if verb.name in FOLDERS:
                    (verb.place / name).mkdir()
                    (verb.place / name / "photo").write_text("dear")
                else:
                    (verb.place / name).write_text("dear")

        code, _ = stopped(lambda: verb(*force), each=comes)
        found, dear = verb.found(), [b"dear"]
        came = [path for path, what in found.items() if what in dear]
        assert not verb.left
        if came == []:  # it was there before
            assert code == 0 and found == verb.new
        elif code == 0:
            assert {path: found[path] for path in verb.new} == verb.new and len(came) == 1
            assert came[0].startswith(f"{name}.old-1")
        else:
            assert code == 2 and {path for path in found if found[path] is not None} == {*came}


@pytest.mark.parametrize("verb", FOLDERS, indirect=True)
def test_the_source_is_never_the_target(verb, capsys):
    """The same, its parent, a place in it: by name, by a link. With --force too."""
    verb.empty()
    (verb.place / "link").symlink_to(verb.source)
    within = verb.source / "iter_0000010"
    for source, target in (
        (verb.source, verb.source),
        (verb.source, verb.source.parent),
        (verb.source, verb.source / "new"),
        (verb.source, verb.place / "link" / "new"),
        (verb.place / "link", verb.source),
        (verb.place / "link", verb.source / "new"),
        *([(within, verb.source), (verb.source, within)] if within.exists() else []),
    ):
        for force in ([], ["--force"]):
            assert cli.main([verb.name, str(source), str(target), *force]) == 2
            error = capsys.readouterr().err
            refusals = ["outside the source", "add --force"][: 1 if force else 2]
            assert error.count("\n") == 1 and any(said in error for said in refusals), error
    assert verb._source() == verb.before and os.listdir(verb.place) == ["link"]


@pytest.mark.parametrize("name", ["corpus", "plot"])
def test_files_are_not_written_over_what_they_are_made_of(sources, tmp_path, capsys, name):
    source = tmp_path / ("text.json" if name == "corpus" else "log.png")
    text = sources[name][0]
    source.write_bytes((text / "1.txt" if text.is_dir() else text).read_bytes())
    before = source.read_bytes()
    more = ["--force", "--input", str(source)] if name == "corpus" else [f"run={source}"]
    target = tmp_path / "text" if name == "corpus" else source
    assert cli.main([name, "--output", str(target), *more]) == 2
    said = "which --output replaces" if name == "corpus" else "outside the source"
    assert said in capsys.readouterr().err
    assert Path(source).read_bytes() == before and os.listdir(tmp_path) == [source.name]


@pytest.mark.parametrize(
    "verb, file",
    [
        ("boundary", "__0_0.distcp"),
        ("boundary", "__common_0.distcp"),
        ("export-nemo", "__0_0.distcp"),
        ("import-hf", "__0_0.distcp"),
    ],
    indirect=["verb"],
)
def test_what_was_written_is_read_back(verb, file, monkeypatch, capsys):
    """A disk that keeps another byte than it was given."""
    flush = atomic.flush

    def faulty(written):
        flush(written)
        if written.name.endswith(f"/{file}"):
            with open(written.name, "r+b") as again:
                again.seek(os.path.getsize(written.name) // 2)
                byte = again.read(1)
                again.seek(-1, os.SEEK_CUR)
                again.write(bytes([byte[0] ^ 1]))

    for module in (atomic, rewrite, write):
        monkeypatch.setattr(module, "flush", faulty)
    verb.empty()
    assert verb() == 2
    error = capsys.readouterr().err
    assert "as it was written, got other bytes. The disk is faulty" in error, error
    assert not os.listdir(verb.place)


@pytest.mark.parametrize("verb", VERBS, indirect=True)
@pytest.mark.parametrize("bytes_", [500, 5000])
def test_a_disk_that_fills_up(verb, bytes_, capfd):
    """One sentence, and nothing left, folders above the target neither."""
    verb.empty()
    verb.target = verb.place / "above" / verb.target.name

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))
        return verb()

    code, _ = stopped(limited)
    error = capfd.readouterr().err
    assert code == 2 and error.count("\n") == 1, error
    assert "expected a place that can be written to, got File too large. Make room" in error
    assert not os.listdir(verb.place)


@pytest.mark.parametrize("verb", VERBS, indirect=True)
def test_a_file_for_a_folder_and_the_reverse(verb, capsys):
    name = sorted(verb.new)[0].split("/")[0]
    for what in ("file", "folder", "pipe", "dangling link"):
        verb.empty()
        place = verb.place / name
        if what == "pipe":
            os.mkfifo(place)
        elif what == "dangling link":
            place.symlink_to("none")
        elif what == ("file" if verb.name in FOLDERS else "folder"):
            place.mkdir() if what == "folder" else place.write_text("dear")
        else:
            continue
        for force in ([], ["force"]):
            assert verb(*force) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and "expected a new name or a" in error, error
        assert os.listdir(verb.place) == [name]
    verb.empty()
    (verb.place / "file").write_text("dear")
    verb.target = verb.place / "file" / verb.target.name
    assert verb() == 2 and "expected a place that can be written to" in capsys.readouterr().err
    assert os.listdir(verb.place) == ["file"]
