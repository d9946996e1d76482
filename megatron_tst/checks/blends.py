"""Megatron's data arguments, read as Megatron reads them and refused where it would end in a
traceback (megatron/training/utils, get_blend_and_blend_per_split; core/datasets/utils.py).
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Sequence

from megatron_tst.errors import refuse
from megatron_tst.json_file import read_json, shown

Blend = tuple[list[str], list[float] | None]  # prefixes, and a weight for each or none at all
SPLITS = "train", "valid", "test"
_DO = "Give prefixes, or a weight above 0 and a prefix in turn."


def read_blends(args: argparse.Namespace) -> tuple[Blend | None, list[Blend | None] | None]:
    """The blend of all splits, or one for each split.

    Args:
        args: Megatron's, validated or not.

    Returns:
        (blend, None), or (None, blends of train, valid and test), or (None, None): no data.

    Raises:
        TSTError: naming the flag or file, and what is wrong in it.
    """

    def of(name):
        return getattr(args, name, None)

    files = of("data_args_path"), of("per_split_data_args_path")
    if any("://" in path for path in files if path):
        from megatron.training.utils import get_blend_and_blend_per_split

        return get_blend_and_blend_per_split(args)
    paths = [of(f"{split}_data_path") for split in SPLITS]
    given = [
        flag
        for flag, there in (
            ("--mock-data", of("mock_data")),
            ("--data-path", of("data_path") is not None),
            ("--data-args-path", of("data_args_path")),
            ("--per-split-data-args-path", of("per_split_data_args_path")),
            ("--train-data-path, --valid-data-path or --test-data-path", any(paths)),
        )
        if there
    ]
    if len(given) > 1:
        refuse("the data", f"{given[0]} alone", " and ".join(given), "Leave out all but one.")
    if of("data_path") is not None:
        return read_blend(of("data_path"), "--data-path"), None
    if path := of("data_args_path"):
        return read_blend(_words(path), f"--data-args-path {path}"), None
    if path := of("per_split_data_args_path"):
        return None, _per_split(path)
    if not any(paths):
        return None, None
    return None, [
        read_blend(words, f"--{split}-data-path") if words is not None else None
        for split, words in zip(SPLITS, paths)
    ]


def read_blend(words: Sequence[str | float], what: str) -> Blend:
    """A blend as Megatron takes it apart: prefixes, or weights and prefixes in turn.

    >>> read_blend(["30", "a", "70", "b"], "--data-path")
    (['a', 'b'], [30.0, 70.0])
    >>> read_blend(["a", "b", "c"], "--data-path")
    (['a', 'b', 'c'], None)

    Args:
        words: of the flag or file.
        what: the flag or file, for the message.

    Raises:
        TSTError: no words, weights for some prefixes alone, or a weight that is not above 0.
    """
    if not words:
        refuse(what, "a prefix", "none", _DO)
    text = " ".join(map(str, words))
    text = text if len(text) <= 200 else f"{text[:200]}..."
    no_corpus = [
        word
        for word in words
        if _number(word) is not None and not os.path.isfile(f"{word}.idx") and len(words) > 1
    ]
    weights = [_number(word) for word in words[::2]]
    if len(words) % 2 or set(weights) == {None}:
        if no_corpus:
            refuse(what, "a weight and a prefix in turn, or prefixes alone", text, _DO)
        return [str(word).strip() for word in words], None
    prefixes = [str(word) for word in words[1::2]]
    if None in weights or any(prefix in map(str, no_corpus) for prefix in prefixes):
        refuse(what, "a weight before each prefix, or before none", text, _DO)
    if not all(0 < weight < math.inf for weight in weights):
        refuse(what, "weights above 0", text, "Leave out what is not to be read.")
    return [prefix.strip() for prefix in prefixes], weights


def training_blend(
    args: argparse.Namespace, blend: Blend | None, per_split: Sequence[Blend | None] | None
) -> tuple[Blend, tuple[float, float]] | None:
    """The training data: a blend, and where its training split begins and ends, in [0, 1]; None
    of a run whose data are no indexed datasets.

    Args:
        args: Megatron's.
        blend, per_split: read_blends's.

    Raises:
        TSTError: nothing is left for training.
    """
    if per_split:
        if per_split[0] is None:
            got = [f"{split} alone" for split, part in zip(SPLITS, per_split) if part]
            refuse("the data of each split", "some for training", ", ".join(got), _DO)
        if getattr(args, "split", None) is not None:
            do = "It cuts the data of --data-path. Leave it out."
            refuse("--split with data of each split", "none", args.split, do)
        return per_split[0], (0.0, 1.0)
    if not blend:
        return None
    split = getattr(args, "split", None)
    if split is None and getattr(args, "data_path", None):
        split = "969, 30, 1"  # Megatron's default, with --data-path alone
    shares = [_number(share) for share in re.findall(r"[.0-9]+", split or "")]
    # Megatron takes the digits alone: 1 and 2 of 1e2
    wrong = None in shares or re.search(r"(^|,)\s*-|[A-Za-z]", split or "")
    if wrong or not (0 < len(shares) <= len(SPLITS) and shares[0] > 0):
        do = "Give the shares of training, validation and test, as 99,1,0."
        refuse("--split", "up to three numbers, the first above 0", split or "none", do)
    return blend, (0.0, shares[0] / sum(shares))


def _per_split(path):
    do = 'Write {"train": [...], "valid": [...], "test": null}, prefixes in each list.'
    found = read_json(path, do=do)
    if set(found) != set(SPLITS):
        refuse(path, f"the keys {', '.join(SPLITS)}", ", ".join(found) or "none", do)
    blends = []
    for split in SPLITS:
        words = found[split].split() if isinstance(found[split], str) else found[split]
        if words is None:
            blends.append(None)
            continue
        what = f"{split} in {path}"
        if not isinstance(words, list) or any(
            isinstance(word, bool) or not isinstance(word, (str, int, float)) for word in words
        ):
            refuse(what, "a list of prefixes, or null", shown(words), do)
        blends.append(read_blend(words, what))
    return blends


def _words(path):
    try:
        if not os.path.isfile(path):
            got = "a folder" if os.path.isdir(path) else "no such file"
            refuse(f"--data-args-path {path}", "a text file", got, _DO)
        with open(path, "rb") as file:
            return file.read().decode().split()
    except OSError as error:
        refuse(f"--data-args-path {path}", "a readable file", error.strerror, _DO)
    except UnicodeDecodeError:
        refuse(f"--data-args-path {path}", "text in UTF-8", "other bytes", _DO)


def _number(word) -> float | None:
    try:
        return float(word)
    except (ValueError, OverflowError):
        return None
