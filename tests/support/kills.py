"""Run something in a process of its own that is stopped at a certain step of its work with files.

A step is a call that opens, renames, flushes or removes something. Steps, not seconds: a slow
machine is stopped at the same place as a fast one.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from megatron_tst.checkpoint import renames
from megatron_tst.checkpoint.atomic import MARK

_EVENTS = (
    "open",
    "os.link",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.scandir",
)


def stopped(
    call: Callable[[], int],
    at: int | None = None,
    number: int = signal.SIGKILL,
    each: Callable[[], object] = lambda: None,
) -> tuple[int, int]:
    """Call something that gives an exit code in a fork, which gets a signal at its step `at`.

    Args:
        each: called in the fork at every step.

    Returns:
        the exit code, negative for a signal, and how many steps there were.
    """
    steps = mmap.mmap(-1, 8)  # shared with the fork
    process = os.fork()
    if process == 0:
        code = 97
        try:
            # tqdm's own lock is shared by all forks: one that is killed with it would stop the rest
            tqdm.set_lock(threading.RLock())
            _count(steps, at, number, each)
            code = call()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code, int.from_bytes(steps[:8], "little")


def _count(steps, at, number, each):
    inside = []  # `each` has steps of its own

    def step():
        if inside:
            return
        inside.append(True)
        try:
            each()
        finally:
            inside.clear()
        now = int.from_bytes(steps[:8], "little") + 1
        steps[:8] = now.to_bytes(8, "little")
        if now == at:
            os.kill(os.getpid(), number)

    def counted(function):
        def calls(*arguments):
            step()  # before and after
            answer = function(*arguments)
            step()
            return answer

        return calls

    sys.addaudithook(lambda event, arguments: event in _EVENTS and _ours(arguments) and step())
    os.fsync = counted(os.fsync)
    renames._renameat2 = counted(renames._renameat2)


def _ours(arguments):
    """Not a module that is imported."""
    return not str(arguments[0]).endswith((".py", ".pyc", ".so"))


def spread(steps: int, times: int) -> list[int]:
    """So many of the steps 1 .. `steps`, the last ones among them: there names change hands."""
    late = min(times // 2, steps)
    rest, early = steps - late, times - late
    early = [1 + (2 * i + 1) * rest // (2 * early) for i in range(early)]
    return sorted({*early, *range(steps - late + 1, steps + 1)})


def content(folder: Path) -> dict[str, bytes | None]:
    """Name of everything below a folder, MARK apart -> its bytes, None for a folder."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
        if path.name != MARK
    }
