"""The arithmetic of a planned run: text, FLOPs, GPU-hours, memory of the loss, the loader's load.
No torch.

flags.py reads a command line, evidence.py has what the paper measured, plan.py puts the parts
together. Both phases have the same positions
a step, so a step costs the same FLOPs in both, and the same as a baseline's. What differs is the
text that it reads: s tokens a position.
"""

from __future__ import annotations

import argparse
import bisect

from megatron_tst import model_size
from megatron_tst.config import TSTConfig
from megatron_tst.hardware import GPUS
from megatron_tst.model_size import flops_of_step, padded_vocabulary, query_groups
from megatron_tst.ops.chunks import LINEAR_LOSS, TORCH_KERNEL
from megatron_tst.planning import evidence, paper
from megatron_tst.schedule import Schedule

ASSUMED_MFU = 0.35  # ours: nothing is measured yet


def complete(args: argparse.Namespace) -> None:
    """Fill in what Megatron derives: widths, groups, expert TP, the padded vocabulary."""
    if args.ffn_hidden_size is None:
        four = 4 * args.hidden_size  # SwiGLU: two thirds of it, in whole 64s
        args.ffn_hidden_size = four * 2 // 3 // 64 * 64 if args.swiglu else four
    args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    args.num_query_groups = query_groups(args)
    args.moe_ffn_hidden_size = args.moe_ffn_hidden_size or args.ffn_hidden_size
    args.expert_tensor_parallel_size = (
        args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    )
    args.padded_vocab_size = padded_vocabulary(
        args.vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    )
    args.train_samples = None


def make(args: argparse.Namespace, config: TSTConfig) -> dict:
    """The plan of a run as plain numbers and text, for JSON.

    Args:
        args: completed; beside Megatron's `gpus`, `gpu`, `mfu`, `tflops`, `tokens` (available raw
            tokens or None) and `preset`.
        config: the TST settings; at least one iteration is superposed.

    Raises:
        TSTError: phases that do not fit the iterations.
    """
    schedule = config.schedule(args)
    batch, steps = args.global_batch_size * args.seq_length, args.train_iters
    superposed = schedule.superposition_samples // args.global_batch_size
    raw = schedule.raw_tokens(schedule.train_samples)
    size = model_size.size(args)
    every = size.every - size.mtp
    phases = [
        {
            "name": phase.name,
            "bag_size": phase.bag_size,
            "steps": phase.samples // args.global_batch_size,
            "raw_tokens": phase.samples * phase.width * args.seq_length,
            "raw_tokens_a_step": batch * phase.width,
        }
        for phase in schedule.phases
    ]
    cost = _cost(args, superposed, config)
    return {
        "model": {
            "parameters": every,
            "active_parameters": size.active - size.mtp + size.mtp_idle,
            "embedding": size.embedding if size.output else 0,
            "output": size.output or size.embedding,
            "mtp_parameters": size.mtp,
            "mtp_active": size.mtp - size.mtp_idle,
            "vocabulary": args.padded_vocab_size,
            "preset": args.preset,
        },
        "run": {
            "steps": steps,
            "superposed_steps": superposed,
            "step_ratio": superposed / steps,
            "bag_size": list(config.bag_sizes),
            "positions_a_step": batch,
            "gpus": args.gpus,
            "gpu": args.gpu,
        },
        "phases": phases,
        "text": {
            "raw_tokens": raw,
            "baseline_tokens": batch * steps,
            "ratio": raw / (batch * steps),
            **_data(args, config, schedule),
        },
        "cost": cost,
        "equal_loss": evidence.equal_loss(args, config, superposed, every, cost),
        "loss_memory": loss_memory(args, max(config.bag_sizes)),
        "loader": _loader(args, phases, cost["step_seconds"]),
        "paper": evidence.evidence(args, config, superposed, every),
    }


def _data(args, config, schedule) -> dict:
    """Whether the text suffices, counting whole long samples as Megatron's dataset does, and what
    would fit.
    """
    needed, available = schedule.long_samples * schedule.long_sample_length, args.tokens
    if available is None:
        return {"needed": needed, "available": None, "suffices": None}
    found = {
        "needed": needed,
        "available": available,
        "suffices": available >= needed,
        "missing": max(0, needed - available),
    }
    found |= {
        "times": needed / available,
        "baseline_suffices": available >= schedule.train_samples * args.seq_length,
    }
    if not found["suffices"] and len(config.bag_sizes) == 1 and not schedule.single_tokens_in:
        found["fits"] = _what_fits(args, schedule, available)
    return found


