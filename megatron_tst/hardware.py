"""GPU kinds, and what each low-precision recipe asks of a GPU and of shapes. No torch.

Everything that compares a machine with a recipe reads this file: the refusals before training, the
planner, the dry run, the doctor, the benchmarks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """A kind of GPU.

    Args:
        peak_tflops: dense bf16, TFLOP/s, of the SXM card by the vendor's data sheet.
        capability: compute capability, (major, minor).
    """

    peak_tflops: float
    capability: tuple[int, int]


GPUS = {
    "h100": GPU(989.4, (9, 0)),
    "h200": GPU(989.4, (9, 0)),
    "b200": GPU(2250.0, (10, 0)),
}
ASSUMED_CUDA = "13.0"  # torch's CUDA version where there is no GPU to ask


@dataclass(frozen=True)
class LowPrecision:
    """What an FP8 or FP4 recipe of Transformer Engine asks for.

    Args:
        lowest: compute capability from which it runs.
        too_new: the first compute capability on which it does not run; None: all newer ones do.
        cuda: lowest CUDA version; None: any.
        tokens: what the tokens of a rank must be a multiple of. They are a GEMM's M, and its K in
            the gradient of the weights: 16 values, or the scale's block.
        widths: what the widths of a rank's weights must be a multiple of.
        faster_tokens: multiple of the tokens at which blocks are whole; 1: no such thing.
    """

    lowest: tuple[int, int]
    too_new: tuple[int, int] | None = None
    cuda: tuple[int, int] | None = None
    tokens: int = 16
    widths: int = 16
    faster_tokens: int = 1


# Transformer Engine 2.20, transformer_engine/pytorch/quantization.py. Names are Megatron's
# --fp8-recipe, and nvfp4 for --fp4-format.
LOW_PRECISION = {
    "delayed": LowPrecision((8, 9)),
    "tensorwise": LowPrecision((8, 9)),
    "blockwise": LowPrecision((9, 0), cuda=(12, 9), widths=128, faster_tokens=128),
    "mxfp8": LowPrecision((10, 0), too_new=(12, 0), tokens=32, widths=32),
    "nvfp4": LowPrecision((10, 0), faster_tokens=128),
}


def recipes(capability: Sequence[int], cuda: str | None) -> list[str]:
    """The recipes that run on a GPU of this compute capability with torch's CUDA version."""
    return [recipe for recipe in LOW_PRECISION if not why_not(recipe, capability, cuda)]


def why_not(recipe: str, capability: Sequence[int], cuda: str | None) -> str | None:
    """What the recipe needs, as "sm_90 or newer with CUDA 12.9", where this GPU or CUDA is not it;
    None where it runs.
    """
    needs = LOW_PRECISION[recipe]
    version = tuple(int(part) for part in re.findall(r"\d+", cuda or "0")[:2])
    if (
        tuple(capability) >= needs.lowest
        and not (needs.too_new and tuple(capability) >= needs.too_new)
        and not (needs.cuda and version < needs.cuda)
    ):
        return None
    below = ", below sm_{}{}".format(*needs.too_new) if needs.too_new else ""
    with_cuda = " with CUDA {}.{}".format(*needs.cuda) if needs.cuda else ""
    return "sm_{}{} or newer".format(*needs.lowest) + below + with_cuda
