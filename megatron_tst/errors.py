"""The exceptions of the package, the one way to refuse, and the one line that a run ends with. No
torch.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import NoReturn


class TSTError(ValueError):
    """A mistake in how a run is set up or in a file that is handed in; its text is one line for the
    user.
    """


class PatchError(RuntimeError):
    """A seam is missing, has changed, or was replaced by somebody else; all is left as it was."""


def refuse(what: object, expected: object, got: object, do: str) -> NoReturn:
    """Refuse a user's mistake.

    Args:
        what: the flag, file or setting that it is about.
        expected, got: what it was to be and what it is.
        do: what the user can do about it, as a sentence.

    Raises:
        TSTError: always, with the text "what: expected ..., got .... What to do."
    """
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


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line on stderr and exit code 2 on a TSTError or PatchError; let
    everything else through.

    Raises:
        SystemExit: in place of those two.
    """
    try:
        yield
    except (TSTError, PatchError) as error:
        rank = os.environ.get("RANK", "0")
        prefix = "megatron_tst: error: " if rank == "0" else f"megatron_tst: error on rank {rank}: "
        lines = str(error).strip().splitlines() or [""]
        # an error of a data-loading worker comes with the worker's traceback, its own text last
        text = lines[-1] if "Traceback" in str(error) else " ".join(lines)
        print(prefix + text, file=sys.stderr, flush=True)
        sys.exit(2)
