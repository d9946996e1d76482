"""Bags from rank 0 of each tensor-parallel group to its other ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

# what Megatron's function returns
_KEYS = (
    "tokens",
    "labels",
    "loss_mask",
    "position_ids",
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "max_seqlen",
    "local_cp_size",
    "hybrid_cp_group",
)


def broadcast_bags(
    batch: dict[str, torch.Tensor],
    bag_size: int,
    superpose: str,
    *,
    tp_rank: int,
    broadcast_src_rank: int,
    broadcast_group: dist.ProcessGroup,
    micro_batch_size: int,
    seq_length: int,
    create_attention_mask_in_dataloader: bool,
    mtp_on_this_rank: bool = False,
    pipeline_model_parallel_size: int = 1,
    is_pipeline_first_stage: bool = False,
    is_pipeline_last_stage: bool = False,
    **_: object,
) -> dict[str, torch.Tensor | None]:
    """Megatron's get_batch_on_this_tp_rank (megatron/core/utils.py) for a superposed batch.

    Args:
        batch: on rank 0 of the tensor-parallel group the micro-batch, on its device; not read
            elsewhere.
        bag_size, superpose: s, and which side has bags ("both", "input", "output").
        Others: as Megatron's function takes them.

    Returns:
        what this rank's pipeline stage needs, on every rank: tokens [b, L, s] (or [b, L]), labels
        likewise, loss_mask and position_ids [b, L], attention_mask [b, 1, L, L] if the data loader
        makes it; None for the rest.
    """
    row, bag = (micro_batch_size, seq_length), (micro_batch_size, seq_length, bag_size)
    tensors = {  # name: shape, dtype, stages
        "tokens": (row if superpose == "output" else bag, torch.int64, "first"),
        "position_ids": (row, torch.int64, "first"),
        "labels": (row if superpose == "input" else bag, torch.int64, "last"),
        "loss_mask": (row, torch.float32, "last"),
    }
    if create_attention_mask_in_dataloader:
        mask = micro_batch_size, 1, seq_length, seq_length
        tensors["attention_mask"] = mask, torch.bool, "first last"
    needs_all = pipeline_model_parallel_size == 1 or mtp_on_this_rank
    here = {"first": is_pipeline_first_stage, "last": is_pipeline_last_stage}
    received = dict.fromkeys(_KEYS)
    for name, (shape, dtype, stages) in tensors.items():
        if not needs_all and not any(here[stage] for stage in stages.split()):
            continue
        if tp_rank == 0:
            tensor = batch[name]
            got = None if tensor is None else (tuple(tensor.shape), tensor.dtype)
            assert got == (shape, dtype), (
                f"{name}: expected {shape} {dtype} in the superposition phase, got {got}"
            )
        else:
            tensor = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
        # before: on rank 0 of the tensor-parallel group; after: on all of its ranks
        dist.broadcast(tensor, broadcast_src_rank, group=broadcast_group)
        received[name] = tensor
    return received
