"""The bag losses that the paper found worse than no TST at all, for repeating that: --tst-loss bce,
--tst-loss hinge. In torch alone.

The paper names them and prints no formula that we know; these are our choice. Each column v of the
vocabulary is a yes-or-no question of its own ("is v in the next bag?"), with no softmax between
them:

    loss = sum_v  t_v f(-z_v) + (1 - t_v) f(z_v)
        bce:    f(z) = softplus(z)
        hinge:  f(z) = max(0, 1 + z)

t_v is 1 for the tokens of the bag, which count once, and 0 for all others; with a target weighting
it is the token's weight over the largest in the bag, as in mce-alt. A sum, not a mean, over the
vocabulary: bce is then the likelihood of V independent coins. It starts near V log 2 (hinge: V), so
that loss and gradient norm are far above the softmax losses'; --clip-grad and Adam take most of
that out.

N rows, V this rank's columns of the vocabulary (padded vocabulary / tp), S labels a row. All
arithmetic is fp32.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_tst.ops.torch_kernel import (
    carries_loss,
    check_label_range,
    own_labels,
    row_chunks,
    weight_of_token,
)

_TERM = {"bce": F.softplus, "hinge": lambda z: (1 + z).clamp_min(0)}
_SLOPE = {"bce": torch.sigmoid, "hinge": lambda z: (z > -1).float()}


class BagAblation(torch.autograd.Function):
    """loss [N] fp32 of logits [N, V] and labels [N, S]; one all-reduce of a float a row in forward,
    none in backward.
    """

    @staticmethod
    def forward(
        ctx,
        rows_NV: torch.Tensor,
        labels_NS: torch.Tensor,
        weights_S: torch.Tensor,
        group: dist.ProcessGroup | None,
        vocab_start: int,
        vocab_size: int,
        loss: str,
        inplace: bool,
    ) -> torch.Tensor:
        """Arguments as `multi_hot_cross_entropy` prepares them; -> loss [N] fp32, nats.

        Raises:
            ValueError: a label outside the vocabulary (on CUDA a device-side assertion).
        """
        check_label_range(labels_NS, vocab_size)
        term = _TERM[loss]
        local_N = torch.empty(len(rows_NV), dtype=torch.float32, device=rows_NV.device)
        for rows in row_chunks(rows_NV):
            z = rows_NV[rows].float()
            target = _target(labels_NS[rows], weights_S, vocab_start, z)
            # a padded column of -inf must not meet a target of 0
            asked = torch.where(target > 0, target * term(-z) + (1 - target) * term(z), term(z))
            local_N[rows] = asked.sum(1)
        if group is not None:
            # before: the sum over this rank's columns; after: over the vocabulary
            dist.all_reduce(local_N, group=group)
        ctx.save_for_backward(rows_NV, labels_NS, weights_S)
        ctx.vocab_start, ctx.loss, ctx.inplace, ctx.overwritten = vocab_start, loss, inplace, False
        return torch.where(carries_loss(labels_NS, weights_S), local_N, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """grad_N [N] fp32 -> the logits' gradient [N, V] in their dtype.

        Raises:
            RuntimeError: a second backward over logits that the first has overwritten.
        """
        if ctx.overwritten:
            raise RuntimeError(
                "multi_hot_cross_entropy: the logits were overwritten by the first backward "
                "(inplace_backward=True)."
            )
        rows_NV, labels_NS, weights_S = ctx.saved_tensors
        rows_NV, slope, ctx.overwritten = rows_NV.detach(), _SLOPE[ctx.loss], ctx.inplace
        scale_N = torch.where(carries_loss(labels_NS, weights_S), grad_N, 0.0)
        grad_NV = rows_NV if ctx.inplace else torch.empty_like(rows_NV)
        for rows in row_chunks(rows_NV):
            z = rows_NV[rows].float()
            target = _target(labels_NS[rows], weights_S, ctx.vocab_start, z)
            grad = (1 - target) * slope(z) - target * slope(-z)
            grad_NV[rows] = grad * scale_N[rows, None]
        return grad_NV, *[None] * 7


def _target(labels_nS, weights_S, vocab_start, z_nV):
    """t of these rows and this rank's columns: 0 but for the bag's own tokens. fp32 [n, V]"""
    index, owned = own_labels(labels_nS, vocab_start, z_nV.shape[1])
    # a place that is not ours writes a 0 into column 0
    weight = torch.where(owned, weight_of_token(labels_nS, weights_S), 0.0)
    return torch.zeros_like(z_nV).scatter_reduce_(1, index, weight, "amax")
