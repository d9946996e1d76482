"""Memory and time of the export to Hugging Face at real shapes: python benchmarks/bench_export.py
--shape 10b-a1b --folder DIR [--csv FILE]

Writes a checkpoint of the shape with made-up bf16 weights into DIR (the size of the weights, and as
much again for the export), exports it in a process of its own, and asks the kernel for that
process's peak resident memory. Both folders are removed.

    3b        Llama: 28 layers x 3072, 24 heads, 8 of keys and values, MLP of 8192
    10b-a1b   Qwen3-MoE: 24 layers x 2048, 64 experts of 1024, of which 4 are active (the paper does not give its shape; this is ours)
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
from megatron_tst.export.architectures import architecture_of
from megatron_tst.export.import_hf import arguments, items

_ALL = dict(
    vocab_size=128256,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    rope_theta=500000.0,
)
SHAPES = {
    "3b": _ALL
    | dict(
        model_type="llama",
        num_hidden_layers=28,
        hidden_size=3072,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=8192,
        tie_word_embeddings=True,
    ),
    "10b-a1b": _ALL
    | dict(
        model_type="qwen3_moe",
        num_hidden_layers=24,
        hidden_size=2048,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=8192,
        tie_word_embeddings=False,
        num_experts=64,
        num_experts_per_tok=4,
        moe_intermediate_size=1024,
        norm_topk_prob=True,
    ),
}


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
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument(
        "--folder", type=Path, required=True, help="where there is space for the weights twice"
    )
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/data/export.csv")
    options = parser.parse_args()
    args = arguments(SHAPES[options.shape])
    arch = architecture_of(args, SHAPES[options.shape]["vocab_size"], "bfloat16")
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
            str(ROOT / "tools/export_checkpoint.py"),
            "hf",
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
