"""Tested Megatron versions, and what stands between an install and an import."""

from __future__ import annotations

import importlib
import sys
import warnings

# What ran on each, and 0.20.0's commit: docs/patch_points.md.
TESTED_MEGATRON = ("0.18.2", "0.19.2", "0.20.0")


def megatron_version() -> str:
    """Megatron-Core's version, without the commit that it adds where its environment lies in a git
    checkout.
    """
    from megatron.core import __version__

    return __version__.split("+")[0]


def hide_broken_transformer_engine() -> None:
    """Let Megatron be imported beside a half-installed Transformer Engine.

    Without its torch part Transformer Engine raises AssertionError on import; Megatron catches
    ImportError alone (megatron/core/utils.py), so `import megatron.core` dies. A whole one, or
    none, is left as it is.
    """
    if "transformer_engine" in sys.modules:
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError:
        pass
    except Exception as error:  # whatever a broken install raises
        for name in [m for m in sys.modules if m.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]
        sys.modules["transformer_engine"] = None  # importing it is now a ModuleNotFoundError
        reason = str(error).strip().splitlines() or [""]
        warnings.warn(
            "megatron_tst: transformer_engine is installed but cannot be imported "
            f"({type(error).__name__}: {reason[0]}); going on without it. Install "
            "transformer-engine, its core and its torch part in one version, or none of them.",
            stacklevel=2,
        )
