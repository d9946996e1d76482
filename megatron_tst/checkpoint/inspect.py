"""What is in a checkpoint: phase, step, samples and raw tokens, TST settings, layout, tensors."""

from __future__ import annotations

import argparse
import re
from collections import Counter

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
    "use_layer_wise_distributed_optimizer",
)
# The second and further parts of an optimizer have a prefix of their own in some formats
# (megatron/core/optimizer/optimizer.py, ChainedOptimizer.sharded_state_dict).
_OPTIMIZER = re.compile(
    r"(?:chained_\d+\.)*optimizer\.(?:(?P<flat>distributed\..*\.)|state\.)?(?P<state>\w+)"
)


def state_of(name: str) -> str | None:
    """Which state of the optimizer a tensor is ("exp_avg", "momentum_buffer", "fp32_param"); None
    of the model's own.

    >>> state_of("chained_0.optimizer.state.momentum_buffer.decoder.layers.mlp.router.weight")
    'momentum_buffer'
    >>> state_of("output_layer.weight") is None
    True
    """
    found = _OPTIMIZER.match(name)
    return found and found["state"]


def parameter_of(name: str) -> str:
    """The parameter whose state a tensor of the optimizer is; the model's own are themselves.

    >>> parameter_of("chained_1.optimizer.state.exp_avg.output_layer.weight")
    'output_layer.weight'
    """
    found = _OPTIMIZER.match(name)
    return name[found.end() + 1 :] if found else name


def is_flat(name: str) -> bool:
    """Whether it is a buffer of the distributed optimizer, which holds parts of many parameters."""
    found = _OPTIMIZER.match(name)
    return bool(found and found["flat"])


def layer_pattern(args: argparse.Namespace) -> str | None:
    """The layers of a HybridModel by Megatron's symbols; None of a GPTModel.

    Args:
        args: Megatron's, of a run or from a checkpoint of any version.
    """
    names = "hybrid_layer_pattern", "hybrid_override_pattern"
    return next((found for name in names if (found := getattr(args, name, None))), None)


def describe(checkpoint: Checkpoint) -> dict:
    """Everything that `inspect` shows, ready for JSON.

    Returns:
        name -> value: iteration, samples and raw tokens so far, the model's class, the phases,
        TST's settings, the layout when saved, parameters, elements of each kind of optimizer
        state, bytes, and shape, dtype and shards of each tensor.
    """
    args, schedule = checkpoint.args, stored(checkpoint.args)
    samples, pattern = getattr(args, "consumed_train_samples", 0), layer_pattern(args)
    about = {
        "path": str(checkpoint.path),
        "format": "torch_dist, "
        + ("common.pt (<= 0.18)" if checkpoint.common_item is None else "common_state (>= 0.19)"),
        "iteration": checkpoint.common.get("iteration"),
        "consumed samples": samples,
        "model": "GPTModel" if pattern is None else f"HybridModel {pattern}",
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
    elements = Counter()
    for name, entry in checkpoint.tensors.items():
        elements[state_of(name)] += entry.size.numel()
    about["parameters"] = elements.pop(None, 0)
    about["optimizer"] = bool(elements)
    about["optimizer state"] = dict(sorted(elements.items()))
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
