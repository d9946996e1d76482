"""Megatron's data arguments: read as Megatron reads them, and what would end in its traceback is
refused in one sentence.
"""

import argparse
import json

import pytest

from megatron_tst.checks.blends import read_blend, read_blends, training_blend
from megatron_tst.errors import TSTError


def arguments(**given):
    names = "data_path", "train_data_path", "valid_data_path", "test_data_path"
    files = "data_args_path", "per_split_data_args_path", "split"
    return argparse.Namespace(**dict.fromkeys((*names, *files)) | given)


@pytest.mark.parametrize(
    "given",
    [
        dict(data_path=["a"]),
        dict(data_path=["a", "b"]),
        dict(data_path=["0.3", "a", "7", "b"]),
        dict(data_path=["1e-3", "a"]),
        dict(data_path=["a", "b", "c"]),
        dict(data_path=["2024"]),
        dict(train_data_path=["a", "b"], valid_data_path=["1", "c", "2", "d"]),
        dict(train_data_path=["a"], test_data_path=["b"]),
        dict(),
    ],
)
def test_what_is_right_is_read_as_by_megatron(given):
    from megatron.training.utils import get_blend_and_blend_per_split

    args = arguments(**given)
    assert read_blends(args) == get_blend_and_blend_per_split(args)


@pytest.mark.parametrize(
    "content",
    [
        {"train": ["a"], "valid": ["b", "c"], "test": None},
        {"train": [0.3, "a", 0.7, "b"], "valid": "1 c 2 d", "test": None},
        {"train": "a", "valid": None, "test": ["d"]},
    ],
)
def test_files_are_read_as_by_megatron(tmp_path, content):
    from megatron.training.utils import get_blend_and_blend_per_split

    (tmp_path / "splits.json").write_text(json.dumps(content))
    (tmp_path / "words").write_text("0.3 a\n0.7  b\n")
    for given in (
        dict(per_split_data_args_path=str(tmp_path / "splits.json")),
        dict(data_args_path=str(tmp_path / "words")),
    ):
        args = arguments(**given)
        assert read_blends(args) == get_blend_and_blend_per_split(args)


