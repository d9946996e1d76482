"""What `megatron-tst corpus` reads: each file once. What it does not read is counted and said."""

import builtins
import inspect
import itertools
import json
import os
import random
import socket
import warnings

import numpy as np
import pytest

from megatron_tst import cli
from megatron_tst.data import corpus
from megatron_tst.errors import TSTError

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def here(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        words = [random.Random(i).choice(TEXT.split()) + str(j % 97) for j in range(400)]
        (folder / f"good{i}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture
def made(tmp_path, capsys):
    """-> exit code, stdout, stderr without its progress bar"""

    def run(*inputs, more=(), output="out"):
        call = ["corpus", "--output", str(tmp_path / output), "--vocab-size", "300", *more]
        code = cli.main([*call, *(("--input", *map(str, inputs)) if inputs else ())])
        out, err = capsys.readouterr()
        return (
            code,
            out.strip(),
            [line for line in err.splitlines() if "error:" in line],
        )

    return run


def refused(answer, *parts):
    code, out, errors = answer
    assert code == 2 and not out and len(errors) == 1, answer
    assert all(part in errors[0] for part in parts), errors


def test_all_is_read(here, made):
    code, out, _ = made(here)
    assert code == 0 and out.endswith("vocabulary 300") and ": 3 documents" in out


@pytest.mark.parametrize("name", ["god0.txt", "missing/", "broken", "good0.txt/below"])
def test_an_input_that_is_not_there_among_others(here, made, name):
    (here / "broken").symlink_to(here / "nowhere")
    refused(made(here / "good0.txt", here / name), "--input: expected files and folders that exist")


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_an_input_that_is_no_file(here, made, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name may have a hundred letters
    if kind == "fifo":
        os.mkfifo("odd")
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind("odd")
    else:
        os.symlink("/dev/zero", "odd")
    refused(
        made(here / "good0.txt", "odd"), "expected files and folders, got odd, which is neither"
    )


@pytest.mark.parametrize(
    "content, reason",
    [
        ("naïve café".encode("latin-1"), "not in UTF-8"),
        ("text".encode("utf-16"), "not text (null bytes: UTF-16, or binary)"),
        ("text".encode("utf-16-le"), "not text (null bytes: UTF-16, or binary)"),
        ("日本".encode("shift-jis"), "not in UTF-8"),
        (bytes(range(256)), "not text (null bytes: UTF-16, or binary)"),
        (b"", "empty"),
    ],
)
def test_what_is_left_out_is_counted_and_named(here, made, content, reason):
    for name in ("x.txt", "y.txt"):
        (here / name).write_bytes(content)
    code, out, _ = made(here)
    assert code == 0 and ": 3 documents" in out
    assert out.endswith(f"; left out: 2 {reason} (the first: {here / 'x.txt'})")
    refused(made(here / "x.txt", output="only"), "expected files of text, got none, left out: 1")


def test_reasons_stand_side_by_side(here, made):
    (here / "page.html").write_text("x")
    (here / "gone.md").symlink_to(here / "nowhere")
    os.mkfifo(here / "pipe.txt")
    (here / os.fsdecode(b"\xff.csv")).write_text("x")
    _, out, _ = made(here)
    assert "2 of other endings (the first: " in out and "2 that are no files (the first: " in out


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads everything")
def test_what_may_not_be_read(here, made):
    (here / "secret.txt").write_text("x")
    (here / "secret.txt").chmod(0)
    assert "1 that cannot be read (the first:" in made(here)[1]


def test_a_file_that_cannot_be_read(here):
    assert corpus.read(here) == ("", "that are no files")
    assert corpus.read(here / "missing") == ("", "that cannot be read")
    os.mkfifo(here / "pipe")
    (here / "text").write_text("a")
    files = os.listdir("/proc/self/fd")
    assert corpus.read(here / "pipe") == ("", "that are no files")  # and nobody writes to it
    assert corpus.read(here / "text") == ("a", "")
    assert os.listdir("/proc/self/fd") == files


def test_a_folder_that_may_not_be_read(here, made, monkeypatch):
    (here / "closed").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path) == str(here / "closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    code, out, _ = made(here)
    reason = f"left out: 1 in folders that cannot be read (the first: {here / 'closed'})"
    assert code == 0 and out.endswith(reason)


@pytest.mark.parametrize(
    "again",
    [
        ["good0.txt"],
        ["./good0.txt", "../in/good0.txt"],
        [""],
        ["link.txt"],
        ["hard.txt"],
        ["loop"],
    ],
)
def test_a_file_counts_once(here, made, again, monkeypatch):
    (here / "link.txt").symlink_to("good0.txt")
    os.link(here / "good1.txt", here / "hard.txt")
    (here / "loop").symlink_to(here)
    monkeypatch.chdir(here)
    code, out, _ = made(".", *(name or here for name in again))
    assert code == 0 and ": 3 documents" in out


def test_folders_behind_links_are_read(here, made, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/more.txt").write_text(TEXT)
    (here / "there").symlink_to(tmp_path / "elsewhere")
    assert ": 4 documents" in made(here)[1]


def test_no_token_of_its_tokenizer_goes_over_two_words(here, made, tmp_path):
    import tokenizers

    (here / "words.txt").write_text(TEXT)
    assert made(here, here / "words.txt")[0] == 0
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out.tokenizer.json"))
    parts = tokenizer.encode(TEXT + "na\u00efve").tokens
    assert len(parts) > 200 and not any("\u0120" in part[1:] for part in parts)
    assert tokenizer.decode(tokenizer.encode(TEXT + "na\u00efve").ids) == TEXT + "na\u00efve"


def test_a_named_file_is_read_whatever_its_ending(here, made, recwarn):
    (here / "page.html").write_text(TEXT)
    assert ": 4 documents" in made(here, here / "page.html")[1]
    assert not [w for w in recwarn if "one document" in str(w.message)]


def test_a_file_that_is_named_before_its_folder(here, made):
    assert ": 3 documents" in made(here / "good0.txt", here)[1]


def test_it_does_not_read_another_corpus(here, made):
    assert made(here, output="in/first")[0] == 0
    (here / "notes.json").write_text('{"a": "text of mine"}')
    code, out, _ = made(here)
    assert code == 0 and ": 4 documents" in out
    assert f"left out: 4 of another corpus (the first: {here / 'first.bin'})" in out


def test_lines_of_json_are_said_to_be_one_document(here, made):
    (here / "a.jsonl").write_text('{"text": "one"}\n' * 50)
    with pytest.warns(UserWarning, match="a.jsonl: read as one document.*preprocess_data.py"):
        code, out, _ = made(here, here / "a.jsonl")
    assert code == 0 and ": 4 documents" in out


def test_it_does_not_read_its_own_output(here, made, tmp_path):
    output = "in/out"
    first = made(here, output=output)
    assert ": 3 documents" in first[1]
    again = made(here, output=output, more=["--force"])
    assert again == first
    answer = made(here / "out.json", here, output=output, more=["--force"])
    refused(answer, "expected text from elsewhere", "which --output replaces")
    assert {path.name for path in here.iterdir()} >= {"out.bin", "out.idx", "out.json"}


@pytest.mark.parametrize(
    "more, message",
    [
        (["--vocab-size", "0"], "--vocab-size: expected at least 300"),
        (["--vocab-size", "-5"], "--vocab-size: expected at least 300"),
        (["--vocab-size", "299"], "--vocab-size: expected at least 300"),
        (["--vocab-size", str(2**20 + 1)], "--vocab-size: expected at most 1,048,576 token ids"),
        (["--vocab-size", str(2**20)], "expected as many ids as the text gives"),
        (["--vocab-size", str(10**23)], "--vocab-size: expected at most 1,048,576 token ids"),
        (["--vocab-size", "1e6"], "invalid int value: '1e6'"),
        (["--vocab-size", ""], "invalid int value: ''"),
        (["--vocab-size", "100000"], "expected as many ids as the text gives"),
        (["--output", ""], "--output: expected a prefix, got '.'"),
        (["--output", ".."], "--output: expected a prefix, got '..'"),
    ],
)
def test_values_that_make_no_sense(here, made, more, message):
    refused(made(here, more=more), message)


@pytest.mark.parametrize("inputs", [["--input"], ["--input", ""]])
def test_an_empty_list_is_not_the_standard_library(made, inputs):
    refused(made(more=inputs), "--input: expected")


def test_no_documents_at_all(tmp_path, made):
    (tmp_path / "empty").mkdir()
    refused(made(tmp_path / "empty"), "expected text files (", "got none in ")
    (tmp_path / "empty/a.html").write_text("x")
    refused(made(tmp_path / "empty"), "left out: 1 of other endings (the first: ")


@pytest.mark.parametrize("word", ["a", " ", "random"])
def test_one_endless_word_does_not_take_forever(here, made, word):
    letters = random.Random(0).choices("abcdefghij", k=200_000)
    (here / "long.txt").write_text("".join(letters) if word == "random" else word * 200_000)
    assert ": 4 documents" in made(here)[1]


def test_lines_marks_and_end_tokens_of_a_text(here, made, tmp_path):
    """A mark at the begin is no letter, a line ends as in Unix, "<|end|>" ends no document."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from tokenizers import Tokenizer

    for path in here.iterdir():
        path.unlink()
    (here / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode() + b"one\r\ntwo<|end|>three\rfour")
    (here / "b.txt").write_text(" ".join(f"{word}{i}" for i, word in enumerate(TEXT.split())))
    assert made(here)[0] == 0
    data, end = IndexedDataset(str(tmp_path / "out")), 299
    tokenizer = Tokenizer.from_file(str(tmp_path / "out.tokenizer.json"))
    texts = [tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) for ids in data]
    assert TEXT + "one\ntwo<|end|>three\nfour" in texts
    assert all(np.flatnonzero(ids == end).tolist() == [len(ids) - 1] for ids in data)
    assert json.loads((tmp_path / "out.json").read_text())["end_of_document"] == end


@pytest.mark.parametrize("letter", ["a", " "])
def test_pieces_of_an_endless_word(letter):
    text = letter * 2500 + "x y\n" + letter * 1000
    pieces = list(corpus._pieces(text))
    assert "".join(pieces) == text and list(map(len, pieces[:2])) == [1000, 1000]
    assert max(map(len, pieces)) <= 2000
    assert list(corpus._pieces("one two")) == ["one two"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_made_is_said(here, tmp_path, monkeypatch, seed):
    """The documents in the order of the seed, what PREFIX.json holds, and each step on the way."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from tokenizers import Tokenizer

    monkeypatch.setattr(corpus, "_BATCH", 2)
    prefix, steps = tmp_path / "new/out", []
    (here / "empty.txt").write_text("")
    (here / "more.txt").write_text(TEXT)
    assert not corpus.is_there(prefix)
    made = corpus.make(
        prefix, [here], vocab_size=300, seed=seed, progress=lambda *step: steps.append(step)
    )
    assert corpus.is_there(prefix) and corpus.vocab_size(prefix) == 300
    assert steps == [*((i, 10) for i in (1, 2, 3, 4, 5, 7, 9)), (10, 10)]
    order = sorted(here.iterdir())
    random.Random(seed).shuffle(order)
    data = IndexedDataset(str(prefix))
    tokenizer = Tokenizer.from_file(f"{prefix}.tokenizer.json")
    texts = [tokenizer.decode(ids[:-1].tolist()) for ids in data]
    assert texts == [path.read_text() for path in order if path.name != "empty.txt"]
    assert made.pop("left_out") == {"empty": (1, str(here / "empty.txt"))}
    assert (
        made
        == json.loads(prefix.with_name("out.json").read_text())
        == {
            "documents": 4,
            "tokens": sum(map(len, data)),
            "vocab_size": 300,
            "end_of_document": 299,
            "files": {
                ending: os.path.getsize(f"{prefix}{ending}")
                for ending in (".bin", ".tokenizer.json", ".idx")
            },
        }
    )


def test_what_make_has_written_is_known_again(here, tmp_path):
    prefix = tmp_path / "out"
    names = {ending: f"{prefix}{ending}" for ending in corpus.FILES}
    corpus.make(prefix, [here], vocab_size=300)
    assert corpus._as_made(prefix)
    written, summary = os.stat(names[".json"]).st_mtime_ns, json.loads(open(names[".json"]).read())
    os.utime(names[".bin"], ns=(written, written + 1))
    assert not corpus._as_made(prefix)
    os.utime(names[".bin"], ns=(written, written))
    assert corpus._as_made(prefix)
    for more in (-1, 1):
        os.truncate(names[".bin"], summary["files"][".bin"] + more)
        os.utime(names[".bin"], ns=(written, written))
        assert not corpus._as_made(prefix)
    os.unlink(names[".bin"])
    assert corpus._as_made(prefix)
    for content in ("", "{}", "[1]", '{"files": [1]}', '{"files": {}}', "[" * 100_000):
        open(names[".json"], "w").write(content)
        assert not corpus._as_made(prefix)
    os.unlink(names[".json"])
    assert not corpus._as_made(prefix)


def test_what_is_replaced_is_deleted_where_nobody_has_changed_it(here, tmp_path):
    (tmp_path / "to").mkdir()
    prefix, names = tmp_path / "to/out", {f"out{ending}" for ending in corpus.FILES}
    corpus.make(prefix, [here], vocab_size=300)
    corpus.make(prefix, [here], vocab_size=301, force=True)
    assert set(os.listdir(tmp_path / "to")) == names and corpus.vocab_size(prefix) == 301
    (tmp_path / "to/out.tokenizer.json").write_text("mine")
    with pytest.warns(UserWarning, match="old-1"):
        corpus.make(prefix, [here], vocab_size=300, force=True)
    kept = set(os.listdir(tmp_path / "to")) - names
    assert kept == {f"{name}.old-1" for name in names} and corpus.vocab_size(prefix) == 300
    assert (tmp_path / "to/out.tokenizer.json.old-1").read_text() == "mine"


def test_the_library_and_the_command_have_the_same_defaults():
    from megatron_tst.cli.corpus import parser

    options = vars(parser("corpus").parse_args(["--output", "x"]))
    of_make = {
        name: parameter.default
        for name, parameter in inspect.signature(corpus.make).parameters.items()
        if parameter.kind == inspect.Parameter.KEYWORD_ONLY and name != "progress"
    }
    assert of_make == {name: options[name] for name in of_make} and len(of_make) == 3


def test_each_folder_is_looked_at_once(here):
    """Two links that lead back would double the work at each of forty levels."""
    for name in ("one", "other"):
        (here / name).symlink_to(here)
    (here / "below").mkdir()
    (here / "below/up").symlink_to(here)
    (here / "below/a.txt").write_text("a")
    (here / "again").symlink_to(here / "below")
    found = list(itertools.islice(corpus._below(here, corpus.LeftOut()), 100))
    assert sorted(path.name for path in found) == ["a.txt", "good0.txt", "good1.txt", "good2.txt"]


def test_the_tokenizers_file_is_as_its_library_saves_it(here, made, tmp_path):
    from tokenizers import Tokenizer

    assert made(here)[0] == 0
    Tokenizer.from_file(str(tmp_path / "out.tokenizer.json")).save(str(tmp_path / "saved"))
    assert (tmp_path / "out.tokenizer.json").read_text() == (tmp_path / "saved").read_text()


def test_training_the_tokenizer_draws_no_bars_of_its_own(here, tmp_path):
    """Its library draws on a terminal alone."""
    terminal, side = os.openpty()
    kept = os.dup(2)
    try:
        os.dup2(side, 2)
        corpus.make(tmp_path / "out", [here], vocab_size=300)
        os.write(2, b"end")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    assert os.read(terminal, 10_000) == b"end"
    os.close(side)
    os.close(terminal)


def test_names_that_are_no_text(here, made):
    """The first by name is named."""
    for name in (b"\xff.csv", b"\xfe.csv"):
        (here / os.fsdecode(name)).write_text("x")
    code, out, _ = made(here)
    assert code == 0 and out.endswith(
        rf"; left out: 2 of other endings (the first: {here}/\udcfe.csv)"
    )


def test_how_many_ids_a_small_text_gives(tmp_path):
    """256 bytes, the merges "aa" and "aaaa", and the end of a document."""
    (tmp_path / "a.txt").write_text("aaaa")
    with pytest.raises(TSTError) as caught:
        corpus.make(tmp_path / "out", [tmp_path / "a.txt"], vocab_size=300)
    assert str(caught.value) == (
        "--vocab-size: expected as many ids as the text gives, got a text that is too small for "
        "300: it gives 259. Ask for fewer or add text."
    )


def test_what_megatron_warns_of_without_a_gpu_is_not_said(here, tmp_path, monkeypatch):
    """Its import warns, where it is the first in a process."""
    importing, found = builtins.__import__, []

    def warning(name, *rest):
        if name == "megatron.core.datasets.indexed_dataset":
            found.append(list(hidden))
            warnings.warn("Apex is not installed", stacklevel=2)
        return importing(name, *rest)

    hidden = []
    monkeypatch.setattr(
        corpus.compat, "hide_broken_transformer_engine", lambda: hidden.append("hidden")
    )
    monkeypatch.setattr(builtins, "__import__", warning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corpus.make(tmp_path / "out", [here], vocab_size=300)
    assert found and all(found)  # with a broken Transformer Engine the import would fail
