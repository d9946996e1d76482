"""tools/gpu_check.sh and what it calls, as far as a machine without a GPU goes: all of it rehearsed
on the CPU, the whole build for sm_90 and sm_100, the report, the FP8 comparison in 16 bit.
"""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import bench_step
import check_fp8
import check_kernels
import gpu_machine
import gpu_report
import measure
import pytest
import sanitize
import torch
from support import paths
from support.runs import ROOT

from megatron_tst import demo, model_size
from megatron_tst.checks import dry_run
from megatron_tst.ops.embedding import superposed_embedding
from megatron_tst.planning import recipes

GRAPHS = "tests/gpu/test_full_iteration_graph.py"
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None,
    reason="NOT RUN: the CUDA kernels were not compiled: no nvcc. Install a CUDA toolkit",
)


def run(*command, **environment):
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=ROOT,
    )


def gpu_check(*arguments, **named):
    environment = dict(PYTHON=sys.executable, OUT="", CUDA_VISIBLE_DEVICES="", MAX_JOBS="2")
    return run("tools/gpu_check.sh", *arguments, **environment | named)


@needs_nvcc
@pytest.mark.slow
def test_kernels_compile_for_hopper_and_blackwell_and_none_spills(tmp_path):
    done = gpu_check("--slow", "4", "--part", "build", tmp_path / "out")
    assert done.returncode == 0, done.stdout
    with tarfile.open(tmp_path / "out/details.tar") as details:
        found = json.load(details.extractfile("resources.json"))
    assert found["faults"] == []
    kernels = {(kernel["architecture"], kernel["kernel"]): kernel for kernel in found["kernels"]}
    assert {(arch, name.partition("<")[0]) for arch, name in kernels} == {
        (arch, kernel) for arch in ("sm_90", "sm_100") for kernel in gpu_machine.kernels()
    }
    assert {name for _, name in kernels if name.startswith("row_gradients")} == {
        f"row_gradients<{of}>" for of in ("float", "c10::BFloat16", "c10::Half")
    }
    # 2048 threads of a multiprocessor share 65536 registers; the kernels' blocks have 256 and 512
    # threads
    for kernel in kernels.values():
        assert (
            0 < kernel["registers"] <= 64
            and kernel["stack"] == kernel["spill_stores"] == kernel["spill_loads"] == 0
        )
    report = (tmp_path / "out/report.md").read_text()
    assert "| kernels that spill registers, or are missing | <= 0 | 0 | yes |" in report
    for part in ("first", "test", "bench", "fp8", "train"):
        assert f"| {part} |  | NOT RUN |  |  |" in report


@needs_nvcc
@pytest.mark.slow
def test_a_kernel_that_spills_is_found(tmp_path):
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void row_losses(float* x) { float a[64]; for (int i = 0; i < 64; ++i) a[i] = "
        "x[i * 32 + threadIdx.x];\n"
        "__syncthreads(); for (int i = 0; i < 64; ++i) x[i] = a[63 - i] * a[i] + a[(i * 7) % 64]; "
        "}\n"
    )
    for limit, spills in ((16, True), (255, False)):
        command = ["nvcc", "-arch=sm_90", "-Xptxas", "-v", f"-maxrregcount={limit}"]
        log = run(*command, "-cubin", "-o", tmp_path / "x.cubin", source).stderr
        (kernel,) = gpu_machine.kernels_in(log)
        assert (kernel["kernel"], kernel["architecture"]) == ("row_losses", "sm_90") and bool(
            kernel["spill_stores"]
        ) == spills
        faults = gpu_machine.faults([kernel], ["sm_90"])
        assert any("row_losses for sm_90 uses memory" in fault for fault in faults) == spills
        assert (
            "row_gradients is not there for sm_90" in faults
            and "row_losses is not there for sm_90" not in faults
        )


