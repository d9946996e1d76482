"""JSON files that somebody else wrote: read whole and checked, or refused in one sentence.

read_json reads a file, entry takes one value out of what was read. Between them every way in which
such a file goes wrong ends as a TSTError that names the file, and the key where it is about one.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tst.errors import refuse

LARGEST = 1 << 30  # bytes; the largest tokenizers have some tens of millions
_SHOWN = 60  # characters of a wrong value in a message
_NAMES = {
    dict: "a JSON object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_REQUIRED = object()


def read_json(
    path: str | os.PathLike, kind: type = dict, do: str = "Copy the file again, or mend it."
) -> Any:
    """What a JSON file holds.

    A whole file of UTF-8 without a byte order mark is read, as transformers and tokenizers read it.
    NaN, Infinity and numbers that overflow to them are no JSON.

    Args:
        path: of a regular file, or a link to one.
        kind: of the outermost value: dict, list, str, int, float or bool.
        do: what the user can do where the file is refused, as a sentence.

    Returns:
        the value, of that kind.

    Raises:
        TSTError: no file, a folder or a FIFO in its place, not readable, empty, too large, not
            UTF-8, no JSON, nested too deeply for Python, or of another kind.
    """
    found = parse_json(_text(path, do), path, do)
    if not _is(found, kind):
        refuse(path, f"{_NAMES[kind]} in it", shown(found), do)
    return found


def parse_json(text: str, what: object, do: str = "Copy the file again, or mend it.") -> Any:
    """The value of a JSON text.

    Args:
        text: the JSON.
        what: the file or flag that it is from, for the message.
        do: as read_json's.

    Raises:
        TSTError: it is no JSON, or nested too deeply for Python.
    """

    def number(word):
        if not math.isfinite(value := float(word)):
            raise ValueError(f"{word[:_SHOWN]} is no finite number")
        return value

    try:
        return json.loads(text, parse_float=number, parse_constant=number)
    except RecursionError:
        refuse(what, "JSON", "lists or objects nested too deeply", do)
    except ValueError as error:  # json.JSONDecodeError, and int's for thousands of digits
        got = "an empty file" if not text.strip() else " ".join(str(error).split())
        refuse(what, "JSON", got, do)


def entry(
    found: Mapping[str, Any],
    key: str,
    kind: type | tuple[type, ...],
    path: object,
    *,
    default: Any = _REQUIRED,
    least: float | None = None,
    most: float | None = None,
    do: str = "Mend the file, or copy it again.",
) -> Any:
    """One value of a JSON object.

    Args:
        found: the object.
        key: whose value is asked for.
        kind: dict, list, str, int, float, bool, type(None), or several of them. A bool is no
            number. A whole number is also a float, and comes as one where int is not asked for.
        path: the file, for the message.
        default: what an absent key stands for; left out: it must be there.
        least, most: bounds of a number.
        do: what the user can do where it is refused, as a sentence.

    Returns:
        the value.

    Raises:
        TSTError: the key is absent, or its value of another kind or out of bounds.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = " or ".join(_NAMES[k] for k in kinds)
    what = f"{path}: {key}"
    if least is not None:
        names += f" of at least {least}"
    if most is not None:
        names += f" {'and' if least is not None else 'of'} at most {most}"
    if key not in found:
        if default is _REQUIRED:
            refuse(what, names, "no such key", do)
        return default
    value = found[key]
    if not any(_is(value, k) for k in kinds):
        refuse(what, names, shown(value), do)
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if numeric and not ((least is None or value >= least) and (most is None or value <= most)):
        refuse(what, names, shown(value), do)
    if numeric and isinstance(value, int) and int not in kinds:
        try:
            return float(value)
        except OverflowError:
            refuse(what, names, shown(value), do)
    return value


def shown(value: object) -> str:
    """A value of a JSON file as a message shows it: as JSON, cut where it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):  # a number of thousands of digits
        text = "what is too large to be shown"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _is(value, kind) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _text(path, do) -> str:
    try:
        # without waiting for a writer, where it is a FIFO
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        # a link may be there without its target
        got = "a link to nothing" if Path(path).is_symlink() else "no such file"
        refuse(path, "a JSON file", got, do)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        refuse(path, "a JSON file that can be read", getattr(error, "strerror", error), do)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            got = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            refuse(path, "a JSON file", got, do)
        if status.st_size > LARGEST:
            refuse(path, f"a JSON file of at most {LARGEST:,} bytes", f"{status.st_size:,}", do)
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read()
    except OSError as error:
        refuse(path, "a JSON file that can be read", error.strerror, do)
    finally:
        os.close(descriptor)
    if content.startswith(b"\xef\xbb\xbf"):
        refuse(path, "JSON in UTF-8", "a byte order mark before it", do)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        refuse(path, "JSON in UTF-8", f"byte {error.object[error.start]:#x} at {error.start}", do)
