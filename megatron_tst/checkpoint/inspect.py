"""What is in a checkpoint: phase, step, samples and raw tokens, TST settings, layout, tensors."""

from __future__ import annotations

from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.phases import stored

_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "data_parallel_size",
    "sequence_parallel",
    "use_distributed_optimizer",
)
OPTIMIZER = "optimizer."


def describe(checkpoint: Checkpoint) -> dict:
    """Everything that `inspect` shows, ready for JSON.

    Returns:
        name -> value: iteration, samples and raw tokens so far, the phases, TST's settings, the
        layout when saved, parameters, bytes, and shape, dtype and shards of each tensor.
    """
    args, schedule = checkpoint.args, stored(checkpoint.args)
    samples = getattr(args, "consumed_train_samples", 0)
    about = {
        "path": str(checkpoint.path),
        "format": "torch_dist, "
        + ("common.pt (<= 0.18)" if checkpoint.common_item is None else "common_state (>= 0.19)"),
        "iteration": checkpoint.common.get("iteration"),
        "consumed samples": samples,
        "global batch size": getattr(args, "global_batch_size", None),
        "sequence length": getattr(args, "seq_length", None),
        "phase": "no TST",
    }
    if schedule:
        ended = next((phase for phase in schedule.superposed_phases if phase.end == samples), None)
        about["phase"] = (
            f"boundary: bag size {ended.bag_size} done"
            if ended
            else schedule.phase_at(samples).name
        )
        about["raw tokens"] = schedule.raw_tokens(samples)
        about["phases"] = [
            {
                "phase": p.name,
                "bag size": p.bag_size,
                "samples": [p.first_sample, p.end],
                "raw tokens": schedule.raw_tokens(p.end),
            }
            for p in schedule.phases
        ]
    else:
        about["raw tokens"] = samples * getattr(args, "seq_length", 0)
    about["tst settings"] = {
        name.removeprefix("tst_"): value
        for name, value in sorted(vars(args).items())
        if name.startswith("tst_")
    }
    about["layout when saved"] = {
        name: getattr(args, name)
        for name in _LAYOUT
        if getattr(args, name, None) not in (None, False)
    }
    about["optimizer"] = any(name.startswith(OPTIMIZER) for name in checkpoint.tensors)
    about["parameters"] = sum(
        entry.size.numel()
        for name, entry in checkpoint.tensors.items()
        if not name.startswith(OPTIMIZER)
    )
    about["bytes"] = sum(item.length for item in checkpoint.items)
    about["tensors"] = {
        name: {
            "shape": list(entry.size),
            "dtype": str(entry.properties.dtype).removeprefix("torch."),
            "shards": len(entry.chunks),
        }
        for name, entry in sorted(checkpoint.tensors.items())
    }
    return about
