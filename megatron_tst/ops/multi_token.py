"""Multi-token prediction over bags: the k-th head of a superposed model predicts the k-th bag after
the next one.

Megatron shifts tokens and labels by one place of the last dimension for each head. In a superposed
batch that dimension is the bag, so these two functions of
megatron/core/transformer/multi_token_prediction.py take 3-D tensors along the sequence instead
(loop/patch.py).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

SEQUENCE = 1  # the dimension of bags [b, L, S]
_IDS = torch.int64, torch.int32


def rolls_bags(tensor: torch.Tensor | None, dims: int) -> bool:
    """Whether Megatron's roll_tensor is asked to shift tokens or labels inside their bags, and so
    has to shift whole bags, along SEQUENCE. Context parallelism, the zeros after the last bag and
    the sum are Megatron's: rank r of the group holds chunks r and 2*cp-1-r of the sequence.

    Args:
        tensor: bags are int64 [b, L/cp, S]. Hidden state mixing (Megatron 0.20) rolls hidden states
            [b, H, L/cp] by the same function, floats with the sequence last.
        dims: the dimension to roll.
    """
    bags = tensor is not None and tensor.dim() == 3 and tensor.dtype in _IDS
    return bags and dims % 3 == 2


def accepted_in_bags(
    logits: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    whole_logits: bool,
    tp_group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many guesses of a head are right, a guess being the most likely token and right if it is
    in the bag.

    Args:
        logits: [L, b, V/tp] of this rank's columns, or [L, b, V] with `whole_logits`.
        labels: int64 [b, L, S], -100 ignored.
        loss_mask: [b, L], 0 where nothing counts.
        tp_group: the ranks that share the vocabulary; all of them call.

    Returns:
        right guesses and positions that count, fp32 scalars.
    """
    from megatron.core.transformer.multi_token_prediction import _vocab_parallel_argmax

    with torch.no_grad():
        if tp_group is not None and tp_group.size() > 1 and not whole_logits:
            guess = _vocab_parallel_argmax(logits, tp_group, tp_group.size())
        else:
            guess = logits.argmax(-1)
        counts = loss_mask.bool()
        right = (labels == guess.t().unsqueeze(-1)).any(-1) & counts
        return right.sum().float(), counts.sum().float()
