"""Whole tensors out of a checkpoint's shards, one at a time, in whatever layout it was saved."""

from __future__ import annotations

import torch

from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.errors import refuse


class Tensors:
    """The model's tensors of a torch_dist checkpoint by Megatron's names; a read holds one tensor
    and one shard.

    Layers of one kind are stored as one tensor [layers, ...]
    (`decoder.layers.mlp.linear_fc2.weight`), layers of several kinds one by one
    (`decoder.layers.3.mlp.linear_fc2.weight`); experts have one more dimension. `of_layer` reads
    either.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._items: dict[str, dict[tuple, object]] = {}
        for item in checkpoint.items:
            if item.name in checkpoint.tensors:
                self._items.setdefault(item.name, {})[tuple(item.index.offset)] = item

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor as it is stored."""
        return tuple(self.checkpoint.tensors[name].size)

    def read(self, name: str, *place: int) -> torch.Tensor:
        """The tensor, or its part at `place` along the first dimensions (a layer, an expert of it),
        in the dtype in which it was saved, on CPU.

        Raises:
            TSTError: no such tensor, or its shards do not cover it.
        """
        if name not in self:
            do = "The model is of another kind than its arguments say."
            refuse(self.checkpoint.path, f"a tensor {name}", "none", do)
        entry, lead = self.checkpoint.tensors[name], len(place)
        whole = torch.empty(entry.size[lead:], dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            if any(not o <= i < o + n for i, o, n in zip(place, chunk.offsets, chunk.sizes)):
                continue
            shard = self.checkpoint.tensor(self._items[name][tuple(chunk.offsets)])
            part = shard[tuple(i - o for i, o in zip(place, chunk.offsets))]
            cuts = zip(chunk.offsets[lead:], chunk.sizes[lead:])
            whole[tuple(slice(o, o + n) for o, n in cuts)] = part
            filled += part.numel()
        if filled != whole.numel():
            got = f"{filled} of {whole.numel()} elements"
            refuse(self.checkpoint.path, f"shards that cover {name}", got, "Copy it again.")
        return whole

    def of_layer(
        self,
        layer: int,
        *names: str,
        at: tuple[int, ...] = (),
        block: str = "decoder.layers",
    ) -> torch.Tensor:
        """A layer's tensor under the first of `names` that is there.

        Args:
            layer: from 0, over all pipeline stages.
            names: what follows the layer in Megatron's names.
            at: a further place in it (an expert).
            block: what stands before the layer.

        Raises:
            TSTError: it has none of them.
        """
        for name in names:
            if f"{block}.{layer}.{name}" in self:
                return self.read(f"{block}.{layer}.{name}", *at)
            if f"{block}.{name}" in self:
                return self.read(f"{block}.{name}", layer, *at)
        return refuse(
            self.checkpoint.path,
            f"layer {layer}'s {' or '.join(names)}",
            "none",
            "The model is of another kind than its arguments say.",
        )
