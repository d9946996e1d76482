"""Multi-token prediction over bags: the k-th head of a superposed model predicts the k-th bag after
the next one.

Megatron shifts tokens and labels by one place of the last dimension for each head. In a superposed
batch that dimension is the bag, so these two functions of
megatron/core/transformer/multi_token_prediction.py take 3-D tensors along the sequence instead
(loop/patch.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist


def roll_bags(
    roll_tensor: Callable,
    bags: torch.Tensor,
    shifts: int,
    cp_group: dist.ProcessGroup | None,
    packed_seq_params: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Megatron's roll_tensor for tokens or labels [b, L/cp, S]: by whole bags, over the borders of
    context-parallel ranks.

    Args:
        roll_tensor: Megatron's function.
        bags: int64 [b, L/cp, S]; rank r of `cp_group` holds chunks r and 2*cp-1-r of the sequence.
        shifts: bags to shift by, -1 for the next one.
        packed_seq_params: None, since packed sequences are refused with TST.

    Returns:
        the rolled bags, zeros after the last one (Megatron rolls the loss mask alike, so they count
        for nothing), and their sum.
    """
    assert packed_seq_params is None, "packed sequences are refused with TST"
    return roll_tensor(bags, shifts=shifts, dims=1, cp_group=cp_group)


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
