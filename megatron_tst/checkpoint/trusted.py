"""Unpickling that runs nothing: a checkpoint can come from anywhere, a pickle can run anything."""

from __future__ import annotations

import argparse
import enum
import importlib
import pickle
import signal
import warnings
from pathlib import Path
from typing import BinaryIO

import torch

from megatron_tst.errors import refuse


class MetadataUnpickler(pickle.Unpickler):
    """Reads a checkpoint's .metadata: torch's metadata classes, sizes, dtypes, plain containers."""

    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = {
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("builtins", "set"),
        ("builtins", "frozenset"),
        ("torch._C", "_get_layout"),
        ("pathlib", "PosixPath"),
    }

    def find_class(self, module: str, name: str) -> type:
        """What pickle calls for every class or function that a pickle names.

        Raises:
            pickle.UnpicklingError: it has no place in a checkpoint's metadata.
        """
        of_metadata = module in self._MODULES and "." not in name
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if of_metadata or dtype or (module, name) in self._NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


def load_trusted(file: Path | BinaryIO, name: object = None) -> object:
    """torch.load of tensors, plain containers, argparse's Namespace and enumerations of Megatron's.
    Nothing else is unpickled.

    Args:
        file: a path or an open file.
        name: for messages; None: the file.

    Raises:
        TSTError: something else is in it, by its name, or it cannot be read.
    """
    name = name or file
    try:
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        refuse(name, "a readable torch.save", got, "The checkpoint is damaged.")
    allowed = []
    for full in asked:
        found = _argument_type(full)
        if found is None:
            expected = "tensors, plain values and Megatron's argument types"
            refuse(name, expected, full, "It is not unpickled, since that could run anything.")
        allowed.append(found)
    if hasattr(file, "seek"):
        file.seek(0)
    with torch.serialization.safe_globals(allowed):
        return torch.load(file, map_location="cpu", weights_only=True)


def _argument_type(full: str) -> type | None:
    """The class of this name if Megatron's arguments may hold it: Namespace, a signal, an
    enumeration or dtype; else None.
    """
    module, _, name = full.rpartition(".")
    known = {"argparse.Namespace": argparse.Namespace, "signal.Signals": signal.Signals}
    if full in known:
        return known[full]
    if module.split(".")[0] != "megatron":
        return None
    try:
        # of what Megatron does without a GPU's libraries: nothing is trained here
        with warnings.catch_warnings(action="ignore"):
            found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        do = "Use the Megatron that wrote it, or mend this one: `megatron-tst doctor`."
        got = f"{type(error).__name__}: {error}"
        refuse(full, "a type of the Megatron that is installed", got, do)
    return found if isinstance(found, type) and issubclass(found, enum.Enum) else None
