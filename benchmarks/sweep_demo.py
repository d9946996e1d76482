"""The sweep behind the demo's setting: baseline and TST arms over seeds at equal FLOPs, on the
demo's corpus and model.

    python benchmarks/sweep_demo.py --corpus demo_out/corpus --iterations 1000 --arms 1:0 2:0.2
    --seeds 1 2 3

An arm is BAG_SIZE:STEP_RATIO, 1:0 the baseline. Rows go to benchmarks/data/demo_sweep.csv as runs
end; a summary is printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from measure import ROOT, append_rows

from megatron_tst import demo
from megatron_tst.data import corpus
from megatron_tst.planning.curves import read_log


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, required=True, help="prefix made by `megatron-tst corpus`"
    )
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--arms", nargs="+", default=["1:0", "2:0.2"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--moe", action="store_true")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--logs", type=Path, default=Path("sweep_logs"))
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/data/demo_sweep.csv")
    options = parser.parse_args(argv)
    options.logs.mkdir(parents=True, exist_ok=True)
    jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]
    rows = []
    with ThreadPoolExecutor(options.parallel) as pool:
        futures = [pool.submit(run, options, arm, seed) for arm, seed in jobs]
        for future in as_completed(futures):
            rows.append(future.result())
            append_rows(options.csv, [rows[-1]])
            print(rows[-1], flush=True)
    for arm in options.arms:
        losses = [
            row["validation_loss"]
            for row in rows
            if f"{row['bag_size']}:{row['step_ratio']:g}" == arm
        ]
        print(
            f"{arm:>8}  mean {statistics.mean(losses):.4f}  spread "
            f"{max(losses) - min(losses):.4f}  n {len(losses)}"
        )
    return 0


def run(options, arm: str, seed: int) -> dict:
    """One training run; its final next-token validation loss and what it took."""
    bag_size, ratio = int(arm.split(":")[0]), float(arm.split(":")[1])
    vocab_size = corpus.vocab_size(options.corpus)
    arguments = demo.flags(
        options.corpus, vocab_size, options.iterations, seed, "gpt-moe" if options.moe else "gpt"
    )
    if bag_size > 1:
        arguments += ["--tst-bag-size", str(bag_size), "--tst-step-ratio", str(ratio)]
    log = (
        options.logs
        / f"{'moe_' if options.moe else ''}{options.iterations}_s{bag_size}_r{ratio}_seed{seed}.log"
    )
    start = time.time()
    code = demo.start(arguments, log).wait()
    result = read_log(log)
    if code or result.final_validation is None:
        raise SystemExit(f"{log}: training ended with exit code {code}")
    return {
        "model": demo.NAME + (" moe" if options.moe else ""),
        "iterations": options.iterations,
        "bag_size": bag_size,
        "step_ratio": ratio,
        "seed": seed,
        "validation_loss": result.final_validation,
        "seconds": round(time.time() - start),
    }


if __name__ == "__main__":
    sys.exit(main())
