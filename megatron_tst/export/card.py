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
    sizes = (
        f"{arch.layers} layers x {arch.hidden}, {arch.heads} heads ({arch.groups} of keys and "
        f"values) of {arch.head_dim}"
    )
    experts = (
        f", {arch.experts} experts, {args.moe_router_topk} of them active" if arch.experts else ""
    )
    samples = getattr(args, "consumed_train_samples", 0)
    schedule, batch = stored(args), getattr(args, "global_batch_size", 1)
    rows = [
        (
            "architecture",
            f"`{arch.name}`: {sizes}{experts}, {parameters:,} parameters, vocabulary of "
            f"{arch.vocab}",
        ),
        ("weights", f"{dtype}, {'tied' if arch.tied else 'untied'} embeddings"),
    ]
    if samples:
        rows.append(
            (
                "training",
                f"{samples // batch} iterations of {batch} x {args.seq_length} positions, "
                f"learning rate {args.lr:g}",
            )
        )
    if schedule:
        for phase in schedule.phases:
            done = min(max(samples - phase.first_sample, 0), phase.samples)
            raw = schedule.raw_tokens(phase.first_sample + done) - schedule.raw_tokens(
                phase.first_sample
            )
            what = (
                f"bags of {phase.bag_size}" if phase in schedule.superposed_phases else "next token"
            )
            rows.append((phase.name, f"{what}: {done // batch} iterations, {raw:,} raw tokens"))
        objective = (
            f"{args.tst_loss}, {args.tst_target_weighting} weighting, "
            f"{args.tst_superpose} superposed"
        )
        rows.append(("objective of superposition", objective))
        rows.append(("raw tokens in all", f"{schedule.raw_tokens(samples):,}"))
    validation = getattr(args, "tst_validation", None)
    rows.append(
        (
            "validation loss",
            f"{validation[1]:.4f} nats (next token, iteration {validation[0]})"
            if validation
            else "not in the checkpoint",
        )
    )
    rows.append(
        (
            "made with",
            ", ".join(
                f"{name} {_version(name)}" for name in ("megatron-tst", "megatron-core", "torch")
            ),
        )
    )
    table = "\n".join(f"| {name} | {text} |" for name, text in rows)
    about = (
        "Token-Superposition Training ([arXiv 2605.06546](https://arxiv.org/abs/2605.06546)); it "
        "adds no parameter."
        if schedule
        else "Megatron-Core."
    )
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
