"""Megatron's fp32 gradient buffers: adding to them in backward, as Megatron's own linear layers do
with gradient accumulation fusion.
"""

from __future__ import annotations

import torch


def buffer_of(weight: torch.nn.Parameter) -> torch.Tensor | None:
    """The fp32 `main_grad`, of the weight's shape, that DistributedDataParallel has given it
    (megatron/core/distributed/distributed_data_parallel.py). None where autograd must carry the
    gradient.
    """
    buffer = getattr(weight, "main_grad", None)
    if buffer is None or buffer.dtype != torch.float32 or hasattr(weight, "__fsdp_param__"):
        return None
    return buffer if hasattr(weight, "grad_added_to_main_grad") else None


def added(weight: torch.nn.Parameter) -> torch.Tensor:
    """Tell DistributedDataParallel's hook that the gradient is in the buffer.

    The hook wants a gradient and does not add it. Where `zero_out_wgrad` says that the weight is
    tied to another layer, whose own gradient comes along, it must be zeros
    (megatron/core/tensor_parallel/layers.py does the same).

    Returns:
        what autograd gets in the gradient's place, of the weight's shape and dtype.
    """
    weight.grad_added_to_main_grad = True
    make = torch.zeros if getattr(weight, "zero_out_wgrad", False) else torch.empty
    return make(weight.shape, dtype=weight.dtype, device=weight.device)


def left_to_autograd(weight: torch.nn.Parameter) -> None:
    """Tell the hook that the coming gradient is autograd's own: with `--cuda-graph-impl
    transformer_engine` Megatron does not forget between iterations what `added` said
    (distributed_data_parallel.py, zero_grad_buffer), and the hook would drop the gradient.
    """
    if getattr(weight, "grad_added_to_main_grad", False):
        weight.grad_added_to_main_grad = False
