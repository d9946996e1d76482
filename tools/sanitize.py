"""Every kernel of the extension once, on small shapes: for compute-sanitizer (CUDA) or
AddressSanitizer (CPU), which make it slow.

    python tools/sanitize.py --under memcheck       on a GPU; also racecheck, synccheck, initcheck
    tools/address_sanitizer.sh                      on CPU

--under starts compute-sanitizer over this program and judges what it says: exit code 0 only where
it saw the kernels run and found nothing. Without a GPU, --rehearse runs the kernels alone.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys

import check_kernels
import torch

from megatron_tst import extension
from megatron_tst.ops.loss import multi_hot_cross_entropy

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SHAPES = [(1, 1, 1), (3, 7, 2), (5, 1000, 16), (2, 20011, 3)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--under", choices=TOOLS, help="start it under compute-sanitizer")
    parser.add_argument("--rehearse", action="store_true", help="--under without the sanitizer")
    parser.add_argument("--few", action="store_true", help="the smaller shapes, out of place")
    options = parser.parse_args(argv)
    if options.under:
        return under(options.under, options.rehearse)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    losses(device, options.few)
    embeddings(device, options.few)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"sanitize: {extension.load().description}; every kernel ran on {device}")
    return 0


def losses(device: str, few: bool) -> None:
    for (n, v, s), dtype, loss, inplace, margin in itertools.product(
        SHAPES[1:3] if few else SHAPES,
        (torch.float32, torch.bfloat16, torch.float16),
        ("mce", "mce-alt"),
        (False,) if few else (False, True),
        (1,) if few else (0, 1),
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


def embeddings(device: str, few: bool) -> None:
    check_kernels.a_group_of_one()
    for (length, s, v, h), dtype in itertools.product(
        [(7, 3, 5, 24)] if few else [(1, 1, 1, 8), (7, 3, 5, 24), (70, 16, 90, 1032)],
        (torch.float32, torch.bfloat16, torch.float16),
    ):
        ids = torch.randint(0, v, (2, length, s), device=device)
        ids[0, 0, 0], ids[-1, -1, -1] = 0, v - 1
        table = torch.randn(v, h, device=device).to(dtype)
        out, _ = check_kernels.embed(table, ids, torch.zeros(v, h, device=device))
        out.sum().backward()


def under(tool: str, rehearse: bool) -> int:
    """This program once more, under a tool of compute-sanitizer."""
    few = ["--few"] if tool == "racecheck" else []  # the slowest of them
    command = [sys.executable, __file__, *few]
    if not rehearse:
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not os.path.exists(sanitizer):
            print(
                "sanitize: error: expected compute-sanitizer of the CUDA toolkit, got none. Put "
                "its folder into PATH.",
                file=sys.stderr,
            )
            return 2
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *command]
    # each tensor a piece of memory of its own: what is outside one is outside all
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = []
    for line in process.stdout:
        said.append(line)
        print(line, end="", flush=True)
    fault = judge(process.wait(), "".join(said), rehearse)
    print(f"sanitize: {tool}: {fault or ('REHEARSED' if rehearse else 'clean')}")
    return 1 if fault else 0


def judge(code: int, said: str, rehearsed: bool = False) -> str | None:
    """What is wrong with a run under a tool; None: nothing."""
    if code:
        return f"FAILED, exit code {code}"
    if "every kernel ran on" not in said:
        return "FAILED, the kernels did not run to the end"
    if rehearsed:
        return None
    if "every kernel ran on cuda" not in said:
        return "FAILED, no CUDA kernel ran"
    found = re.findall(r"^=+ \w* ?SUMMARY: (\d+)", said, re.M)
    if not found:
        return "FAILED, the sanitizer says nothing of its findings"
    return f"FAILED, {found}" if any(map(int, found)) else None


if __name__ == "__main__":
    sys.exit(main())
