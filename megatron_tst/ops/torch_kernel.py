"""The multi-hot cross entropy kernel in torch: what csrc/multi_hot_ce.h does, for where the
extension is not there.

The same three steps with the same arguments as torch.ops.megatron_tst.multi_hot_ce_*; loss.py calls
either:

    statistics(logits [N, V], labels [N, S], weights [S], vocab_start, vocab_size, alt)
        -> fp32 [4, N] of this rank
    loss(statistics [R, 4, N], labels, weights, alt)
        -> fp32 [N], and fp32 [3, N] for backward
    gradient(logits, labels, weights, saved [3, N], upstream [N], vocab_start, alt)
        -> [N, V] in the logits' dtype

N rows (positions), V local vocabulary (padded vocabulary / tp), S labels a row, R ranks. Rank r
holds columns vocab_start = r*V to (r+1)*V of the vocabulary, and all labels as global ids. `alt`
says mce-alt. All arithmetic is fp32, in nats.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_tst.ops.chunks import TORCH_KERNEL, rows_of
from megatron_tst.ops.names import IGNORE

_LOWEST, _TINY = torch.finfo(torch.float32).min, torch.finfo(torch.float32).tiny


def statistics(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    vocab_start: int,
    vocab_size: int,
    alt: bool,
) -> torch.Tensor:
    """Of each row: maximum, sum of exponentials, target, and the weight of the labels that this
    rank holds.

    Args:
        logits: [N, V] of this rank's columns, fp32, bf16 or fp16.
        labels: int64 [N, S], global ids, -100 ignored.
        weights: fp32 [S].
        vocab_size: of all ranks together.

    Returns:
        fp32 [4, N], of this rank's columns alone.

    Raises:
        ValueError: a label outside the vocabulary (on CUDA a device-side assertion).
    """
    check_label_range(labels, vocab_size)
    index_NS, owned_NS = own_labels(labels, vocab_start, logits.shape[1])
    peak_N, sum_exp_N = torch.empty(2, logits.shape[0], dtype=torch.float32, device=logits.device)
    picked_NS = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    for chunk in row_chunks(logits):  # the only pass over the logits, whatever S is
        z = logits[chunk].float()
        peak = z.amax(1).clamp_min_(_LOWEST)  # a shard of padding alone is all -inf
        peak_N[chunk] = peak
        picked_NS[chunk] = z.gather(1, index_NS[chunk])
        sum_exp_N[chunk] = (z - peak[:, None]).exp_().sum(1)
    picked_NS -= peak_N[:, None]
    if alt:
        scaled_NS = picked_NS + _log_weight_of_token(index_NS, owned_NS, labels, weights)
        repeated_NS = torch.tril(_same(index_NS, owned_NS), diagonal=-1).any(2)
        target_N = scaled_NS.masked_fill(repeated_NS | ~owned_NS, -torch.inf).logsumexp(1)
        held_N = torch.zeros_like(peak_N)
    else:
        weight_NS = _normalised_weight(labels, weights) * owned_NS
        # a weight of 0 must not meet a picked -inf
        target_N = torch.where(weight_NS > 0, weight_NS * picked_NS, 0.0).sum(1)
        held_N = weight_NS.sum(1)
    return torch.stack([peak_N, sum_exp_N, target_N, held_N])


def loss(
    statistics: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, alt: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ranks' statistics -> each row's loss.

    Args:
        statistics: fp32 [R, 4, N] of all ranks, the same on each of them.
        labels, weights: as in `statistics`.

    Returns:
        the loss, fp32 [N], and for backward fp32 [3, N]: maximum, sum of exponentials and target
        over the whole vocabulary.
    """
    peak_RN, sum_RN, target_RN, held_RN = statistics.unbind(1)
    peak_N = peak_RN.amax(0)
    shift_RN = peak_RN - peak_N
    sum_exp_N = (sum_RN * shift_RN.exp()).sum(0)
    if alt:
        target_N = (target_RN + shift_RN).logsumexp(0)
    else:
        target_N = (target_RN + torch.where(held_RN > 0, held_RN * shift_RN, 0.0)).sum(0)
    loss_N = torch.where(carries_loss(labels, weights), sum_exp_N.log() - target_N, 0.0)
    return loss_N, torch.stack([peak_N, sum_exp_N, target_N])


def gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    saved: torch.Tensor,
    upstream: torch.Tensor,
    vocab_start: int,
    alt: bool,
) -> torch.Tensor:
    """(softmax - what the bag takes off it) * upstream, scaled in fp32 and rounded once.

    Args:
        logits, labels, weights: as in `statistics`.
        saved: fp32 [3, N], from `loss`.
        upstream: fp32 [N], the gradient of each row's loss.

    Returns:
        [N, V] of this rank's columns, in the logits' dtype. Exact zeros in rows of no valid label
        or an upstream of 0, whatever their logits are.
    """
    return _write_gradient(
        torch.empty_like(logits), logits, labels, weights, saved, upstream, vocab_start, alt
    )


def gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    saved: torch.Tensor,
    upstream: torch.Tensor,
    vocab_start: int,
    alt: bool,
) -> None:
    """The same over the logits' memory."""
    _write_gradient(logits, logits, labels, weights, saved, upstream, vocab_start, alt)


