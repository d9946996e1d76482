"""The model card and the evaluation commands that go with an export."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version

from megatron_tst.checkpoint.phases import stored
from megatron_tst.export.architectures import Architecture

# The zero-shot tasks of the paper's table 1, by lm-evaluation-harness's names.
TASKS = (
    "arc_easy",
    "arc_challenge",
    "boolq",
    "hellaswag",
    "openbookqa",
    "piqa",
    "winogrande",
    "mmlu",
)

_LIBRARIES = "megatron-tst", "megatron-core", "torch"
_PAPER = "[arXiv 2605.06546](https://arxiv.org/abs/2605.06546)"
_LOAD = {
    "transformers": "Load it with `transformers.AutoModelForCausalLM.from_pretrained`. "
    "`evaluate.md` has the commands of the usual tasks.",
    "megatron-bridge": "A checkpoint of Megatron-Bridge: name this folder in its "
    "`checkpoint.load` or `checkpoint.pretrained_checkpoint`.",
}


def model_card(
    args: argparse.Namespace,
    arch: Architecture,
    dtype: str,
    parameters: int,
    library: str = "transformers",
) -> str:
    """README.md of an exported folder: architecture, what each phase of training read, the last
    validation loss, versions.

    Args:
        args: Megatron's arguments from the checkpoint.
        dtype: of the weights.
        parameters: how many.
        library: that loads the folder, "transformers" or "megatron-bridge".
    """
    rows = {
        "architecture": f"`{arch.name}`: {_sizes(args, arch)}, {parameters:,} parameters, "
        f"vocabulary of {arch.vocab}",
        "weights": f"{dtype}, {'tied' if arch.tied else 'untied'} embeddings",
    }
    samples, batch = (
        getattr(args, "consumed_train_samples", 0),
        getattr(args, "global_batch_size", 1),
    )
    if samples:
        rows["training"] = (
            f"{samples // batch} iterations of {batch} x {args.seq_length} positions, "
            f"learning rate {args.lr:g}"
        )
    about = "Megatron-Core."
    schedule = stored(args)
    if schedule:
        about = f"Token-Superposition Training ({_PAPER}); it adds no parameter."
    table = "".join(
        f"| {name} | {text} |\n"
        for name, text in [
            *rows.items(),
            *(_phases(args, schedule, samples) if schedule else ()),
            ("validation loss", _validation(args)),
            ("made with", ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES)),
        ]
    ).rstrip()
    return f"""---
library_name: {library}
pipeline_tag: text-generation
---

# A {arch.name.removesuffix("ForCausalLM")} model

Pre-trained with {about} {_LOAD[library]}

| | |
|---|---|
{table}
"""


def _sizes(args, arch) -> str:
    text, config = f"{arch.layers} layers x {arch.hidden}, {arch.heads} heads ", arch.config
    if arch.latent:
        text += f"of multi-latent attention (rank {config['kv_lora_rank']} of keys and values)"
    else:
        text += f"({arch.groups} of keys and values) of {arch.head_dim}"
    if arch.experts:
        text += f", {arch.experts} experts, {args.moe_router_topk} of them active"
    if shared := config.get("n_shared_experts"):
        text += f", and {shared} shared"
    if arch.mtp_layers:
        text += f", {arch.mtp_layers} of multi-token prediction"
    return text


def _phases(args, schedule, samples):
    """(name, text) of each phase as far as the run has come, and of superposition's objective."""
    for phase in schedule.phases:
        done = min(max(samples - phase.first_sample, 0), phase.samples)
        before, after = map(schedule.raw_tokens, (phase.first_sample, phase.first_sample + done))
        superposed = phase in schedule.superposed_phases
        what = f"bags of {phase.bag_size}" if superposed else "next token"
        iterations = done // schedule.global_batch_size
        yield phase.name, f"{what}: {iterations} iterations, {after - before:,} raw tokens"
    weighting = f"{args.tst_target_weighting} weighting"
    objective = f"{args.tst_loss}, {weighting}, {args.tst_superpose} superposed"
    yield "objective of superposition", objective
    yield "raw tokens in all", f"{schedule.raw_tokens(samples):,}"


def _validation(args) -> str:
    last = getattr(args, "tst_validation", None)
    if not last:
        return "not in the checkpoint"
    iteration, loss = last
    return f"{loss:.4f} nats (next token, iteration {iteration})"


def evaluation() -> str:
    """evaluate.md: the paper's zero-shot tasks (table 1) with lm-evaluation-harness."""
    return f"""# Evaluate

The zero-shot tasks of the paper, with
[lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness)
(`pip install lm-eval`):

```
lm_eval --model hf --model_args pretrained=$(pwd) --num_fewshot 0 --batch_size auto \\
    --tasks {",".join(TASKS)}
```

On several GPUs: `accelerate launch -m lm_eval` and the same arguments.
These commands were not run by the export.
"""


def _version(name) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"
