"""What the verbs share: a parser, one line for what is refused, a progress bar."""

from __future__ import annotations

import argparse
import contextlib
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
        more.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
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
        return run()
    except (TSTError, OSError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def progress_bar(what: str, unit: str = "B") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, in bytes or in `unit`: a function (done, of)."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=unit, unit_scale=True, file=sys.stderr, disable=None) as bar:

        def advance(done, total):
            bar.total = total
            bar.update(done - bar.n)

        yield advance
