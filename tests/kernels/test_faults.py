"""Faults put into the CUDA kernels, one at a time: those of tests/mutation/bugs.toml whose tests
are of this folder. At each a test must fail.
"""

import subprocess
import sys
import tomllib

import pytest
from support import cuda_on_cpu
from support.paths import ROOT, environment

BUGS = tomllib.loads((ROOT / "tests/mutation/bugs.toml").read_text())
OF_KERNELS = [name for name, bug in BUGS.items() if bug["tests"][0].startswith("tests/kernels/")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    cuda_on_cpu.NOT_RUN is not None, reason=f"{cuda_on_cpu.NOT_RUN}: faults of CUDA kernels"
)
def test_every_fault_is_seen(tmp_path):
    command = [sys.executable, "tests/mutation/run.py", "--bugs", "--nice", "0"]
    command += ["--work", tmp_path, *OF_KERNELS]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count(": seen, ") == len(OF_KERNELS) > 30
