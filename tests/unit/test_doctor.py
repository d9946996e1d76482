"""`megatron-tst doctor`: real runs with broken packages in front of the real ones, and its
judgements of GPUs that are not here.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

from megatron_tst import compat, extension
from megatron_tst.cli import doctor
from megatron_tst.doctor import judges, probes, report
from megatron_tst.loop import seams

ROOT = Path(__file__).resolve().parent.parent.parent
VERB, DOOR = ("-m", "megatron_tst", "doctor"), (str(ROOT / "tools/doctor.py"),)
BUILT = "8.0 9.0 10.0+PTX"  # setup.py's default
HALF = "assert False, 'Could not find shared object file for Transformer Engine torch lib.'"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Puts packages before the real ones, for processes started in this test:
    packages({"apex/__init__.py": source, ...}).
    """

    def write(sources):
        for name, source in sources.items():
            file = tmp_path / "packages" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)

    path = [str(tmp_path / "packages"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    return write


def run(*arguments, python=(), cpu="1", doctor=VERB):
    """-> exit code, what was printed"""
    command = [sys.executable, *python, *doctor, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"MEGATRON_TST_CPU": cpu}
    )
    assert not done.stderr
    return done.returncode, done.stdout


def rows_of(report):
    return {row["name"]: row for row in report["rows"]}


def faults_of(report):
    return {row["name"] for row in report["rows"] if row["state"] == "FAULT"}


def test_a_healthy_environment_and_that_what_is_said_is_true(packages):
    code, text = run()
    assert code == 0 and "no fault: training would start" in text and "FAULT" not in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= doctor.WIDTH and 12 <= lines.index("") <= 16

    def said(name):
        return re.search(rf"^ *{name} +(?:ok|note)? *(.*(?:\n {{28}}\S.*)*)", text, re.MULTILINE)[
            1
        ].split()

    assert " ".join(said("extension")) == extension.load().description
    assert (
        said("torch")[0] == f"{torch.__version__},"
        and said("megatron-core")[0] == compat.megatron_version()
    )
    assert said("megatron-tst")[1] == str(ROOT / "megatron_tst")
    kernel = extension.choose("auto", "cpu")
    uses = " ".join(said(r"embedding and loss on CPU"))
    assert ("extension" in uses) == (kernel == "extension")
    assert said("Adam") == [f"torch.optim.{torch.optim.AdamW.__module__.split('.')[-1]}.AdamW"]
    assert set(said("flags for what is absent")) == {
        "--transformer-impl",
        "local",
        "--no-persist-layer-norm",
        "--no-rope-fusion",
        "--no-masked-softmax-fusion",
        "--no-gradient-accumulation-fusion",
    }


def test_half_a_transformer_engine_and_a_foreign_apex_are_named_and_hide_nothing_else(
    packages, tmp_path
):
    packages({"apex/__init__.py": "", "transformer_engine/__init__.py": HALF})
    code, text = run("--json")
    said = json.loads(text)
    rows = rows_of(said)
    assert (
        code == 1 and not said["would_train"] and faults_of(said) == {"Transformer Engine", "apex"}
    )
    assert "AssertionError: Could not find shared object" in rows["Transformer Engine"]["found"]
    assert "in one version, or uninstall all of them" in rows["Transformer Engine"]["do"]
    assert (
        str(tmp_path / "packages/apex") in rows["apex"]["found"]
        and "pip uninstall apex" in rows["apex"]["do"]
    )
    assert (
        rows["megatron-core"]["found"] == compat.megatron_version()
        and rows["seams of Megatron"]["state"] == "ok"
    )
    assert said["will_use"]["Adam"].startswith("unknown")


def test_a_megatron_out_of_range_and_a_machine_without_a_device(packages):
    packages({"megatron/core/__init__.py": "__version__ = '0.17.1'"})
    code, text = run(cpu="0")
    text = " ".join(text.split())
    assert code == 1 and "2 faults: training would fail" in text
    assert (
        "megatron-core: expected >=0.18,<0.21, got 0.17.1. `pip install "
        "'megatron-core>=0.18,<0.21'`." in text
    )
    assert "set MEGATRON_TST_CPU=1: on CPU with gloo" in text


def test_a_resiliency_extension_that_megatron_cannot_import_beside(packages):
    """As PyPI's newest, 0.4.1, has no __version__."""
    asked = (
        "__init__",
        "core",
        "cached_metadata_filesystem_reader",
        "filesystem_async",
        "state_dict_saver",
    )
    inner = {f"nvidia_resiliency_ext/checkpointing/async_ckpt/{name}.py": "" for name in asked}
    packages(
        {
            "nvidia_resiliency_ext/__init__.py": "",
            "nvidia_resiliency_ext/checkpointing/__init__.py": "",
            **inner,
        }
    )
    row = rows_of(json.loads(run("--json", cpu="0")[1]))["megatron-core"]
    assert row["state"] == "FAULT" and "has no attribute '__version__'" in row["found"]
    assert "pip uninstall nvidia-resiliency-ext" in row["do"]


def test_nothing_but_python(packages):
    """Neither site-packages nor PYTHONPATH is read: the door loads the checkout's own files."""
    code, text = run(python=("-I", "-S"), doctor=DOOR)
    again, found = run("--json", python=("-I", "-S"), doctor=DOOR)
    found = json.loads(found)
    assert (code, again) == (1, 1) and faults_of(found) == {
        "megatron-tst",
        "torch",
        "megatron-core",
    }
    assert doctor.screen(found) == text.rstrip("\n")
    assert (
        "torch: expected `import torch` to work, got ModuleNotFoundError: No module named "
        "'torch'. `pip install" in text
    )


def test_no_package_but_this_one(packages):
    """PYTHONPATH is read, site-packages is not; the door in tools/ says the same."""
    code, found = run("--json", python=("-S",))
    assert code == 1 and faults_of(json.loads(found)) == {"torch", "megatron-core"}
    assert run("--json", python=("-S",), doctor=DOOR) == (code, found)


def test_help_is_one_screen(packages):
    code, text = run("--help")
    assert code == 0 and len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    "source, error",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "a crash (SIGSEGV)"),
        ("import os; os._exit(7)", "a crash (exit code 7)"),
        ("raise SystemExit('no')", "SystemExit: no"),
        ("import time; time.sleep(600)", "no answer within 5 s"),
        (
            HALF,
            "AssertionError: Could not find shared object file for Transformer Engine torch lib.",
        ),
    ],
)
def test_whatever_an_import_does_is_reported(packages, monkeypatch, source, error):
    packages({"torch.py": "", "transformer_engine/__init__.py": source})
    if "sleep" in source:
        monkeypatch.setattr(probes, "TIMEOUT", 5)
    found = probes.ask("packages", "transformer_engine")
    assert found["packages"]["megatron-tst"]["folder"] == str(
        ROOT / "megatron_tst"
    )  # what was found before is kept
    assert found["transformer_engine"]["error"] == error
    assert judges.judge_transformer_engine(found["transformer_engine"]).state == "FAULT"


