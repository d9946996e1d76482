"""Run a question of examples/experiments: every arm with every seed, a row of OUT/results.csv for
each.

    python examples/experiments/run.py examples/experiments/equal_flops.toml --out experiments_out
    [--seeds 1 2 3] [--parallel 2]

Each run is megatron.training (megatron_tst.pretrain_gpt) in a process of its own, one CPU
thread, or with --device cuda a GPU. It can be stopped and started again: rows that are there are
kept, a run that was cut off begins anew, and a run with the settings and seed of another question's
row takes its figures. Logs: OUT/QUESTION/ARM/seedN. --iterations 20 tries whether every arm starts,
switches and is read.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
import questions
import results
from questions import Arm, ConfigError, Question

from megatron_tst import demo
from megatron_tst.data import corpus
from megatron_tst.errors import TSTError
from megatron_tst.planning import curves


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, nargs="+", help="one or several questions")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--corpus",
        type=Path,
        help="prefix made by `megatron-tst corpus`; default: OUT/corpus, made if it is not there",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the config's")
    parser.add_argument("--arms", nargs="+", help="these alone, by name")
    parser.add_argument(
        "--iterations",
        type=int,
        help="in place of the config's, for a trial; such rows are kept apart",
    )
    parser.add_argument("--parallel", type=int, help="runs at once (default 2; on a GPU 1)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="fp32 on CPU, bf16 on a GPU"
    )
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        asked = [questions.load(path) for path in options.config]
        options.out.mkdir(parents=True, exist_ok=True)
        with results.locked(options.out / ".running"):
            return Driver(options).run(asked)
    except (ConfigError, TSTError, OSError) as error:
        print(f"experiments: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "experiments: interrupted; the same command goes on with what is missing",
            file=sys.stderr,
        )
        return 130


class Driver:
    """Starts runs, waits for them, and keeps their rows."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.table, self.processes, self.stopping = (
            options,
            results.Table(options.out / "results.csv"),
            set(),
            False,
        )
        self.corpus = (options.corpus or options.out / "corpus").absolute()

    def run(self, asked: list[Question]) -> int:
        """Everything that has no row yet; a failed run does not stop the others. -> exit code"""
        if not self.options.corpus:
            if not corpus.is_there(self.corpus):
                print(f"corpus: the Python standard library's texts -> {self.corpus}", flush=True)
                corpus.make(self.corpus, force=True)
        jobs = [
            (q, arm, seed)
            for q in asked
            for seed in self.options.seeds or q.seeds
            for arm in self._arms(q)
        ]
        todo = [job for job in jobs if not self.table.has(**self._key(*job))]
        print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them in {self.table.path}", flush=True)
        failed = 0
        with ThreadPoolExecutor(
            self.options.parallel or (1 if self.options.device == "cuda" else 2)
        ) as pool:
            futures = {pool.submit(self._row, *job): job for job in todo}
            try:
                for done in as_completed(futures):
                    question, arm, seed = futures[done]
                    try:
                        row = done.result()
                    except RunFailed as error:
                        failed += 1
                        print(
                            f"FAILED {question.name} | {arm.name} | seed {seed} | {error}",
                            flush=True,
                        )
                        continue
                    print(" | ".join(f"{row[name]}" for name in results.SHOWN), flush=True)
            except BaseException:
                self.stopping = True
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.processes):
                    process.terminate()
                raise
        return int(bool(failed))

    def _arms(self, question):
        wanted = self.options.arms
        return [arm for arm in question.arms if not wanted or arm.name in wanted]

    def _key(self, question: Question, arm: Arm, seed: int) -> dict:
        iterations = self.options.iterations or question.iterations
        settings = [
            question.architecture,
            question.flags,
            arm.flags,
            arm.tst,
            f"convert {arm.convert}" if arm.convert is not None else "",
        ]
        return {
            "question": question.name,
            "arm": arm.name,
            "seed": str(seed),
            "base_iterations": str(iterations),
            "iterations": str(round(arm.length * iterations)),
            "settings": " ".join(filter(None, settings)),
        }

    def _row(self, question: Question, arm: Arm, seed: int) -> dict:
        key = self._key(question, arm, seed)
        twin = self.table.find(**{name: key[name] for name in ("seed", "iterations", "settings")})
        if twin:
            return self.table.append(twin | key)
        started, run = time.time(), self._train(question, arm, seed, int(key["iterations"]))
        last = int(key["iterations"])
        if run.validation.get(last) is None or run.raw_tokens.get(last) is None:
            raise RunFailed(f"no validation loss at iteration {last} in its log")
        measured = {
            "validation_loss": run.validation[last],
            "raw_tokens": run.raw_tokens[last],
            "flops": f"{run.flops * last:.6g}",
            "seconds": round(run.seconds[max(run.seconds)], 1),
            "wall_seconds": round(time.time() - started, 1),
            "boundary": run.boundary or "",
            "experts": "; ".join(run.experts),
        }
        return self.table.append(key | measured | where(self.options.device))

    def _train(self, question: Question, arm: Arm, seed: int, iterations: int) -> curves.Run:
        here = (self.options.out / question.name / arm.folder / f"seed{seed}").absolute()
        here.mkdir(parents=True, exist_ok=True)
        vocabulary = corpus.vocab_size(self.corpus)
        # A file of --data-cache-path that another run is writing would be read half: each run has
        # its own.
        flags = demo.flags(
            self.corpus, vocabulary, iterations, seed, question.architecture, self.options.device
        )
        flags += [*question.flags.split(), *arm.flags.split()]
        if arm.convert is None:
            return self._process(
                [*flags, *arm.tst.split(), "--data-cache-path", str(here / "cache")],
                here / "train.log",
            )
        for name in ("superposed", "converted"):
            shutil.rmtree(here / name, ignore_errors=True)
        exit_there = (
            f"--tst-exit-at-boundary --save-interval {iterations} --ckpt-format torch_dist --save"
        ).split()
        index = ["--data-cache-path", str(here / "cache"), "--tst-stock-index", str(here / "index")]
        self._process(
            [*flags, *arm.tst.split(), *index, *exit_there, str(here / "superposed")],
            here / "superposed.log",
        )
        verb = [
            "-m",
            "megatron_tst",
            "boundary",
            str(here / "superposed"),
            str(here / "converted"),
        ]
        done = subprocess.run(
            [sys.executable, *verb, *arm.convert.split(), "--seed", str(seed)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RunFailed(done.stderr.strip())
        go_on = [
            "--ckpt-format",
            "torch_dist",
            "--load",
            str(here / "converted"),
            "--data-cache-path",
            str(here / "index"),
        ]
        self._process([*flags, *go_on], here / "train.log")
        for name in ("superposed", "converted"):
            shutil.rmtree(here / name)
        return curves.read_log(here / "superposed.log", here / "train.log")

    def _process(self, arguments, log) -> curves.Run:
        if self.stopping:
            raise RunFailed("interrupted")
        process = demo.start(arguments, log, self.options.device)
        self.processes.add(process)
        if self.stopping:  # since this process was asked for
            process.terminate()
        try:
            code = process.wait()
        finally:
            self.processes.discard(process)
        if code:
            raise RunFailed(
                f"exit code {code}, {log}: "
                f"{(log.read_text(errors='replace').splitlines() or [''])[-1]}"
            )
        return curves.read_log(log)


class RunFailed(RuntimeError):
    """A run that gives no row."""


def where(device: str) -> dict:
    """What the figures were taken on."""
    name = f"CPU, 1 thread ({_processor()})"
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return {
        "device": name,
        "versions": ", ".join(
            f"{name} {importlib.metadata.version(name)}"
            for name in ("torch", "megatron-core", "megatron-tst")
        ),
        "commit": commit.stdout.strip() or "unknown",
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(": ", 1)[1] for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _interrupt(*_):
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
