"""What the verbs share: a parser, one line for what is refused, a progress bar."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from megatron_tst.errors import TSTError


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

    def error(self, message: str) -> NoReturn:
        """What argparse calls for a mistake.

        Raises:
            TSTError: always.
        """
        raise TSTError(f"{message}. `{self.prog} --help` says more.")


def refusing(prog: str, run: Callable[[], int]) -> int:
    """Call `run`; what it refuses becomes one line on stderr and exit code 2."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head`: nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (TSTError, OSError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def answer(as_json: bool, about: dict, text: str) -> None:
    """Print what a verb found or did: `about` as one JSON object, or `text`."""
    print(json.dumps(about, indent=1, default=str) if as_json else text)


@contextlib.contextmanager
def progress_bar(what: str, unit: str = "B") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, in bytes or in `unit`: a function (done, of)."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=unit, unit_scale=True, file=sys.stderr, disable=None) as bar:

        def advance(done, total):
            bar.total = total
            bar.update(done - bar.n)

        yield advance
