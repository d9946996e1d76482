"""Which cases of a test `make test` runs. The others are marked slow: `make test-slow`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest


def tiers(cases: Iterable, fast: set, name: Callable = lambda case: case) -> list:
    """Parameters of a test.

    Args:
        fast: names of the cases that are not slow.
        name: of a case, which the test is then called by.
    """
    cases = list(cases)
    unknown = fast - {name(case) for case in cases}
    assert not unknown, f"no case is called {unknown}"
    return [
        pytest.param(
            case, id=str(name(case)), marks=[] if name(case) in fast else [pytest.mark.slow]
        )
        for case in cases
    ]
