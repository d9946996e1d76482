"""Optimizers beside Adam and SGD: what Megatron needs for them, and would miss in a traceback only
when it builds the optimizer.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from megatron_tst.errors import refuse

_MEGATRON_S_OWN = "adam", "sgd"


def check_optimizer_choice(args: argparse.Namespace) -> None:
    """Refuse Muon and its like where they cannot be built.

    Args:
        args: Megatron's, validated.

    Raises:
        TSTError: the package is not there, or the precision is not one that they work in
            (megatron/core/optimizer/__init__.py, layer_wise_optimizer.py).
    """
    name = getattr(args, "optimizer", None)
    if name in (None, *_MEGATRON_S_OWN):
        return
    flag = f"--optimizer {name}"
    if find_spec("emerging_optimizers") is None:
        do = "Install it: pip install emerging-optimizers."
        refuse(flag, "the package emerging-optimizers", "none", do)
    if getattr(args, "fp16", False):
        refuse(flag, "--bf16 or fp32", "--fp16", "Megatron builds it for these alone.")
    in_layers = getattr(args, "use_layer_wise_distributed_optimizer", False)
    if in_layers and not getattr(args, "bf16", False):
        do = "Add --bf16, or leave the distributed optimizer out: --optimizer muon."
        refuse(f"{flag} with the distributed optimizer (or dist_muon)", "--bf16", "fp32", do)
