"""What the paper measured near a plan: its run with these settings, the baseline of equal loss, the
losses of its tables, and what speaks against the plan. No torch.
"""

from __future__ import annotations

import argparse
import math

from megatron_tst.config import TSTConfig
from megatron_tst.model_size import parameters
from megatron_tst.planning import paper
from megatron_tst.schedule import Schedule

SWEEP_S, SWEEP_R = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16), (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)


def run_of_the_paper(
    args: argparse.Namespace, superposed: int, config: TSTConfig
) -> paper.Run | None:
    """The run of table 1 that the plan is, whatever its sequence length: the paper gives none.

    Args:
        args: completed (arithmetic.complete).
        superposed: iterations of superposition.
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


def equal_loss(
    args: argparse.Namespace, config: TSTConfig, superposed: int, parameters: int, cost: dict
) -> dict | None:
    """The baseline of equal loss: measured by the paper for this very run, or its nearest speed-up;
    None where neither says anything.

    Args:
        superposed: iterations of superposition.
        parameters: of the model.
        cost: of the plan: GPU-hours of a step, and whether they are the paper's.
    """
    run, r, s = (
        run_of_the_paper(args, superposed, config),
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


def evidence(args: argparse.Namespace, config: TSTConfig, superposed: int, parameters: int) -> dict:
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
    if run := run_of_the_paper(args, superposed, config):
        plain = (
            other.loss
            for other in paper.runs()
            if (other.model, other.steps, other.tst_steps) == (run.model, run.steps, 0)
        )
        found["run"] = {
            "loss": run.loss,
            "baseline_loss": next(plain, None),
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
