"""The tests' own support: what it promises the other tests."""

import subprocess
import sys

import pytest
from support import processes
from support.paths import environment

# it waits: for an instant after exec the kernel shows no environment of a new process
LEAVES_ONE = """
import subprocess, time
def test_leaves_a_process():
    subprocess.Popen(["sleep", "{seconds}"], start_new_session=True)
    time.sleep(0.3)
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["", "xdist"])
@pytest.mark.parametrize("seconds, code", [(300, 1), (0, 0)])
def test_a_process_that_outlives_the_session_fails_it(tmp_path, seconds, code, workers):
    (tmp_path / "test_tiny.py").write_text(LEAVES_ONE.format(seconds=seconds))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["-p", "support.processes", "--rootdir", tmp_path, tmp_path, *workers]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(**{processes.PATIENCE: "1"})
    )
    assert done.returncode == code and "1 passed" in done.stdout, done.stdout
    assert done.stdout.count("sleep 300") == code, done.stdout
