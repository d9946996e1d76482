"""The arithmetic of a planned run: text, FLOPs, GPU-hours, memory of the loss, the loader's load,
what the paper measured. No torch.

flags.py reads a command line, plan.py puts the parts together. Both phases have the same positions
a step, so a step costs the same FLOPs in both, and the same as a baseline's; what differs is the
text that it reads: s tokens a position.
"""

from __future__ import annotations

import argparse
import math

from megatron_tst.config import TSTConfig
from megatron_tst.hardware import GPUS
from megatron_tst.model_size import flops_of_step, padded_vocabulary, parameters, query_groups
from megatron_tst.ops.chunks import LINEAR_LOSS, TORCH_KERNEL
from megatron_tst.planning import paper
from megatron_tst.schedule import Schedule

ASSUMED_MFU = 0.35  # ours: nothing is measured yet
SWEEP_S, SWEEP_R = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16), (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)


def complete(args: argparse.Namespace) -> None:
    """Fill in what Megatron derives: widths, groups, expert TP, the padded vocabulary."""
    if args.ffn_hidden_size is None:
        args.ffn_hidden_size = (
            int(4 * args.hidden_size * 2 / 3 / 64) * 64 if args.swiglu else 4 * args.hidden_size
        )
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
    every, active = parameters(args)
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
            "active_parameters": active,
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
        "equal_loss": _equal_loss(args, config, superposed, every, cost),
        "loss_memory": loss_memory(args, max(config.bag_sizes)),
        "loader": _loader(args, phases, cost["step_seconds"]),
        "paper": _evidence(args, config, superposed, every),
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

    def largest(low, high, fit):  # above `low`, by halving: more of each needs more text
        least = low
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fit(middle) else (low, middle - 1)
        return low if low > least else None

    return {
        "bag_size": largest(1, s, lambda x: fits(x, superposed, steps)),
        "superposed_steps": largest(0, superposed, lambda x: fits(s, x, steps)),
        "steps": largest(0, steps, lambda x: fits(s, round(x * superposed / steps), x)),
    }


def _cost(args, superposed, config) -> dict:
    """FLOPs, GPU-hours and seconds of a step, by the best source that there is, which is named."""
    flops, peak, steps = flops_of_step(args), GPUS[args.gpu].peak_tflops, args.train_iters
    share = args.global_batch_size * args.seq_length
    run = _run_of_the_paper(args, superposed, config)
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


def _run_of_the_paper(args, superposed, config) -> paper.Run | None:
    """The run of table 1 that the plan is (but for the sequence length, which the paper does not
    give).
    """
    if not _plain(config):
        return None
    settings = (
        args.preset,
        args.train_iters,
        superposed,
        config.bag_sizes[0],
        args.global_batch_size * args.seq_length,
    )
    return next(
        (
            run
            for run in paper.runs()
            if (run.model, run.steps, run.tst_steps, run.s, run.batch) == settings
        ),
        None,
    )


def _plain(config) -> bool:
    """Whether the objective is the one of the paper's runs."""
    paper_s = ("both", "mce", "fixed", "uniform")
    return (
        len(config.bag_sizes) == 1
        and (config.superpose, config.loss, config.switch, config.target_weighting) == paper_s
    )


