"""multi_hot_cross_entropy: the op, its autograd, its one collective, its kernels.

For a position with logits z and labels y_1..y_S of weights w_k (renormalised over the valid labels, so that they sum to 1):

    mce      lse(z) - sum_k w_k z[y_k]            (paper, section 3: the mean of S single-label cross entropies)
    mce-alt  lse(z) - lse_{v in bag}(z[v])        (paper, appendix: the bag as a set; here with log-weights inside)

The softmax statistics do not depend on the labels: one pass over the logits whatever S is.

Shapes: N rows (positions), V local vocabulary (padded vocabulary / tp), S labels a row. All arithmetic is fp32.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_tst.bags import IGNORE
from megatron_tst.config import LOSSES, TARGET_WEIGHTINGS

_PLACE_WEIGHT = {  # g(i), i = 1..S from the bag's first token (paper, section 5); only ratios matter
    "uniform": lambda i: torch.ones_like(i),
    "power-law": lambda i: 1 / i,
    "exponential": lambda i: (1 - i).exp(),
    "first-token": lambda i: (i == 1).to(i.dtype),
    "fitted-power-law": lambda i: 3.63 + 1.35 * i**-1.25,
}
assert tuple(_PLACE_WEIGHT) == TARGET_WEIGHTINGS

# Rows are taken in chunks so that the fp32 working copy stays in cache (CPU) or small beside the logits (GPU).
_CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
_LOWEST = torch.finfo(torch.float32).min


def target_weights(weighting: str, bag_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Weights of the places in a bag, fp32 [bag_size], for a name in TARGET_WEIGHTINGS."""
    return _PLACE_WEIGHT[weighting](torch.arange(1, bag_size + 1, dtype=torch.float64)).float().to(device)


def multi_hot_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    tp_group: dist.ProcessGroup | None = None,
    loss: str = "mce",
    inplace_backward: bool = False,
    kernel: str = "auto",
) -> torch.Tensor:
    """Cross entropy of each position against a bag of labels, over a vocabulary split across `tp_group`.

    Args:
        logits: [..., V/tp], bf16, fp16 or fp32. Rank r holds columns r*V/tp to (r+1)*V/tp. Padded columns may be -inf.
        labels: int64 [..., S], global ids, the same on every rank of `tp_group`; -100 is ignored. Duplicates add up
            (mce) or count once (mce-alt).
        weights: [S], non-negative, any scale; None means equal.
        tp_group: the ranks that share the vocabulary; None means that `logits` are whole.
        loss: "mce" or "mce-alt".
        inplace_backward: let backward write the gradient over `logits`. Only where nothing else reads them; allows
            one backward.
        kernel: "auto" or "torch" (the only kernel so far).

    Returns:
        [...] fp32, nats per position; 0, with zero gradient, where no label of positive weight is valid.
        A NaN in a row of logits makes that row's loss NaN and no other.

    Collectives: one all-gather of 4 floats a row in forward if tp > 1, none in backward.
    Saved for backward: the logits (not a copy) and, for each row, 2 floats and what its S labels take off the softmax.

    Raises:
        ValueError: mismatched shapes, wrong dtypes, unknown loss or kernel; on CPU also a label outside the vocabulary
            (on CUDA that is a device-side assertion, without synchronising).
    """
    _check(logits, labels, weights, loss, kernel)
    num_ranks, rank = (1, 0) if tp_group is None else (tp_group.size(), tp_group.rank())
    _check_label_range(labels, logits.shape[-1] * num_ranks)
    if weights is None:
        weights = torch.ones(labels.shape[-1])
    weights = weights.to(device=logits.device, dtype=torch.float32)
    rows_NV = logits.reshape(-1, logits.shape[-1])
    labels_NS = labels.reshape(-1, labels.shape[-1])
    out_N = _MultiHotCrossEntropy.apply(
        rows_NV, labels_NS, weights, tp_group if num_ranks > 1 else None, rank * logits.shape[-1], loss, inplace_backward
    )
    return out_N.reshape(labels.shape[:-1])


