"""Train a small GPT with and without TST at equal FLOPs, on CPU or on one GPU, and draw both.

    megatron-tst demo
    megatron-tst demo --out demo_qwen3 --architecture qwen3-moe --iterations 200

1. corpus: the Python standard library's texts -> a BPE tokenizer and Megatron's indexed dataset,
   kept for the next time
2. two runs of megatron.training.pretrain side by side: baseline, and TST (superposition, switch,
   recovery). On CPU in fp32, one thread each; on a GPU in bf16, with Transformer Engine where it
   is installed
3. OUT/ARCHITECTURE/loss.png, and a screen that says what was seen

Needs pip install 'megatron-tst[demo]'.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

from megatron_tst import demo
from megatron_tst.checkpoint.atomic import kept_folder
from megatron_tst.cli.screen import Parser, call, progress_bar
from megatron_tst.errors import TSTError, optional, refuse

LEAST = 20  # iterations: of 10 a learning-rate schedule, a phase and a validation have too few


def parser(prog: str) -> Parser:
    """The flags of this verb; `prog` is the command as it was called."""
    it = Parser(prog, __doc__)
    it.add_argument("--out", type=Path, default=Path("demo_out"), help="default: demo_out")
    it.add_argument(
        "--architecture",
        choices=demo.ARCHITECTURES,
        default="gpt",
        help="default: gpt. With -moe: 4 experts, 2 active, for each MLP. llama and both qwen3 can "
        "be exported",
    )
    it.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    it.add_argument(
        "--iterations",
        type=int,
        default=demo.ITERATIONS,
        help=f"{LEAST} or more; default: {demo.ITERATIONS}",
    )
    it.add_argument("--seed", type=int, default=1)
    return it


def main(argv: list[str] | None = None, prog: str = "megatron-tst demo") -> int:
    """Run the verb. -> exit code"""
    return call(parser(prog), _run, argv)


def _run(options):
    from rich.console import Console

    from megatron_tst.planning import curves, plots

    if options.iterations < LEAST:
        do = "Fewer have no phases to show."
        refuse("--iterations", f"{LEAST} or more", options.iterations, do)
    for package in ("tokenizers", "matplotlib"):  # said before minutes of training, not after
        optional(package, "megatron-tst[demo]")
    if options.device == "cuda":
        _check_gpu()
    console, started = Console(highlight=False, soft_wrap=True), time.time()
    here, corpus = options.out / options.architecture, options.out / "corpus"
    iterations = options.iterations
    with kept_folder(here):
        _prepare(console, corpus)
        console.print(f"2/3 training: {iterations} iterations twice, side by side; logs in {here}")
        with demo.side_by_side(
            corpus, here, iterations, options.seed, options.architecture, options.device
        ) as processes:
            _watch(console, processes, iterations)
        runs = {
            "baseline": curves.read_log(here / "baseline.log"),
            f"TST s={demo.BAG_SIZE}, r={demo.STEP_RATIO}": curves.read_log(here / "tst.log"),
        }
        title = (
            f"{options.architecture}, 3 layers x 128, on {options.device}, Python standard "
            f"library, seed {options.seed}"
        )
        plots.plot(runs, here / "loss.png", title)
    _last_screen(console, options, corpus, here, runs, time.time() - started)
    return 0


def _check_gpu():
    import torch

    if not torch.cuda.is_available():
        expected = "an NVIDIA GPU that torch can use"
        refuse("--device cuda", expected, "none", "Drop it to train on CPU.")


def _prepare(console, prefix):
    from megatron_tst.data import corpus

    if corpus.is_there(prefix):
        console.print(f"1/3 corpus: {prefix} is there")
        return
    console.print("1/3 corpus: the Python standard library's sources and texts")
    with progress_bar("    reading, then tokenizing", unit=" files") as progress:
        made = corpus.make(prefix, force=True, progress=progress)
    console.print(f"    {made['documents']} documents, {made['tokens']} tokens")


def _watch(console, runs, iterations):
    """Show how far both runs are until they end; on a terminal as bars, else a line now and then.

    Raises:
        TSTError: one of them failed.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from megatron_tst.planning import curves

    columns = (
        TextColumn("    {task.description:9}"),
        BarColumn(),
        TextColumn("{task.completed:>5}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = {name: progress.add_task(name, total=iterations, said="starting") for name in runs}
        next_line = 0.0
        while True:
            running = [name for name, (process, _) in runs.items() if process.poll() is None]
            said = {}
            for name, (process, log) in runs.items():
                run = curves.read_log(log)
                said[name] = _says(run)
                progress.update(bars[name], completed=run.last, said=said[name])
                if process.poll():
                    _failed(name, process.returncode, log)
            if not console.is_terminal and (time.time() > next_line or not running):
                console.print("    " + " | ".join(f"{name} {said[name]}" for name in runs))
                next_line = time.time() + 15
            if not running:
                return
            time.sleep(1)


def _failed(name, code, log):
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise TSTError(
        f"expected the {name} run to end well, got exit code {code}. {log} says why: "
        f"{lines[-1] if lines else 'nothing'}"
    )


def _says(run) -> str:
    if not run.train:
        return "starting"
    phase = "superposition" if run.excess and run.last in run.excess else "next token"
    loss, validation = run.train.get(run.last, math.nan), run.final_validation
    text = f"{run.last}/{run.total} {phase} loss {loss:.3f}"
    return text + (f", validation {validation:.3f}" if validation is not None else "")


def _last_screen(console, options, corpus, here, runs, seconds):
    """Where things are and what was seen."""
    from megatron_tst.planning import curves

    found = {name: curves.summary(run) for name, run in runs.items()}
    base, tst = found.values()
    for name, run in found.items():
        if run["validation_loss"] is None:
            do = "Its log says why: lower --lr, or another --seed."
            refuse(f"the {name} run", "a validation loss", "none, or NaN", do)
    gain = base["validation_loss"] - tst["validation_loss"]
    console.print(f"\n3/3 done in {seconds / 60:.1f} minutes on {os.cpu_count()} cores\n")
    console.print(
        f"    {'':18} {'iterations':>10} {'raw tokens':>11} {'next-token validation loss':>27}"
    )
    for name, run in found.items():
        console.print(
            f"    {name:18} {run['iterations']:>10} {run['raw_tokens']:>11} "
            f"{run['validation_loss']:>27.4f}"
        )
    verdict = "lower" if gain > 0 else "higher"
    console.print(
        f"\n    With TST the final validation loss is {abs(gain):.4f} nats {verdict} at equal "
        f"iterations (equal FLOPs), one seed."
    )
    console.print(
        f"    The switch came after iteration {tst['boundary']}, in process: optimizer, schedule "
        f"and data went on."
    )
    console.print("    Figures of this scale say nothing about large models.\n")
    console.print(f"    picture      {here / 'loss.png'}")
    console.print(f"    logs         {here / 'baseline.log'}  {here / 'tst.log'}")
    console.print(f"    checkpoints  {here / 'checkpoints_baseline'}  {here / 'checkpoints_tst'}")
    console.print(f"    corpus       {corpus}.bin .idx .tokenizer.json")
    if not options.architecture.startswith("gpt"):
        given = f"{here / 'checkpoints_tst'} {here / 'hf'} --tokenizer {corpus}.tokenizer.json"
        console.print(f"    export       megatron-tst export-hf {given}")
