"""The emulated CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a process
that has these from its start.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from support import cuda_on_cpu
from support.paths import ROOT

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        cuda_on_cpu.NOT_RUN is not None, reason=f"{cuda_on_cpu.NOT_RUN}: sanitized kernels"
    ),
]


def run(*arguments):
    env = cuda_on_cpu.sanitized_environment()
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=env | {"PYTHONPATH": f"{env['PYTHONPATH']}:{HERE}"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "file", sorted(HERE.glob("test_emulated_*.py")), ids=lambda path: path.stem
)
def test_nothing_is_found(file):
    flags = [
        "-q",
        "-n",
        "0",
        "-s",
        "-m",
        "not slow",
        "-k",
        "not test_borders and not test_as_it_is",
    ]
    done = run("-m", "pytest", *flags, "-p", "no:cacheprovider", file)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr[-3000:]


ONE = """
import sys, pathlib
import test_cuda_on_cpu as tiny
kernels = tiny.build_tiny(pathlib.Path(sys.argv[1]), sanitized=True)
for what in tiny.RIGHT:
    tiny.run(kernels, what, 3, seed=1)
print("right", flush=True)
tiny.run(kernels, int(sys.argv[2]), 1, seed=1)
"""


@pytest.mark.parametrize("what", [26, 27])
def test_an_access_outside_is_found(tmp_path, what):
    done = run("-c", ONE, tmp_path, str(what))
    assert "right" in done.stdout and done.returncode != 0, done.stdout + done.stderr[-3000:]
    assert "AddressSanitizer: use-after-poison" in done.stderr, done.stderr[-3000:]
