"""Token-Superposition Training (TST, arXiv 2605.06546) for Megatron-Core.

Importing this package imports neither torch nor Megatron and patches nothing; each public name is
loaded on first use.

On a machine without a GPU set MEGATRON_TST_CPU=1 and call `megatron_tst.cpu.enable_if_asked()`
before the first import of megatron. Recovery is stock code: its batches have no bag dimension
(`PhasedDataset` gives such, `bag_view` says how).
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "apply": "loop.patch",
    "remove": "loop.patch",
    "status": "loop.patch",
    "TSTConfig": "config",
    "TSTError": "errors",
    "Schedule": "schedule",
    "PhasedDataset": "data.dataset",
    "bag_view": "data.bags",
    "target_weights": "ops.loss",
    "multi_hot_cross_entropy": "ops.loss",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'megatron_tst' has no attribute {name!r}")
    return getattr(import_module(f"megatron_tst.{_HOME[name]}"), name)


def __dir__():
    return sorted(__all__)
