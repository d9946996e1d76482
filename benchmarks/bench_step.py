"""The superposed training step against the ordinary one: time, peak memory, tokens/s, MFU; same
model, same L, one process, interleaved.

    python benchmarks/bench_step.py [--model demo] [--bag-size 2] [--steps 15] [--json] [--csv FILE]
    # a recipe of examples/, on a GPU
    python benchmarks/bench_step.py --model 270m --bag-size 6 --micro-batch 4 --micro-batches 4
    # its flags overruled
    python benchmarks/bench_step.py --model 270m ... -- --num-layers 2 --seq-length 64

Real train_step of megatron.training (forward, backward, clipping, Adam) on the demo's model or a
recipe's; the data are random ids, so data loading is left out. Time: medians of alternating steps.
Memory: the peak of what tensors take beyond the start of a step (on CPU from the profiler's
allocation events, on a GPU from the caching allocator). MFU: Megatron's own count of FLOPs over the
GPU's dense bf16 peak, in FP8 too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from pathlib import Path

from measure import append_rows, has_gpu, peak_bytes, peak_tflops, seconds_to_the_end, where

from megatron_tst import demo
from megatron_tst.model_size import LLAMA_3_VOCABULARY
from megatron_tst.planning import recipes

DEMOS = {"demo": "gpt", "demo-moe": "gpt-moe"}
ACTIVE = "1.4b"  # what a token of the 10B-A1B recipe goes through, as a dense model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        choices=(*DEMOS, *recipes.RECIPES, ACTIVE),
        default="demo",
        help=f"the demo's, a recipe's, or {ACTIVE}: moe-10b-a1b with one expert as wide as the "
        "four that a token goes to, which fits a GPU",
    )
    parser.add_argument(
        "--precision",
        default="bf16",
        help="of a recipe: bf16, fp8 or fp8-blockwise (the demo's: fp32 on CPU, bf16 on a GPU)",
    )
    parser.add_argument("--bag-size", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=1, help="of a recipe: samples")
    parser.add_argument(
        "--micro-batches", type=int, default=1, help="of a recipe: gradient accumulation"
    )
    parser.add_argument("--vocab-size", type=int, default=2048, help="of the demo's model")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--superpose", default="both", choices=("both", "input", "output"))
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else on stdout"
    )
    parser.add_argument("--csv", type=Path, help="append a row")
    parser.add_argument(
        "flags", nargs="*", help="after --: Megatron's flags, which overrule the model's"
    )
    options = parser.parse_args(argv)
    os.environ.update(OMP_NUM_THREADS=str(options.threads))

    from megatron_tst import cpu

    if not has_gpu():
        os.environ["MEGATRON_TST_CPU"] = "1"
        cpu.enable_if_asked()
    # stdout is for the result alone: Megatron logs and prints there
    result, _ = os.fdopen(os.dup(1), "w"), os.dup2(2, 1)
    row = measure(options)
    if options.csv:
        append_rows(options.csv, [row])
    print(
        json.dumps(row)
        if options.json
        else "\n".join(f"{key:24} {value}" for key, value in row.items()),
        file=result,
        flush=True,
    )
    return 0


def measure(options) -> dict:
    """Set up Megatron and the model, then time and weigh both kinds of step."""
    import torch
    from megatron.training import get_args
    from megatron.training.training import num_floating_point_operations

    torch.set_num_threads(options.threads)
    step, ordinary, superposed = _set_up(options)
    args = get_args()
    kinds = {"ordinary": ordinary, "superposed": superposed}
    for batch in kinds.values():  # warm up: optimizer state, allocator
        step(batch)
        step(batch)
    times = {kind: [] for kind in kinds}
    for _ in range(options.steps):
        for kind, batch in kinds.items():
            times[kind].append(seconds_to_the_end(lambda batch=batch: step(batch)))
    memory = {
        kind: statistics.median(peak_bytes(lambda batch=batch: step(batch)) for _ in range(3))
        for kind, batch in kinds.items()
    }
    median = {kind: statistics.median(values) for kind, values in times.items()}
    positions = args.global_batch_size * args.seq_length
    raw = {
        kind: positions * (options.bag_size if kind == "superposed" else 1) / median[kind]
        for kind in kinds
    }
    flops, peak = num_floating_point_operations(args, args.global_batch_size), peak_tflops()
    return {
        "model": options.model,
        "precision": (
            args.fp8_recipe if args.fp8 else str(args.params_dtype).removeprefix("torch.")
        ),
        "transformer_impl": args.transformer_impl,
        "bag_size": options.bag_size,
        "superpose": options.superpose,
        "seq_length": args.seq_length,
        "micro_batch": args.micro_batch_size,
        "micro_batches": args.global_batch_size // args.micro_batch_size,
        "threads": options.threads,
        "ordinary_ms": round(1e3 * median["ordinary"], 2),
        "superposed_ms": round(1e3 * median["superposed"], 2),
        "time_ratio": round(median["superposed"] / median["ordinary"], 4),
        "ordinary_tokens_per_s": round(raw["ordinary"]),
        "superposed_raw_tokens_per_s": round(raw["superposed"]),
        "ordinary_mfu": round(flops / median["ordinary"] / peak / 1e12, 4) if peak else "",
        "superposed_mfu": round(flops / median["superposed"] / peak / 1e12, 4) if peak else "",
        "ordinary_peak_mb": round(memory["ordinary"] / 2**20, 2),
        "superposed_peak_mb": round(memory["superposed"] / 2**20, 2),
        "memory_ratio": round(memory["superposed"] / memory["ordinary"], 4),
        "steps": options.steps,
        **where(),
    }


def flags_of(options) -> list[str]:
    """Megatron's flags: the demo's, or a recipe's model, optimizer and precision in one process
    that saves nothing.
    """
    device = "cuda" if has_gpu() else "cpu"
    if options.model in DEMOS:
        return [
            *demo.flags(
                None, options.vocab_size, 1000, architecture=DEMOS[options.model], device=device
            ),
            *options.flags,
        ]
    recipe = "moe-10b-a1b" if options.model == ACTIVE else options.model
    groups = recipes.groups(recipe, {"PRECISION": options.precision})
    if options.model == ACTIVE:
        groups["model"] = dense(groups["model"])
    size = (
        f"--micro-batch-size {options.micro_batch} --global-batch-size "
        f"{options.micro_batch * options.micro_batches}"
    ).split()
    data = (
        f"--mock-data --tokenizer-type NullTokenizer --vocab-size {LLAMA_3_VOCABULARY} "
        f"{demo.machine(device)}"
    ).split()
    precision = groups["precision"] if has_gpu() else []
    return [*groups["model"], *groups["training"], *size, *data, *precision, *options.flags]


def dense(flags: list[str]) -> list[str]:
    """A model's flags without its experts: its feed-forward layers as wide as all that a token goes
    to.
    """
    values = dict(itertools.pairwise(flags))
    width = int(values["--moe-router-topk"]) * int(values["--moe-ffn-hidden-size"])
    rest, skipped = [], False
    for flag in flags:
        if flag.startswith("--"):
            skipped = flag.startswith("--moe-") or flag in ("--num-experts", "--ffn-hidden-size")
        if not skipped:
            rest.append(flag)
    return [*rest, "--ffn-hidden-size", str(width)]


def _set_up(options):
    """-> (step(batch), ordinary batch, superposed batch)."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.core.utils import get_model_config
    from megatron.training import training as loop
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    from megatron_tst import pretrain_gpt as script
    from megatron_tst.data.bags import superposed_sample
    from megatron_tst.loop import entry, patch, seams
    from megatron_tst.ops.loss import target_weights

    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        MASTER_ADDR="localhost",
        MASTER_PORT=os.environ.get("MASTER_PORT", "29881"),
        CUDA_DEVICE_MAX_CONNECTIONS="1",
    )
    argv, sys.argv = sys.argv, ["bench_step", *flags_of(options)]
    try:
        args = parse_and_validate_args()
        config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        patch.install({seams.BUILD_HELPERS: entry.build_dataset_helpers})
        loop.initialize_megatron()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model, optimizer, scheduler = loop.setup_model_and_optimizer(
            script.ModelType.encoder_or_decoder,
            checkpointing_context={},
            cfg_container=config,
            pg_collection=groups,
        )
    finally:
        sys.argv = argv
    patch.apply()
    for chunk in model:
        chunk.train()
    model_config = get_model_config(model[0])
    model_config.grad_scale_func = optimizer.scale_loss
    forward_backward = loop.get_forward_backward_func()
    device = "cuda" if has_gpu() else "cpu"

    def batch(superposed):
        rows, length, size = [], args.seq_length, options.bag_size
        for _ in range(args.micro_batch_size):
            raw = torch.randint(
                0,
                args.vocab_size,
                (length * (size if superposed and options.superpose != "output" else 1) + 1,),
            )
            row = {
                "tokens": raw[:-1],
                "labels": raw[1:],
                "loss_mask": torch.ones(len(raw) - 1),
                "position_ids": torch.arange(length),
            }
            rows.append(
                superposed_sample(
                    row, length, size, options.superpose, target_weights("uniform", size)
                )
                if superposed
                else row
            )
        return {key: torch.stack([row[key] for row in rows]).to(device) for key in rows[0]}

    # one process, so the batch is whole where it is: what crosses between ranks is not part of this
    # figure
    script.get_batch_on_this_tp_rank = lambda batch, **named: batch

    def step(batch):
        loop.train_step(
            script.forward_step,
            RerunDataIterator(iter([batch] * (args.global_batch_size // args.micro_batch_size))),
            model,
            optimizer,
            scheduler,
            model_config,
            forward_backward,
            iteration=0,
        )

    return step, batch(False), batch(True)


if __name__ == "__main__":
    sys.exit(main())