def test_a_corpus_may_have_a_number_for_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("2023", "2024"):
        (tmp_path / f"{name}.idx").write_text("")
    assert read_blend(["0.3", "2023", "0.7", "2024"], "") == (["2023", "2024"], [0.3, 0.7])
    assert read_blend(["2023", "2024", "a"], "") == (["2023", "2024", "a"], None)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--data-path: expected a prefix, got none"),
        (["0", "a", "0", "b"], "expected weights above 0, got 0 a 0 b. Leave out what is not"),
        (["1", "a", "0", "b"], "weights above 0"),
        (["1", "a", "-1", "b"], "weights above 0"),
        (["nan", "a", "1", "b"], "weights above 0"),
        (["inf", "a", "1", "b"], "weights above 0"),
        (["1", "a", "x", "b"], "expected a weight before each prefix, or before none, got 1 a x b"),
        (["a", "1", "b", "2"], "expected a weight and a prefix in turn, or prefixes alone"),
        (["1", "a", "2"], "expected a weight and a prefix in turn"),
        (["1", "2", "3", "a"], "expected a weight before each prefix"),
        (["1", "2"], "expected a weight before each prefix"),
    ],
)
def test_blends_that_are_none(words, message):
    with pytest.raises(TSTError, match=message):
        read_blend(words, "--data-path")


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"train": ["a"], "valid": ["b"]', "splits.json: expected JSON, got .*delimiter"),
        ("", "expected JSON, got an empty file"),
        ('["a"]', "expected a JSON object in it"),
        ('{"training": ["a"], "valid": null, "test": null}', "keys train, valid, test, got trai"),
        ('{"train": ["a"]}', "expected the keys train, valid, test, got train"),
        ("{}", "got none"),
        (
            '{"train": ["a"], "valid": null, "test": null, "more": null}',
            "got train, valid, test, m",
        ),
        ('{"train": 7, "valid": null, "test": null}', "train in .*: expected a list of prefixes"),
        ('{"train": [["a"]], "valid": null, "test": null}', "expected a list of prefixes, or null"),
        ('{"train": [true], "valid": null, "test": null}', "expected a list of prefixes"),
        ('{"train": [], "valid": null, "test": null}', "train in .*: expected a prefix, got none"),
        ('{"train": ["a"], "valid": [0, "a"], "test": null}', "valid in .*weights above 0"),
        ('{"train": [1e999, "a"], "valid": null, "test": null}', "finite"),
        ("[" * 100000, "nested too deeply"),
        (b"\xff\xfe{", "UTF-8"),
        ("", r'an empty file\. Write {"train": \[\.\.\.\], "valid": '),
    ],
)
def test_files_of_splits_that_are_none(tmp_path, content, message):
    file = tmp_path / "splits.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TSTError, match=message) as caught:
        read_blends(arguments(per_split_data_args_path=str(file)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", ["data_args_path", "per_split_data_args_path"])
@pytest.mark.parametrize("place", ["missing", "folder"])
def test_files_that_are_not_there(tmp_path, flag, place):
    (tmp_path / "folder").mkdir()
    with pytest.raises(TSTError, match=f"{place}: expected a .* file, got (a folder|no such file)"):
        read_blends(arguments(**{flag: str(tmp_path / place)}))
    got = {"missing": "no such file", "folder": "a folder"}[place]
    with pytest.raises(TSTError, match=f"file, got {got}"):
        read_blends(arguments(**{flag: str(tmp_path / place)}))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "words").write_bytes(b"\xff\xfe a")
    with pytest.raises(TSTError, match="words: expected text in UTF-8, got other bytes"):
        read_blends(arguments(data_args_path=str(tmp_path / "words")))


def test_one_way_to_name_data_alone():
    with pytest.raises(TSTError, match="the data: expected --data-path alone, got --data-path and"):
        read_blends(arguments(data_path=["a"], data_args_path="words"))
    with pytest.raises(TSTError, match="got --data-path and --train-data-path, --valid"):
        read_blends(arguments(data_path=["a"], train_data_path=["b"]))
    with pytest.raises(TSTError, match="got --per-split-data-args-path and --train-data-path"):
        read_blends(arguments(per_split_data_args_path="x", valid_data_path=["b"]))


@pytest.mark.parametrize(
    "split, share",
    [("99,1,0", 0.99), ("969, 30, 1", 0.969), ("1", 1.0), ("8,2", 0.8), (None, 0.969)],
)
def test_the_training_share_is_megatrons(split, share):
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    args = arguments(data_path=["a"], split=split)
    blend, place = training_blend(args, *read_blends(args))
    assert blend == (["a"], None) and place == pytest.approx((0.0, share))
    vector = parse_and_normalize_split(split or "969, 30, 1")
    assert place == convert_split_vector_to_split_matrix(vector)[0]


@pytest.mark.parametrize(
    "split", ["0,50,50", "", "abc", "0", "1,2,3,4", "-1,2,3", "1.2.3,4", "nan,1,1", "1e2,1,1"]
)
def test_splits_without_training(split):
    args = arguments(data_path=["a"], split=split)
    with pytest.raises(TSTError, match="--split: expected up to three numbers, the first above 0"):
        training_blend(args, *read_blends(args))


def test_data_without_any_for_training():
    args = arguments(valid_data_path=["a"], test_data_path=["b"])
    with pytest.raises(TSTError, match="expected some for training, got valid alone, test alone"):
        training_blend(args, *read_blends(args))
    args = arguments(train_data_path=["a"], split="99,1,0")
    with pytest.raises(TSTError, match="--split with data of each split: expected none, got 99"):
        training_blend(args, *read_blends(args))
    assert training_blend(arguments(), None, None) is None


def test_a_run_without_data_flags_has_none():
    assert read_blends(argparse.Namespace()) == (None, None)
    assert read_blends(argparse.Namespace(mock_data=True)) == (None, None)
    with pytest.raises(TSTError, match="expected --mock-data alone, got --mock-data and --data-p"):
        read_blends(arguments(mock_data=True, data_path=[]))
    with pytest.raises(TSTError, match="got --data-args-path and --per-split-data-args-path"):
        read_blends(arguments(data_args_path="a", per_split_data_args_path="b"))


@pytest.mark.parametrize("flag", ["data_args_path", "per_split_data_args_path"])
def test_a_list_in_object_storage_is_megatrons_to_read(monkeypatch, flag):
    from megatron.training import utils

    args = arguments(**{flag: "msc://bucket/list"})
    monkeypatch.setattr(utils, "get_blend_and_blend_per_split", lambda given: given)
    assert read_blends(args) is args


@pytest.mark.parametrize("letters", [200, 201])
def test_a_long_list_is_shown_by_its_first_200_letters(letters):
    words = ["1", "a", "0", "b" * (letters - len("1 a 0 "))]
    cut = "" if letters == 200 else "..."
    with pytest.raises(TSTError) as caught:
        read_blend(words, "--data-path")
    assert str(caught.value) == (
        f"--data-path: expected weights above 0, got {' '.join(words)[:200]}{cut}. "
        "Leave out what is not to be read."
    )


def test_spaces_around_a_prefix_do_not_count():
    """As Megatron's get_blend_from_list."""
    assert read_blend([" a", "b "], "") == (["a", "b"], None)
    assert read_blend(["1", " a", "2", "b "], "") == (["a", "b"], [1.0, 2.0])


def test_a_file_that_cannot_be_read():
    with pytest.raises(TSTError) as caught:  # a file whose first byte nobody may read
        read_blends(arguments(data_args_path="/proc/self/mem"))
    assert str(caught.value) == (
        "--data-args-path /proc/self/mem: expected a readable file, got Input/output error. "
        "Give prefixes, or a weight above 0 and a prefix in turn."
    )


def test_a_share_without_a_default():
    """Megatron has one of --data-path alone."""
    blend = ["a"], None
    for args in (arguments(), argparse.Namespace()):
        with pytest.raises(TSTError) as caught:
            training_blend(args, blend, None)
        assert str(caught.value) == (
            "--split: expected up to three numbers, the first above 0, got none. "
            "Give the shares of training, validation and test, as 99,1,0."
        )
    per_split = [blend, None, None]
    assert training_blend(argparse.Namespace(), None, per_split) == (blend, (0.0, 1.0))