def _what_fits(args, schedule, available) -> dict:
    """The largest s, superposed steps, or steps (at the same r) with which the text suffices, the
    rest as it is; None: nothing does.
    """
    batch, s, steps = (
        args.global_batch_size,
        schedule.bag_sizes[0],
        schedule.train_samples // args.global_batch_size,
    )
    superposed = schedule.superposition_samples // batch

    def fits(s, superposed, steps):
        plan = Schedule.of(s, superposed, steps * batch, args.seq_length, batch)
        return plan.long_samples * plan.long_sample_length <= available

    def largest(least, high, fit):  # above `least`, by halving: more of each needs more text
        count = bisect.bisect(range(least + 1, high), False, key=lambda x: not fit(x))
        return least + count if count else None

    plain = steps // (2 * superposed)  # so few steps have none that is superposed at the same r
    return {
        "bag_size": largest(1, s, lambda x: fits(x, superposed, steps)),
        "superposed_steps": largest(0, superposed, lambda x: fits(s, x, steps)),
        "steps": largest(plain, steps, lambda x: fits(s, round(x * superposed / steps), x)),
    }


def _cost(args, superposed, config) -> dict:
    """FLOPs, GPU-hours and seconds of a step, by the best source that there is, which is named."""
    flops, peak, steps = flops_of_step(args), GPUS[args.gpu].peak_tflops, args.train_iters
    share = args.global_batch_size * args.seq_length
    run = evidence.run_of_the_paper(args, superposed, config)
    run = run or next(
        (run for run in paper.runs() if run.model == args.preset and run.tst_steps), None
    )
    hours = (
        run and run.b200_hours / run.steps * share / run.batch
    )  # of the whole machine for a step
    implied = hours and flops / (hours * 3600) / 1e12
    if args.tflops:
        tflops, source = args.tflops, f"--tflops {args.tflops:g}, given"
    elif args.mfu:
        tflops, source = args.mfu * peak, f"--mfu {args.mfu:g}, given"
    elif run and args.gpu == "b200":
        tflops, source = implied, f"paper: {run.b200_hours:,} B200-hours for {run.steps:,} steps"
    elif run:
        tflops, source = (
            implied / GPUS["b200"].peak_tflops * peak,
            "assumed: the MFU that the paper's B200-hours come to",
        )
    else:
        tflops, source = (
            ASSUMED_MFU * peak,
            f"assumed: MFU {ASSUMED_MFU}. Give --mfu, or --tflops as Megatron's --log-throughput "
            f"prints it",
        )
    step_hours = flops / (tflops * 1e12 * 3600)
    return {
        "flops_of_step": flops,
        "flops": flops * steps,
        "tflops_a_gpu": tflops,
        "mfu": tflops / peak,
        "source": source,
        "gpu_hours_of_step": step_hours,
        "gpu_hours": step_hours * steps,
        "days": step_hours * steps / args.gpus / 24,
        "step_seconds": step_hours * 3600 / args.gpus,
        "of_the_paper": bool(run and args.gpu == "b200" and not (args.tflops or args.mfu)),
    }


def loss_memory(args: argparse.Namespace, s: int) -> dict:
    """Bytes of the logits (bf16) and of what the loss adds at its peak, for one micro-batch, on a
    rank of the last pipeline stage.

    Factors of the logits' size: measured beyond the logits on CPU
    (benchmarks/data/multi_hot_ce.csv); chunks: the code's, on CUDA.
    """
    rows, columns = (
        args.micro_batch_size * args.seq_length // args.context_parallel_size,
        args.padded_vocab_size // args.tensor_model_parallel_size,
    )
    logits = 2 * rows * columns
    fused, torch = min(LINEAR_LOSS["cuda"], logits), 2 * min(TORCH_KERNEL["cuda"], 2 * logits)
    # Losses of multi-token prediction come first, and backward is after all of them: each head
    # keeps its gradient in 16 bit, or Megatron's softmax in 32.
    heads = getattr(args, "mtp_num_layers", None) or 0
    kept = heads * logits
    fused = None if heads else fused  # refused beside them
    return {
        "logits": logits,
        "superposition": {
            "extension": logits + kept,
            "torch": logits + torch + kept,
            "fused": fused,
            "paper_loop": logits * (5 + 2 * s),
        },
        "recovery": {
            "megatron": 4 * logits + 2 * kept,
            "kernel_in_recovery": logits + kept,
            "fused": fused,
        },
    }


def _loader(args, phases, step_seconds) -> dict:
    """What the data loaders must deliver, all ranks together; a token of Megatron's index is 2
    bytes below 65,500 ids, else 4.
    """
    itemsize = 2 if args.vocab_size < 65500 else 4
    baseline = args.global_batch_size * args.seq_length / step_seconds
    most = max(phase["raw_tokens_a_step"] for phase in phases) / step_seconds
    readers = args.gpus // (
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )
    return {
        "tokens_a_second": most,
        "mb_a_second": most * itemsize / 1e6,
        "baseline_tokens_a_second": baseline,
        "times_baseline": most / baseline,
        "readers": readers,
        "tokens_a_second_of_a_reader": most / readers,
        "bytes_a_token": itemsize,
    }
