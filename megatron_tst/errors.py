"""The exceptions of the package, and the one way to refuse. No torch."""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType
from typing import NoReturn


class TSTError(ValueError):
    """A mistake in how a run is set up or in a file that is handed in; its text is one line for the
    user.
    """


class PatchError(RuntimeError):
    """A seam is missing, has changed, or was replaced by somebody else; nothing was left half done."""


def refuse(what: object, expected: object, got: object, do: str) -> NoReturn:
    """Raise TSTError: "what: expected ..., got .... What to do." """
    raise TSTError(f"{what}: expected {expected}, got {got}. {do}")


def optional(module: str, install: str) -> ModuleType:
    """Import a module of a package that this one does without.

    Args:
        module: dotted name, "matplotlib.pyplot".
        install: what to give to pip, "megatron-tst[demo]".

    Raises:
        TSTError: it cannot be imported; the text says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        refuse(package, "an installed package", error, f"pip install '{install}'.")


def warn(text: str) -> None:
    """Warn once a job, on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(f"megatron_tst: {text}", stacklevel=3)
