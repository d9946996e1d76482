"""Whether two checkpoints hold the same weights and optimizer state, shard by shard, however either
is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.inspect import state_of


def differences(
    one: Checkpoint,
    other: Checkpoint,
    *,
    optimizer: bool = True,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, str]:
    """Name of a tensor -> how it differs; empty where all are the same.

    Args:
        one, other: whose tensors are compared, bit for bit.
        optimizer: the optimizer's state too.

    Memory: one shard of either.

    Raises:
        TSTError: an item of either is damaged, one that is no tensor too.
    """
    for checkpoint in (one, other):
        objects = set(checkpoint.objects)
        for item in checkpoint.items:
            if item.name in objects:
                checkpoint.check(item)
    ours, others = (
        {name for name in c.tensors if optimizer or not state_of(name)} for c in (one, other)
    )
    found = dict.fromkeys(ours - others, f"only in {one.path}")
    found |= dict.fromkeys(others - ours, f"only in {other.path}")
    theirs: dict[str, list] = {}
    apart: dict[str, list[float]] = {}
    for item in other.items:
        theirs.setdefault(item.name, []).append(item)
    mine = [item for item in one.items if item.name in ours & others]
    total, done = sum(item.length for item in mine), 0
    for item in sorted(mine, key=lambda item: (item.file, item.offset)):
        a, b = one.tensors[item.name], other.tensors[item.name]
        if (a.size, a.properties.dtype) != (b.size, b.properties.dtype):
            kinds = [f"{x.properties.dtype} {list(x.size)}" for x in (a, b)]
            found[item.name] = " and ".join(kinds)
        else:
            apart.setdefault(item.name, []).extend(_apart(one, item, other, theirs[item.name]))
        progress(done := done + item.length, total)
    found |= {name: f"differs by up to {max(by):.3g}" for name, by in apart.items() if by}
    return dict(sorted(found.items()))


def _apart(one, item, other, candidates):
    """The largest difference to each shard of `other` that the shard of `one` is unlike."""
    shard, start = one.tensor(item), item.index.offset
    for candidate in candidates:
        box = []
        place, sizes = candidate.index.offset, _shape(other, candidate)
        for a, length, b, size in zip(start, shard.shape, place, sizes):
            low, high = max(a, b), min(a + length, b + size)
            box.append((slice(low - a, high - a), slice(low - b, high - b)))
        if any(mine.stop <= mine.start for mine, _ in box):
            continue
        mine = shard[tuple(cut for cut, _ in box)]
        theirs = other.tensor(candidate)[tuple(cut for _, cut in box)]
        if not torch.equal(_bits(mine), _bits(theirs)):
            a, b = mine.double(), theirs.double()
            difference = (a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf)
            difference[(a == b) | (a.isnan() & b.isnan())] = 0.0
            yield difference.max().item()


def _bits(tensor):
    """Bytes: a NaN equals itself, and -0.0 is not 0.0."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _shape(checkpoint, item):
    return next(
        chunk.sizes
        for chunk in checkpoint.tensors[item.name].chunks
        if chunk.offsets == item.index.offset
    )
