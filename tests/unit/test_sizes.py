"""Sizes are printed in a unit in which two numbers that differ read differently."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tst import sizes as module
from megatron_tst.sizes import sizes

BYTES = st.integers(0, 10**16)


@pytest.mark.parametrize(
    "counts, texts",
    [
        ((12_345_678,), ("12.35 MB",)),
        ((0,), ("0 bytes",)),
        ((4096, 4095), ("4.10 KB", "4.09 KB")),
        ((4096, 4097), ("4,096 bytes", "4,097 bytes")),
        ((3 * 10**9, 0), ("3.00 GB", "0.00 GB")),
        ((10**9 + 1, 10**9), ("1,000,000,001 bytes", "1,000,000,000 bytes")),
        ((7 * 10**6, 3), ("7.00 MB", "3 bytes")),
        ((5, 5), ("5 bytes", "5 bytes")),
        ((2.5 * 10**12, 10**9), ("2.50 TB", "1.00 GB")),
    ],
)
def test_known_sizes(counts, texts):
    assert sizes(*counts) == texts


@given(BYTES, BYTES)
def test_what_differs_reads_differently(some, other):
    a, b = sizes(some, other)
    assert (a == b) == (some == other)


def test_the_examples():
    assert doctest.testmod(module) == (0, 3)