@pytest.mark.parametrize(
    "source, said",
    [
        (
            "torch_version, cuda_architectures = '1.0.0', ''",
            "built with torch 1.0.0, this is torch",
        ),
        (
            "raise ImportError('_C.so: undefined symbol: _ZN3c10')",
            "built but not loadable with torch",
        ),
    ],
)
def test_an_extension_that_does_not_fit_this_torch(packages, tmp_path, source, said):
    built = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(ROOT / "megatron_tst", tmp_path / "packages/megatron_tst", ignore=built)
    packages({"megatron_tst/_C.py": source})
    found = probes.ask("extension")["extension"]
    row = judges.judge_extension(found, [])
    assert (
        row.state == "FAULT"
        and row.found.startswith(said)
        and "Build it again: `pip install" in row.do
    )
    assert report.will_use(found, {}, [])["embedding and loss on CPU"].startswith("torch kernels")


def test_a_changed_seam_is_named(monkeypatch):
    """In this process, whose Megatron can be changed."""
    found = {}
    probes.probe_megatron(found)
    assert (
        judges.judge_seams(found).state == "ok"
        and judges.judge_megatron(found, ">=0.18,<0.21").state == "ok"
    )
    owner = seams.EMBEDDING.owner()
    monkeypatch.setattr(owner, "forward", lambda self, ids: None)
    probes.probe_megatron(found)
    row = judges.judge_seams(found)
    assert (
        row.state == "FAULT"
        and row.found.startswith("1 that do not: ")
        and str(seams.EMBEDDING) in row.found
    )
    assert "0.19.2" in row.do


APEX = {
    "torch.py": "",
    "apex/__init__.py": "",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": "",
}


