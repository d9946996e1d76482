"""The entropy of the bags that a training step has seen: the floor that its loss cannot pass."""

from __future__ import annotations

import torch

from megatron_tst.data.bags import bag_entropy
from megatron_tst.ops.loss import target_weights


class MeanBagEntropy:
    """Mean entropy over the positions of one training step, as the script averages its loss.

    Args:
        weighting: the name of the target weighting (ops/names.py).
    """

    def __init__(self, weighting: str):
        self._weighting = weighting
        # fp32 [2] on the batch's device: the sum over the positions that count, and their number.
        # One buffer for the whole run, which is only ever written in place: a CUDA graph that
        # holds `see` adds to it in every replay, and Python does not hear of that.
        self._seen: torch.Tensor | None = None

    @property
    def sees(self) -> bool:
        """Whether this rank has seen bags in this run, so that its buffer is there. Under a CUDA
        graph Python cannot tell whether the last step had any: the phase says that.
        """
        return self._seen is not None

    def see(self, labels: torch.Tensor, loss_mask: torch.Tensor) -> None:
        """Take in a micro-batch, on the ranks that hold its labels.

        Args:
            labels: int64 [b, L, S], global ids, -100 ignored.
            loss_mask: fp32 [b, L], 0 where a position does not count.
        """
        weights = target_weights(self._weighting, labels.shape[-1], labels.device)
        entropy = bag_entropy(labels, weights)
        seen = torch.stack([(entropy * loss_mask).sum(), loss_mask.sum()])
        if self._seen is None:
            self._seen = torch.zeros_like(seen)
        self._seen += seen

    def take(self) -> torch.Tensor:
        """The mean in nats, a scalar fp32, and forget what was seen, between two steps. Called by
        every rank that has a loss: they sum over data- and context-parallel ranks. Does not wait
        for the GPU.
        """
        from megatron.core import mpu

        total = self._seen.clone()
        self._seen.zero_()
        # before: this rank's positions; after: all positions of the step, the same on every rank
        group = mpu.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(total, group=group)
        return total[0] / total[1].clamp_min(1)