# ---- what is asked for


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--part", "fast", "OUT"], "--part: expected first build test .*, got fast"),
        (["--part", "", "OUT"], "--part: expected first build test .*, got nothing"),
        (["--part"], "--part: expected a part, got nothing"),
        (
            ["--part", "sanitize-leakcheck", "OUT"],
            "--part: expected sanitize- and one of: memcheck .*, got sanitize-leakcheck",
        ),
        (["--part", "first-", "OUT"], "--part: expected first- and one of: .*, got first-"),
        (["--wheels", "nowhere", "OUT"], "--wheels: expected a folder, got nowhere"),
        (["--extension", "nowhere", "OUT"], "--extension: expected a file, got nowhere"),
        (["--extension", "docs", "OUT"], "--extension: expected a file, got docs"),
        (["--slow", "0", "OUT"], "--slow: expected a whole number of 1 to 99, got 0"),
        (["--slow"], "--slow: expected a whole number, got nothing"),
        (["--fast"], "expected an option that --help names, got --fast"),
        (["--part", "build"], "expected a folder for the results, got none"),
        (
            ["--part", "build", "OUT", "OUT"],
            "expected one folder for the results, got .*out and .*out",
        ),
        (["--part", "build", "README.md"], "expected a folder for the results, got README.md"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(arguments, said, tmp_path):
    out = tmp_path / "out"
    done = gpu_check(*(out if argument == "OUT" else argument for argument in arguments))
    first, usage = done.stderr.splitlines()
    assert done.returncode == 2 and re.fullmatch(f"gpu_check: error: {said}", first), first
    assert "gpu_check.sh [--part PART[-STEP]]" in usage and not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_there_is(tmp_path):
    done = gpu_check("--part", "build", "--part", "fp8", tmp_path / "out")
    said = "--part build fp8: expected an NVIDIA GPU that torch can use, got none. Without one "
    assert done.returncode == 2 and f"{said}there are --part build and --rehearse" in done.stderr
    assert not (tmp_path / "out/steps.jsonl").exists()


def test_a_step_that_is_killed_has_not_run_out_of_time(tmp_path):
    """By the machine for its memory, say, long before its time is over."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase $1 in *check_kernels.py) kill -9 $$ ;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    out = tmp_path / "two words"
    done = gpu_check("--rehearse", "--part", "first-kernels", out, PYTHON=str(python))
    report = (out / "report.md").read_text()
    assert done.returncode == 1 and "FAILED (137) after" in done.stdout
    assert "first-kernels (exit code 137)" in report and "OUT OF TIME" not in report


def test_a_rehearsal_and_a_gpu_do_not_share_a_folder(tmp_path):
    step = '{"part": "first", "step": "loss", "code": 0, "seconds": 1, "limit": 9'
    for before, asked, what in (
        ("}", ["--rehearse"], "a GPU"),
        (', "rehearsed": true}', [], "a rehearsal"),
    ):
        (tmp_path / "steps.jsonl").write_text(f"{step}{before}\n")
        done = gpu_check(*asked, "--part", "first", tmp_path)
        assert done.returncode == 2 and f"which has results of {what}. Name another" in done.stderr


def test_help_sums_the_time_of_the_parts_and_names_their_steps():
    done = gpu_check("--help")
    assert done.returncode == 0 and not done.stderr
    budgets = dict(re.findall(r"^    (\w+) +(\d+)\b", done.stdout, re.M))
    together = int(budgets.pop("together"))
    assert list(budgets) == list(gpu_report.PARTS)
    assert sum(map(int, budgets.values())) == together
    assert max(map(int, budgets.values())) <= 240  # the machine may go after a few minutes
    steps = dict(re.findall(r"^    (\w+) +(\w[\w. ]*)$", done.stdout.split("Steps:")[1], re.M))
    assert list(steps) == list(gpu_report.PARTS)
    assert steps["sanitize"].split() == list(sanitize.TOOLS) == list(gpu_report.SANITIZERS)
    want = "extension compile resources kernels loss embedding step peers"
    assert steps["first"] == want  # what matters most first
    # what the report reads by name is a step
    for part, _, step in (
        name.partition("-")
        for name in re.findall(
            r'codes.get\("([\w-]+)"\)', (ROOT / "tools/gpu_report.py").read_text()
        )
    ):
        assert step in steps[part].split()


# Stands for Python on a machine with a GPU: notes what it is called with, and does nothing.
PLAYED = """#!/bin/sh
printf '%s\\037' "$@" >> "$CALLS"; echo >> "$CALLS"
case "$*" in *"gpu_machine.py machine"*) printf "$MACHINE" ;; esac
"""
PARSED = """
import argparse, importlib, json, sys

class Parsed(BaseException):
    pass

stock = argparse.ArgumentParser.parse_args

def parse_args(self, *given):
    raise Parsed(stock(self, *given))

argparse.ArgumentParser.parse_args = parse_args
for program, *arguments in json.load(sys.stdin):
    module = importlib.import_module(program)
    try:
        module.main(arguments)
    except Parsed as found:
        print(json.dumps([program, vars(found.args[0])], default=str))
