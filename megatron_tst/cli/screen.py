"""What the verbs share: a parser, one way to end, a progress bar."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from megatron_tst.errors import PatchError, TSTError


class Parser(argparse.ArgumentParser):
    """Of one verb; its text is the module's docstring, and a mistake is one line.

    Args:
        prog: the command as it was called, "megatron-tst plan" or a door in tools/.
        about: the module's docstring.
    """

    def __init__(self, prog: str, about: str | None, **more: object):
        # docstrings have lines of 100 columns, so the flags below them do too
        wide = functools.partial(argparse.RawDescriptionHelpFormatter, width=100)
        more.setdefault("formatter_class", wide)
        super().__init__(prog=prog, description=about, **more)
        self.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """What argparse calls for a mistake.

        Raises:
            TSTError: always.
        """
        raise TSTError(f"{message}. `{self.prog} --help` says more.")


def call(parser: Parser, run: Callable[[argparse.Namespace], int], argv: list[str] | None) -> int:
    """A verb from its command line to its exit code. What it refuses and whatever fails is one
    line on stderr and exit code 2, a signal is one line and 128 + its number.

    Args:
        parser: of the verb.
        run: does what the options ask for. -> exit code
        argv: None: the command line's.
    """
    with guarded(parser.prog) as end:
        options = parser.parse_args(argv)
        end.debug = options.debug
        end.code = run(options)
    return end.code


@dataclasses.dataclass
class End:
    """How a verb ends."""

    code: int = 2
    debug: bool = False  # print the traceback of what was not foreseen


class Signal(BaseException):
    """One of SIGNALS came. It passes through `except Exception`, and what was begun is removed."""


SIGNALS = signal.SIGTERM, signal.SIGHUP


@contextlib.contextmanager
def guarded(prog: str) -> Iterator[End]:
    """Whatever is raised in the block becomes one line on stderr and a code in the End.

    Args:
        prog: the command as it was called.
    """
    end = End()
    try:
        with _signals_raised():
            yield end
        _flush_stdout()
    except (TSTError, PatchError) as error:
        end.code = _say(prog, str(error))
    except KeyboardInterrupt:
        end.code = _say(prog, "interrupted. Nothing was left half written.", 128 + signal.SIGINT)
    except Signal as came:
        (number,) = came.args
        text = f"ended by {number.name}. Nothing was left half written."
        end.code = _say(prog, text, 128 + number)
    except BrokenPipeError:  # `| head`: nobody reads the rest, and the answer is not known
        _to_nowhere()
        end.code = 2
    except OSError as error:
        end.code = _say(prog, _of_system(error))
    except ImportError as error:
        text = f"{error.name or 'a package'}: expected a package that can be imported, got {error}."
        end.code = _say(prog, f"{text} `megatron-tst doctor` says what is installed.")
    except MemoryError as error:
        text = f"memory: expected enough, got {str(error) or 'none left'}. Use a machine with more."
        end.code = _say(prog, text)
    except Exception as error:
        if end.debug:
            traceback.print_exc()
        do = f"Nothing was left half written. `{prog} --debug` shows where; please report it."
        got = f"{type(error).__name__}: {error}"
        end.code = _say(prog, f"expected that every mistake is foreseen, got {got}. {do}")


@contextlib.contextmanager
def _signals_raised() -> Iterator[None]:
    """SIGNALS are exceptions in the block, so that `finally` runs; one that is ignored stays so."""

    def came(number, frame):
        raise Signal(signal.Signals(number))

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, came)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _of_system(error):
    """The sentence of an OSError. Its last words are the system's own."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
    what = " -> ".join(names) or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        do = "Make room, or choose another disk."
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        do = "Choose a place that you may read and write."
    else:
        do = "Check the path."
    return f"{what}: expected that it can be used, got {error.strerror or error}. {do}"


def _say(prog, text, code=2):
    """Print the line of an error on stderr, wherever that leads. -> code"""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        print(f"{prog}: error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return code


def _flush_stdout():
    """Bring out what was printed, now that the answer is known.

    Raises:
        OSError: it cannot be written, as to a full disk.
    """
    if sys.stdout is None:  # closed by the caller
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _to_nowhere()
    except OSError as error:
        _to_nowhere()
        raise OSError(error.errno, error.strerror, "stdout") from error


def _to_nowhere():
    """What stdout still holds goes to /dev/null, since Python writes it out at its end."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def answer(as_json: bool, about: dict, text: str) -> None:
    """Print what a verb found or did: `about` as one JSON object, or `text`. A reader that does
    not take all of it (`| head`) does not change the exit code.
    """
    try:
        print(json.dumps(about, indent=1, default=str) if as_json else text)
    except BrokenPipeError:
        _to_nowhere()


@contextlib.contextmanager
def progress_bar(what: str, unit: str = "B") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, in bytes or in `unit`: a function (done, of)."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=unit, unit_scale=True, file=sys.stderr, disable=None) as bar:

        def advance(done, total):
            bar.total = total
            bar.update(done - bar.n)

        yield advance
