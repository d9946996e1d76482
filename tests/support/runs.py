"""Start real training runs and multi-rank functions, and read what they print."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from support.close import close
from support.paths import EVERYTHING, ROOT, environment

SCRIPT = str(ROOT / "megatron_tst" / "pretrain_gpt.py")

# The smallest run that shows everything: 2 layers, 10 iterations of 4 samples of 32 positions.
TINY = (
    "--distributed-backend gloo --transformer-impl local --no-persist-layer-norm "
    "--no-masked-softmax-fusion --no-rope-fusion "
    "--no-gradient-accumulation-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion "
    "--use-cpu-initialization "
    "--no-create-attention-mask-in-dataloader --num-workers 0 --ckpt-format torch_dist "
    "--num-layers 2 --hidden-size 32 "
    "--num-attention-heads 4 --seq-length 32 --max-position-embeddings 64 "
    "--position-embedding-type rope --normalization RMSNorm "
    "--swiglu --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 "
    "--hidden-dropout 0 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 10 --lr 1e-3 --min-lr 1e-5 "
    "--lr-decay-style WSD "
    "--lr-wsd-decay-style linear --lr-wsd-decay-iters 4 --lr-warmup-iters 2 --tokenizer-type "
    "NullTokenizer --log-interval 1 "
    "--eval-interval 5 --eval-iters 2"
).split()
TST = "--tst-bag-size 4 --tst-iters 6".split()

_STEP = re.compile(
    r"\[tst\] iteration +(\d+) \| phase: (\w+) \| bag size: (\d+) \| raw tokens: (\d+) \| lm loss "
    r"of this iteration: ([\d.E+-]+)"
)
_TRAIN = re.compile(r"iteration +(\d+)/ *\d+ \|.*?\| lm loss: ([\d.E+-]+) .*?grad norm: ([\d.]+)")
_VALID = re.compile(r"validation loss at iteration (\d+) \| lm loss value: ([\d.E+-]+)")


def data(corpus: Path) -> list[str]:
    """Flags for the test corpus."""
    return ["--data-path", str(corpus), "--split", "90,10,0", "--vocab-size", "512"]


_FILES = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.listdir",
    "os.scandir",
    "os.chmod",
    "os.utime",
)


def in_a_fork(call, killed_at: int | None = None, delay: float = 0) -> tuple[int, float]:
    """Call something that gives an exit code in a process of its own, killed `delay` seconds after
    it touched its killed_at-th file.

    Files, not seconds: a machine that is slower than a moment ago is killed at the same place.

    Returns: how many files it touched (sys.audit's events), and the seconds it ran.
    """
    (reading, writing), start, process = os.pipe(), time.time(), os.fork()
    if process == 0:
        code = 3
        try:
            os.close(reading)
            # tqdm's own lock is shared by all forks: one that is killed with it would stop the rest
            tqdm.set_lock(threading.RLock())
            sys.addaudithook(lambda event, _: event in _FILES and os.write(writing, b"."))
            code = call()
        finally:
            os._exit(code)
    os.close(writing)
    touched = 0
    while more := len(os.read(reading, 1)):
        touched += more
        if touched == killed_at:
            time.sleep(delay)
            os.kill(process, signal.SIGKILL)
    os.close(reading)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code == 0 or (killed_at is not None and code == -signal.SIGKILL), code
    return touched, time.time() - start


def all_over(touched: int, took: float, times: int) -> list[tuple[int, float]]:
    """Where to kill something that touches so many files: (killed_at, delay) from its first file to
    its last.
    """
    random_ = random.Random(0)
    return [
        (1 + i * touched // times, random_.uniform(0, 2 * took / touched)) for i in range(times)
    ]


@dataclass
class Run:
    """Exit codes and output of a run."""

    codes: list[int]
    log: str

    @property
    def ok(self) -> bool:
        return not any(self.codes)

    @property
    def losses(self) -> dict[int, str]:
        """Loss of each iteration, as printed (Megatron's own line averages the first two after a
        start).
        """
        return {int(m[1]): m[5] for m in _STEP.finditer(self.log)}

    @property
    def phases(self) -> dict[int, tuple[str, int, int]]:
        """(phase, bag size, raw tokens) of each iteration."""
        return {int(m[1]): (m[2], int(m[3]), int(m[4])) for m in _STEP.finditer(self.log)}

    @property
    def grad_norms(self) -> dict[int, str]:
        return {int(m[1]): m[3] for m in _TRAIN.finditer(self.log)}

    @property
    def stock_losses(self) -> dict[int, str]:
        """What Megatron's own log line says."""
        return {int(m[1]): m[2] for m in _TRAIN.finditer(self.log)}

    @property
    def validation(self) -> dict[int, str]:
        return {int(m[1]): m[2] for m in _VALID.finditer(self.log)}

    @property
    def error(self) -> str:
        """The line that megatron_tst ended the run with."""
        found = [line for line in self.log.splitlines() if line.startswith("megatron_tst: error")]
        assert found, f"no error line in:\n{self.log[-2000:]}"
        return found[0]


def losses_close(got: Run, want: Run, iterations) -> None:
    """The losses that two runs print with seven digits, where sums are cut differently."""
    one, other = ([float(run.losses[i]) for i in iterations] for run in (got, want))
    close(one, other, 2e-6)  # largest seen 1e-7


class ForkServer:
    """Context manager around tests/support/fork_server.py.

    Args:
        folder: for logs.
        nodes, node, master: the same tests run on several nodes at once, each starting its share of
            every run's processes.
    """

    def __init__(self, folder: Path, nodes: int = 1, node: int = 0, master: str = "localhost"):
        self.folder = folder
        self.nodes, self.node, self.master = nodes, node, master
        self.runs = 0
        self.spread = 0  # runs over all nodes

    def __enter__(self) -> ForkServer:
        self.errors = open(self.folder / "fork_server.log", "w")
        self.process = subprocess.Popen(
            # -P: not from the current folder, which can be another checkout
            [sys.executable, "-P", "-m", "support.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment(),
        )
        return self

    def __exit__(self, *exc) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=300)
        self.errors.close()

    def train(self, *arguments: str, nproc: int = 1, script: str = SCRIPT, **job) -> Run:
        """A training run of `script` in `nproc` processes."""
        return self._run(nproc=nproc, script=[script, *map(str, arguments)], **job)

    def launch(self, script: str, *arguments: str, nproc: int = 1, **job) -> Run:
        """python -m megatron_tst.launch script arguments"""
        return self._run(
            nproc=nproc, module=["megatron_tst.launch", str(script), *map(str, arguments)], **job
        )

    def call(self, function: Callable, *arguments, nproc: int) -> Run:
        """Call a function of a test's module in `nproc` ranks of a gloo group; arguments go through
        JSON.
        """
        file = Path(inspect.getfile(function)).relative_to(ROOT / "tests")
        module = ".".join(file.with_suffix("").parts)
        run = self._run(nproc=nproc, call=[module, function.__name__, *arguments])
        assert run.ok, run.log[-3000:]
        return run

    def _run(self, seconds: float = 300, env: dict | None = None, **job) -> Run:
        self.runs += 1
        log = self.folder / f"job{self.runs}.log"
        alone = self.nodes == 1 or job["nproc"] == 1
        self.spread += not alone
        share = job["nproc"] if alone else job["nproc"] // self.nodes
        job.update(
            log=str(log),
            # close.py names it
            env={"PYTEST_CURRENT_TEST": os.environ.get("PYTEST_CURRENT_TEST", ""), **(env or {})},
            seconds=seconds,
            ranks=[0 if alone else self.node * share, share],
            master="localhost" if alone else self.master,
            port=_free_port() if alone else 29600 + self.spread % 2000,
        )
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the fork server died, see {self.errors.name}"
        return Run(
            json.loads(answer)["codes"], log.read_text(errors="replace") if log.exists() else ""
        )


CHECKOUTS = [Path(p) for p in os.environ.get("MEGATRON_LM", "").split(os.pathsep) if p]
NO_CHECKOUT = (
    "NOT RUN: Megatron-LM's unmodified scripts; set MEGATRON_LM=/path/to/Megatron-LM "
    "(tags core_v0.18.2, core_v0.19.0; ':' between)"
)


def from_checkout(script: Path, *flags, stock: bool = False) -> Run:
    """One of Megatron-LM's own scripts in a fresh process that takes Megatron from the script's
    checkout; `stock`: without megatron_tst.
    """
    how = ["-m", "support.stock_launch"] if stock else ["-m", "megatron_tst.launch"]
    # a checkout's Megatron comes before an installed one
    first = [str(script.parent)] if stock else []
    variables = environment(
        [*first, *EVERYTHING],
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        MASTER_ADDR="localhost",
        MASTER_PORT=str(_free_port()),
    )
    done = subprocess.run(
        [sys.executable, *how, *map(str, (script, *flags))],
        capture_output=True,
        text=True,
        env=variables,
    )
    return Run([done.returncode], done.stdout + done.stderr)


def _free_port() -> int:
    """Of those below the kernel's own range, out of which gloo's listeners take theirs: one of that
    range can be taken between this look and the run's start.
    """
    while True:
        port = random.SystemRandom().randrange(10000, 29000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
