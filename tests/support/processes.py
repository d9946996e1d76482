"""What is left of the processes that the tests have started: a pytest plugin that ends the session
with an error if one is alive after it.

Every process of the session has its mark in the environment that it was started with, which a fork
keeps. Linux alone (/proc).
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

import pytest

MARK = "MEGATRON_TST_TEST_SESSION"
PATIENCE = "MEGATRON_TST_TEST_PATIENCE"  # seconds, for those that are ending; 20 unless given
_left = pytest.StashKey[list[str]]()


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that started it dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def marked(mark: str) -> dict[int, str]:
    """Process id -> command line of the processes with this mark, without this one and those that
    it descends from.
    """
    found, own = {}, set()
    pid = os.getpid()
    while pid > 1:
        own.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                if command and int(folder.name) not in own:  # a zombie has no command line
                    found[int(folder.name)] = command
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue  # it has ended, or is another user's
    return found


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # xdist's workers take the mark of the main process
        os.environ[MARK] = f"{os.getpid()}-{time.time()}"


@pytest.hookimpl(trylast=True)  # after xdist has ended its workers
def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput") or not Path("/proc/self/environ").exists():
        return
    deadline, looks_without = time.time() + float(os.environ.get(PATIENCE, 20)), 0
    while looks_without < 2:  # a process that has only begun has no environment for a moment
        left = marked(os.environ[MARK])
        looks_without = 0 if left else looks_without + 1
        if time.time() > deadline:
            break
        time.sleep(0.1)
    session.config.stash[_left] = [f"{pid}: {command}" for pid, command in left.items()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if left := config.stash.get(_left, None):
        terminalreporter.section("processes that outlived the tests (killed now)", red=True)
        for line in left:
            terminalreporter.line(line)
