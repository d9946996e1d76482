"""Does FP8 train as bf16 does on this GPU, in both phases and over the switch? A small
mixture-of-experts model, the same data, each recipe once.

    python tools/check_fp8.py OUT      every recipe that this GPU runs, against bf16
    python tools/check_fp8.py OUT --recipes tensorwise --iterations 200
    python tools/check_fp8.py OUT --reference fp32 --recipes bf16      without a GPU

Each run is `python -m megatron_tst.pretrain_gpt` with bags of 4 for --iterations steps and plain
training for as many. Compared is the mean loss of the last 10 steps of each phase. OUT gets the
logs, and fp8.json after each run. Exit code 1: a run failed, or a loss is further from the
reference's than --distance, in which case train in bf16 and look at the logs.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_tst import demo
from megatron_tst.checks import precision
from megatron_tst.compat import megatron_version
from megatron_tst.data import corpus as corpora

LAST = 10
FLAGS = {
    "fp32": "",
    "bf16": "--bf16",
    "tensorwise": "--bf16 --fp8-format hybrid --fp8-recipe tensorwise",
    "delayed": "--bf16 --fp8-format hybrid --fp8-recipe delayed",
    "blockwise": "--bf16 --fp8-format e4m3 --fp8-recipe blockwise",
    "mxfp8": "--bf16 --fp8-format e4m3 --fp8-recipe mxfp8",
}
# Every width is a multiple of 128, as are the 16 x 256 tokens of a micro-batch: what the strictest
# recipe takes.
MODEL = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --kv-channels 64 --ffn-hidden-size "
    "512 --normalization RMSNorm --swiglu "
    "--disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope "
    "--attention-dropout 0 --hidden-dropout 0 "
    "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 512 "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 "
    "--moe-token-dispatcher-type alltoall"
)
_STEP = re.compile(
    r"\[tst\] iteration +(\d+) \| phase: (\w+) .*lm loss of this iteration: ([\d.E+-]+|nan|inf)"
)


def flags(recipe: str, corpus: Path, vocab_size: int, options, device: str) -> list[str]:
    steps, length = 2 * options.iterations, options.seq_length
    return " ".join(
        [
            demo.machine(device),
            FLAGS[recipe],
            MODEL,
            "--moe-grouped-gemm" if device == "cuda" and has_te() else "",
            f"--seq-length {length} --max-position-embeddings {length} --micro-batch-size 16 "
            f"--global-batch-size 16",
            f"--train-iters {steps} --lr 1e-3 --min-lr 1e-4 --lr-decay-style WSD "
            f"--lr-wsd-decay-iters {max(1, steps // 10)}",
            f"--lr-wsd-decay-style linear --lr-warmup-iters {max(1, steps // 20)} --clip-grad 1.0 "
            f"--seed 1",
            f"--data-path {corpus} --split 95,5,0 --tokenizer-type NullTokenizer --vocab-size "
            f"{vocab_size}",
            f"--log-interval 1 --eval-interval {steps} --eval-iters 2 --tst-bag-size 4 "
            f"--tst-iters {options.iterations}",
        ]
    ).split()


def has_te() -> bool:
    """Whether Transformer Engine can be imported, whole."""
    code = "import torch, transformer_engine.pytorch"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def losses(log: str) -> dict[str, list[float]]:
    """Of each phase, in order."""
    found = {}
    for match in _STEP.finditer(log):
        found.setdefault(match[2], []).append(float(match[3]))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--recipes", nargs="+", choices=FLAGS, help="default: all that this GPU runs"
    )
    parser.add_argument("--reference", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--iterations", type=int, default=50, help="of each phase")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument(
        "--distance",
        type=float,
        default=0.01,
        help="largest relative distance of a loss from the reference's",
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        help="prefix that `megatron-tst corpus` made; default: of the Python standard library",
    )
    options = parser.parse_args(argv)
    recipes = options.recipes or (
        [r for r in precision.recipes(*_gpu()) if r in FLAGS] if torch.cuda.is_available() else []
    )
    if why := why_not(recipes):
        print(f"check_fp8: error: {why}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = options.corpus or options.out / "corpus"
    if not corpora.is_there(corpus):
        corpora.make(corpus)
    vocab_size = corpora.vocab_size(corpus)
    found, wanted = {}, [*dict.fromkeys([options.reference, *recipes])]
    for recipe in wanted:  # written after each: this may be ended at any time
        found[recipe] = train(recipe, corpus, vocab_size, options)
        report = judge(found, options) | {"wanted": wanted}
        (options.out / "fp8.json").write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    return 0 if report["holds"] else 1


def _gpu() -> tuple[tuple[int, int], str | None]:
    return torch.cuda.get_device_capability(), torch.version.cuda


def why_not(recipes: list[str]) -> str | None:
    """The reason that these cannot be compared here."""
    if not recipes:
        return (
            "expected an NVIDIA GPU that runs FP8, got none. --reference fp32 --recipes bf16 "
            "tries the comparison without one."
        )
    quantised = [recipe for recipe in recipes if recipe not in ("bf16", "fp32")]
    if quantised and not torch.cuda.is_available():
        return f"--recipes {' '.join(quantised)}: expected an NVIDIA GPU, got none."
    if quantised and not has_te():
        return (
            f"--recipes {' '.join(quantised)}: expected Transformer Engine, which runs them, "
            f"got none that can be imported. Install it."
        )
    return None


def train(recipe: str, corpus: Path, vocab_size: int, options) -> dict[str, list[float]] | None:
    """Losses of a run by phase; None: it failed."""
    log, device = options.out / f"{recipe}.log", "cuda" if torch.cuda.is_available() else "cpu"
    code = demo.start(flags(recipe, corpus, vocab_size, options, device), log, device).wait()
    found = losses(log.read_text(errors="replace"))
    whole = (
        code == 0
        and [len(found.get(phase, [])) for phase in ("superposition", "recovery")]
        == [options.iterations] * 2
    )
    if not whole:
        print(
            f"check_fp8: {recipe} FAILED (exit code {code}), {log}:",
            *log.read_text(errors="replace").splitlines()[-12:],
            sep="\n",
        )
    return found if whole else None


def judge(found: dict, options) -> dict:
    """Each recipe's mean loss at the end of each phase, and its relative distance from the
    reference's.
    """
    rows, want = {}, found[options.reference]
    for recipe, phases in found.items():
        rows[recipe] = None
        if phases and want:
            ends = {
                phase: (
                    statistics.mean(phases[phase][-LAST:]),
                    statistics.mean(want[phase][-LAST:]),
                )
                for phase in want
            }
            rows[recipe] = {
                phase: {"loss": got, "distance": abs(got / exact - 1)}
                for phase, (got, exact) in ends.items()
            }
    close = [
        row and all(end["distance"] <= options.distance for end in row.values())
        for row in rows.values()
    ]  # a nan is not
    settings = {
        "reference": options.reference,
        "iterations": options.iterations,
        "last": LAST,
        "limit": options.distance,
    }
    return {**settings, "recipes": rows, "holds": all(close), **where()}


def where() -> dict:
    """What the figures were taken on."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or "CPU",
        "torch": torch.__version__,
        "megatron_core": megatron_version(),
    }


def show(report: dict) -> None:
    table = Table(
        title=f"mean loss of the last {LAST} of {report['iterations']} steps, and its distance "
        f"from {report['reference']}"
    )
    for heading in ("recipe", "superposition", "", "recovery", ""):
        table.add_column(heading)
    for recipe, row in report["recipes"].items():
        cells = [
            text
            for end in (row or {}).values()
            for text in (f"{end['loss']:.4f}", f"{end['distance']:.2%}")
        ]
        table.add_row(recipe, *(cells or ["FAILED", "", "FAILED", ""]))
    Console().print(table)
    print(
        f"{'all' if report['holds'] else 'NOT all'} within {report['limit']:.1%} on "
        f"{report['device']}"
    )


if __name__ == "__main__":
    sys.exit(main())