@pytest.mark.parametrize(
    "sources, state, said",
    [
        ({}, "note", "absent: train with --no-gradient-accumulation-fusion"),
        (
            {"apex/read.me": ""},
            "FAULT",
            "another package of that name",
        ),  # a folder: Megatron's `import apex` takes it
        (
            {"apex/__init__.py": "import pyramid"},
            "FAULT",
            "ModuleNotFoundError: No module named 'pyramid'",
        ),
        (
            APEX,
            "FAULT",
            "NVIDIA's without amp_C (ModuleNotFoundError: No module named 'amp_C')",
        ),
        (
            APEX | {"amp_C.py": ""},
            "note",
            "without fused_weight_gradient_mlp_cuda (ModuleNotFoundError: No module named 'fused_",
        ),
        (
            APEX | {"amp_C.py": "raise OSError('libcuda.so.1: cannot open')"},
            "FAULT",
            "NVIDIA's without amp_C (OSError: libcuda.so.1: cannot open)",
        ),
        (APEX | {"amp_C.py": "", "fused_weight_gradient_mlp_cuda.py": ""}, "ok", "NVIDIA's: "),
    ],
)
def test_which_apex(packages, sources, state, said):
    packages({"torch.py": ""} | sources)
    row = judges.judge_apex(probes.ask("apex")["apex"])
    assert row.state == state and said in row.found


def test_packages_are_looked_for_where_python_m_looks_first(packages, tmp_path):
    packages({"torch.py": ""})
    (
        tmp_path / "apex"
    ).mkdir()  # apex's own repository, say: Megatron's `import apex` takes the folder
    assert probes.ask("apex")["apex"]["folder"] == str(tmp_path / "apex")


@pytest.mark.parametrize(
    "versions, state, said",
    [
        ({}, "note", "absent: no FP8"),
        (
            {"transformer_engine_cu13": "2.20.2"},
            "FAULT",
            "(transformer-engine-cu13 2.20.2)",
        ),  # and nothing to import
        (
            dict.fromkeys(("", "_cu13", "_torch"), "2.20.2"),
            "ok",
            "whole: transformer-engine 2.20.2, transformer-engine-cu13 2.20.2",
        ),
        (
            {"": "2.20.2", "_cu13": "2.19.0", "_torch": "2.20.2"},
            "FAULT",
            "half-installed: transformer-engine 2.20.2",
        ),
    ],
)
def test_which_transformer_engine(packages, versions, state, said):
    packages({"torch.py": ""})
    for part, version in versions.items():
        name = part if part.startswith("transformer") else f"transformer_engine{part}"
        packages(
            {
                f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: "
                f"{name}\nVersion: {version}\n"
            }
        )
    if "" in versions:
        packages({"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": ""})
    row = judges.judge_transformer_engine(probes.ask("transformer_engine")["transformer_engine"])
    assert row.state == state and said in row.found


def gpu(capability, **more):
    return {"name": "NVIDIA X", "capability": list(capability), "GiB": 79} | more


def torch_with(*gpus, cuda="13.0", nvidia_smi=("NVIDIA X, 580.65.06",)):
    return {
        "version": "2.11.0+cu130",
        "cuda": cuda,
        "gpus": list(gpus),
        "nvidia_smi": list(nvidia_smi),
    }


def built(architectures=BUILT, **more):
    found = {
        "built": True,
        "loaded": True,
        "cuda": bool(architectures),
        "architectures": architectures,
        "errors": {},
    }
    return (
        found
        | {
            "description": "CPU kernels",
            "auto": {"cpu": "extension", "cuda": "extension" if architectures else "torch"},
        }
        | more
    )


@pytest.mark.parametrize("exit_code", [0, 9])
def test_what_the_gpu_probe_asks(monkeypatch, tmp_path, exit_code):
    """In this process, with CUDA calls that answer as two GPUs would, one of which torch has no
    kernels for.
    """
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho 'NVIDIA X, 580.65.06'\nexit {exit_code}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def ones(size, device):
        if device == "cuda:1":
            raise RuntimeError("no kernel image")
        return torch.zeros(size)

    properties = types.SimpleNamespace(name="NVIDIA X", major=9, minor=0, total_memory=79 << 30)
    for name, value in (("is_available", True), ("device_count", 2), ("get_arch_list", ["sm_80"])):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(torch, "ones", ones)
    found = {}
    probes.probe_torch(found)
    assert found["gpus"] == [
        gpu((9, 0)),
        gpu((9, 0), error="RuntimeError: no kernel image; torch is built for sm_80"),
    ]
    assert found["nvidia_smi"] == ([] if exit_code else ["NVIDIA X, 580.65.06"])
    assert (found["version"], found["cuda"]) == (torch.__version__, torch.version.cuda)


