"""Where tests and their processes import from: this checkout, whatever is installed."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = [str(ROOT)]
EVERYTHING = [
    str(ROOT / name)
    for name in ("", "tests", "tools", "examples", "examples/experiments", "benchmarks")
]


def environment(folders: list[str] = EVERYTHING, **changes: str) -> dict[str, str]:
    """This process's environment, for a child that imports from `folders` first."""
    rest = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    path = dict.fromkeys([*folders, *rest])  # each once, in order
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)} | changes
