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

from megatron_tst.schedule import Schedule

WATCHED = 5  # iterations on either side


class ExpertLoad:
    """Counts the tokens that each expert is given, and how undecided the routers are, while it is
    attached.
    """

    def __init__(self):
        # layer number -> int64 [experts] of this rank's tokens; fp64 [2]: sum of the tokens' router
        # entropies, and their number
        self.handles, self.counts, self.entropies = [], {}, {}

    def attach(self, model: list[torch.nn.Module]) -> None:
        """Start counting anew in the routers of Megatron's model chunks."""
        from megatron.core.transformer.moe.router import TopKRouter

        self.detach()
        self.counts, self.entropies = {}, {}
        routers = [
            module
            for chunk in model
            for module in chunk.modules()
            if isinstance(module, TopKRouter)
        ]
        self.handles = [router.register_forward_hook(self._count) for router in routers]

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _count(self, router, inputs, output):
        if (
            not torch.is_grad_enabled() or not router.training
        ):  # evaluation; the first pass of recomputed activations
            return
        per_expert = output[1].detach().sum(0)
        layer = router.layer_number
        self.counts[layer] = self.counts[layer] + per_expert if layer in self.counts else per_expert
        with torch.no_grad():
            scores = router.gating(inputs[0].detach()).double().flatten(0, -2)
        if router.config.moe_router_score_function == "sigmoid":
            scores = scores.sigmoid().log()
        log_p = scores.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1) / math.log(log_p.shape[-1])
        noted = torch.stack([entropy.sum(), entropy.new_tensor(float(len(entropy)))])
        self.entropies[layer] = self.entropies[layer] + noted if layer in self.entropies else noted

    def imbalance(self, layers: int, experts: int) -> list[float]:
        """The busiest expert's tokens over the mean, for each layer that has experts; called by all
        ranks.
        """
        counts = torch.zeros(
            layers + 1, experts, dtype=torch.int64, device=torch.cuda.current_device()
        )
        for layer, per_expert in self.counts.items():
            counts[min(layer, layers)] += per_expert
        torch.distributed.all_reduce(counts)
        counts = counts[counts.sum(1) > 0].double()
        return (counts.max(1).values / counts.mean(1)).tolist()

    def entropy(self, layers: int) -> list[float]:
        """Mean entropy of the routers' probabilities over log(experts), 1 undecided, for each layer
        that has experts; called by all ranks.
        """
        sums = torch.zeros(layers + 1, 2, dtype=torch.float64, device=torch.cuda.current_device())
        for layer, noted in self.entropies.items():
            sums[min(layer, layers)] += noted
        torch.distributed.all_reduce(sums)
        sums = sums[sums[:, 1] > 0]
        return (sums[:, 0] / sums[:, 1]).tolist()


