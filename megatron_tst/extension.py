"""The C++/CUDA extension: whether it is there, what it holds, and if not, why."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass

KERNELS = ("auto", "extension", "torch")


@dataclass(frozen=True)
class Extension:
    """What was found.

    Args:
        loaded: whether torch.ops.megatron_tst.* are registered.
        cuda: whether the CUDA kernels are among them.
        description: one line for a log.
    """

    loaded: bool
    cuda: bool
    description: str


@functools.cache
def load() -> Extension:
    """Import the extension once; never raises."""
    import torch

    try:  # `from megatron_tst import _C` would not say that there is none
        _C = importlib.import_module("megatron_tst._C")
    except ModuleNotFoundError:
        return Extension(
            False,
            False,
            "not built. `pip install --no-build-isolation` this package; what it prints says why",
        )
    except Exception as error:  # built for another torch: undefined symbols, missing libraries
        why = f"built but not loadable with torch {torch.__version__} ({error}). Build it again"
        return Extension(False, False, why)
    if _C.torch_version != torch.__version__.split("+")[0]:
        why = f"built with torch {_C.torch_version}, this is torch {torch.__version__}. Build it"
        return Extension(False, False, f"{why} again")
    cuda = _C.cuda_architectures
    kernels = f"CUDA kernels for {cuda}" if cuda else "no CUDA kernels"
    return Extension(True, bool(cuda), f"CPU kernels, {kernels}")


def choose(kernel: str, device: str) -> str:
    """Which kernel a request gets.

    Args:
        kernel: "auto", "extension" or "torch".
        device: torch's device type, "cpu" or "cuda".

    Returns:
        "extension" or "torch".

    Raises:
        ValueError: the extension is asked for and cannot run there.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {kernel!r}.")
    if kernel == "torch":
        return "torch"
    extension = load()
    fits = extension.loaded and (device in ("cpu", "meta") or (device == "cuda" and extension.cuda))
    if fits:
        return "extension"
    if kernel == "extension":
        raise ValueError(
            f"kernel 'extension': expected the extension's {device} kernels, got an extension that "
            f"is {extension.description}. Or ask for kernel 'auto' or 'torch'."
        )
    return "torch"


if __name__ == "__main__":
    print(f"megatron_tst extension: {load().description}")
