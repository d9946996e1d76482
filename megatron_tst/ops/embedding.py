"""Superposed vocab-parallel embedding: pool the bag before anything crosses the wire (paper,
listing 2).

The two steps are in csrc/superposed_embedding* (C++, CUDA) and here in torch, for where the
extension is not there. Both take the same arguments:

    pool(table [V, H], tokens [N, S], vocab_start, vocab_size, dtype)
        -> [N, H] in `dtype`: each bag's sum over the rows that this rank holds, over S
    add_gradient_(gradient [V, H], upstream [N, H], tokens [N, S], vocab_start, vocab_size)
        adds each row's share, in place

b micro-batch, L positions, N = b * L of them in the order of the output's rows, S bag size, H
width, V rows of the table that this rank holds. Rank r holds rows vocab_start = r*V to (r+1)*V of
`vocab_size`, and all tokens as global ids. All arithmetic is fp32.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import mappings

from megatron_tst import extension
from megatron_tst.ops import main_grad


def superposed_embedding(
    module: torch.nn.Module, tokens: torch.Tensor, kernel: str = "auto"
) -> torch.Tensor:
    """Mean of the embedding rows of each bag, for a megatron.core VocabParallelEmbedding.

    Args:
        module: the embedding; `weight` [V/tp, H] holds rows vocab_start_index to vocab_end_index of
            the table, which has `num_embeddings` rows.
        tokens: int64 [b, L, S], the same on every tensor-parallel rank.
        kernel: "extension" (C++ on CPU, CUDA on CUDA tensors), "torch", or "auto": the extension
            where it is there.

    Returns:
        [b, L, H] in the dtype of the table; with `reduce_scatter_embeddings` (sequence parallelism)
        this rank's [L/tp, b, H]. The sum over the bag, in the order of its places, the sum over
        ranks and the division by S are fp32, then one cast: the same bits with either kernel. Rows
        that a rank does not hold are not touched, so a NaN in a row stays with its bags.

    Wire: [b, L, H] fp32 once in forward, whatever S; in backward what stock moves ([b, L, H] in the
    table's dtype, gathered under sequence parallelism, else nothing).

    The weight gradient is summed in fp32 and added to `main_grad` where Megatron's
    DistributedDataParallel has put one, else rounded once. The extension's is the same to the bit
    in every run, on CPU with any number of threads; the torch kernel's on CUDA is not.

    Raises:
        ValueError: a kernel that is not there; on CPU also a token outside the table, on whatever
            rank (on CUDA that is a device-side assertion, without synchronising).
    """
    return _PoolBags.apply(
        module.weight,
        tokens,
        module.vocab_start_index,
        module.num_embeddings,
        module.tp_group,
        module.reduce_scatter_embeddings,
        extension.choose(kernel, module.weight.device.type),
    )


class _PoolBags(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_VH, tokens_BLS, vocab_start, vocab_size, group, scatter, kernel):
        b, seq_length, bag_size = tokens_BLS.shape
        if scatter:  # the sequence is cut: its order is the output's
            tokens_BLS = tokens_BLS.transpose(0, 1)
        tokens_NS = tokens_BLS.reshape(-1, bag_size).contiguous()
        pool, ctx.add_gradient_ = KERNELS[kernel]()
        # fp32 where the ranks' parts are still to be added up
        dtype = torch.float32 if group.size() > 1 else weight_VH.dtype
        mean = pool(weight_VH.detach(), tokens_NS, vocab_start, vocab_size, dtype)
        mean = mean.view(*((seq_length, b) if scatter else (b, seq_length)), -1)

        # before: this rank's part of every position's mean; after: the whole mean (of its own
        # positions, if scattered)
        if scatter:
            mean = mappings.reduce_scatter_to_sequence_parallel_region(mean, group=group)
        else:
            mean = mappings.reduce_from_tensor_model_parallel_region(mean, group=group)
        ctx.save_for_backward(tokens_NS)
        ctx.weight, ctx.range = weight_VH, (vocab_start, vocab_size)
        ctx.group, ctx.scatter = group, scatter
        return mean.to(weight_VH.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (tokens_NS,) = ctx.saved_tensors
        weight_VH = ctx.weight
        if ctx.scatter:
            grad = mappings.gather_from_sequence_parallel_region(grad, group=ctx.group)
        grad_NH = grad.reshape(-1, weight_VH.shape[1]).contiguous()
        buffer = main_grad.buffer_of(weight_VH)
        sum_VH = torch.zeros_like(weight_VH) if buffer is None else buffer
        ctx.add_gradient_(sum_VH, grad_NH, tokens_NS, *ctx.range)
        grad_VH = sum_VH if buffer is None else main_grad.added(weight_VH)
        return grad_VH, *[None] * 6


def _pool(table, tokens, vocab_start, vocab_size, dtype):
    wrong = (tokens < 0) | (tokens >= vocab_size)
    if tokens.device.type != "cpu":
        torch._assert_async((~wrong).all())
    elif wrong.any():
        raise ValueError(
            f"superposed_embedding: expected token ids in 0..{vocab_size - 1}, got "
            f"{int(tokens[wrong][0])}. Check that the data were tokenised with this vocabulary."
        )
    local_NS, elsewhere_NS = _local(tokens, vocab_start, vocab_size, table.shape[0])
    shape = tokens.shape[0], table.shape[1]
    sum_NH = torch.zeros(shape, dtype=torch.float32, device=table.device)
    for place in range(tokens.shape[1]):  # never [N*S, H] at once
        rows = table.index_select(0, local_NS[:, place])
        if elsewhere_NS is not None:  # not a product: a NaN in row 0 must not meet a zero
            rows.masked_fill_(elsewhere_NS[:, place, None], 0)
        sum_NH += rows
    # by a tensor: by a number, CUDA multiplies by the reciprocal, which rounds twice
    return sum_NH.div_(sum_NH.new_full((), tokens.shape[1])).to(dtype)


def _add_gradient_(gradient, upstream, tokens, vocab_start, vocab_size):
    local_NS, elsewhere_NS = _local(tokens, vocab_start, vocab_size, gradient.shape[0])
    share_NH = upstream.float()
    share_NH = share_NH / share_NH.new_full((), tokens.shape[1])
    # fp32: in bf16 a frequent token's thousands of small contributions are lost
    fp32 = gradient.dtype == torch.float32
    sum_VH = gradient if fp32 else torch.zeros_like(gradient, dtype=torch.float32)
    for place in range(tokens.shape[1]):
        rows = share_NH
        if elsewhere_NS is not None:
            rows = share_NH.masked_fill(elsewhere_NS[:, place, None], 0)
        sum_VH.index_add_(0, local_NS[:, place], rows)
    if not fp32:
        gradient += sum_VH


def _local(tokens, vocab_start, vocab_size, rows):
    """Index [N, S] into the rows that this rank holds, and whether another rank holds the token's,
    bool [N, S] (None where this rank holds all). There the index is 0.
    """
    if rows == vocab_size:
        return tokens, None
    local = tokens - vocab_start
    elsewhere = (local < 0) | (local >= rows)
    return local.masked_fill_(elsewhere, 0), elsewhere


# name -> (pool, add_gradient_); the extension's ops exist once it is loaded
KERNELS = {
    "extension": lambda: (
        torch.ops.megatron_tst.superposed_embedding,
        torch.ops.megatron_tst.superposed_embedding_gradient_,
    ),
    "torch": lambda: (_pool, _add_gradient_),
}
