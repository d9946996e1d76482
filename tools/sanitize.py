"""Every kernel of the extension once, on small shapes: for compute-sanitizer (CUDA) or
AddressSanitizer (CPU), which make it slow.

compute-sanitizer python tools/sanitize.py                              on a GPU
tools/address_sanitizer.sh                                              on CPU
"""

from __future__ import annotations

import itertools
import sys

import torch

from megatron_tst import extension
from megatron_tst.ops.loss import multi_hot_cross_entropy


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = [(1, 1, 1), (3, 7, 2), (5, 1000, 16), (2, 20011, 3)]
    for (n, v, s), dtype, loss, inplace, margin in itertools.product(
        shapes,
        (torch.float32, torch.bfloat16, torch.float16),
        ("mce", "mce-alt"),
        (False, True),
        (0, 1),
    ):
        memory = torch.randn(n, v + margin, device=device).to(dtype)
        # the rows end where the memory does: one element too far is outside
        leaf = memory[:, margin:].detach().requires_grad_()
        labels = torch.randint(0, v, (n, s), device=device)
        labels[0, 0], labels[-1, -1] = -100, v - 1
        out = multi_hot_cross_entropy(
            leaf, labels, loss=loss, inplace_backward=inplace, kernel="extension"
        )
        out.sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"sanitize: {extension.load().description}; every kernel ran on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
