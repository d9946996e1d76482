"""Reading what a checkpoint holds: nothing is run, since a pickle can run anything and a checkpoint
can come from anywhere, and nothing is taken that its checksums contradict.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import io
import pickle
import pickletools
import signal
import warnings
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed.checkpoint import metadata

from megatron_tst.errors import refuse

_FOLDER = 0x10  # of MS-DOS, in a zip archive's attributes


class MetadataUnpickler(pickle.Unpickler):
    """Reads a checkpoint's .metadata: torch's metadata classes, sizes, dtypes, plain containers."""

    _NAMES = {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
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
        of_metadata = module == metadata.__name__ and isinstance(vars(metadata).get(name), type)
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if of_metadata or dtype or (module, name) in self._NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


def load_metadata(pickled: bytes) -> object:
    """Unpickle a checkpoint's .metadata.

    Raises:
        Exception: of any type, since a damaged pickle fails in many ways.
    """
    for operation, argument, _ in pickletools.genops(pickled):
        # the C unpickler allocates as many places as the largest number of one says
        if operation.name.endswith("PUT") and argument > len(pickled):
            raise pickle.UnpicklingError(f"an object that is numbered {argument}")
    return MetadataUnpickler(io.BytesIO(pickled)).load()


def check_archive(file: BinaryIO) -> None:
    """Hold an archive of torch.save against the checksums in it, which torch.load does not look at,
    and let torch's own reader find every record. Memory: a MiB.

    Args:
        file: open, at its beginning; left there.

    Raises:
        ValueError: what is wrong, as a phrase.
    """
    try:
        archive = zipfile.ZipFile(file)
        entries = archive.infolist()
        bad = archive.testzip()
        file.seek(0)
        torch._C.PyTorchFileReader(file).get_all_records()
    except Exception as error:  # a damaged archive fails in many ways
        text = str(error).strip().partition("\n")[0]
        raise ValueError(f"damage ({type(error).__name__}: {text})") from error
    # torch takes such a record for a folder, and leaves the memory for its values as it was
    if any(entry.external_attr & _FOLDER for entry in entries):
        raise ValueError("damage (a record that is marked as a folder)")
    if bad and not any(entry.CRC for entry in entries):
        raise ValueError("none of its checksums (torch.serialization.set_crc32_options)")
    if bad:
        raise ValueError(f"damage ({bad})")
    file.seek(0)


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
        if hasattr(file, "seek"):
            check_archive(file)
        else:
            with open(file, "rb") as opened:
                check_archive(opened)
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception as error:
        got = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
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