"""


@pytest.mark.parametrize("te", [True, False])
def test_every_command_of_a_gpu_machine_is_one_that_its_program_takes(tmp_path, te):
    """The whole check with a Python that does nothing; then each command is parsed."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(PLAYED)
    python.chmod(0o755)
    machine = f"torch 2.11\\ntransformer-engine {'2.12' if te else 'not there'}\\ncapability 9.0\\n"
    environment = dict(PYTHON=str(python), CALLS=str(calls), MACHINE=machine)
    parts = [flag for part in gpu_report.PARTS for flag in ("--part", part)]
    done = run("tools/gpu_check.sh", *parts, tmp_path / "out", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    given = [line.split("\037")[:-1] for line in calls.read_text().splitlines()]
    steps = [json.loads(line) for line in (tmp_path / "out/steps.jsonl").read_text().splitlines()]
    assert {step["code"] for step in steps} == {0} and not any("rehearsed" in s for s in steps)
    for part in gpu_report.PARTS:  # the caps of a part's steps are within reach of its budget
        assert any(step["part"] == part for step in steps)
    for call in given:
        if call[:2] == ["-m", "pytest"]:
            files = [word for word in call[2:] if word.startswith("tests/")]
            assert files and all(name == GRAPHS or (ROOT / name).exists() for name in files)
    programs = [
        [path.removesuffix(".py").rpartition("/")[2], *arguments]
        for path, *arguments in given
        if path.startswith(("benchmarks/", "tools/check", "tools/sanitize", "examples/"))
    ]
    done = subprocess.run(
        [sys.executable, "-c", PARSED],
        input=json.dumps(programs),
        env=paths.environment(),
        text=True,
        capture_output=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert done.returncode == 0 and len(found) == len(programs) > 20, done.stderr[-2000:]
    steps = [options for program, options in found if program == "bench_step"]
    assert [options["model"] for options in steps].count("270m") == 3
    for options in steps:
        assert options["micro_batch"] == (1 if not te else 4 if options["model"] == "270m" else 2)
        again = options["model"] != "270m" and not te
        assert options["flags"] == (["--recompute-activations"] if again else [])
    sizes = {tuple(o["vocab_size"]) for p, o in found if p == "bench_multi_hot_ce" and o["apart"]}
    assert (gpu_report.WHOLE, gpu_report.SHARD) in sizes


# ---- wheels and extensions from elsewhere


def wheel(folder, name, module):
    """A wheel of one module in a folder that others share."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    files = {
        f"shared_by_wheels/{module}.py": "here = True\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for file, text in [*files.items(), (f"{info}/RECORD", record)]:
            archive.writestr(file, text)


def bring(wheels, site):
    path = os.pathsep.join([str(site), str(ROOT)])
    command = (sys.executable, "tools/gpu_machine.py", "wheels", wheels, site)
    return run(*command, PYTHONPATH=path)


def test_wheels_that_the_machine_lacks_are_put_beside_what_is_there(tmp_path):
    site = tmp_path / "site"
    wheel(tmp_path / "one", "tst_made_up_core", "core")
    done = bring(tmp_path / "one", site)
    assert done.returncode == 0 and "installed: tst_made_up_core-1.0" in done.stdout, done.stderr
    wheel(tmp_path / "one", "tst_made_up_torch", "torch")  # brought in a second call
    (tmp_path / "one/torch-1.0-py3-none-any.whl").write_text("not opened")
    done = bring(tmp_path / "one", site)
    assert done.returncode == 0, done.stderr
    there = re.search("^there: (.*)", done.stdout, re.M)[1].split()
    assert [name.split("-")[0] for name in there] == ["torch", "tst_made_up_core"]
    assert re.search("^installed: tst_made_up_torch-1.0[^ ]*$", done.stdout, re.M)
    assert {path.name for path in (site / "shared_by_wheels").iterdir()} == {"core.py", "torch.py"}
    assert "installed:\n" in bring(tmp_path / "one", site).stdout


def test_wheels_that_are_none_are_said(tmp_path):
    (tmp_path / "empty").mkdir()
    done = bring(tmp_path / "empty", tmp_path / "site")
    assert done.returncode == 1 and "expected wheels in" in done.stdout
    (tmp_path / "empty/no_such_package-1.0-py3-none-any.whl").write_text("no wheel")
    done = bring(tmp_path / "empty", tmp_path / "site")
    assert done.returncode != 0 and "installed: no_such_package" in done.stdout
    assert not (tmp_path / "site").exists()


def check_extension(path, before=""):
    """As the tool judges the file, after some lines of Python."""
    code = f"import sys, torch, gpu_machine\n{before}\nprint(gpu_machine.unfit({str(path)!r}))"
    code = code.replace(f"unfit({str(path)!r})", f"unfit(gpu_machine.Path({str(path)!r}))")
    done = run(
        sys.executable, "-c", code, PYTHONPATH=os.pathsep.join([str(ROOT / "tools"), str(ROOT)])
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture
def built():
    found = sorted((ROOT / "megatron_tst").glob("_C*.so"))
    if not found:
        pytest.skip("NOT RUN: an extension from elsewhere: none is built here")
    if "built of other sources" in check_extension(found[0]):
        pytest.skip("NOT RUN: the extension here is of other sources: build it anew")
    return found[0]


def test_an_extension_from_elsewhere_must_fit(built, tmp_path):
    elsewhere = shutil.copy(built, tmp_path)
    other = shutil.copy(built, tmp_path / "_C.cpython-399-x86_64-linux-gnu.so")
    assert "built for cpython-399, this is Python" in check_extension(other)
    (tmp_path / "_C.so").write_text("no library")
    assert "cannot be loaded with torch" in check_extension(tmp_path / "_C.so")
    assert check_extension(tmp_path / "absent.so") == "not there."
    other = 'gpu_machine.sources = lambda: "0123456789abcdef"'
    assert "built of other sources than those in csrc" in check_extension(elsewhere, other)
    a_gpu = (
        "torch.cuda.is_available = lambda: True\ntorch.cuda.get_device_capability = lambda: (12, 3)"
    )
    assert "this GPU is 12.3." in check_extension(elsewhere, a_gpu)


# ---- the rehearsal


def rehearse(out, *parts):
    asked = [flag for part in parts for flag in ("--part", part)]
    done = gpu_check("--rehearse", "--slow", "9", *asked, out)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= 8 and all(path.parent == out for path in files), files
    assert all(re.fullmatch(r"[\w.-]+", path.name) for path in files)
    report = (out / "report.md").read_text()
    assert report.startswith("# REHEARSED ON A CPU. NOT A GPU MEASUREMENT.")
    assert "| yes |" not in report and "**" not in report
    return report


def test_rehearsal_of_the_kernels(built, tmp_path):
    report = rehearse(tmp_path, "first-kernels")
    assert "| first | kernels | rehearsed |" in report and "cases are right." in report
    cases = (tmp_path / "kernels.csv").read_text().splitlines()
    assert len(cases) > 50 and sum("tensor parallel 2" in case for case in cases) == 6


@pytest.mark.parametrize("fault", ["loss", "gradient", "embedding", "nothing"])
def test_a_kernel_that_is_wrong_is_found(built, megatron, monkeypatch, tmp_path, fault):
    """A loss, a gradient or an embedding that is off by less than bf16 can show."""
    stock = check_kernels.KERNELS["extension"]

    def off(step):
        def call(*given):
            out = stock(step)(*given)
            if (step, fault) == ("loss", "loss"):
                return out[0] * (1 + 1e-4), out[1]
            return out * (1 + 1e-4) if (step, fault) == ("gradient", "gradient") else out

        return call

    def embed(*given):
        out = superposed_embedding(*given)
        return out * (1 + 1e-5) if fault == "embedding" else out

    monkeypatch.setitem(check_kernels.KERNELS, "extension", off)
    monkeypatch.setattr(check_kernels, "superposed_embedding", embed)
    code = check_kernels.main(["--small", "--csv", str(tmp_path / "kernels.csv")])
    with open(tmp_path / "kernels.csv") as file:
        wrong = {row["kernel"] for row in csv.DictReader(file) if row["ok"] != "yes"}
    assert (code, wrong) == (
        (0, set()) if fault == "nothing" else (1, {"embedding" if fault == "embedding" else "loss"})
    )


def test_the_first_minutes_call_it_by_this_name():
    """A script beside the project looks for the part in the text."""
    assert re.search(r"[|(]first[|)]", (ROOT / "tools/gpu_check.sh").read_text())


@pytest.mark.slow
def test_rehearsal_of_the_first_minutes(built, tmp_path):
    report = rehearse(tmp_path, "first")
    for step in ("kernels", "loss", "embedding", "step", "peers"):
        assert f"| first | {step} | rehearsed |" in report
    verdicts = {row["what"]: row["verdict"] for row in targets_of(report)}
    ran = {what for what, verdict in verdicts.items() if verdict == "rehearsed"}
    by_first = {
        t.what for t in gpu_report.targets(gpu_report.Results(tmp_path)) if t.part == "first"
    }
    assert by_first - ran == {"loss: Transformer Engine's time for one label over ours for 16"}


@pytest.mark.slow
def test_rehearsal_of_what_comes_after(built, tmp_path):
    report = rehearse(
        tmp_path,
        *("sanitize", "hints", "fp8-270m", "train-1.4b", "bench-linear", "test-gpu"),
        *("test-extension", "build-doctor"),
    )
    steps = report.split("## Steps")[1].split("\n## ")[0]
    ended = re.findall(r"^\| (\w+) \| ([\w.]+) \| (\w+) \|", steps, re.M)
    assert len(ended) == 17 and {how for *_, how in ended} == {"rehearsed"}
    assert "ours (plain_store), in place" in report and "| 1.4b |" in report


# ---- time on a GPU


class Events:
    """torch.cuda on paper: the GPU does what is queued one after the other, Python queues it at
    once, and needs `launch` ms for each call.
    """

    def __init__(self, launch, work):
        self.launch, self.work = launch, work
        self.python = self.gpu = 0.0  # ms at which each of them is done with what was given to it
        self.log = []

    def queue(self, what, ms):
        self.log.append(what)
        self.gpu = max(self.gpu, self.python) + ms

    def call(self):
        self.python += self.launch
        self.queue("call", self.work)

    def install(self, monkeypatch):
        outer = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                outer.queue("event", 0)
                self.at = outer.gpu

            def query(self):
                return self.at <= outer.python

            def elapsed_time(self, end):
                return end.at - self.at

        def synchronize():
            outer.python = max(outer.python, outer.gpu)

        cold = measure.functools.partial(lambda: self.queue("cold", 0.1))
        monkeypatch.setattr(measure, "has_gpu", lambda: True)
        monkeypatch.setattr(measure, "_delay", 1 << 20)
        monkeypatch.setattr(
            measure,
            "_larger_than_the_cache",
            lambda: type("Cold", (), {"zero_": staticmethod(cold)}),
        )
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        sleep = lambda cycles: self.queue("delay", cycles / 1.7e6)  # noqa: E731
        monkeypatch.setattr(torch.cuda, "_sleep", sleep)


def test_times_on_a_gpu_are_without_the_launches_of_python(monkeypatch):
    gpu = Events(launch=7.0, work=0.25)
    gpu.install(monkeypatch)
    prepared = []
    assert measure.seconds(gpu.call, lambda: prepared.append(1)) == pytest.approx(0.25e-3)
    tries = gpu.log.count("call")
    assert gpu.log == ["cold", "delay", "event", "call", "event"] * tries
    assert len(prepared) == tries == 5  # the delay doubles until it is longer than 7 ms
    gpu.log.clear()
    assert measure.seconds(gpu.call) == pytest.approx(0.25e-3)
    assert gpu.log.count("call") == 1  # and stays so


def test_a_call_that_no_delay_hides_is_timed_all_the_same(monkeypatch):
    gpu = Events(launch=100.0, work=0.25)
    gpu.install(monkeypatch)
    assert 0.05 < measure.seconds(gpu.call) < 0.11 and gpu.log.count("call") < 10


# ---- compute-sanitizer


CLEAN = "sanitize: CPU kernels, CUDA kernels; every kernel ran on cuda\n"


@pytest.mark.parametrize(
    "code, said, fault",
    [
        (0, CLEAN + "========= ERROR SUMMARY: 0 errors\n", None),
        (
            0,
            CLEAN + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
            None,
        ),
        (0, CLEAN + "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors)\n", "'2'"),
        (9, CLEAN + "========= ERROR SUMMARY: 3 errors\n", "exit code 9"),
        (0, CLEAN, "says nothing of its findings"),
        (0, "========= ERROR SUMMARY: 0 errors\n", "did not run to the end"),
        (0, CLEAN.replace("on cuda", "on cpu") + "========= ERROR SUMMARY: 0 errors\n", "no CUDA"),
    ],
)
def test_what_a_sanitizer_says_is_judged(code, said, fault):
    found = sanitize.judge(code, said)
    assert (found is None) if fault is None else fault in found


def test_the_sanitizer_is_started_over_the_kernels(tmp_path):
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(
        '#!/bin/sh\necho "$@ cached: $PYTORCH_NO_CUDA_MEMORY_CACHING"\n'
        'echo "every kernel ran on cuda"\necho "========= RACECHECK SUMMARY: 0 hazards"\n'
    )
    fake.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = run(sys.executable, "tools/sanitize.py", "--under", "racecheck", PATH=path)
    assert done.returncode == 0 and "sanitize: racecheck: clean" in done.stdout, done.stderr
    assert "--tool racecheck --error-exitcode 9" in done.stdout
    assert "sanitize.py --few cached: 1" in done.stdout


# ---- the report


def with_header_of(name, out, *rows):
    """A CSV as the benchmark writes it (its committed figures have the same columns)."""
    columns = (ROOT / "benchmarks/data" / name).read_text().splitlines()[0].split(",")
    assert all(set(row) <= set(columns) for row in rows)
    lines = [",".join(f'"{row.get(column, 0)}"' for column in columns) for row in rows]
    (out / name).write_text("\n".join([",".join(columns), *lines]) + "\n")


def loss_rows(ms, share=0.9):
    times = {
        "copy": 1.7,
        "ours": ms,
        "ours, in place": ms,
        "te, single": 2.0,
        "te x s": 30.0,
        "paper's loop, compiled": 9.0,
    }
    return [
        dict(N=8192, V=v, dtype="bf16", variant=variant, s=s, ms=time, share_of_copy=share)
        | dict(logits_mb=2489.3)
        for v in (151936, 18992)
        for s in (1, 16)
        for variant, time in times.items()
    ]


def targets_of(report):
    """Of a report's text: the rows of its targets."""
    lines = report.split("## Targets\n\n")[1].split("\n\n")[0].splitlines()[2:]
    keys = ("what", "wanted", "measured", "verdict")
    return [dict(zip(keys, line.strip("| ").split(" | "))) for line in lines]


def verdicts(out):
    assert gpu_report.main(str(out)) == 0
    rows = targets_of((out / "report.md").read_text())
    return {row["what"]: row["verdict"] for row in rows}


def test_report_of_nothing_claims_nothing(tmp_path):
    found = verdicts(tmp_path)
    assert set(found.values()) == {"NOT RUN"} and len(found) == 18
    report = (tmp_path / "report.md").read_text()
    assert report.count("NOT RUN") == 18 + len(gpu_report.PARTS)
    assert "Of 18 targets 0 are met, 0 are missed and 18 were not run." in report
    for part in ("first", "train-1.4b", "sanitize-initcheck", "fp8", "graphs"):
        assert f"--part {part}" in report


STEPS = [
    *("test-gpu", "test-ranks", "graphs-full_iteration"),
    *(f"sanitize-{tool}" for tool in sanitize.TOOLS),
]


def results(out, good):
    """Of a GPU on which all is well, or nothing."""
    with_header_of(
        "multi_hot_ce.csv",
        out,
        *loss_rows(5.0, 0.5),
        *loss_rows(1.0 if good else 3.1, 0.9 if good else 0.74),
    )
    step = dict(precision="bfloat16", time_ratio=1.01 if good else 1.03)
    others = [dict(step, model="600m", time_ratio=3), dict(step, model="270m", precision="fp8")]
    with_header_of("step.csv", out, *(dict(step, model=m) for m in ("270m", "1.4b")), *others)
    shape = dict(V=128256, H=4096, b=2, L=4096, s=16, dtype="bf16")
    torch_path = dict(shape, variant="ours, torch, main_grad", ms=4.1)
    ours = dict(shape, variant="ours, main_grad", ms=1.0 if good else 1.1)
    with_header_of("embedding.csv", out, torch_path, ours, dict(ours, dtype="fp32", ms=9))
    lines = [
        dict(zip(("part", "step"), name.split("-")), code=code, seconds=1, limit=60)
        for code in (1, 0 if good else 9)
        for name in STEPS
    ]
    (out / "steps.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )  # the later run counts
    (out / "kernels.csv").write_text(
        "kernel,case,difference,allowed,ok\nloss,a,0.1,1,yes\nloss,b,0.1,1,"
        + ("yes\n" if good else "NO\n")
    )
    ends = {"loss": 5.0, "distance": 0.009 if good else 0.011}
    exact = {"loss": 5.0, "distance": 0.0}
    recipes = {
        "bf16": {"superposition": exact, "recovery": exact},
        "tensorwise": {"superposition": exact | {"distance": 0.001}, "recovery": ends},
    }
    settings = dict(last=10, iterations=50, reference="bf16", limit=0.01, holds=good)
    fp8 = dict(settings, recipes=recipes, wanted=[*recipes])
    (out / "fp8.json").write_text(json.dumps(fp8))
    spills = {"kernels": [], "faults": [] if good else ["x"]}
    (out / "resources.json").write_text(json.dumps(spills))
    with tarfile.open(out / "details.tar", "w") as details:  # the newest of a name counts
        for old in ({"kernels": [], "faults": ["x", "y"]}, spills):
            (out / "packed").write_text(json.dumps(old))
            details.add(out / "packed", "resources.json")
    (out / "resources.json").unlink()


@pytest.mark.parametrize("good", [True, False])
def test_report_holds_figures_against_what_is_wanted(tmp_path, good):
    results(tmp_path, good)
    found = verdicts(tmp_path)
    flat = found.pop("loss: time at s = 16 over s = 1")
    assert flat == "yes" and set(found.values()) == {"yes" if good else "**no**"}, found
    report = (tmp_path / "report.md").read_text()
    assert "5.0000 (0.100%)" in report and ("**FAILED (9)**" in report) == (not good)
    assert ("| loss | b | 0.1 | 1 | NO |" in report) == (not good)
    said = report.split("## Conclusions")[1].split("## Targets")[0]
    count = "18 are met, 0 are missed" if good else "1 are met, 17 are missed"
    assert f"Of 18 targets {count} and 0 were not run." in said
    assert "A copy of the logits moves 2.93 TB/s here" in said
    if good:
        assert "Missed" not in said and "(0.9, wanted >= 0.85)" in said
    else:
        assert "The kernels are wrong, so no time below counts" in said
        assert "V = 151936, s = 16 is 0.74, wanted >= 0.85, 12.9% off. Look first at" in said


def test_a_recipe_that_failed_is_no_yes_and_one_that_is_missing_is_not_run(tmp_path):
    settings = dict(last=10, iterations=50, reference="bf16", wanted=["bf16", "tensorwise"])
    what = "FP8: largest distance of a loss from bf16's, either phase"
    good = {"superposition": {"loss": 5.0, "distance": 0.0}}
    for found, verdict in (
        ({"bf16": None, "tensorwise": None}, "**no**"),
        ({"bf16": good, "tensorwise": None}, "**no**"),
        ({"bf16": good}, "NOT RUN"),
        ({"bf16": good, "tensorwise": good}, "yes"),
    ):
        (tmp_path / "fp8.json").write_text(json.dumps(dict(settings, recipes=found)))
        assert verdicts(tmp_path)[what] == verdict


def test_what_ran_out_of_time_is_named(tmp_path):
    line = {"part": "sanitize", "step": "racecheck", "code": 124, "seconds": 60, "limit": 60}
    (tmp_path / "steps.jsonl").write_text(json.dumps(line))
    assert verdicts(tmp_path)["compute-sanitizer, racecheck, exit code"] == "**no**"
    report = (tmp_path / "report.md").read_text()
    assert (
        "sanitize-racecheck (out of time)" in report and "| **OUT OF TIME** | 60 | 60 |" in report
    )


def test_builds_without_hints_are_held_against_the_ordinary_one(tmp_path):
    shape = dict(N=8192, V=18992, s=16, dtype="bf16")
    times = [("ours, in place", 2.0), ("ours (plain_forward), in place", 1.9)]
    times += [("ours, in place", 4.0), ("ours (plain_store), in place", 4.4)]
    rows = [dict(shape, variant=variant, ms=ms) for variant, ms in times]
    with_header_of("multi_hot_ce.csv", tmp_path, *rows)
    said = gpu_report.conclusions(gpu_report.Results(tmp_path))
    assert (
        "Without cache hints: plain_forward takes 0.95 of the time at V = 18992; "
        "plain_store takes 1.1 of the time at V = 18992." in said
    )


# ---- FP8 against bf16


@pytest.mark.slow
def test_fp8_comparison_trains_both_phases_and_compares_them(tmp_path, corpus):
    given = ["--iterations", "4", "--seq-length", "32", "--corpus", corpus]
    done = run(
        sys.executable,
        "tools/check_fp8.py",
        tmp_path,
        "--reference",
        "fp32",
        "--recipes",
        "bf16",
        *given,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    report = json.loads((tmp_path / "fp8.json").read_text())
    assert report["holds"] and set(report["recipes"]) == {"fp32", "bf16"}
    for phase in ("superposition", "recovery"):
        exact, rounded = report["recipes"]["fp32"][phase], report["recipes"]["bf16"][phase]
        assert exact["distance"] == 0 and 0 < rounded["distance"] < 0.01 and 4 < rounded["loss"] < 7
    assert "boundary after iteration 4" in (tmp_path / "bf16.log").read_text()


def test_fp8_comparison_judges():
    options = check_fp8.argparse.Namespace(reference="bf16", iterations=12, distance=0.01)

    def phases(first, second):
        return {"superposition": [9.0] * 2 + [first] * 10, "recovery": [9.0] * 2 + [second] * 10}

    def holds(recipe):
        return check_fp8.judge({"bf16": phases(5.0, 4.0), "tensorwise": recipe}, options)["holds"]

    assert (
        holds(phases(5.049, 3.961))
        and not holds(phases(5.051, 4.0))
        and not holds(phases(5.0, 3.959))
    )
    assert not holds(phases(math.nan, 4.0)) and not holds(None)
    assert not check_fp8.judge({"bf16": None, "tensorwise": phases(5.0, 4.0)}, options)["holds"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "expected an NVIDIA GPU that runs FP8"),
        (["--recipes", "tensorwise"], "expected an NVIDIA GPU, got none"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp8_comparison_says_what_it_needs(arguments, said, tmp_path):
    done = run(sys.executable, "tools/check_fp8.py", tmp_path / "out", *arguments)
    assert done.returncode == 2 and said in done.stderr and not (tmp_path / "out").exists()


MOE = "moe-10b-a1b"


def with_transformer_engine(monkeypatch):
    """megatron_tst.demo finds it; dry_run.validate assumes one and the GPU."""
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: name == "transformer_engine")
    monkeypatch.setattr(check_fp8, "has_te", lambda: True)


@pytest.mark.parametrize("recipe", check_fp8.FLAGS)
def test_fp8_comparison_asks_for_what_megatron_takes(recipe, corpus, monkeypatch):
    with_transformer_engine(monkeypatch)
    options = check_fp8.argparse.Namespace(iterations=50, seq_length=256)
    args = dry_run.validate(
        check_fp8.flags(recipe, corpus, 512, options, "cuda"),
        1,
        "b200" if recipe == "mxfp8" else "h100",
    )
    assert bool(args.fp8) == (recipe not in ("fp32", "bf16")) and (
        not args.fp8 or args.fp8_recipe == recipe
    )
    assert args.transformer_impl == "transformer_engine" and args.moe_grouped_gemm


@pytest.mark.parametrize("model", [*recipes.RECIPES, bench_step.ACTIVE])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_step_benchmark_asks_for_what_megatron_takes(model, precision, monkeypatch):
    with_transformer_engine(monkeypatch)
    monkeypatch.setattr(bench_step, "has_gpu", lambda: True)
    options = bench_step.argparse.Namespace(
        model=model, precision=precision, micro_batch=2, micro_batches=3, flags=[]
    )
    args = dry_run.validate(bench_step.flags_of(options), 1, "h100")
    assert (args.fp8 and args.fp8_recipe) == (
        "tensorwise" if precision == "fp8" else None
    ) and args.bf16
    assert (args.micro_batch_size, args.global_batch_size, args.seq_length) == (2, 6, 4096)
    if model == bench_step.ACTIVE:  # as many weights as a token of the recipe goes through
        whole = dry_run.validate(
            bench_step.flags_of(bench_step.argparse.Namespace(**vars(options) | {"model": MOE})),
            1,
            "h100",
        )
        routers = whole.num_layers * whole.num_experts * whole.hidden_size
        used = model_size.parameters(whole)[0] - model_size.idle_parameters(whole) - routers
        assert model_size.parameters(args)[0] == used and 1.3e9 < used < 1.5e9


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L4", None),
    ],
)
def test_mfu_is_stated_only_where_the_peak_is_known(name, peak, monkeypatch):
    monkeypatch.setattr(measure, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert measure.peak_tflops() == peak
