"""multi_hot_cross_entropy: the op, its autograd, its one collective, and the choice of its kernel.

For a position with logits z and labels y_1..y_S of weights w_k (renormalised over the valid labels,
so that they sum to 1):

    mce         lse(z) - sum_k w_k z[y_k]
                paper, section 3: the mean of S single-label cross entropies
    mce-alt     lse(z) - lse_{v in bag}(z[v])
                paper, appendix: the bag as a set; here with log-weights inside
    bce, hinge  ablations without a softmax, worse than no TST in the paper: ops/ablations.py

The softmax statistics do not depend on the labels: one pass over the logits whatever S is. The
kernels are in csrc/ (C++, CUDA) and torch_kernel.py (torch).

Shapes: N rows (positions), V local vocabulary (padded vocabulary / tp), S labels a row. All
arithmetic is fp32.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

from megatron_tst import extension
from megatron_tst.ops import torch_kernel
from megatron_tst.ops.ablations import BagAblation
from megatron_tst.ops.names import ABLATIONS, LOSSES

# g(i), i = 1..S from the bag's first token (paper, section 5); only ratios matter
_PLACE_WEIGHT = {
    "uniform": lambda i: torch.ones_like(i),
    "power-law": lambda i: 1 / i,
    "exponential": lambda i: (1 - i).exp(),
    "first-token": lambda i: (i == 1).to(i.dtype),
    "fitted-power-law": lambda i: 3.63 + 1.35 * i**-1.25,
}


@functools.cache  # asked for in every micro-batch; a copy to a GPU would wait for it
def target_weights(
    weighting: str, bag_size: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Weights of the places in a bag, from its first token (paper, section 5).

    Args:
        weighting: a name in names.TARGET_WEIGHTINGS.
        bag_size: S.
        device: where they are to lie.

    Returns:
        fp32 [S], > 0 but for first-token's zeros; only their ratios matter. One tensor for all
        callers: read it only.

    Raises:
        KeyError: another name.
    """
    places = torch.arange(1, bag_size + 1, dtype=torch.float64)
    return _PLACE_WEIGHT[weighting](places).float().to(device)


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
    """Cross entropy of each position against a bag of labels, over a vocabulary split across
    `tp_group`.

    Args:
        logits: [..., V/tp], bf16, fp16 or fp32. Rank r holds columns r*V/tp to (r+1)*V/tp. Padded
            columns may be -inf.
        labels: int64 [..., S], global ids, the same on every rank of `tp_group`; -100 is ignored.
            Duplicates add up (mce) or count once (the others).
        weights: [S], non-negative, any scale; None means equal.
        tp_group: the ranks that share the vocabulary; None means that `logits` are whole.
        loss: "mce" or "mce-alt"; "bce" or "hinge" for ablations, in torch alone.
        inplace_backward: let backward write the gradient over `logits`. Only where nothing else
            reads them; allows one backward.
        kernel: "extension" (C++ on CPU, CUDA on CUDA tensors), "torch", or "auto": the extension
            where it is there.

    Returns:
        [...] fp32, nats per position; 0, with zero gradient, where no label of positive weight is
        valid. A NaN in a row of logits makes that row's loss NaN and no other.

    Collectives: one all-gather of 4 floats a row in forward if tp > 1 (ablations: an all-reduce of
    one), none in backward. Saved for backward: the logits and the labels (not copies) and 3 floats
    a row.

    Raises:
        ValueError: mismatched shapes, wrong dtypes or devices, unknown loss, a kernel that is not
            there; on CPU also a label outside the vocabulary (on CUDA that is a device-side
            assertion, without synchronising).
    """
    _check(logits, labels, weights, loss)
    kernel = extension.choose(_kernel_for(loss, kernel), logits.device.type)
    ranks, rank = (1, 0) if tp_group is None else (tp_group.size(), tp_group.rank())
    columns = logits.shape[-1]
    rows_NV = logits.reshape(-1, columns)
    if rows_NV.stride(1) != 1 or rows_NV.stride(0) < columns:
        rows_NV = rows_NV.contiguous()
    labels_NS = labels.reshape(-1, labels.shape[-1]).contiguous()
    if weights is None:  # made there, not copied: that would wait for the GPU
        weights = torch.ones(labels.shape[-1], device=logits.device)
    weights = weights.to(device=logits.device, dtype=torch.float32).contiguous()
    where = tp_group if ranks > 1 else None, rank * columns, ranks * columns
    if loss in ABLATIONS:
        loss_N = BagAblation.apply(rows_NV, labels_NS, weights, *where, loss, inplace_backward)
    else:
        loss_N = _MultiHotCrossEntropy.apply(
            rows_NV, labels_NS, weights, *where, loss == "mce-alt", inplace_backward, kernel
        )
    return loss_N.reshape(labels.shape[:-1])