def _write_gradient(out_NV, logits, labels, weights, saved, upstream, vocab_start, alt):
    """Write the gradient into `out_NV`, which may be the logits themselves.

    Example, mce: 4 columns, logits log(1, 2, 3, 4), so that the softmax is 0.1, 0.2, 0.3, 0.4. The
    bag names column 3 twice and column 1 once, with equal weights of 1/3 each. So it takes 2/3 off
    column 3 and 1/3 off column 1, and the gradient is

        0.1    0.2 - 1/3    0.3    0.4 - 2/3

    Both places that name column 3 write the same 0.4 - 2/3: whichever comes last, it is right.

    mce-alt takes the bag as a set: off the columns it names, the softmax among them alone, 0.2/0.6
    and 0.4/0.6. The gradient is 0.1, 0.2 - 1/3, 0.3, 0.4 - 2/3, here the same.
    """
    peak_N, sum_exp_N, target_N = saved
    index_NS, owned_NS = own_labels(labels, vocab_start, logits.shape[1])
    # Columns are written, not accumulated, so every place that names a column must hold all that
    # the bag takes off it. There is no order of additions, so the result is deterministic. A place
    # without an owned label points at column 0 and holds column 0's.
    shared_NSS = index_NS[:, :, None] == index_NS[:, None, :]
    if alt:
        log_weight_NS = _log_weight_of_token(index_NS, owned_NS, labels, weights)
        log_weight_NS = torch.where(owned_NS, log_weight_NS, -torch.inf)
        log_weight_NS = torch.where(shared_NSS, log_weight_NS[:, None, :], -torch.inf).amax(2)
        target_N = target_N.clamp_min(_LOWEST)  # no label: nothing is taken off
    else:
        weight_NS = _normalised_weight(labels, weights) * owned_NS
        off_NS = torch.where(shared_NSS, weight_NS[:, None, :], 0.0).sum(2)
    scale_N = torch.where(carries_loss(labels, weights), upstream, 0.0)
    zero_N = scale_N == 0  # exact zeros, whatever the logits are: 0 times a NaN would be a NaN
    fp32 = logits.dtype == torch.float32  # then it is made where it goes
    for chunk in row_chunks(logits):
        z = logits[chunk].float()
        p = torch.sub(z, peak_N[chunk, None], out=out_NV[chunk] if fp32 else z)
        index = index_NS[chunk]
        if alt:
            log_p = p.gather(1, index) + log_weight_NS[chunk]
            off = (log_p - target_N[chunk, None]).exp()
        else:
            off = off_NS[chunk]
        p.exp_().div_(sum_exp_N[chunk, None])
        p.scatter_(1, index, p.gather(1, index) - off)
        p.mul_(scale_N[chunk, None]).masked_fill_(zero_N[chunk, None], 0.0)
        if not fp32:
            out_NV[chunk] = p
    return out_NV


def check_label_range(labels: torch.Tensor, vocab_size: int) -> None:
    """Refuse labels outside the vocabulary.

    Args:
        labels: int64 [N, S], -100 ignored.
        vocab_size: of all ranks together.

    Raises:
        ValueError: on CPU. On CUDA it is a device-side assertion, without waiting for the GPU.
    """
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= vocab_size))
    if labels.device.type != "cpu":
        torch._assert_async((~wrong).all())
    elif wrong.any():
        raise ValueError(
            f"multi_hot_cross_entropy: expected labels in 0..{vocab_size - 1} or {IGNORE}, got "
            f"{int(labels[wrong][0])}. Check that the data were tokenised with this vocabulary."
        )


def row_chunks(rows_NV: torch.Tensor) -> Iterator[slice]:
    """Rows of [N, V] logits, a few at a time: their fp32 copy stays small."""
    size = rows_of(TORCH_KERNEL, rows_NV.device.type, 4 * rows_NV.shape[1])
    return (slice(i, i + size) for i in range(0, rows_NV.shape[0], size))


def own_labels(
    labels: torch.Tensor, vocab_start: int, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The labels as this rank sees them, which holds columns vocab_start to vocab_start + columns.

    Returns:
        index int64 [N, S] into its columns, 0 where it does not own the label, and owned bool
        [N, S].
    """
    local = labels - vocab_start
    owned = (local >= 0) & (local < columns)  # none that is ignored: it is negative
    return local.masked_fill_(~owned, 0), owned


def _same(index, owned):
    """[N, S, S]: places k and j name the same column and both are owned."""
    same = index[:, :, None] == index[:, None, :]
    return same & owned[:, :, None] & owned[:, None, :]


def carries_loss(labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Whether a row has a valid label of positive weight. bool [N]"""
    return (_valid_weight(labels, weights) > 0).any(1)


def _normalised_weight(labels, weights):
    """mce: weights of the valid labels, which sum to 1 (all 0 where there is none). [N, S]"""
    weight = _valid_weight(labels, weights)
    return weight / weight.sum(1, keepdim=True).clamp_min(_TINY)


def _log_weight_of_token(index, owned, labels, weights):
    """mce-alt: log of each token's weight, the largest of its occurrences, over the largest in the
    bag. [N, S]
    """
    relative = weight_of_token(labels, weights).log()
    return torch.where(_same(index, owned), relative[:, None, :], -torch.inf).amax(2)


def weight_of_token(labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each place's weight over the largest in its bag, 0 where the label is ignored. fp32 [N, S]"""
    weight = _valid_weight(labels, weights)
    return weight / weight.amax(1, keepdim=True).clamp_min(_TINY)


def _valid_weight(labels, weights):
    """Each place's weight, 0 where the label is ignored. [N, S]"""
    return weights * (labels != IGNORE)
