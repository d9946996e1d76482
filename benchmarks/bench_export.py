"""Memory and time of the export to Hugging Face at real shapes:

    python benchmarks/bench_export.py --shape moe-10b-a1b --folder DIR [--csv FILE]

Writes a checkpoint of the shape with made-up bf16 weights into DIR (the size of the weights, and as
much again for the export), exports it in a process of its own, and asks the kernel for that
process's peak resident memory. Both folders are removed. Shapes: Llama 3.2's 3B, and the paper's
(megatron_tst/planning/recipes.py).
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from measure import ROOT, append_rows, where

from megatron_tst.checkpoint.format import TRACKER
from megatron_tst.checkpoint.write import write_checkpoint
from megatron_tst.checks import dry_run
from megatron_tst.export.architectures import architecture_of
from megatron_tst.export.import_hf import arguments, items
from megatron_tst.model_size import LLAMA_3_VOCABULARY
from megatron_tst.planning import recipes

LLAMA_3B = "llama-3.2-3b"
_LLAMA_3B = dict(
    model_type="llama",
    vocab_size=LLAMA_3_VOCABULARY,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    rope_theta=500000.0,
    num_hidden_layers=28,
    hidden_size=3072,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=8192,
    tie_word_embeddings=True,
)


def config_of(shape: str) -> dict:
    """config.json of LLAMA_3B or of a recipe's model."""
    if shape == LLAMA_3B:
        return _LLAMA_3B
    flags = [flag for group in recipes.groups(shape).values() for flag in group]
    data = "--mock-data --tokenizer-type NullTokenizer --eval-iters 0".split()
    args = dry_run.validate([*flags, *data], 8, "h100")
    return architecture_of(args, LLAMA_3_VOCABULARY, "bfloat16").config


class MadeUp:
    """Hugging Face's tensors of a model that nobody trained: slices of one block of random bits, so
    that each differs.
    """

    def __init__(self):
        self._block, self._at = torch.randn(1 << 22, dtype=torch.bfloat16), 0

    def read(self, name, shape):
        numbers = torch.Size(shape).numel()
        self._at = (self._at + 4097) % self._block.numel()
        return (
            self._block.roll(self._at)
            .repeat(-(-numbers // self._block.numel()))[:numbers]
            .view(shape)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=(LLAMA_3B, *recipes.RECIPES), default=LLAMA_3B)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where there is space for the weights twice"
    )
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/data/export.csv")
    options = parser.parse_args()
    config = config_of(options.shape)
    args = arguments(config)
    arch = architecture_of(args, config["vocab_size"], "bfloat16")
    checkpoint, target = options.folder / "checkpoint", options.folder / "hf"
    try:
        (checkpoint / "release").mkdir(parents=True)
        write_checkpoint(
            checkpoint / "release", items(MadeUp(), arch, "local"), args, lambda done: None
        )
        (checkpoint / TRACKER).write_text("release")
        start = time.time()
        command = [
            sys.executable,
            "-m",
            "megatron_tst",
            "export-hf",
            str(checkpoint),
            str(target),
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, status
        size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        row = {
            "shape": options.shape,
            "weights_gb": round(size / 1e9, 2),
            "peak_resident_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
            "seconds": round(time.time() - start),
            **where(),
        }
    finally:
        for folder in (checkpoint, target):
            shutil.rmtree(folder, ignore_errors=True)
    csv.DictWriter(sys.stdout, row).writeheader()
    csv.DictWriter(sys.stdout, row).writerow(row)
    append_rows(options.csv, [row])


if __name__ == "__main__":
    main()
