"""What the log says around the end of a superposition phase: one block on rank 0, a few iterations
into the next phase.

The facts of the moment itself are kept in Megatron's arguments, so that a run that exits at the
boundary shows them when it goes on.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch

from megatron_tst.checks.conflicts import routers_in_graphs
from megatron_tst.loop.expert_load import ExpertLoad
from megatron_tst.schedule import Schedule

WATCHED = 5  # iterations on either side
_NO_STEP = -(1 << 62)


class BoundaryLog:
    """Watches the iterations around the end of each superposition phase.

    Args:
        args: Megatron's, which hold the facts between processes: tst_boundary, tst_validation.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.load = args, ExpertLoad()
        self.attached_for: tuple[str, int] | None = None  # what the experts are counted for
        self.done: int | None = None  # samples after the last iteration that this process finished
        self.rate: float | None = None
        self.losses: dict[int, torch.Tensor | None] = {}  # by iteration, on the rank that has them

    def saw_validation(self, loss: torch.Tensor | None, schedule: Schedule) -> None:
        """Note the next-token validation loss in Megatron's arguments; called by all ranks.

        Args:
            loss: in nats, a scalar; None on ranks without it.
        """
        (value,) = _from_last([loss])
        if not math.isnan(value):  # Megatron ran out of time
            iteration = self.args.consumed_train_samples // schedule.global_batch_size
            self.args.tst_validation = iteration, value

    def saw_iteration(self, iteration: int, rate: float, loss: torch.Tensor | None) -> None:
        """Note learning rate and loss of an iteration; the loss None on ranks without it."""
        self.rate = rate
        recent = {i: kept for i, kept in self.losses.items() if i > iteration - WATCHED}
        self.losses = recent | {iteration: loss}

    def after_iteration(
        self, schedule: Schedule, model: list[torch.nn.Module], optimizer: object
    ) -> None:
        """Count experts near a boundary, keep its facts, and print the block. Called by all ranks
        after each iteration, before a checkpoint is saved.

        Example: batches of 4 samples, superposition to sample 24 (iteration 6), 40 samples in all,
        WATCHED = 5. Samples done after each iteration, and what happens there:

             4  (iteration 1)    the boundary is 20 = 5 * 4 samples ahead: count experts before it
            24  (iteration 6)    the phase has ended: keep its facts, and count experts anew
            28 .. 40  (7 to 10)  4, 8, 12, 16 samples since: fewer than 20, but the run ends at 40,
                                 so the block is printed there

        Args:
            schedule: the phases as they are now.
            model: Megatron's model chunks of this rank.
            optimizer: Megatron's.
        """
        args, batch = self.args, schedule.global_batch_size
        done = args.consumed_train_samples
        before = done - batch if self.done is None else self.done
        # later than at its end if that iteration was skipped
        ended = [phase for phase in schedule.superposed_phases if before < phase.end <= done]
        facts = getattr(args, "tst_boundary", None)
        since = done - facts["sample"] if facts else 0
        at_the_end = done // batch >= args.train_iters
        if since > 0 and (since >= WATCHED * batch or ended or at_the_end):
            self._print(facts, schedule, optimizer)
            facts = None
        if ended:
            facts = self._facts(ended[-1], optimizer)
        args.tst_boundary, self.done = facts, done
        self._count_experts(schedule, model, facts)

    def _count_experts(self, schedule, model, facts):
        """Count from here on for what comes next: nothing, a boundary ahead, or the one behind."""
        done, wanted = self.done, None
        if self._counts_experts():
            ahead = schedule.phase_at(done)
            near = ahead.end - done <= WATCHED * schedule.global_batch_size
            if facts:
                wanted = "after", facts["sample"]
            elif ahead in schedule.superposed_phases and near:
                wanted = "before", ahead.end
        if wanted == self.attached_for:
            return
        if wanted is None:
            self.load.detach()
        else:
            self.load.attach(model)
        self.attached_for = wanted

    def _counts_experts(self):
        """Not in CUDA graphs: replays run no hook, and a hook that was captured would stay in the
        graph for the rest of the run.
        """
        return bool(getattr(self.args, "num_experts", None)) and not routers_in_graphs(self.args)

    def _experts(self):
        """-> (imbalance, router entropy) of each layer with experts."""
        if not self._counts_experts():
            return [], []
        layers = self.args.num_layers + (getattr(self.args, "mtp_num_layers", None) or 0)
        return self.load.imbalance(layers, self.args.num_experts), self.load.entropy(layers)

    def _facts(self, phase, optimizer):
        imbalance, entropy = self._experts()
        return {
            "sample": phase.end,
            "bag size": phase.bag_size,
            "learning rate": self.rate,
            "optimizer step": _steps(optimizer),
            "imbalance": imbalance,
            "router entropy": entropy,
            "validation": getattr(self.args, "tst_validation", None),
        }

    def _print(self, facts, schedule, optimizer):
        batch, done = schedule.global_batch_size, self.args.consumed_train_samples
        first, now = facts["sample"] // batch, done // batch
        losses = [self.losses.get(i) for i in range(first + 1, now + 1) if i in self.losses]
        losses, (load, entropy) = _from_last(losses), self._experts()
        steps = _steps(optimizer)
        if self.args.rank:
            return
        rows = {
            "raw tokens": f"{schedule.raw_tokens(facts['sample'])} at the boundary, "
            f"{schedule.raw_tokens(done)} now, {schedule.raw_tokens(schedule.train_samples)} at "
            "the end",
            "learning rate": f"{_figure(facts['learning rate'], 'E')} at the boundary, "
            f"{_figure(self.rate, 'E')} now",
            "optimizer": _kept(
                facts["optimizer step"], steps, now - first, _without_steps(optimizer)
            ),
            "data": _next_data(schedule, done),
        }
        if facts["imbalance"] or load:
            before = facts.get("router entropy")  # not in checkpoints of earlier versions
            rows["expert load"] = (
                "busiest expert over the mean, median of the layers: "
                f"{_spread(facts['imbalance'])} before, {_spread(load)} since"
            )
            rows["router entropy"] = (
                f"over log(experts), median of the layers: {_median(before)} before, "
                f"{_median(entropy)} since"
            )
        elif getattr(self.args, "num_experts", None):
            impl = getattr(self.args, "cuda_graph_impl", None)
            rows["expert load"] = f"not known: --cuda-graph-impl {impl} runs the routers in graphs"
        seen = " ".join(f"{loss:.6E}" for loss in losses) or "not seen"
        beside = "none yet"
        if validation := facts["validation"]:
            beside = f"{validation[1]:.6E} (next-token, iteration {validation[0]})"
        rows["losses since"] = f"{seen} | last validation loss: {beside}"
        phase = schedule.phase_at(facts["sample"])
        superposed = phase in schedule.superposed_phases
        head = (
            f" [tst] boundary: {f'bag size {phase.bag_size}' if superposed else 'recovery'} since "
            f"iteration {first + 1}, after bag size {facts['bag size']}; "
            f"{now - first} iterations later"
        )
        lines = [head, *(f" [tst]   {name:14s} {text}" for name, text in rows.items())]
        print("\n".join(lines), flush=True)


