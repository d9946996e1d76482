"""The demo, the plots, the benchmark and the set-up script, run as a user runs them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from support.runs import ROOT
from support.tiers import tiers

from megatron_tst.checkpoint.atomic import MARK
from megatron_tst.planning import curves

VERB = (sys.executable, "-m", "megatron_tst")


def run(*command, **environment):
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=dict(os.environ, **environment),
        cwd=ROOT,
    )


@pytest.mark.parametrize(
    "architecture", tiers(["gpt", "llama", "qwen3", "qwen3-moe"], {"gpt", "llama"})
)
def test_demo(corpus, tmp_path, architecture):
    for suffix in (".bin", ".idx", ".json", ".tokenizer.json"):
        shutil.copy(f"{corpus}{suffix}", tmp_path / f"corpus{suffix}")
    here = tmp_path / architecture
    here.mkdir()
    (here / "photo").write_text("dear")
    done = run(
        *VERB, "demo", "--out", tmp_path, "--iterations", "20", "--architecture", architecture
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / f"{architecture}.old-1" / "photo").read_text() == "dear"
    assert "did not write there: it is" in done.stderr and not (here / "photo").exists()
    assert (here / "loss.png").read_bytes().startswith(b"\x89PNG")
    tst = curves.read_log(here / "tst.log")
    assert (
        tst.boundary == 4
        and tst.last == 20
        and tst.total == 20
        and sorted(tst.validation) == [10, 20]
    )
    for said in (
        "loss.png",
        "next-token validation loss",
        "equal FLOPs",
        "after iteration 4",
        "checkpoints",
    ):
        assert said in done.stdout, done.stdout
    assert (here / "checkpoints_tst" / "latest_checkpointed_iteration.txt").read_text() == "20"
    export = re.search(r"export +megatron-tst (.*)", done.stdout)
    assert bool(export) == (not architecture.startswith("gpt"))
    if export:
        assert run(*VERB, *export[1].split()).returncode == 0
        config = json.loads((here / "hf" / "config.json").read_text())
        assert (
            config["model_type"] == architecture.replace("-", "_") and config["vocab_size"] == 512
        )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_demo_ended_by_a_signal(corpus, tmp_path, number):
    """Both runs end with it, and the next demo takes the place of what it has left."""
    for suffix in (".bin", ".idx", ".json", ".tokenizer.json"):
        shutil.copy(f"{corpus}{suffix}", tmp_path / f"corpus{suffix}")
    here = tmp_path / "gpt"
    for _ in range(2):
        demo = subprocess.Popen(
            [*VERB, "demo", "--out", tmp_path, "--iterations", "300"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            # a job in the background is born with it ignored
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
        )
        began, log, text = time.time(), here / "tst.log", ""
        while "iteration       10/" not in text:
            assert demo.poll() is None and time.time() < began + 240
            time.sleep(0.2)
            if log.exists() and log.stat().st_mtime > began:  # not the last demo's
                text = log.read_text(errors="replace")
        demo.send_signal(number)
        assert demo.wait(60) == -number
        assert "did not write there" not in demo.stderr.read()
        running = subprocess.run(["pgrep", "-f", str(here)], capture_output=True, text=True)
        assert not running.stdout
        assert {MARK, "baseline.log", "tst.log"} <= {*os.listdir(here)}
    assert not [name for name in os.listdir(tmp_path) if ".old-" in name or name[0] == "."]


def test_demo_says_where_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(*VERB, "demo", "--out", tmp_path / "file" / "out")
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "expected a place that can be written to" in done.stderr
    )


def test_plot_refuses_what_is_no_log(tmp_path):
    for name in ("absent", "empty"):
        if name == "empty":
            (tmp_path / name).write_text("nothing here\n")
        done = run(*VERB, "plot", "--output", tmp_path / "x.png", f"a={tmp_path / name}")
        assert (
            done.returncode == 2
            and re.match("megatron-tst plot: error: .*: expected", done.stderr)
            and done.stderr.count("\n") == 1
            and not (tmp_path / "x.png").exists()
        )


@pytest.mark.parametrize("superpose", tiers(["both", "input", "output"], {"both"}))
def test_step_benchmark_prints_its_ratios(superpose):
    done = run(
        sys.executable,
        "benchmarks/bench_step.py",
        "--steps",
        "1",
        "--json",
        "--superpose",
        superpose,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout)
    assert row["time_ratio"] > 0 and 0.5 < row["memory_ratio"] < 1.1 and row["ordinary_peak_mb"] > 1


def test_a_machine_without_a_suitable_python_is_told_what_to_install(tmp_path):
    (tmp_path / "cat").symlink_to(shutil.which("cat"))
    nowhere = dict(PATH=str(tmp_path), HOME=str(tmp_path), PYENV_ROOT=str(tmp_path), PYTHON="")
    done = run("/bin/sh", "tools/find_python.sh", **nowhere)
    assert (
        done.returncode == 1
        and "Python >= 3.12" in done.stderr
        and "pyenv install 3.12" in done.stderr
        and not done.stdout
    )
    done = run(
        "/bin/sh", "tools/find_python.sh", **nowhere | dict(PYTHON=str(tmp_path / "python9"))
    )
    assert done.returncode == 1 and "python9 to be a Python >= 3.12" in done.stderr
    assert os.access(
        run("/bin/sh", "tools/find_python.sh", PYTHON=sys.executable).stdout.strip(), os.X_OK
    )


@pytest.mark.slow
def test_step_benchmark_takes_a_recipes_model():
    small = "--num-layers 1 --seq-length 16 --max-position-embeddings 16 --vocab-size 500".split()
    flags = (
        "--model 270m --bag-size 6 --micro-batch 2 --micro-batches 2 --steps 1 --json --".split()
    )
    done = run(sys.executable, "benchmarks/bench_step.py", *flags, *small)
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout)
    assert (row["model"], row["seq_length"], row["micro_batch"], row["micro_batches"]) == (
        "270m",
        16,
        2,
        2,
    )
    times = row["ordinary_ms"] / row["superposed_ms"]
    assert row["superposed_raw_tokens_per_s"] == pytest.approx(
        6 * times * row["ordinary_tokens_per_s"], rel=0.05
    )
    assert row["ordinary_tokens_per_s"] == pytest.approx(
        2 * 2 * 16 / row["ordinary_ms"] * 1e3, rel=0.05
    )
