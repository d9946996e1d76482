"""The demo: train a small GPT with and without TST at equal FLOPs, on CPU or on one GPU, and draw
both.

    make demo            or:  python examples/demo.py --out demo_out [--architecture qwen3-moe] [--device cuda]

1. corpus: the Python standard library's texts -> BPE tokenizer and Megatron's indexed dataset (kept
for the next time) 2. two runs of megatron.training.pretrain side by side: baseline, and TST
(superposition, switch, recovery). On CPU in fp32, one thread each; on a
   GPU in bf16 with Transformer Engine where it is installed
3. OUT/loss.png, and a screen that says what was seen
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tools")]

import demo_run
import plot_runs
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

BAG_SIZE, STEP_RATIO, ITERATIONS = 2, 0.2, 1000
console = Console(highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"))
    parser.add_argument(
        "--architecture",
        choices=demo_run.ARCHITECTURES,
        default="gpt",
        help="moe: 4 experts, 2 active, for each MLP",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    started = time.time()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "demo: error: --device cuda: expected an NVIDIA GPU that torch can use, got none. "
            "Drop it to train on CPU.",
            file=sys.stderr,
        )
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        here = options.out / options.architecture
        if here.exists():
            shutil.rmtree(here)
        here.mkdir()
    except OSError as error:
        print(
            f"demo: error: --out: expected a folder that can be written to, got {options.out}: "
            f"{error.strerror}.",
            file=sys.stderr,
        )
        return 2
    corpus = prepare(options.out / "corpus")
    logs = train(options, corpus, here)
    runs = {
        "baseline": plot_runs.read_log(logs["baseline"]),
        f"TST s={BAG_SIZE}, r={STEP_RATIO}": plot_runs.read_log(logs["tst"]),
    }
    title = (
        f"{options.architecture}, 3 layers x 128, on {options.device}, Python standard "
        f"library, seed {options.seed}"
    )
    plot_runs.plot(runs, here / "loss.png", title)
    last_screen(options, corpus, here, runs, time.time() - started)
    return 0


def prepare(prefix: Path, title: str = "1/3 corpus") -> Path:
    """Make the corpus unless it is there whole; its index is written last."""
    if Path(f"{prefix}.idx").exists():
        console.print(f"{title}: {prefix} is there")
        return prefix
    console.print(f"{title}: the Python standard library's sources and texts")
    subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            str(ROOT / "tools/prepare_corpus.py"),
            "--output",
            str(prefix),
            "--force",
        ],
        check=True,
    )
    return prefix


def train(options, corpus: Path, here: Path) -> dict[str, Path]:
    """Both runs at once, with a progress line; returns their logs."""
    vocab_size = json.loads(Path(f"{corpus}.json").read_text())["vocab_size"]
    common = demo_run.flags(
        corpus, vocab_size, options.iterations, options.seed, options.architecture, options.device
    )
    arms = {
        "baseline": [],
        "tst": ["--tst-bag-size", str(BAG_SIZE), "--tst-step-ratio", str(STEP_RATIO)],
    }
    logs = {name: here / f"{name}.log" for name in arms}
    console.print(
        f"2/3 training: {options.iterations} iterations twice, side by side; logs in {here}"
    )
    processes = {}
    for name, flags in arms.items():
        save = [
            "--save",
            str(here / f"checkpoints_{name}"),
            "--save-interval",
            str(options.iterations),
            "--ckpt-format",
            "torch_dist",
        ]
        processes[name] = demo_run.start([*common, *flags, *save], logs[name], options.device)
    try:
        watch(processes, logs, options.iterations)
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.terminate()
    return logs


def watch(processes: dict, logs: dict[str, Path], iterations: int) -> None:
    """Show how far both runs are until they end; on a terminal as bars, else a line now and then."""
    columns = (
        TextColumn("    {task.description:9}"),
        BarColumn(),
        TextColumn("{task.completed:>5}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = {
            name: progress.add_task(name, total=iterations, said="starting") for name in processes
        }
        next_line = 0.0
        while True:
            running = [name for name, process in processes.items() if process.poll() is None]
            said = {}
            for name in processes:
                run = plot_runs.read_log(logs[name])
                said[name] = _says(run)
                progress.update(bars[name], completed=run.last, said=said[name])
                if processes[name].poll():
                    tail = "\n".join(logs[name].read_text(errors="replace").splitlines()[-15:])
                    raise SystemExit(
                        f"demo: error: the {name} run ended with exit code "
                        f"{processes[name].returncode}; {logs[name]}:\n{tail}"
                    )
            if not console.is_terminal and (time.time() > next_line or not running):
                console.print("    " + " | ".join(f"{name} {said[name]}" for name in processes))
                next_line = time.time() + 15
            if not running:
                return
            time.sleep(1)


def _says(run: plot_runs.Run) -> str:
    if not run.train:
        return "starting"
    phase = "superposition" if run.excess and run.last in run.excess else "next token"
    text = f"{run.last}/{run.total} {phase} loss {run.train[run.last]:.3f}"
    return text + (f", validation {run.final_validation:.3f}" if run.validation else "")


def last_screen(
    options, corpus: Path, here: Path, runs: dict[str, plot_runs.Run], seconds: float
) -> None:
    """Where things are and what was seen."""
    (base_name, base), (tst_name, tst) = runs.items()
    gain = base.final_validation - tst.final_validation
    tokens = {
        base_name: options.iterations * demo_run.BATCH * demo_run.SEQ_LENGTH,
        tst_name: max(tst.raw_tokens.values(), default=0),
    }
    console.print(f"\n3/3 done in {seconds / 60:.1f} minutes on {os.cpu_count()} cores\n")
    console.print(
        f"    {'':18} {'iterations':>10} {'raw tokens':>11} {'next-token validation loss':>27}"
    )
    for name, run in runs.items():
        console.print(
            f"    {name:18} {run.last:>10} {tokens[name]:>11} {run.final_validation:>27.4f}"
        )
    verdict = "lower" if gain > 0 else "higher"
    console.print(
        f"\n    With TST the final validation loss is {abs(gain):.4f} nats {verdict} at equal "
        f"iterations (equal FLOPs), one seed."
    )
    console.print(
        f"    The switch came after iteration {tst.boundary}, in process: optimizer, schedule and "
        f"data went on."
    )
    console.print(
        "    What other settings gave, losses included, is in docs/LOG.md: figures of this scale "
        "say nothing about large models.\n"
    )
    console.print(f"    picture      {here / 'loss.png'}")
    console.print(f"    logs         {here / 'baseline.log'}  {here / 'tst.log'}")
    console.print(f"    checkpoints  {here / 'checkpoints_baseline'}  {here / 'checkpoints_tst'}")
    console.print(f"    corpus       {corpus}.bin .idx .tokenizer.json")
    if not options.architecture.startswith("gpt"):
        given = f"{here / 'checkpoints_tst'} {here / 'hf'} --tokenizer {corpus}.tokenizer.json"
        console.print(f"    export       python tools/export_checkpoint.py hf {given}")


if __name__ == "__main__":
    sys.exit(main())