def _kernel_for(loss, kernel):
    if loss not in ABLATIONS:
        return kernel
    if kernel == "extension":
        raise ValueError(
            f"multi_hot_cross_entropy: expected kernel 'auto' or 'torch' with loss {loss!r}, got "
            "'extension'. It is an ablation, in torch alone."
        )
    return "torch"


def _check(logits, labels, weights, loss):
    name = "multi_hot_cross_entropy"
    if loss not in LOSSES + ABLATIONS:
        raise ValueError(f"{name}: expected loss to be one of {LOSSES + ABLATIONS}, got {loss!r}.")
    floats = torch.float32, torch.bfloat16, torch.float16
    if logits.dtype not in floats or not logits.dim() or not logits.shape[-1]:
        raise ValueError(
            f"{name}: expected logits [..., V/tp >= 1] in fp32, bf16 or fp16, got {logits.dtype} "
            f"{tuple(logits.shape)}."
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"{name}: expected int64 labels, got {labels.dtype}.")
    if not labels.dim() or labels.shape[:-1] != logits.shape[:-1] or not labels.shape[-1]:
        raise ValueError(
            f"{name}: expected labels [..., S] with the leading sizes of logits [..., V/tp], S >= "
            f"1; got labels {tuple(labels.shape)} and logits {tuple(logits.shape)}. One label a "
            "position is labels.unsqueeze(-1)."
        )
    if labels.device != logits.device:
        raise ValueError(
            f"{name}: expected labels on the device of the logits, {logits.device}, got "
            f"{labels.device}."
        )
    if weights is None:
        return
    if weights.shape != labels.shape[-1:]:
        raise ValueError(
            f"{name}: expected weights [{labels.shape[-1]}], one for each place in the bag, got "
            f"{tuple(weights.shape)}."
        )
    on_host = weights.device.type == "cpu"  # else looking at them would wait for the GPU
    if on_host and not (bool((weights >= 0).all()) and bool((weights > 0).any())):
        raise ValueError(
            f"{name}: expected weights >= 0, one of them positive, got {weights.tolist()}."
        )


# name -> run(step), the kernel's function for "statistics", "loss", "gradient" or "gradient_"
# (arguments: torch_kernel.py)
KERNELS = {
    "extension": lambda step: getattr(torch.ops.megatron_tst, f"multi_hot_ce_{step}"),
    "torch": lambda step: getattr(torch_kernel, step),
}


class _MultiHotCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, rows_NV, labels_NS, weights_S, group, vocab_start, vocab_size, alt, inplace, kernel
    ):
        run = KERNELS[kernel]
        local_4N = run("statistics")(rows_NV, labels_NS, weights_S, vocab_start, vocab_size, alt)
        loss_N, saved_3N = run("loss")(of_all_ranks(local_4N, group), labels_NS, weights_S, alt)
        ctx.save_for_backward(rows_NV, labels_NS, weights_S, saved_3N)
        ctx.vocab_start, ctx.alt, ctx.run = vocab_start, alt, run
        ctx.inplace, ctx.overwritten = inplace, False
        return loss_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N):
        if ctx.overwritten:
            raise RuntimeError(
                "multi_hot_cross_entropy: the logits were overwritten by the first backward "
                "(inplace_backward=True)."
            )
        rows_NV, labels_NS, weights_S, saved_3N = ctx.saved_tensors
        rows_NV = rows_NV.detach()
        rest = labels_NS, weights_S, saved_3N, grad_N.contiguous(), ctx.vocab_start, ctx.alt
        if ctx.inplace:
            ctx.overwritten = True
            ctx.run("gradient_")(rows_NV, *rest)
            grad_NV = rows_NV
        else:
            grad_NV = ctx.run("gradient")(rows_NV, *rest)
        return grad_NV, *[None] * 8


def of_all_ranks(local_4N: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The op's one collective.

    Before: this rank's statistics, fp32 [4, N]. After: every rank's, fp32 [R, 4, N], the same on
    all of them.
    """
    if group is None:
        return local_4N.unsqueeze(0)
    # gloo takes ranks concatenated, not stacked
    shape = group.size() * 4, local_4N.shape[1]
    gathered = torch.empty(shape, dtype=torch.float32, device=local_4N.device)
    dist.all_gather_into_tensor(gathered, local_4N, group=group)
    return gathered.view(group.size(), 4, -1)
