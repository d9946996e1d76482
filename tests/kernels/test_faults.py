"""Faults put into the CUDA kernels, one at a time: those of tests/mutation/bugs.toml whose tests
are of this folder. Each is put into a copy of csrc, and a test must fail.
"""

import shutil
import subprocess
import sys
import tomllib

import pytest
from support import cuda_on_cpu
from support.paths import EVERYTHING, ROOT, environment

BUGS = tomllib.loads((ROOT / "tests/mutation/bugs.toml").read_text())
OF_KERNELS = [
    name
    for name, bug in BUGS.items()
    if bug["file"].startswith("csrc/") and bug["tests"][0].startswith("tests/kernels/")
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        cuda_on_cpu.NOT_RUN is not None, reason=f"{cuda_on_cpu.NOT_RUN}: faults of CUDA kernels"
    ),
]


def run_with(csrc, tests):
    flags = ["-x", "-q", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider", "-W", "ignore"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *flags, *tests],
        cwd=ROOT,
        env=environment(EVERYTHING, CUDA_ON_CPU_CSRC=str(csrc)),
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", OF_KERNELS)
def test_a_fault_is_seen(tmp_path, name):
    bug = BUGS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    file = csrc / bug["file"].removeprefix("csrc/")
    source = file.read_text()
    assert source.count(bug["was"]) == 1, f"expected once in {bug['file']}: {bug['was']}"
    file.write_text(source.replace(bug["was"], bug["is"]))
    done = run_with(csrc, bug["tests"])
    seen = "Fault" in done.stdout or "AssertionError" in done.stdout
    assert done.returncode == 1 and seen and "error:" not in done.stdout, done.stdout[-3000:]


def test_without_a_fault_they_pass(tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    tests = dict.fromkeys(test for name in OF_KERNELS for test in BUGS[name]["tests"])
    done = run_with(csrc, tests)
    assert done.returncode == 0, done.stdout[-3000:]
