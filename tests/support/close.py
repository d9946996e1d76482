"""Floating-point results against each other: the difference is relative to the size of what is
compared, since processors round and sum differently.

With DIFFERENCES=FILE in the environment each comparison appends a line of JSON to the file:
{"where": "tests/unit/test_loss.py:120", "of": test, "difference": ..., "tolerance": ...}.
tests/support/processors.py collects them over the processors that one machine can play.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from support.paths import ROOT

VARIABLE = "DIFFERENCES"


def close(got, want, tolerance: float, *, terms=None, rounded=None, roundings: int = 1) -> None:
    """Assert that two results are the same but for rounding.

    Args:
        got, want: numbers, sequences of numbers, or tensors of one shape.
        tolerance: of the length of the whole difference over the length of `want`; with `terms`,
            of each element's difference over its terms.
        terms: size of the largest term of the sum that an element is, a number or a tensor that
            broadcasts to `want`.
        rounded: a dtype that elements are rounded to at the end, which is allowed beside the
            tolerance (with `terms` alone).
        roundings: 2 where both results are rounded.
    """
    got, want = (torch.as_tensor(x).detach().cpu().double() for x in (got, want))
    assert got.shape == want.shape, (got.shape, want.shape)
    delta = (got - want).abs()
    if terms is None:
        assert rounded is None
        part, whole = delta.norm(), want.norm()
    else:
        whole = torch.as_tensor(terms).detach().cpu().double().expand_as(want)
        if rounded is not None:
            about = torch.finfo(rounded)
            ulp = (want.abs() * about.eps).clamp_min(about.smallest_normal * about.eps)
            delta = (delta - roundings * ulp / 2).clamp_min(0)
        part = delta
    found = torch.where((part == 0) & (whole == 0), 0.0, part / whole)
    check(found.max().item() if found.numel() else 0.0, tolerance)


def check(found: float, tolerance: float, name: str = "") -> None:
    """Assert that a relative difference is within its tolerance, and note it if asked to."""
    if path := os.environ.get(VARIABLE):
        frame = sys._getframe(1)
        while frame.f_code.co_filename == __file__:
            frame = frame.f_back
        where = f"{name} {os.path.relpath(frame.f_code.co_filename, ROOT)}:{frame.f_lineno}".strip()
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        row = {"where": where, "of": test, "difference": found, "tolerance": tolerance}
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
    assert found <= tolerance, (
        f"{name or 'it'} differs by {found:.2e} of its size, allowed is {tolerance:.2e}"
    )