@pytest.mark.parametrize(
    "capability, cuda, state, said",
    [
        ((7, 0), "13.0", "note", "no bf16: train with --fp16"),
        ((8, 0), "13.0", "ok", "bf16; FP8 and FP4 recipes: none"),
        ((8, 9), "13.0", "ok", "recipes: delayed tensorwise"),
        ((9, 0), "12.8", "ok", "recipes: delayed tensorwise"),
        ((9, 0), "12.9", "ok", "recipes: delayed tensorwise blockwise"),
        ((10, 0), "13.0", "ok", "recipes: delayed tensorwise blockwise mxfp8 nvfp4"),
        ((12, 0), "13.0", "ok", "recipes: delayed tensorwise blockwise nvfp4"),
    ],
)
def test_what_a_gpu_can_do(capability, cuda, state, said):
    row = judges.judge_gpu(torch_with(gpu(capability), gpu(capability), cuda=cuda), cpu_asked=False)
    sm = f"sm_{capability[0]}{capability[1]}"
    assert row.state == state and row.found.startswith(
        f"2 x NVIDIA X ({sm}, 79 GiB); driver 580.65.06; "
    )
    assert row.found.endswith(said)


def test_two_kinds_of_gpu_are_judged_by_the_lower():
    row = judges.judge_gpu(torch_with(gpu((9, 0)), gpu((8, 0))), cpu_asked=False)
    assert row.found.startswith(
        "1 x NVIDIA X (sm_90, 79 GiB), 1 x NVIDIA X (sm_80, 79 GiB)"
    ) and row.found.endswith("recipes: none")
    assert (
        judges.judge_extension(built("9.0"), [gpu((9, 0)), gpu((8, 0))]).expected
        == "CUDA kernels for compute capability 8.0"
    )


@pytest.mark.parametrize(
    "probe, cpu_asked, state, said",
    [
        (torch_with(nvidia_smi=()), True, "note", "on CPU with gloo"),
        (torch_with(), True, "note", "on CPU with gloo"),  # hidden from torch, on purpose
        (torch_with(nvidia_smi=()), False, "FAULT", "none"),
        (torch_with(), False, "FAULT", "none that torch 2.11.0+cu130 (CUDA 13.0) sees"),
        (
            torch_with(gpu((9, 0))),
            True,
            "FAULT",
            "MEGATRON_TST_CPU=1 and NVIDIA X",
        ),  # cpu.py ends the process
        (
            torch_with(gpu((7, 0), error="no kernel image; torch is built for sm_75 sm_80")),
            False,
            "FAULT",
            "no kernel image",
        ),
    ],
)
def test_whether_there_is_a_device_to_train_on(probe, cpu_asked, state, said):
    row = judges.judge_gpu(probe, cpu_asked)
    assert row.state == state and said in row.found and bool(row.do) == (state == "FAULT")


@pytest.mark.parametrize(
    "architectures, capability, way",
    [
        (BUILT, (8, 0), "binary"),
        (BUILT, (8, 9), "binary"),
        (BUILT, (9, 0), "binary"),
        (BUILT, (10, 0), "binary"),
        (BUILT, (10, 3), "binary"),
        (BUILT, (12, 0), "PTX"),
        (BUILT, (7, 0), "not"),
        (BUILT, (7, 5), "not"),
        ("8.0 9.0", (10, 0), "not"),
        ("8.0;9.0+PTX", (10, 0), "PTX"),
        ("8.6", (8, 0), "not"),
        ("9.0+PTX", (8, 9), "not"),
        ("10.0+PTX 12.0", (12, 0), "binary"),
        ("Hopper", (9, 0), "unknown"),
        ("9.0a", (9, 0), "unknown"),
    ],
)
def test_whether_the_extension_runs_on_a_gpu(architectures, capability, way):
    assert judges.how_it_runs(architectures, list(capability)) == way
    row = judges.judge_extension(built(architectures), [gpu(capability)])
    used = report.will_use(built(architectures), {}, [gpu(capability)])
    uses = used["embedding and loss on GPU"]
    assert (row.state == "FAULT") == ("do not run here" in uses) == (way == "not")
    assert ("PTX by the driver" in uses) == (way == "PTX")
    if way == "not":
        sm = "{}.{}".format(*capability)
        assert f'TORCH_CUDA_ARCH_LIST="{sm}"' in row.do and row.found == f"some for {architectures}"


