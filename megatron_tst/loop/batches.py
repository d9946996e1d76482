"""Bags from rank 0 of each tensor-parallel group to its other ranks."""

from __future__ import annotations

import torch


def broadcast_bags(
    batch,
    bag_size,
    superpose,
    *,
    tp_rank,
    broadcast_src_rank,
    broadcast_group,
    micro_batch_size,
    seq_length,
    create_attention_mask_in_dataloader,
    mtp_on_this_rank=False,
    pipeline_model_parallel_size=1,
    is_pipeline_first_stage=False,
    is_pipeline_last_stage=False,
    **_,
):
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
        tensors["attention_mask"] = (
            (micro_batch_size, 1, seq_length, seq_length),
            torch.bool,
            "first last",
        )
    needs_all = pipeline_model_parallel_size == 1 or mtp_on_this_rank
    here = {"first": is_pipeline_first_stage, "last": is_pipeline_last_stage}
    received = dict.fromkeys(
        (
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
    )
    for name, (shape, dtype, stages) in tensors.items():
        if not needs_all and not any(here[stage] for stage in stages.split()):
            continue
        if tp_rank == 0:
            tensor = batch[name]
            assert tensor is not None and tuple(tensor.shape) == shape and tensor.dtype == dtype, (
                f"{name}: expected {shape} {dtype} in the superposition phase, got "
                f"{None if tensor is None else (tuple(tensor.shape), tensor.dtype)}"
            )
        else:
            tensor = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
        torch.distributed.broadcast(tensor, broadcast_src_rank, group=broadcast_group)
        received[name] = tensor
    return received
