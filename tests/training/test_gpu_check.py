"""tools/gpu_check.sh and what it calls, as far as a machine without a GPU goes: the whole build for
sm_90 and sm_100, the report, the FP8 comparison in 16 bit.
"""

import json
import math
import os
import shutil
import subprocess
import sys

import bench_step
import check_fp8
import demo_run
import dry_run
import gpu_report
import measure
import pytest
import torch
from support.runs import ROOT

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


def gpu_check(*arguments):
    environment = dict(PYTHON=sys.executable, OUT="", CUDA_VISIBLE_DEVICES="", MAX_JOBS="2")
    return run("tools/gpu_check.sh", *arguments, **environment)


@needs_nvcc
@pytest.mark.slow
def test_kernels_compile_for_hopper_and_blackwell_and_none_spills(tmp_path):
    done = gpu_check("--part", "build", tmp_path / "out")
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "out/resources.json").read_text())
    assert found["faults"] == []
    kernels = {(kernel["architecture"], kernel["kernel"]): kernel for kernel in found["kernels"]}
    assert set(kernels) == {
        (arch, kernel) for arch in ("sm_90", "sm_100") for kernel in gpu_report.KERNELS
    }
    # 2048 threads of a multiprocessor share 65536 registers; the kernels' blocks have 256 and 512
    # threads
    for kernel in kernels.values():
        assert (
            0 < kernel["registers"] <= 64
            and kernel["stack"] == kernel["spill_stores"] == kernel["spill_loads"] == 0
        )
    report = (tmp_path / "out/report.md").read_text()
    assert "| kernels that spill registers | 0 | 0 | yes |" in report
    for part in ("test", "bench", "fp8", "train"):
        assert f"| {part} |  | NOT RUN |  |" in report


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
        command = [
            "nvcc",
            "-arch=sm_90",
            "-Xptxas",
            "-v",
            f"-maxrregcount={limit}",
            "-cubin",
            "-o",
            tmp_path / "x.cubin",
            source,
        ]
        log = run(*command).stderr
        (kernel,) = gpu_report.kernels_in(log)
        assert (kernel["kernel"], kernel["architecture"]) == ("row_losses", "sm_90") and bool(
            kernel["spill_stores"]
        ) == spills
        faults = gpu_report.faults([kernel], ["sm_90"])
        assert any("row_losses for sm_90 uses memory" in fault for fault in faults) == spills
        assert (
            "row_gradients<float> is not there for sm_90" in faults
            and "row_losses is not there for sm_90" not in faults
        )


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--part", "fast", "out"], "--part: expected build, test, bench, fp8 or train, got fast"),
        (["--part"], "--part: expected build, test, bench, fp8 or train, got nothing"),
        (["--wheels", "nowhere", "out"], "--wheels: expected a folder, got nowhere"),
        (["--fast"], "expected --part or --wheels, got --fast"),
        (["--part", "build"], "expected a folder for the results, got none"),
        (
            ["--part", "build", "--part", "fp8", "out"],
            "--part build fp8: expected an NVIDIA GPU that torch can use, got none",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(arguments, said, tmp_path):
    if torch.cuda.is_available() and "GPU" in said:
        pytest.skip("there is a GPU")
    done = gpu_check(
        *(tmp_path / "out" if argument == "out" else argument for argument in arguments)
    )
    assert done.returncode == 2 and said in done.stderr.splitlines()[0], done.stderr
    assert not (tmp_path / "out/steps.jsonl").exists()


def test_wheels_that_the_machine_has_are_left_where_they_are(tmp_path):
    wheel = tmp_path / "wheels"
    wheel.mkdir()
    (wheel / "torch-1.0-py3-none-any.whl").write_text("not opened")
    done = run(sys.executable, "tools/gpu_report.py", "wheels", wheel, tmp_path / "site")
    assert (
        done.returncode == 0
        and "there: torch-1.0" in done.stdout
        and not (tmp_path / "site").exists()
    )
    (wheel / "no_such_package-1.0-py3-none-any.whl").write_text("no wheel")
    done = run(sys.executable, "tools/gpu_report.py", "wheels", wheel, tmp_path / "site")
    assert done.returncode != 0 and "installed: no_such_package" in done.stdout
    done = run(
        sys.executable, "tools/gpu_report.py", "wheels", tmp_path / "empty", tmp_path / "site"
    )
    assert done.returncode == 1 and "expected wheels in" in done.stdout


# ---- the report


def with_header_of(name, out, *rows):
    """A CSV as the benchmark writes it (its committed figures have the same columns)."""
    columns = (ROOT / "benchmarks/data" / name).read_text().splitlines()[0].split(",")
    assert all(set(row) <= set(columns) for row in rows)
    lines = [",".join(f'"{row.get(column, 0)}"' for column in columns) for row in rows]
    (out / name).write_text("\n".join([",".join(columns), *lines]) + "\n")


def loss_rows(ms, share=0.9):
    shape = dict(N=8192, V=151936, dtype="bf16")
    times = {
        "ours": ms,
        "ours, in place": ms,
        "te, single": 2.0,
        "te x s": 30.0,
        "paper's loop, compiled": 9.0,
    }
    return [
        dict(shape, variant=variant, s=s, ms=time, share_of_copy=share)
        for s in (1, 16)
        for variant, time in times.items()
    ]


def verdicts(out):
    return {
        what: end
        for what, _, _, end in (
            line.strip("| ").split(" | ") for line in gpu_report._targets(out).splitlines()[4:]
        )
    }


def test_report_of_nothing_claims_nothing(tmp_path):
    assert gpu_report.report(str(tmp_path)) == 0
    assert set(verdicts(tmp_path).values()) == {"NOT RUN"} and len(verdicts(tmp_path)) == 11
    assert (tmp_path / "report.md").read_text().count("NOT RUN") == 11 + len(gpu_report.PARTS)


@pytest.mark.parametrize("good", [True, False])
def test_report_holds_figures_against_what_is_wanted(tmp_path, good):
    with_header_of(
        "multi_hot_ce.csv",
        tmp_path,
        *loss_rows(5.0, 0.5),
        *loss_rows(1.0 if good else 3.1, 0.9 if good else 0.84),
    )
    step = dict(
        model="270m",
        precision="bfloat16",
        time_ratio=1.01,
        ordinary_tokens_per_s=100,
        superposed_raw_tokens_per_s=594,
    )
    if not good:
        step |= dict(time_ratio=1.03, superposed_raw_tokens_per_s=580)
    with_header_of("step.csv", tmp_path, dict(step, model="600m", time_ratio=3), step)
    names = [
        "test_gpu",
        "test_tp2_training",
        *(f"sanitizer_{tool}" for tool in ("memcheck", "racecheck", "synccheck")),
    ]
    lines = [
        {"part": "test", "step": name, "code": code, "seconds": 1}
        for code in (1, 0 if good else 9)
        for name in names
    ]
    (tmp_path / "steps.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )  # the later run counts
    (tmp_path / "resources.json").write_text(
        json.dumps({"kernels": [], "faults": [] if good else ["x"]})
    )
    (tmp_path / "fp8").mkdir()
    ends = {"loss": 5.0, "distance": 0.009 if good else 0.011}
    recipes = {
        "bf16": {
            "superposition": {"loss": 5.0, "distance": 0.0},
            "recovery": {"loss": 5.0, "distance": 0.0},
        }
    }
    recipes["tensorwise"] = {"superposition": {"loss": 5.0, "distance": 0.001}, "recovery": ends}
    (tmp_path / "fp8/fp8.json").write_text(
        json.dumps(
            {
                "recipes": recipes,
                "last": 10,
                "iterations": 50,
                "reference": "bf16",
                "limit": 0.01,
                "holds": good,
            }
        )
    )
    found = verdicts(tmp_path)
    flat = found.pop("loss: time at s = 16 over s = 1")
    assert flat == "yes" and set(found.values()) == {"yes" if good else "**no**"}, found
    assert gpu_report.report(str(tmp_path)) == 0
    report = (tmp_path / "report.md").read_text()
    assert "5.0000 (0.100%)" in report and ("**FAILED (9)**" in report) == (not good)


def test_a_recipe_that_failed_is_no_yes(tmp_path):
    (tmp_path / "fp8").mkdir()
    found = {
        "recipes": {"bf16": None, "tensorwise": None},
        "last": 10,
        "iterations": 50,
        "reference": "bf16",
    }
    (tmp_path / "fp8/fp8.json").write_text(json.dumps(found))
    assert (
        verdicts(tmp_path)["FP8: largest distance of a loss from bf16's, either phase"] == "**no**"
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


def with_transformer_engine(monkeypatch):
    """demo_run finds it; dry_run.validate assumes one and the GPU."""
    monkeypatch.setattr(
        demo_run.importlib.util, "find_spec", lambda name: name == "transformer_engine"
    )
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


@pytest.mark.parametrize("model", bench_step.RECIPES)
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