def _check(logits, labels, weights, loss, kernel):
    name = "multi_hot_cross_entropy"
    if loss not in LOSSES:
        raise ValueError(f"{name}: expected loss to be one of {LOSSES}, got {loss!r}.")
    if kernel not in ("auto", "torch"):
        raise ValueError(f"{name}: expected kernel 'auto' or 'torch', got {kernel!r}.")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16) or logits.dim() < 1:
        raise ValueError(f"{name}: expected logits [..., V/tp] in fp32, bf16 or fp16, got {logits.dtype} {tuple(logits.shape)}.")
    if labels.dtype != torch.int64:
        raise ValueError(f"{name}: expected int64 labels, got {labels.dtype}.")
    if labels.dim() != logits.dim() or labels.shape[:-1] != logits.shape[:-1] or labels.shape[-1] < 1:
        raise ValueError(
            f"{name}: expected labels [..., S] with the leading sizes of logits [..., V/tp], S >= 1; "
            f"got labels {tuple(labels.shape)} and logits {tuple(logits.shape)}. One label a position is labels.unsqueeze(-1)."
        )
    if labels.device != logits.device:
        raise ValueError(f"{name}: expected labels on the device of the logits, {logits.device}, got {labels.device}.")
    if weights is None:
        return
    if weights.shape != labels.shape[-1:]:
        raise ValueError(
            f"{name}: expected weights [{labels.shape[-1]}], one for each place in the bag, got {tuple(weights.shape)}."
        )
    if weights.device.type == "cpu" and not (bool((weights >= 0).all()) and bool((weights > 0).any())):
        raise ValueError(f"{name}: expected weights >= 0, one of them positive, got {weights.tolist()}.")


def _check_label_range(labels, vocab_size):
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= vocab_size))
    if labels.device.type == "cpu":
        if wrong.any():
            raise ValueError(
                f"multi_hot_cross_entropy: expected labels in 0..{vocab_size - 1} or {IGNORE}, got {int(labels[wrong][0])}. "
                "Check that the data were tokenised with this vocabulary."
            )
    else:
        torch._assert_async((~wrong).all())


def _chunks(rows_NV: torch.Tensor):
    size = max(1, _CHUNK_BYTES.get(rows_NV.device.type, 4 << 20) // (4 * max(1, rows_NV.shape[1])))
    return (slice(i, i + size) for i in range(0, rows_NV.shape[0], size))


def _own_labels(labels, vocab_start, vocab_size):
    """-> index [n, S] into the local columns (0 where not owned), owned [n, S]."""
    local = labels - vocab_start
    owned = (local >= 0) & (local < vocab_size) & (labels != IGNORE)
    return local.masked_fill_(~owned, 0), owned


def _same(index, owned):
    """[n, S, S]: places k and j name the same column and both are owned."""
    return (index.unsqueeze(-1) == index.unsqueeze(-2)) & owned.unsqueeze(-1) & owned.unsqueeze(-2)


def _normalised(weight):
    """mce: weights of the valid labels, summing to 1 (all 0 where there is none)."""
    return weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _log_weight_of_token(index, owned, weight):
    """mce-alt: log of each token's weight, the largest of its occurrences, over the largest in the bag. [n, S]"""
    relative = (weight / weight.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)).log()
    return torch.where(_same(index, owned), relative.unsqueeze(-2), -torch.inf).amax(-1)


