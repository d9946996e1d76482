"""JSON files that people really have: each that is none ends in one sentence that names it."""

import json
import os
from pathlib import Path

import pytest

from megatron_tst.errors import TSTError
from megatron_tst.json_file import entry, read_json, shown


def wrong(path):
    """name of a fault -> how the file gets it, and what is said"""
    deep = 200_000

    def put(content):
        return lambda: path.write_bytes(content)

    return {
        "absent": (lambda: None, "a JSON file, got no such file"),
        "a link to nothing": (lambda: path.symlink_to("nowhere"), "got a link to nothing"),
        "a link to itself": (lambda: path.symlink_to(path), "can be read, got Too many levels"),
        "a folder": (path.mkdir, "a JSON file, got a folder"),
        "a fifo": (lambda: os.mkfifo(path), "a JSON file, got no regular file"),
        "below a file": (lambda: path.symlink_to(f"{__file__}/x"), "got Not a directory"),
        "empty": (put(b""), "JSON, got an empty file"),
        "blank": (put(b" \n"), "JSON, got an empty file"),
        "cut": (put(b'{"a": [1, 2'), "JSON, got Expecting ',' delimiter: line 1 column 12"),
        "zeros": (put(bytes(100)), "JSON, got Expecting value"),
        "two": (put(b"{}{}"), "JSON, got Extra data"),
        "a list": (put(b"[1]"), r"a JSON object in it, got \[1\]"),
        "null": (put(b"null"), "a JSON object in it, got null"),
        "deep list": (put(b"[" * deep), "nested too deeply"),
        "deep object": (put(b'{"a":' * deep), "nested too deeply"),
        "nan": (put(b'{"a": NaN}'), "NaN is no finite number"),
        "infinity": (put(b'{"a": -Infinity}'), "-Infinity is no finite number"),
        "overflow": (put(b'{"a": 1e999}'), "1e999 is no finite number"),
        "digits": (put(b'{"a": ' + b"9" * 5000 + b"}"), "Exceeds the limit"),
        "latin 1": (put('{"a": "é"}'.encode("latin-1")), "JSON in UTF-8, got byte 0xe9 at 7"),
        "utf 16": (put('{"a": 1}'.encode("utf-16")), "JSON in UTF-8, got byte 0xff at 0"),
        "mark": (put(b"\xef\xbb\xbf{}"), "JSON in UTF-8, got a byte order mark before it"),
        "gzip": (put(b"\x1f\x8b\x08\x00"), "JSON in UTF-8, got byte 0x8b"),
        "a comment": (put(b'{"a": 1} // one'), "JSON, got Extra data"),
        "a comma": (put(b'{"a": 1,}'), "JSON, got"),
        "quotes": (put(b"{'a': 1}"), "JSON, got Expecting property name"),
    }


@pytest.mark.parametrize("fault", wrong(Path("x")))
def test_a_file_that_is_no_json_is_one_sentence(tmp_path, fault):
    path = tmp_path / "config.json"
    make, message = wrong(path)[fault]
    make()
    with pytest.raises(TSTError, match=message) as error:
        read_json(path, do="Do this.")
    text = str(error.value)
    assert text.startswith(f"{path}: expected ") and text.endswith(" Do this.")
    assert "\n" not in text and len(text) < 400


def test_what_is_read_is_what_was_written(tmp_path):
    path = tmp_path / "x.json"
    # a tokenizer_config.json's model_max_length is such a number
    for value in ({"a": int(1e30), "é": [None, True, 1.5]}, {}):
        path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
        assert read_json(path) == value
    (tmp_path / "link").symlink_to(path)
    assert read_json(tmp_path / "link") == {}
    path.write_text("[1]")
    assert read_json(path, list) == [1]


@pytest.mark.parametrize(
    "value, given, message",
    [
        ({}, dict(kind=int), "f: k: expected a whole number, got no such key"),
        ({"k": None}, dict(kind=int, default=3), "f: k: expected a whole number, got null"),
        ({"k": "32"}, dict(kind=int), 'f: k: expected a whole number, got "32"'),
        ({"k": True}, dict(kind=int), "f: k: expected a whole number, got true"),
        ({"k": 1}, dict(kind=bool), "f: k: expected true or false, got 1"),
        ({"k": 2.0}, dict(kind=int), "f: k: expected a whole number, got 2.0"),
        ({"k": 0}, dict(kind=int, least=1), "a whole number of at least 1, got 0"),
        ({"k": -4}, dict(kind=int, least=1), "a whole number of at least 1, got -4"),
        (
            {"k": 10**30},
            dict(kind=int, least=1, most=9),
            "a whole number of at least 1 and at most 9, got 1000",
        ),
        ({"k": 10**400}, dict(kind=float), "f: k: expected a number, got 1000"),
        ({"k": 10**5000}, dict(kind=float), "a number, got what is too large to be shown"),
        ({"k": [1]}, dict(kind=(str, type(None))), r"a text or null, got \[1\]"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_key(value, given, message):
    with pytest.raises(TSTError, match=message):
        entry(value, "k", path="f", **given)


def test_a_value_comes_as_what_was_asked_for():
    assert entry({}, "k", int, "f", default=None) is None
    one = entry({"k": 1}, "k", float, "f")
    assert one == 1.0 and type(one) is float
    assert type(entry({"k": 1}, "k", (int, float), "f")) is int
    assert entry({"k": None}, "k", (int, type(None)), "f") is None
    assert entry({"k": True}, "k", bool, "f") is True
    for value in (1, 9):  # both bounds are inside
        assert entry({"k": value}, "k", int, "f", least=1, most=9) == value


def test_a_long_value_is_shown_cut():
    assert shown("x" * 1000) == '"' + "x" * 59 + "..."
    nested = []
    for _ in range(200_000):
        nested = [nested]
    assert "too large" in shown(nested)