class BoundaryLog:
    """Watches the iterations around the end of each superposition phase."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.load, self.attached_for = args, ExpertLoad(), None
        self.done = (
            None  # samples of the run after the last iteration that this process has finished
        )
        self.rate, self.losses = None, {}  # iteration -> the loss, on the rank that has it

    def saw_validation(self, loss: torch.Tensor | None, schedule: Schedule) -> None:
        """Note the next-token validation loss, None on ranks without it, in Megatron's arguments;
        called by all ranks.
        """
        (value,) = _from_last([loss])
        if not math.isnan(value):  # Megatron ran out of time
            self.args.tst_validation = (
                self.args.consumed_train_samples // schedule.global_batch_size,
                value,
            )

    def saw_iteration(self, iteration: int, rate: float, loss: torch.Tensor | None) -> None:
        """Note learning rate and loss of an iteration; the loss None on ranks without it."""
        self.rate = rate
        self.losses = {i: kept for i, kept in self.losses.items() if i > iteration - WATCHED} | {
            iteration: loss
        }

    def after_iteration(self, schedule: Schedule, model, optimizer) -> None:
        """Count experts near a boundary, keep its facts, and print the block; called by all ranks
        before a checkpoint is saved.
        """
        args, batch = self.args, schedule.global_batch_size
        done = args.consumed_train_samples
        before = done - batch if self.done is None else self.done
        ended = [
            phase for phase in schedule.superposed_phases if before < phase.end <= done
        ]  # later than at its end if that was skipped
        facts = getattr(args, "tst_boundary", None)
        since = done - facts["sample"] if facts else 0
        if since > 0 and (since >= WATCHED * batch or ended or done // batch >= args.train_iters):
            self._print(facts, schedule, optimizer)
            facts = None
        if ended:
            facts = self._facts(ended[-1], optimizer)
        args.tst_boundary, self.done = facts, done
        wanted = None  # what to count experts for, from here on
        if getattr(args, "num_experts", None):
            ahead = schedule.phase_at(done)
            if facts:
                wanted = "after", facts["sample"]
            elif ahead in schedule.superposed_phases and ahead.end - done <= WATCHED * batch:
                wanted = "before", ahead.end
        if wanted != self.attached_for:
            self.load.detach() if wanted is None else self.load.attach(model)
            self.attached_for = wanted

    def _experts(self):
        """-> (imbalance, router entropy) of each layer with experts."""
        if not getattr(self.args, "num_experts", None):
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
        if self.args.rank:
            return
        phase = schedule.phase_at(facts["sample"])
        what = (
            "recovery" if phase not in schedule.superposed_phases else f"bag size {phase.bag_size}"
        )
        steps, step = facts["optimizer step"], _steps(optimizer)
        _, long, piece = schedule.locate(min(done, schedule.train_samples - 1))
        rows = {
            "raw tokens": f"{schedule.raw_tokens(facts['sample'])} at the boundary, "
            f"{schedule.raw_tokens(done)} now, {schedule.raw_tokens(schedule.train_samples)} at "
            f"the end",
            "learning rate": f"{_figure(facts['learning rate'], 'E')} at the boundary, "
            f"{_figure(self.rate, 'E')} now",
            "optimizer": _kept(steps, step, now - first),
            "data": f"sample {done} of {schedule.train_samples}"
            + (
                f", next is piece {piece} of long sample {long}"
                if done < schedule.train_samples
                else ""
            ),
        }
        if facts["imbalance"] or load:
            rows["expert load"] = (
                f"busiest expert over the mean, median of the layers: "
                f"{_spread(facts['imbalance'])} before, {_spread(load)} since"
            )
            before = facts.get("router entropy")  # not in checkpoints of earlier versions
            rows["router entropy"] = (
                f"over log(experts), median of the layers: {_median(before)} before, "
                f"{_median(entropy)} since"
            )
        validation = facts["validation"]
        beside = (
            f"{validation[1]:.6E} (next-token, iteration {validation[0]})"
            if validation
            else "none yet"
        )
        rows["losses since"] = (
            f"{' '.join(f'{loss:.6E}' for loss in losses) or 'not seen'} | last validation loss: "
            f"{beside}"
        )
        head = (
            f" [tst] boundary: {what} since iteration {first + 1}, after bag size "
            f"{facts['bag size']}; {now - first} iterations later"
        )
        print(
            "\n".join([head, *(f" [tst]   {name:14s} {text}" for name, text in rows.items())]),
            flush=True,
        )


def _from_last(values) -> list[float]:
    """Scalars that the last rank has, on every rank."""
    figures = torch.zeros(len(values), dtype=torch.float64, device=torch.cuda.current_device())
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        for i, value in enumerate(values):
            figures[i] = value.double().reshape(()) if torch.is_tensor(value) else float("nan")
    torch.distributed.broadcast(figures, torch.distributed.get_world_size() - 1)
    return figures.tolist()


def _steps(optimizer) -> int | None:
    """How many steps the optimizer's state says that it has made; None where it does not say."""
    steps = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None:
            continue
        steps += [group["step"] for group in inner.param_groups if "step" in group]
        steps += [state["step"] for state in inner.state.values() if "step" in state]
    return max(map(int, steps)) if steps else None


def _kept(before, now, iterations) -> str:
    if before is None or now is None:
        return "does not say how many steps it has made"
    kept = "state kept" if now == before + iterations else "state NOT kept, or steps were skipped"
    return f"{kept}: step {before} at the boundary, {now} now"


def _spread(imbalance) -> str:
    if not imbalance:
        return "not measured"
    return f"{statistics.median(imbalance):.2f} (worst layer {max(imbalance):.2f})"


def _median(values) -> str:
    return f"{statistics.median(values):.3f}" if values else "not measured"


def _figure(value, kind) -> str:
    return "none" if value is None else f"{value:.6{kind}}"
