"""What a question's config file holds (TOML), read and checked.

question    what is asked, one sentence                    expect     what to look at
time        measured or estimated, as text                 iterations of an arm of length 1
seeds       whole numbers; the same seed is the same       flags      Megatron's, for every arm
            initialisation and the same data for all arms
[[arm]]     the first one is what the others are compared with
  name      in the CSV and in figures                      tst        --tst flags; none: stock
  flags     Megatron's, for this arm alone                 length     times `iterations` (1)
  convert   options of `megatron-tst boundary`: the run exits at the boundary, is converted
            and goes on as stock Megatron
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path


class ConfigError(ValueError):
    """A mistake in a config file or on the command line; one line for the user."""


def refuse(what: object, expected: str, got: object, do: str) -> None:
    raise ConfigError(f"{what}: expected {expected}, got {got}. {do}")


@dataclass(frozen=True)
class Arm:
    """One way of training that a question compares."""

    name: str
    tst: str = ""
    flags: str = ""
    length: float = 1.0
    convert: str | None = None

    @property
    def folder(self) -> str:
        return "".join(c if c.isalnum() or c in ".-" else "_" for c in self.name.replace("=", ""))


@dataclass(frozen=True)
class Question:
    """A config file's content; `name` is the file's."""

    name: str
    question: str
    arms: tuple[Arm, ...]
    iterations: int = 1000
    seeds: tuple[int, ...] = (1, 2, 3)
    architecture: str = "gpt"
    flags: str = ""
    time: str = ""
    expect: str = ""
    path: Path | None = field(default=None, compare=False)


def load(path: Path) -> Question:
    """Read a config file.

    Raises:
        ConfigError: no such file, no TOML, unknown or missing entries, two arms of a name.
    """
    try:
        entries = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        refuse(
            path,
            "a TOML file",
            f"{type(error).__name__}: {error}",
            "Give a file of examples/experiments.",
        )
    arms = entries.pop("arm", [])
    for where, given, kind in (
        (path, entries, Question),
        *((f"{path}, arm {arm.get('name')}", arm, Arm) for arm in arms),
    ):
        known = set(kind.__dataclass_fields__) - {"name", "arms", "path"} | (
            {"name"} if kind is Arm else set()
        )
        if unknown := set(given) - known:
            refuse(
                where,
                f"entries of {', '.join(sorted(known))}",
                ", ".join(sorted(unknown)),
                "Correct the name.",
            )
    for where, given, needed in (
        (path, entries, "question"),
        *((path, arm, "name") for arm in arms),
    ):
        if needed not in given:
            refuse(
                where,
                f"an entry {needed!r}",
                f"only {', '.join(sorted(given)) or 'nothing'}",
                "Add it.",
            )
    names = [arm["name"] for arm in arms]
    if len(set(names)) != len(names) or not arms:
        refuse(
            path,
            "[[arm]] tables, each with a name of its own",
            ", ".join(names) or "none",
            "Name them apart.",
        )
    if any("convert" in arm and not arm.get("tst") for arm in arms):
        refuse(
            path,
            "'tst' beside 'convert'",
            "'convert' alone",
            "Say how the superposition phase is trained.",
        )
    entries["seeds"] = tuple(entries.get("seeds", (1, 2, 3)))
    return Question(name=path.stem, arms=tuple(Arm(**arm) for arm in arms), path=path, **entries)
