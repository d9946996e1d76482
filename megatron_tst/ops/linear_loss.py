"""The output layer and the loss in one op, for `--tst-fused-linear-loss`: the logits of all rows
never exist at once.

Forward: for one chunk of rows after the other, logits = hidden @ weight^T and their statistics; one
collective for all rows. Backward: the chunk's logits again, their gradient in place, and the two
products with it. Costs one more product (a third more time in the output layer), saves the logits
[L, b, V/tp]: the largest activation of a run with a large vocabulary.

N rows, H width, V this rank's columns of the vocabulary (padded vocabulary / tp), S labels a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, mappings

from megatron_tst import extension
from megatron_tst.ops import main_grad
from megatron_tst.ops.chunks import LINEAR_LOSS, rows_of
from megatron_tst.ops.loss import KERNELS, of_all_ranks


@dataclass
class DeferredLogits:
    """What the output layer returns in place of logits between its call and the loss: all that the
    loss needs to compute them.

    Args:
        layer: the output layer.
        hidden: [L, b, H], or this rank's [L/tp, b, H] under sequence parallelism.
        weight: [V, H], this rank's rows of the table.
    """

    layer: ColumnParallelLinear
    hidden: torch.Tensor
    weight: torch.Tensor


@contextlib.contextmanager
def deferred_logits(layer: torch.nn.Module) -> Iterator[None]:
    """Let this output layer return DeferredLogits.

    Raises:
        ValueError: the layer is not one whose product with the hidden states this module can form.
            From the layer's own call: it is asked for gathered logits, or for those of another type
            than the hidden states'.
    """
    if not isinstance(layer, ColumnParallelLinear) or layer.bias is not None or layer.gather_output:
        raise ValueError(
            "--tst-fused-linear-loss: expected an output layer that is a ColumnParallelLinear "
            f"without bias that does not gather, got {type(layer).__name__}. Drop the flag."
        )

    def forward(input_, weight=None, runtime_gather_output=None):
        if runtime_gather_output:
            raise ValueError(
                "--tst-fused-linear-loss: expected logits that stay split over tensor-parallel "
                "ranks, got runtime_gather_output=True. Drop one of the two."
            )
        wanted = getattr(layer, "output_dtype", None)  # --output-logit-dtype, from 0.20
        if wanted not in (None, input_.dtype):
            raise ValueError(
                f"--tst-fused-linear-loss: expected logits of the hidden states' type "
                f"{input_.dtype}, got an output layer for {wanted}. Drop one of the two."
            )
        return DeferredLogits(layer, input_, layer.weight if weight is None else weight), None

    layer.forward = forward  # the instance's, for the time of one call of the model
    try:
        yield
    finally:
        del layer.forward


def loss_of_deferred(
    deferred: DeferredLogits, labels: torch.Tensor, weights: torch.Tensor, *, loss: str, kernel: str
) -> torch.Tensor:
    """multi_hot_cross_entropy of the logits that `deferred` stands for.

    Args:
        deferred: hidden [L, b, H], or this rank's [L/tp, b, H] under sequence parallelism; weight
            [V, H].
        labels: int64 [L, b, S], global ids, -100 ignored.
        weights: fp32 [S].

    Returns:
        [L, b] fp32 nats. The hidden states' gradient is reduced over ranks as the output layer's
        own; the weight's goes into `main_grad` where Megatron's DistributedDataParallel has put
        one, else it is summed in fp32 and cast once.
    """
    layer, hidden = deferred.layer, deferred.hidden
    group = layer.tp_group
    if layer.sequence_parallel:
        # before: this rank's positions; after: all. Backward: reduce-scatter of the ranks' parts of
        # the gradient
        hidden = mappings.gather_from_sequence_parallel_region(hidden, group=group)
    else:
        # before and after: all positions. Backward: all-reduce of the ranks' parts of the gradient
        hidden = mappings.copy_to_tensor_model_parallel_region(hidden, group=group)
    loss_N = _LinearMultiHotCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        deferred.weight,
        labels.reshape(-1, labels.shape[-1]).contiguous(),
        weights,
        group if group.size() > 1 else None,
        group.rank() * deferred.weight.shape[0],
        group.size() * deferred.weight.shape[0],
        loss == "mce-alt",
        KERNELS[extension.choose(kernel, hidden.device.type)],
        layer.gradient_accumulation_fusion,
    )
    return loss_N.view(labels.shape[:-1])


class _LinearMultiHotCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_NH,
        weight_VH,
        labels_NS,
        weights_S,
        group,
        vocab_start,
        vocab_size,
        alt,
        run,
        fuse_accumulation,
    ):
        local_4N = torch.empty(4, len(hidden_NH), dtype=torch.float32, device=hidden_NH.device)
        for rows in _chunks(hidden_NH, weight_VH):
            logits = hidden_NH[rows] @ weight_VH.t()
            local_4N[:, rows] = run("statistics")(
                logits, labels_NS[rows], weights_S, vocab_start, vocab_size, alt
            )
        loss_N, saved_3N = run("loss")(of_all_ranks(local_4N, group), labels_NS, weights_S, alt)
        ctx.save_for_backward(hidden_NH, labels_NS, weights_S, saved_3N)
        ctx.rest = vocab_start, alt, run, fuse_accumulation
        # the parameter itself: a saved tensor does not bring its main_grad back
        ctx.weight = weight_VH
        return loss_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N):
        hidden_NH, labels_NS, weights_S, saved_3N = ctx.saved_tensors
        vocab_start, alt, run, fuse_accumulation = ctx.rest
        weight_VH = ctx.weight
        accumulate, finish = None, lambda: None
        if ctx.needs_input_grad[1]:
            accumulate, finish = _weight_gradient(weight_VH, fuse_accumulation)
        grad_NH, grad_N = torch.empty_like(hidden_NH), grad_N.contiguous()
        for rows in _chunks(hidden_NH, weight_VH):
            logits = hidden_NH[rows] @ weight_VH.t()
            saved_3n = saved_3N[:, rows].contiguous()
            run("gradient_")(
                logits, labels_NS[rows], weights_S, saved_3n, grad_N[rows], vocab_start, alt
            )
            torch.mm(logits, weight_VH, out=grad_NH[rows])
            if accumulate:
                accumulate(logits, hidden_NH[rows])
        return grad_NH, finish(), *[None] * 8


def _weight_gradient(weight_VH, fuse_accumulation):
    """-> accumulate(gradient of logits [n, V], hidden [n, H]), and finish() -> the gradient."""
    buffer = main_grad.buffer_of(weight_VH)
    if buffer is None:
        sum_VH = torch.zeros(weight_VH.shape, dtype=torch.float32, device=weight_VH.device)
        return lambda g, h: _add_product(sum_VH, g, h), lambda: sum_VH.to(weight_VH.dtype)
    if fuse_accumulation and weight_VH.is_cuda and weight_VH.dtype != torch.float32:
        # products summed in fp32: Megatron's own kernel
        from fused_weight_gradient_mlp_cuda import wgrad_gemm_accum_fp32

        return lambda g, h: wgrad_gemm_accum_fp32(h, g, buffer), lambda: main_grad.added(weight_VH)
    return lambda g, h: _add_product(buffer, g, h), lambda: main_grad.added(weight_VH)


def _add_product(sum_VH, grad_nV, hidden_nH):
    if grad_nV.dtype == torch.float32:
        sum_VH.addmm_(grad_nV.t(), hidden_nH)
    else:
        sum_VH += grad_nV.t() @ hidden_nH


def _chunks(hidden_NH, weight_VH):
    row_bytes = weight_VH.shape[0] * hidden_NH.element_size()
    size = rows_of(LINEAR_LOSS, hidden_NH.device.type, row_bytes)
    return (slice(i, i + size) for i in range(0, len(hidden_NH), size))