def test_an_extension_with_a_gpu_in_other_states():
    here = [gpu((9, 0))]
    broken = built(errors={"cuda:0": "RuntimeError: no kernel image"})
    assert judges.judge_extension(broken, here).found == "RuntimeError: no kernel image"
    assert "do not run here" in report.will_use(broken, {}, here)["embedding and loss on GPU"]
    on_cpu = built("")
    assert (
        judges.judge_extension(on_cpu, here).state == "note"
        and "toolkit" in judges.judge_extension(on_cpu, here).found
    )
    assert judges.judge_extension(on_cpu, []).state == "ok"
    uses = report.will_use(on_cpu, {}, here)["embedding and loss on GPU"]
    assert uses.startswith("torch kernels")
    absent = built(
        "",
        built=False,
        loaded=False,
        description="not built",
        auto={"cpu": "torch", "cuda": "torch"},
    )
    assert judges.judge_extension(absent, []).state == "note"
    assert judges.judge_extension({"error": "a crash (SIGSEGV)"}, []).state == "FAULT"


def test_what_could_not_be_looked_at_is_not_blamed(monkeypatch):
    absent = {"error": "ModuleNotFoundError: No module named 'megatron_tst'"}
    found = {
        "packages": {"megatron-core": {"version": "0.19.2", "folder": "/x"}},
        "torch": torch_with(gpu((9, 0))),
    }
    monkeypatch.setattr(
        report, "ask_all", lambda: found | {"extension": absent, "megatron": absent}
    )
    said = report.examine()
    assert faults_of(said) == {"megatron-tst"} and not said["would_train"]
    assert rows_of(said)["extension"]["found"] == "not looked at: see megatron-tst"
    assert rows_of(said)["megatron-core"]["found"] == "0.19.2, /x"


@pytest.mark.parametrize(
    "version, wanted",
    [
        ("0.18.0", ">=0.18,<0.21"),
        ("0.17.9", ">=0.18,<0.21"),
        ("0.19.2+1a2b3c", ">=0.18,<0.21"),
        ("0.20.0", ">=0.18,<0.21"),
        ("1.0", ">=0.18,<0.21"),
        ("2.6.0+cpu", ">=2.6"),
        ("2.10.0", ">=2.6"),
        ("2.5.1", ">=2.6"),
        ("3.11.9", ">=3.12"),
        ("3.12.0", ">=3.12"),
    ],
)
def test_versions_are_compared_as_pip_does(version, wanted):
    assert judges.fits(version, wanted) == (version in SpecifierSet(wanted))


@pytest.mark.parametrize("source", ["installed", "checkout"])
def test_wanted_versions_are_those_of_pyproject(source, monkeypatch):
    if source == "checkout":

        def absent(name):
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "metadata", absent)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = report.needs()
    assert wanted.pop("python") == project["requires-python"]
    assert {name + versions for name, versions in wanted.items()} < set(
        project["dependencies"]
    ) and len(wanted) == 2


def test_a_python_without_tomllib_is_too_old(monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    row = judges.judge_python((3, 10, 4), report._checkout()["requires-python"])
    assert row.state == "FAULT" and row.do == "Use a newer one."


def test_wanted_versions_where_nothing_says_them(monkeypatch, tmp_path):
    """Neither installed nor in a checkout: any version will do."""
    monkeypatch.setattr(report, "_checkout", lambda: {})
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert report.needs() == {"python": "", "torch": "", "megatron-core": ""}
    assert judges.judge_python((3, 11, 2), "").state == "ok"


def test_python_and_untested_megatron():
    assert judges.judge_python((3, 12, 1), ">=3.12").state == "ok"
    assert judges.judge_python((3, 11, 2), ">=3.12").found == "3.11.2"
    megatron = {"version": "0.19.1", "tested": ["0.18.2", "0.19.2"], "problems": [], "seams": 16}
    assert judges.judge_megatron(megatron, ">=0.18,<0.21").state == "note"
    row = judges.judge_megatron(
        {"error": "ModuleNotFoundError: No module named 'einops'"}, ">=0.18,<0.21"
    )
    assert row.state == "FAULT" and "einops" in row.found
    assert (
        judges.judge_torch({"version": "2.5.1", "cuda": "12.4", "gpus": []}, ">=2.6").state
        == "FAULT"
    )