def _equal_loss(args, config, superposed, parameters, cost) -> dict | None:
    """The baseline of equal loss: measured by the paper for this very run, or its nearest speed-up;
    None where neither says anything.
    """
    run, r, s = (
        _run_of_the_paper(args, superposed, config),
        superposed / args.train_iters,
        config.bag_sizes[0],
    )
    measured = bool(run and paper.speed_up(run))
    if not measured:
        if not (_plain(config) and 4 <= s <= 16 and 0.195 <= r <= 0.405):
            return None
        known = [run for run in paper.runs() if run.tst_steps and paper.speed_up(run)]
        run = min(known, key=lambda run: abs(math.log(parameters / paper.PARAMETERS[run.model])))
    speed_up, baseline = paper.speed_up(run)
    steps = round(args.train_iters * speed_up)
    hours = cost["gpu_hours_of_step"] * steps
    if measured and cost["of_the_paper"]:
        hours = float(
            baseline.b200_hours
        )  # its own: at 10B-A1B a step of the baseline took 3 % longer
    return {
        "measured": measured,
        "speed_up": speed_up,
        "baseline_steps": steps,
        "baseline_tokens": steps * args.global_batch_size * args.seq_length,
        "baseline_gpu_hours": hours,
        "paper_run": {
            "model": run.model,
            "s": run.s,
            "r": run.r,
            "loss": run.loss,
            "baseline_loss": baseline.loss,
        },
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
    return {
        "logits": logits,
        "superposition": {
            "extension": logits,
            "torch": logits + torch,
            "fused": fused,
            "paper_loop": logits * (5 + 2 * s),
        },
        "recovery": {"megatron": 4 * logits, "kernel_in_recovery": logits, "fused": fused},
    }


def _loader(args, phases, step_seconds) -> dict:
    """What the data loaders must deliver, all ranks together; a token of Megatron's index is 2
    bytes below 65,500 ids, else 4.
    """
    itemsize = 2 if args.vocab_size < 65500 else 4
    baseline = args.global_batch_size * args.seq_length / step_seconds
    most = max(phase["raw_tokens_a_step"] for phase in phases) / step_seconds
    readers = max(
        1,
        args.gpus
        // (
            args.tensor_model_parallel_size
            * args.pipeline_model_parallel_size
            * args.context_parallel_size
        ),
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


def _evidence(args, config, superposed, parameters) -> dict:
    """The paper's loss at the nearest model, s and r, its run with these settings, and what it says
    against this plan.
    """
    r, s = superposed / args.train_iters, config.bag_sizes[0]
    found = {"cell": None, "run": None}
    if len(config.bag_sizes) == 1 and (config.superpose, config.loss, config.switch) == (
        "both",
        "mce",
        "fixed",
    ):
        if near := paper.nearest(parameters, args.train_iters, r, s, config.target_weighting):
            found["cell"] = describe(*near)
    if run := _run_of_the_paper(args, superposed, config):
        equal = [
            other.loss
            for other in paper.runs()
            if (other.model, other.steps, other.tst_steps) == (run.model, run.steps, 0)
        ]
        found["run"] = {
            "loss": run.loss,
            "baseline_loss": equal[0] if equal else None,
            "b200_hours": run.b200_hours,
        }
    return found


def describe(grid: paper.Grid, cell: paper.Cell) -> dict:
    """A loss of the paper's with all that says which one it is, ready for JSON."""
    return {
        "model": grid.model,
        "steps": grid.steps,
        "weighting": grid.weighting,
        "table": grid.table,
        "loss": cell.loss,
        "difference": cell.difference,
        "interpolated_between_r": cell.between,
    }


def sweep(args: argparse.Namespace, config: TSTConfig) -> dict:
    """Text and the paper's loss for a grid over s and r at the same steps; losses of the one table
    that is nearest.
    """
    steps, every = args.train_iters, parameters(args)[0]
    grid, cells = paper.by_distance(every, steps, config.target_weighting)[0], []
    for s in SWEEP_S:
        for r in SWEEP_R:
            superposed = round(r * steps)
            schedule = Schedule.of(
                s,
                superposed,
                steps * args.global_batch_size,
                args.seq_length,
                args.global_batch_size,
            )
            raw, cell = schedule.raw_tokens(schedule.train_samples), grid.cell(r, s)
            fits = (
                args.tokens is None
                or schedule.long_samples * schedule.long_sample_length <= args.tokens
            )
            cells.append(
                {
                    "s": s,
                    "r": r,
                    "superposed_steps": superposed,
                    "raw_tokens": raw,
                    "fits": fits,
                    "difference": cell and cell.difference,
                }
            )
    return {
        "model": grid.model,
        "steps": grid.steps,
        "weighting": grid.weighting,
        "table": grid.table,
        "cells": cells,
    }


def against(plan: dict, config: TSTConfig) -> list[str]:
    """What the paper's own evidence says against the plan, in plain sentences."""
    text, r, sentences = plan["text"], plan["run"]["step_ratio"], []
    if text["suffices"] is False:
        small, plain = (
            next(x for x in paper.runs() if (x.model, x.steps, bool(x.tst_steps)) == key)
            for key in (("3b", 20000, True), ("3b", 50000, False))
        )
        sentences.append(
            f"Data-bound: TST gains by reading more text for the same compute, and there is less "
            f"than it reads. At equal text the paper's baseline was better: "
            f"3B, {small.tokens / 1e9:.0f}B tokens, plain {plain.loss:.3f} ({plain.steps:,} "
            f"steps, {plain.b200_hours} B200-hours), TST {small.loss:.3f} "
            f"({small.steps:,} steps, {small.b200_hours}). Repeated text under TST: nobody has "
            f"measured it."
        )
    if r >= 0.695:
        grid = paper.grids()[2]
        worse = {
            x: [
                g.cell(x, s).difference > 0
                for g in paper.grids()
                for s in range(2, 17)
                if g.cell(x, s)
            ]
            for x in (0.7, 0.8, 0.9)
        }
        counts = ", ".join(f"{sum(w)} of {len(w)} at r = {x}" for x, w in worse.items())
        sentences.append(
            f"r = {r:.2f}: too little is left to recover. The paper's gain shrinks (600M, s = 6: "
            f"{grid.cell(0.3, 6).difference:+.3f} nats at r = 0.3, "
            f"{grid.cell(0.7, 6).difference:+.3f} at 0.7, {grid.cell(0.9, 6).difference:+.3f} at "
            f"0.9); cells worse than their baseline: {counts}."
        )
    for s in config.bag_sizes:
        if s > 16:
            sentences.append(
                f"s = {s}: the paper tried 2 to 16. Nobody has published a larger bag."
            )
        elif s > 8:
            sentences.append(
                f"s = {s}: no grid of the paper with uniform weights has its lowest loss beyond "
                f"8, and larger bags cost text. Its 10B-A1B run used 16, and no other."
            )
    if plan["run"]["steps"] < 20000:
        sentences.append(f"{plan['run']['steps']:,} steps: the paper's shortest runs have 20,000.")
    if config.superpose == "output":
        sentences.append(
            "Output alone: needs no more text; the paper shows one curve and no figure, better "
            "than the baseline and worse than superposing both sides."
        )
    return sentences