def _next_data(schedule, done) -> str:
    text = f"sample {done} of {schedule.train_samples}"
    if done >= schedule.train_samples:
        return text
    _, long, piece = schedule.locate(done)
    return f"{text}, next is piece {piece} of long sample {long}"


def _from_last(values) -> list[float]:
    """Scalars that the last rank has, on every rank."""
    figures = torch.zeros(len(values), dtype=torch.float64, device=torch.cuda.current_device())
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        for i, value in enumerate(values):
            figures[i] = value.double().reshape(()) if torch.is_tensor(value) else float("nan")
    torch.distributed.broadcast(figures, torch.distributed.get_world_size() - 1)
    return figures.tolist()


def _steps(optimizer) -> int | list[int] | None:
    """How many steps the optimizer's state says that it has made, over all ranks; the least and the
    most where its parts do not agree; None where no part says it. Called by all ranks.

    Muon, Lion and SGD do not count. Beside Muon, Adam does, for embedding, output layer and norms.
    """
    steps = []
    for inner in _inner(optimizer):
        # torch's Adam counts by parameter; a step in its groups is one that was loaded (Megatron's
        # distributed optimizer), and stays. A group without parameters here does not go on either.
        counted = [state["step"] for state in inner.state.values() if "step" in state]
        of_groups = [g["step"] for g in inner.param_groups if g.get("params", 1) and "step" in g]
        steps += counted or of_groups
    steps = list(map(int, steps))
    most = torch.tensor([max(steps, default=-1), max((-s for s in steps), default=_NO_STEP)])
    most = most.to(torch.cuda.current_device())
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    high, low = most.tolist()
    if high < 0:
        return None
    return high if high == -low else [-low, high]


def _without_steps(optimizer) -> list[str]:
    """Names of the optimizers that do not count their steps."""
    names = {
        type(inner).__name__.removeprefix("TensorParallel")
        for inner in _inner(optimizer)
        if any(state and "step" not in state for state in inner.state.values())
        and not any("step" in group for group in inner.param_groups)
    }
    return sorted(names)


def _inner(optimizer):
    """The torch optimizers in one of Megatron's, which may be chained in several depths."""
    if parts := getattr(optimizer, "chained_optimizers", None):
        return [inner for part in parts for inner in _inner(part)]
    inner = getattr(optimizer, "optimizer", None)
    return [] if inner is None else [inner]


def _kept(before, now, iterations, without=()) -> str:
    """What the row says. `before`, `now`: _steps's, at the boundary and so many iterations later;
    `without`: _without_steps's.
    """
    names, count = " and ".join(without), "counts" if len(without) == 1 else "count"
    if before is None or now is None:
        known = f": {names} {count} none" if without else ""
        return f"does not say how many steps it has made{known}"
    kept = isinstance(before, int) and now == before + iterations
    text = "state kept" if kept else "state NOT kept, or steps were skipped"
    text += f": step {_range(before)} at the boundary, {_range(now)} now"
    return f"{text} ({names} {count} none)" if without else text


def _range(steps) -> str:
    return " to ".join(map(str, steps)) if isinstance(steps, list) else str(steps)


def _spread(imbalance) -> str:
    if not imbalance:
        return "not measured"
    return f"{statistics.median(imbalance):.2f} (worst layer {max(imbalance):.2f})"


def _median(values) -> str:
    return f"{statistics.median(values):.3f}" if values else "not measured"


def _figure(value, kind) -> str:
    return "none" if value is None else f"{value:.6{kind}}"
