"""The multi-hot cross entropy kernel in torch: what csrc/multi_hot_ce.h does, for where the
extension is not there.

The same three steps with the same arguments as torch.ops.megatron_tst.multi_hot_ce_*; loss.py calls
either:

    statistics(logits [N, V], labels [N, S], weights [S], vocab_start, vocab_size, alt)
        -> fp32 [4, N] of this rank
    loss(statistics [R, 4, N], labels, weights, alt)
        -> fp32 [N], and [3, N] for backward
    gradient(logits, labels, weights, saved [3, N], upstream [N], vocab_start, alt)
        -> [N, V] in the logits' dtype

N rows (positions), V local vocabulary (padded vocabulary / tp), S labels a row, R ranks. All
arithmetic is fp32.
"""

from __future__ import annotations

import torch

from megatron_tst.ops.chunks import TORCH_KERNEL, rows_of
from megatron_tst.ops.names import IGNORE

_LOWEST = torch.finfo(torch.float32).min


def statistics(logits, labels, weights, vocab_start, vocab_size, alt):
    """Of each row: maximum, sum of exponentials, target, and the weight of the labels that this
    rank holds.
    """
    check_label_range(labels, vocab_size)
    index_NS, owned_NS = own_labels(labels, vocab_start, logits.shape[1])
    peak_N, sum_exp_N = torch.empty(2, logits.shape[0], dtype=torch.float32, device=logits.device)
    picked_NS = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    for chunk in row_chunks(logits):  # the only pass over the logits, whatever S is
        z = logits[chunk].float()
        peak = z.amax(-1).clamp_min_(_LOWEST)  # a shard of padding alone is all -inf
        peak_N[chunk] = peak
        picked_NS[chunk] = z.gather(-1, index_NS[chunk])
        sum_exp_N[chunk] = (z - peak.unsqueeze(-1)).exp_().sum(-1)
    picked_NS -= peak_N.unsqueeze(-1)
    if alt:
        scaled_NS = picked_NS + _log_weight_of_token(index_NS, owned_NS, labels, weights)
        repeated_NS = torch.tril(_same(index_NS, owned_NS), diagonal=-1).any(-1)
        target_N = scaled_NS.masked_fill(repeated_NS | ~owned_NS, -torch.inf).logsumexp(-1)
        held_N = torch.zeros_like(peak_N)
    else:
        weight_NS = _normalised_weight(labels, weights) * owned_NS
        target_N = torch.where(weight_NS > 0, weight_NS * picked_NS, 0.0).sum(
            -1
        )  # a weight of 0 must not meet a picked -inf
        held_N = weight_NS.sum(-1)
    return torch.stack([peak_N, sum_exp_N, target_N, held_N])


def loss(statistics, labels, weights, alt):
    """The ranks' statistics -> each row's loss, and its maximum, sum of exponentials and target
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


def gradient(logits, labels, weights, saved, upstream, vocab_start, alt):
    """(softmax - what the bag takes off it) * upstream, scaled in fp32 and rounded once."""
    return _write_gradient(
        torch.empty_like(logits), logits, labels, weights, saved, upstream, vocab_start, alt
    )


def gradient_(logits, labels, weights, saved, upstream, vocab_start, alt):
    """The same over the logits' memory."""
    _write_gradient(logits, logits, labels, weights, saved, upstream, vocab_start, alt)


def _write_gradient(out_NV, logits, labels, weights, saved, upstream, vocab_start, alt):
    peak_N, sum_exp_N, target_N = saved
    index_NS, owned_NS = own_labels(labels, vocab_start, logits.shape[1])
    # Columns are written, not accumulated, so every place that names a column must hold all that
    # the bag takes off it: no order of additions, hence deterministic. A place without an owned
    # label points at column 0 and holds column 0's.
    shared_NSS = index_NS.unsqueeze(-1) == index_NS.unsqueeze(-2)
    if alt:
        log_weight_NS = torch.where(
            owned_NS, _log_weight_of_token(index_NS, owned_NS, labels, weights), -torch.inf
        )
        log_weight_NS = torch.where(shared_NSS, log_weight_NS.unsqueeze(-2), -torch.inf).amax(-1)
        target_N = target_N.clamp_min(_LOWEST)  # no label: nothing is taken off
    else:
        weight_NS = _normalised_weight(labels, weights) * owned_NS
        off_NS = torch.where(shared_NSS, weight_NS.unsqueeze(-2), 0.0).sum(-1)
    scale_N = torch.where(carries_loss(labels, weights), upstream, 0.0)
    may_overwrite_z = (
        out_NV is logits or logits.dtype != torch.float32
    )  # else .float() below is the caller's memory
    for chunk in row_chunks(logits):
        z = logits[chunk].float()
        p = torch.sub(z, peak_N[chunk].unsqueeze(-1), out=z if may_overwrite_z else None)
        index = index_NS[chunk]
        off = (
            (p.gather(-1, index) + log_weight_NS[chunk] - target_N[chunk].unsqueeze(-1)).exp()
            if alt
            else off_NS[chunk]
        )
        p.exp_().div_(sum_exp_N[chunk].unsqueeze(-1))
        p.scatter_(-1, index, p.gather(-1, index) - off)
        p.mul_(scale_N[chunk].unsqueeze(-1))
        if p.data_ptr() != out_NV[chunk].data_ptr():  # fp32 in place: it is there already
            out_NV[chunk] = p
    return out_NV


def check_label_range(labels, vocab_size):
    """Refuse labels outside the vocabulary: an exception on CPU, an assertion of the device on
    CUDA.
    """
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= vocab_size))
    if labels.device.type != "cpu":
        torch._assert_async((~wrong).all())
    elif wrong.any():
        raise ValueError(
            f"multi_hot_cross_entropy: expected labels in 0..{vocab_size - 1} or {IGNORE}, got "
            f"{int(labels[wrong][0])}. "
            "Check that the data were tokenised with this vocabulary."
        )


def row_chunks(rows_NV: torch.Tensor):
    size = rows_of(TORCH_KERNEL, rows_NV.device.type, 4 * rows_NV.shape[1])
    return (slice(i, i + size) for i in range(0, rows_NV.shape[0], size))


def own_labels(labels, vocab_start, vocab_size):
    """-> index [N, S] into the local columns (0 where not owned), owned [N, S]."""
    local = labels - vocab_start
    owned = (local >= 0) & (local < vocab_size) & (labels != IGNORE)
    return local.masked_fill_(~owned, 0), owned


def _same(index, owned):
    """[N, S, S]: places k and j name the same column and both are owned."""
    return (index.unsqueeze(-1) == index.unsqueeze(-2)) & owned.unsqueeze(-1) & owned.unsqueeze(-2)


def carries_loss(labels, weights):
    return ((labels != IGNORE) & (weights > 0)).any(-1)


def _normalised_weight(labels, weights):
    """mce: weights of the valid labels, summing to 1 (all 0 where there is none). [N, S]"""
    weight = weights * (labels != IGNORE)
    return weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _log_weight_of_token(index, owned, labels, weights):
    """mce-alt: log of each token's weight, the largest of its occurrences, over the largest in the
    bag. [N, S]
    """
    relative = weight_of_token(labels, weights).log()
    return torch.where(_same(index, owned), relative.unsqueeze(-2), -torch.inf).amax(-1)


def weight_of_token(labels, weights):
    """Each place's weight over the largest in its bag, 0 where the label is ignored. [N, S]"""
    weight = weights * (labels != IGNORE)
    return weight / weight.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
