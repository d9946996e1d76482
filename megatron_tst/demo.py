"""The small run of the demo, the experiments and the benchmarks: Megatron's flags for a GPT of 1.1M
parameters on CPU or a GPU, and how to start it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_tst import cpu
from megatron_tst.data import corpus as corpora

SEQ_LENGTH, BATCH = 128, 16  # positions of a sample, samples a step
BAG_SIZE, STEP_RATIO, ITERATIONS = 2, 0.2, 1000  # of the demo; benchmarks/data/demo_sweep.csv
GRACE = 10  # seconds
NAME = "3x128 lr 4e-3"  # in the tables of sweeps

MODEL = (
    f"--num-layers 3 --hidden-size 128 --num-attention-heads 4 --seq-length {SEQ_LENGTH} "
    f"--max-position-embeddings {SEQ_LENGTH} "
    "--position-embedding-type rope --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--init-method-std 0.05 "
    "--embedding-init-method-std 1.0"
)
_GPT = "--normalization LayerNorm --ffn-hidden-size 512"
_LLAMA = "--normalization RMSNorm --swiglu --ffn-hidden-size 344"
_QWEN3 = _LLAMA + " --qk-layernorm --group-query-attention --num-query-groups 2"
_MOE = (
    " --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 192 --moe-aux-loss-coeff 1e-2 "
    "--moe-router-load-balancing-type aux_loss"
)
# The demo's settings were tuned for the first; the last three can be exported to Hugging Face and
# NeMo.
ARCHITECTURES = {
    "gpt": _GPT,
    "gpt-moe": _GPT + _MOE,
    "llama": _LLAMA,
    "qwen3": _QWEN3,
    "qwen3-moe": _QWEN3 + _MOE,
}


def machine(device: str) -> str:
    """Flags for "cpu", or for "cuda" with Transformer Engine's layers and apex's gradient
    accumulation where they are installed.
    """
    if device == "cpu":
        return cpu.FLAGS
    layers = (
        "--transformer-impl transformer_engine"
        if importlib.util.find_spec("transformer_engine")
        else cpu.TORCH_LAYERS
    )
    fused = (
        ""
        if importlib.util.find_spec("fused_weight_gradient_mlp_cuda")
        else "--no-gradient-accumulation-fusion"
    )
    return f"{layers} {fused} {cpu.DATA}"


def flags(
    corpus: Path | None,
    vocab_size: int,
    iterations: int,
    seed: int = 1234,
    architecture: str = "gpt",
    device: str = "cpu",
) -> list[str]:
    """Everything but the --tst flags and where to save: AdamW, warmup-stable-decay with 20 % decay,
    both arms alike; fp32 on CPU, else bf16.
    """
    optimizer = (
        f"--micro-batch-size {BATCH} --global-batch-size {BATCH} --train-iters {iterations} --lr "
        f"4e-3 --min-lr 0 --lr-decay-style WSD "
        f"--lr-wsd-decay-style linear --lr-wsd-decay-iters {iterations // 5} --lr-warmup-iters "
        f"{min(100, iterations // 10)} "
        f"--adam-beta1 0.9 --adam-beta2 0.999 --weight-decay 0.01 --clip-grad 1.0 --seed {seed}"
    )
    data = f"--data-path {corpus} --split 95,5,0" if corpus else "--mock-data"
    data += f" --tokenizer-type NullTokenizer --vocab-size {vocab_size}"
    logs = f"--log-interval 10 --eval-interval {max(10, iterations // 10)} --eval-iters 20"
    return " ".join(
        [
            machine(device),
            "--bf16" if device == "cuda" else "",
            MODEL,
            ARCHITECTURES[architecture],
            optimizer,
            data,
            logs,
        ]
    ).split()


def start(arguments: list[str], log: Path, device: str = "cpu") -> subprocess.Popen:
    """Start one process of training, its output in `log`.

    Args:
        arguments: flags of Megatron and of TST.
        log: is replaced.
        device: "cpu" for one CPU thread, "cuda" for the first GPU that CUDA_VISIBLE_DEVICES shows.
    """
    # port 0: one that is free when the process comes to listen, seconds from now
    environment = dict(
        os.environ,
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        MASTER_ADDR="localhost",
        MASTER_PORT="0",
    )
    environment |= dict(OMP_NUM_THREADS="1", CUDA_DEVICE_MAX_CONNECTIONS="1")
    if device == "cpu":  # also on a machine with a GPU, which is hidden
        environment |= dict(MEGATRON_TST_CPU="1", CUDA_VISIBLE_DEVICES="")
    else:
        environment |= dict(MEGATRON_TST_CPU="0")
    with open(log, "w") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "megatron_tst.pretrain_gpt", *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        )


@contextlib.contextmanager
def side_by_side(
    corpus: Path,
    folder: Path,
    iterations: int = ITERATIONS,
    seed: int = 1,
    architecture: str = "gpt",
    device: str = "cpu",
) -> Iterator[dict[str, tuple[subprocess.Popen, Path]]]:
    """Start the demo's two runs, "baseline" and "tst": name -> (process, log).

    Logs and checkpoints go to `folder`. What still runs when the context ends is terminated, and
    killed where it has not ended GRACE seconds later: nobody writes to `folder` any more.
    """
    common = flags(corpus, corpora.vocab_size(corpus), iterations, seed, architecture, device)
    common += ["--save-interval", str(iterations), "--ckpt-format", "torch_dist"]
    tst = ["--tst-bag-size", str(BAG_SIZE), "--tst-step-ratio", str(STEP_RATIO)]
    runs = {}
    try:
        for name, more in (("baseline", []), ("tst", tst)):
            save, log = ["--save", str(folder / f"checkpoints_{name}")], folder / f"{name}.log"
            runs[name] = start([*common, *more, *save], log, device), log
        yield runs
    finally:
        running = [process for process, _ in runs.values() if process.poll() is None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + GRACE
        for process in running:
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