class _MultiHotCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_NV, labels_NS, weights_S, group, vocab_start, loss, inplace):
        index_NS, owned_NS = _own_labels(labels_NS, vocab_start, rows_NV.shape[1])
        weight_NS = weights_S * (labels_NS != IGNORE)
        # The only passes over the logits: each row's maximum, sum of exponentials, and the logits of its labels.
        peak_N, sum_exp_N = torch.empty(2, rows_NV.shape[0], dtype=torch.float32, device=rows_NV.device)
        picked_NS = torch.empty(labels_NS.shape, dtype=torch.float32, device=rows_NV.device)
        for chunk in _chunks(rows_NV):
            z = rows_NV[chunk].float()
            peak = z.amax(-1).clamp_min_(_LOWEST)  # a shard of padding alone is all -inf
            peak_N[chunk] = peak
            picked_NS[chunk] = z.gather(-1, index_NS[chunk])
            sum_exp_N[chunk] = (z - peak.unsqueeze(-1)).exp_().sum(-1)

        picked_NS -= peak_N.unsqueeze(-1)
        held_N = torch.zeros_like(peak_N)  # weight of the labels that this rank owns
        if loss == "mce":
            weight_NS = _normalised(weight_NS) * owned_NS
            held_N = weight_NS.sum(-1)
            target_N = torch.where(weight_NS > 0, weight_NS * picked_NS, 0.0).sum(-1)  # a weight of 0 must not meet a picked -inf
        else:
            scaled_NS = picked_NS + _log_weight_of_token(index_NS, owned_NS, weight_NS)
            repeated_NS = torch.tril(_same(index_NS, owned_NS), diagonal=-1).any(-1)
            target_N = scaled_NS.masked_fill(repeated_NS | ~owned_NS, -torch.inf).logsumexp(-1)
            picked_NS = scaled_NS + peak_N.unsqueeze(-1)
        peak_N, sum_exp_N, target_N = _combine(torch.stack([peak_N, sum_exp_N, target_N, held_N]), group, loss)

        # What the bag takes off the softmax in each column that it names, for backward.
        valid_N = ((labels_NS != IGNORE) & (weights_S > 0)).any(-1)
        if loss == "mce-alt":
            share_NS = (picked_NS - (peak_N + target_N).unsqueeze(-1)).exp()
            weight_NS = torch.where(owned_NS & valid_N.unsqueeze(-1), share_NS, 0.0)
        ctx.save_for_backward(rows_NV, index_NS, weight_NS, valid_N, peak_N, sum_exp_N)
        ctx.loss, ctx.inplace = loss, inplace
        return torch.where(valid_N, sum_exp_N.log() - target_N, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N):
        if ctx.inplace is None:
            raise RuntimeError(
                "multi_hot_cross_entropy: the logits were overwritten by the first backward (inplace_backward=True)."
            )
        rows_NV, index_NS, weight_NS, valid_N, peak_N, sum_exp_N = ctx.saved_tensors
        grad_NV = rows_NV.detach() if ctx.inplace else torch.empty_like(rows_NV)
        may_overwrite_z = ctx.inplace or rows_NV.dtype != torch.float32  # else .float() below is the caller's memory
        ctx.inplace = None if ctx.inplace else False
        # Columns are written, not accumulated, so every place that names a column must hold all that the bag takes off it: no
        # order of additions, hence deterministic. A place without an owned label points at column 0 and holds column 0's.
        together_NSS = torch.where(index_NS.unsqueeze(-1) == index_NS.unsqueeze(-2), weight_NS.unsqueeze(-2), 0.0)
        off_NS = together_NSS.sum(-1) if ctx.loss == "mce" else together_NSS.amax(-1)
        scale_N = torch.where(valid_N, grad_N, 0.0)
        for chunk in _chunks(rows_NV):
            z = rows_NV[chunk].detach().float()
            p = torch.sub(z, peak_N[chunk].unsqueeze(-1), out=z if may_overwrite_z else None)
            p.exp_().div_(sum_exp_N[chunk].unsqueeze(-1))
            index = index_NS[chunk]
            p.scatter_(-1, index, p.gather(-1, index) - off_NS[chunk])
            p.mul_(scale_N[chunk].unsqueeze(-1))  # scaled in fp32, rounded once
            if p.data_ptr() != grad_NV[chunk].data_ptr():  # fp32 in place: it is there already
                grad_NV[chunk] = p
        return grad_NV, None, None, None, None, None, None


def _combine(local_4N, group, loss):
    """Every rank's (max, sum, target, held weight) -> those of the whole vocabulary, the same bits on every rank."""
    if group is None:
        return local_4N[0], local_4N[1], local_4N[2]
    gathered = torch.empty(group.size() * 4, local_4N.shape[1], dtype=torch.float32, device=local_4N.device)
    dist.all_gather_into_tensor(gathered, local_4N, group=group)  # gloo takes ranks concatenated, not stacked
    peak_r, sum_r, target_r, held_r = gathered.view(group.size(), 4, -1).unbind(1)
    peak = peak_r.amax(0)
    shift = peak_r - peak
    sum_exp = (sum_r * shift.exp()).sum(0)
    if loss == "mce":
        target = (target_r + torch.where(held_r > 0, held_r * shift, 0.0)).sum(0)
    else:
        target = (target_r + shift).logsumexp(0)
    return peak, sum_exp, target
