"""The tokenizer's files that go with an export: found, checked, counted and copied.

Three numbers differ: a model's rows, a tokenizer's tokens, and its largest id + 1. There may be
holes between ids, and a model may have more rows than ids (Qwen3: 151936 rows, 151669 ids). What
must hold is: largest id + 1 <= rows.
"""

from __future__ import annotations

import base64
import binascii
import shutil
from pathlib import Path

from megatron_tst.checkpoint.atomic import flushed, write_json
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.data.corpus import END
from megatron_tst.errors import TSTError, optional, refuse, warn
from megatron_tst.json_file import entry, parse_json, read_json, shown

_FAST, _PIECES, _SLOW = "tokenizer.json", "tokenizer.model", "vocab.json"
_SETTINGS, _ADDED, _SPECIAL = (
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
FILES = (
    _FAST,
    _PIECES,
    _SETTINGS,
    _SPECIAL,
    _SLOW,
    "merges.txt",
    _ADDED,
    "chat_template.jinja",
    "chat_template.json",
)
_TEXTS = {"merges.txt", "chat_template.jinja"}
# What ends a document where no tokenizer_config.json names it: GPT's and Qwen's, that of
# `megatron-tst corpus`, and those of usual sentencepiece tokenizers.
_ENDS = "<|endoftext|>", END, "<|end_of_text|>", "</s>", "<eos>"
_DO = "Give the run's tokenizer."


def tokenizer_of(source: Checkpoint, given: Path | None) -> tuple[list[Path], int | None]:
    """(files of the tokenizer, its largest id + 1); ([], None) and a warning where the run has none
    that can be found. The number is None too where the files do not say it (tiktoken's).

    Args:
        source: whose run's own tokenizer is its arguments' tokenizer_model, or lies in its folder
            `hf` (import_hf, nemo).
        given: --tokenizer, a tokenizer.json, a tokenizer.model or a folder with one; None: the
            run's own.

    Raises:
        TSTError: no tokenizer there, a file of it that is none, or its ids stand for other tokens
            than the run's own.
    """
    own = own_files(source)
    files = _files(given) if given else own
    if given and not _has_tokenizer(files):
        expected = "a tokenizer.json, a tokenizer.model or a folder with one"
        refuse("--tokenizer", expected, f"{given}: neither", _DO)
    if not files:
        warn(
            f"{source.path}: no tokenizer goes with it, since the run's own is not found: "
            "--tokenizer names one"
        )
    ours = check_files(files)
    if given and own and ours is not None:
        for token, number in (check_files(own) or {}).items():
            if ours.get(token) != number:
                expected = f"the run's own ids, {token!r} = {number}"
                refuse("--tokenizer", expected, ours.get(token), _DO)
    return files, None if ours is None else _size(ours)


def own_files(source: Checkpoint) -> list[Path]:
    """Files of the run's own tokenizer, where it can be found."""
    # the argument names nothing here for a name on the hub or a path of another machine
    for path in (getattr(source.args, "tokenizer_model", None), source.path / "hf"):
        files = _files(path) if path else []
        if _has_tokenizer(files):
            return files
    return []


def check_files(files: list[Path], rows: int | None = None) -> dict[str, int] | None:
    """Open each file of a tokenizer.

    Args:
        files: tokenizer_of's.
        rows: of the model's embedding; None: not asked.

    Returns:
        token -> id of the whole tokenizer, None where the files do not say it.

    Raises:
        TSTError: a file that is not what its name says, an id that the model has no row for, or
            settings that name an end token which the tokenizer does not have.
    """
    by_name = {}
    for file in files:
        if not file.is_file():
            got = "a folder" if file.is_dir() else "no regular file"
            refuse(file, "a tokenizer's file", got, _DO)
        by_name[_name_of(file)] = file
    objects = {
        name: read_json(file, do=_DO) for name, file in by_name.items() if name.endswith(".json")
    }
    for name in _TEXTS & by_name.keys():
        _check_text(by_name[name])
    # it is copied also where tokenizer.json counts
    tokens = _pieces(by_name[_PIECES]) if _PIECES in by_name else None
    if _FAST in by_name:
        tokens = _fast(by_name[_FAST])
    elif _SLOW in by_name and _PIECES not in by_name:
        tokens = _ids(objects[_SLOW], by_name[_SLOW])
    if tokens is None:
        return None
    # ids of tokenizer.json count before these, as transformers reads them
    for token, number in _added(objects, by_name).items():
        tokens.setdefault(token, number)
    if not tokens:
        refuse(files[0], "a tokenizer with tokens", "none", _DO)
    if rows is not None and _size(tokens) > rows:
        expected = f"ids below the model's {rows} rows"
        token = max(tokens, key=tokens.get)
        refuse(files[0], expected, f"{token!r} = {tokens[token]}", "It is of another model.")
    _end(files, tokens)
    return tokens


def check_end_ids(found: dict, path: Path, rows: int) -> None:
    """Hold the end tokens that a model's file names against its rows: one beyond them never comes,
    and generation would not stop.

    Args:
        found: what `path`, a config.json or generation_config.json, holds.
        rows: of the model's embedding.

    Raises:
        TSTError: an end token that is no id of the model.
    """
    ends = found.get("eos_token_id")
    for number in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < rows:
            what, expected = f"{path}: eos_token_id", f"ids below the model's {rows} rows"
            refuse(what, expected, shown(number), "Mend the file: generation would never stop.")


def end_of_text(files: list[Path]) -> int | None:
    """The id that ends a document; None and a warning where the tokenizer has none.

    Args:
        files: tokenizer_of's.

    Raises:
        TSTError: the tokenizer's settings name a token that it does not have.
    """
    tokens = check_files(files)
    if tokens is None:
        return None
    name = _end(files, tokens)
    if name is None:
        warn(
            f"{files[0]}: no end token is found, so generation does not stop by itself: name its "
            f"eos_token in {_SETTINGS}"
        )
    return tokens.get(name)


def write_tokenizer(folder: Path, files: list[Path]) -> None:
    """Copy the files into a folder from which transformers.AutoTokenizer makes a tokenizer."""
    for file in files:
        with open(file, "rb") as source:
            copy = folder / _name_of(file)
            flushed(copy, lambda out, source=source: shutil.copyfileobj(source, out))
    if (folder / _FAST).exists() and not (folder / _SETTINGS).exists():
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if end := _end(files, check_files(files) or {}):
            settings["eos_token"] = end
        write_json(folder / _SETTINGS, settings)


def _files(path) -> list[Path]:
    path = Path(path)
    if path.is_dir():
        return [path / name for name in FILES if (path / name).exists()]
    return [path] if path.exists() and _name_of(path) in FILES else []


def _name_of(file: Path) -> str:
    """The name that transformers looks for, of a file that is named alone (PREFIX.tokenizer.json,
    a sentencepiece model of any name).
    """
    if file.name in FILES:
        return file.name
    return {".json": _FAST, ".model": _PIECES}.get(file.suffix, file.name)


def _has_tokenizer(files) -> bool:
    return any(_name_of(file) in (_FAST, _PIECES, _SLOW) for file in files)


def _size(tokens) -> int:
    """Largest id + 1."""
    return max(tokens.values()) + 1


def _end(files, tokens) -> str | None:
    for name in (_SETTINGS, _SPECIAL):
        for file in files:
            if _name_of(file) != name:
                continue
            kinds = (str, dict, type(None))
            found = entry(read_json(file, do=_DO), "eos_token", kinds, file, default=None)
            if isinstance(found, dict):
                found = entry(found, "content", str, f"{file}: eos_token")
            if found is not None and found not in tokens:
                do = "Save the tokenizer again with transformers' save_pretrained."
                refuse(f"{file}: eos_token", "a token of the tokenizer", shown(found), do)
            if found is not None:
                return found
    return next((name for name in _ENDS if name in tokens), None)


def _check_text(file):
    try:
        file.read_bytes().decode()
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#x} at {error.start}"
        refuse(file, "text in UTF-8", got, _DO)


def _fast(file) -> dict[str, int]:
    tokenizers = optional("tokenizers", "megatron-tst[hf]")
    try:
        return tokenizers.Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises a bare Exception
        what = " ".join(str(error).split())
        raise TSTError(f"{file}: expected a tokenizer.json, got {what}. {_DO}") from error


def _ids(found, path) -> dict[str, int]:
    return {token: entry(found, token, int, path, least=0, most=1 << 31) for token in found}


def _added(objects, by_name) -> dict[str, int]:
    added = _ids(objects.get(_ADDED, {}), by_name.get(_ADDED))
    settings, path = objects.get(_SETTINGS, {}), by_name.get(_SETTINGS)
    decoder = entry(settings, "added_tokens_decoder", dict, path, default={})
    for key in decoder:
        what = f"{path}: added_tokens_decoder"
        token = entry(entry(decoder, key, dict, what), "content", str, f"{what}: {key}")
        number = parse_json(key, what)
        added.setdefault(token, entry({key: number}, key, int, what, least=0, most=1 << 31))
    return added


def _pieces(file) -> dict[str, int] | None:
    """Tokens of a tokenizer.model: sentencepiece's, or tiktoken's, whose special tokens are not in
    the file.
    """
    content = file.read_bytes()
    try:
        pieces = [piece for piece in _fields(content) if piece is not None]
        found = [next(filter(None, _fields(piece)), b"").decode() for piece in pieces]
        if found:
            return {piece: number for number, piece in enumerate(found)}
    except (IndexError, ValueError):
        pass
    try:
        lines = [line.split() for line in content.splitlines()]
        if lines and all(base64.b64decode(a, validate=True) and int(b) >= 0 for a, b in lines):
            return None
    except (ValueError, binascii.Error):
        pass
    return refuse(file, "a sentencepiece model or a tiktoken vocabulary", "neither", _DO)


def _fields(content):
    """Of a protobuf message the values of field 1 that are messages or texts, None for others.

    sentencepiece's ModelProto has a message for each piece in field 1, with its text in field 1.
    """
    at = 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte, at = content[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(content):
        field, wire = divmod(number(), 8)
        if wire == 0:
            number()
            yield None
            continue
        size = {1: 8, 5: 4}.get(wire)
        size = number() if wire == 2 else size
        if size is None or not field or at + size > len(content):
            raise ValueError("no protobuf message")
        yield content[at : at + size] if (field, wire) == (1, 2) else None
        at += size
