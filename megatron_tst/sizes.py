"""Bytes as text, for everything that prints a size. No torch."""

from __future__ import annotations

UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("bytes", 1))


def sizes(*counts: int) -> tuple[str, ...]:
    """Numbers of bytes as text, in the unit of the largest. The unit gets smaller until numbers
    that differ read differently.

    >>> sizes(12_340_000_000)
    ('12.34 GB',)
    >>> sizes(5_000_000_000, 4_999_990_000)
    ('5,000.00 MB', '4,999.99 MB')
    >>> sizes(2_000_000_000, 812)
    ('2.00 GB', '812 bytes')

    Args:
        counts: bytes, 0 or more.
    """
    for start in range(_unit(max(counts)), len(UNITS)):
        texts = tuple(_text(count, start) for count in counts)
        if len(set(texts)) == len(set(counts)):
            break
    return texts  # the last unit is bytes, in which every number is written out


def _unit(count: float) -> int:
    return next((i for i, (_, size) in enumerate(UNITS) if count >= size), len(UNITS) - 1)


def _text(count: float, start: int) -> str:
    """In the unit `start`, or in a smaller one where two digits behind the point would not show
    it.
    """
    if count and count < UNITS[start][1] / 100:
        start = _unit(count)
    name, size = UNITS[start]
    return f"{count:,.0f} {name}" if size == 1 else f"{count / size:,.2f} {name}"
