"""Superposed vocab-parallel embedding: pool the bag before anything crosses the wire (paper,
listing 2).

b micro-batch, L positions, S bag size, H width, V rows of the table that this rank holds.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import mappings

from megatron_tst.ops import main_grad


def superposed_embedding(module: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean of the embedding rows of each bag, for a megatron.core VocabParallelEmbedding.

    Args:
        module: the embedding; `weight` [V/tp, H] holds rows vocab_start_index to vocab_end_index of
            the table.
        tokens: int64 [b, L, S], the same on every tensor-parallel rank.

    Returns:
        [b, L, H] in the dtype of the table; with `reduce_scatter_embeddings` (sequence parallelism)
        this rank's [L/tp, b, H]. The sum over the bag and over ranks and the division by S are
        fp32, then one cast.

    Wire: [b, L, H] fp32 once in forward, whatever S; in backward what stock moves ([b, L, H] in the
    table's dtype, gathered under sequence parallelism, else nothing). The weight gradient is
    accumulated in fp32: in `main_grad` where Megatron's DistributedDataParallel has put one, else
    in a buffer that is cast once.
    """
    return _PoolBags.apply(
        module.weight,
        tokens,
        module.vocab_start_index,
        module.tp_group,
        module.reduce_scatter_embeddings,
    )


class _PoolBags(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_VH, tokens_BLS, vocab_start, group, scatter):
        b, seq_length, bag_size = tokens_BLS.shape
        # [S, b*L] or, when the sequence is to be scattered, [S, L*b]: place by place, in the order
        # of the output's rows
        order = (2, 1, 0) if scatter else (2, 0, 1)
        local_SN = (tokens_BLS - vocab_start).permute(order).reshape(bag_size, -1)
        owned_SN = None
        if group.size() > 1:
            owned_SN = (local_SN >= 0) & (local_SN < weight_VH.shape[0])
            local_SN = local_SN.masked_fill(~owned_SN, 0)

        shape = local_SN.shape[1], weight_VH.shape[1]
        sum_NH = torch.zeros(shape, dtype=torch.float32, device=weight_VH.device)
        for place in range(bag_size):  # never [S*L, H] at once
            rows = weight_VH.index_select(0, local_SN[place])
            sum_NH += rows if owned_SN is None else rows * owned_SN[place, :, None]
        mean = (sum_NH / bag_size).view(*((seq_length, b) if scatter else (b, seq_length)), -1)

        # before: this rank's part of every position's mean; after: the whole mean (of its own
        # positions, if scattered)
        if scatter:
            mean = mappings.reduce_scatter_to_sequence_parallel_region(mean, group=group)
        else:
            mean = mappings.reduce_from_tensor_model_parallel_region(mean, group=group)
        ctx.save_for_backward(local_SN, owned_SN)
        ctx.weight, ctx.group, ctx.scatter = weight_VH, group, scatter
        return mean.to(weight_VH.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        local_SN, owned_SN = ctx.saved_tensors
        weight_VH = ctx.weight
        if ctx.scatter:
            grad = mappings.gather_from_sequence_parallel_region(grad, group=ctx.group)
        grad_NH = grad.reshape(-1, weight_VH.shape[1]).float() / len(local_SN)
        # fp32: in bf16 a frequent token's thousands of small contributions are lost
        buffer = main_grad.buffer_of(weight_VH)
        sum_VH = buffer
        if buffer is None:
            sum_VH = torch.zeros(weight_VH.shape, dtype=torch.float32, device=grad.device)
        for place in range(len(local_SN)):
            rows = grad_NH if owned_SN is None else grad_NH * owned_SN[place, :, None]
            sum_VH.index_add_(0, local_SN[place], rows)
        grad_VH = sum_VH.to(weight_VH.dtype) if buffer is None else main_grad.added(weight_VH)
        return grad_VH, *[None] * 4
