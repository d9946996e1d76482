"""What Megatron's logs and TensorBoard files say of a run: losses against steps, FLOPs, raw tokens
and time; equal losses compared.

FLOPs are 6 N D (model_size.flops_6nd).
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tst.errors import optional
from megatron_tst.model_size import flops_6nd, padded_vocabulary

_TRAIN = re.compile(
    r"iteration +(\d+)/ *(\d+) \|.*?\| lm loss: ([\d.E+-]+)(?:.*?mce minus bag entropy: "
    r"([\d.E+-]+))?"
)
_TIME = re.compile(r"iteration +(\d+)/.*?elapsed time per iteration \(ms\): ([\d.]+)")
_VALID = re.compile(r"validation loss at iteration (\d+)[^|]*\| lm loss value: ([\d.E+-]+)")
_PHASE = re.compile(
    r"\[tst\] iteration +(\d+) \| phase: (\w+) \| bag size: (\d+) \| raw tokens: (\d+)"
)
_BOUNDARY = re.compile(r"\[tst\] boundary after iteration (\d+): .*?\((\d+) raw tokens\)")
_BLOCK = re.compile(r"^ \[tst\]   (expert load|router entropy) +(.*)")
_ARGUMENT = re.compile(r"^ {2}(\w+) \.{3,} (\S+)$")
_PARAMETERS = re.compile(r"> number of parameters on \(.*?\) model parallel rank \(.*?\): (\d+)")
AXES = {
    "steps": "iteration",
    "FLOPs": "FLOPs (6 N D)",
    "raw tokens": "raw tokens read",
    "seconds": "seconds of training",
}


@dataclass
class Run:
    """What is known of a run. Losses in nats per position by iteration; `excess` is the mce minus
    the bags' entropy.

    Args:
        seconds: of training since the start, by iteration; evaluation and start-up left out where a
            log says so.
        arguments: Megatron's, as text.
        parameters: as Megatron counts them, over its model-parallel ranks; None where the source
            does not say (TensorBoard).
        experts: what the log says of expert load and router entropy after each boundary.
    """

    train: dict[int, float] = field(default_factory=dict)
    excess: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    raw_tokens: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    parameters: int | None = None
    experts: list[str] = field(default_factory=list)
    boundary: int | None = None
    total: int | None = None

    @property
    def last(self) -> int:
        """The last iteration with a training loss; 0 where there is none."""
        return max(self.train, default=0)

    @property
    def final_validation(self) -> float | None:
        """The last validation loss, nats; None where there is none."""
        return self.validation[max(self.validation)] if self.validation else None

    @property
    def positions(self) -> int | None:
        """Of a step."""
        batch, length = (self.arguments.get(name) for name in ("global_batch_size", "seq_length"))
        return int(batch) * int(length) if batch and length else None

    @property
    def flops(self) -> float | None:
        """Of a step; None where parameters or arguments are not known."""
        known = self.parameters and self.positions and "hidden_size" in self.arguments
        return flops_6nd(self.parameters, self._model()) if known else None

    def _model(self) -> argparse.Namespace:
        """The arguments that the FLOPs follow from, as numbers."""

        def of(name, default=0):
            value = self.arguments.get(name, "None")
            return default if value == "None" else int(value)

        names = ("hidden_size", "num_layers", "num_experts", "mtp_num_layers")
        on = ("swiglu", "untie_embeddings_and_output_weights")
        return argparse.Namespace(
            **{name: of(name) for name in (*names, "global_batch_size", "seq_length")},
            **{name: self.arguments.get(name) == "True" for name in on},
            moe_ffn_hidden_size=of("moe_ffn_hidden_size", of("ffn_hidden_size")),
            moe_router_topk=of("moe_router_topk", 1),
            padded_vocab_size=padded_vocabulary(
                of("vocab_size"),
                of("make_vocab_size_divisible_by", 1),
                of("tensor_model_parallel_size", 1),
            ),
        )

    def curve(
        self, axis: str, losses: dict[int, float] | None = None
    ) -> tuple[list[float], list[float]] | None:
        """(where on the axis, loss) of the validation losses, or of others by iteration; None where
        the run does not say.
        """
        losses = self.validation if losses is None else losses
        steps = sorted(losses)
        if axis == "steps":
            where = steps
        elif axis == "FLOPs":
            where = self.flops and [self.flops * step for step in steps]
        elif axis == "raw tokens":
            where = self.raw_tokens and [
                interpolated({0: 0, **self.raw_tokens}, step) for step in steps
            ]
        else:
            where = self.seconds and [
                interpolated({0: 0.0, **self.seconds}, step) for step in steps
            ]
        return (list(where), [losses[step] for step in steps]) if where else None


def interpolated(known: dict[int, float], step: int) -> float:
    """On straight lines between what is known, and on the last line beyond."""
    after = next((k for k in sorted(known) if k >= step), max(known))
    if step in known or len(known) == 1:
        return known[after]
    before = max(k for k in known if k < after)
    return known[before] + (known[after] - known[before]) * (step - before) / (after - before)


def read(path: Path) -> Run:
    """A log of Megatron, an event file of TensorBoard, or a folder of those."""
    return read_events(path) if path.is_dir() or "tfevents" in path.name else read_log(path)


def read_log(*paths: Path) -> Run:
    """Parse a log, whole or still being written; several: a run's parts in order. The last
    evaluation of an iteration counts.
    """
    run, parameters, spent = Run(), [], 0.0
    for path in paths:
        parameters, timed = [], max(run.train, default=0)
        for line in path.read_text(errors="replace").splitlines():
            if match := _TRAIN.search(line):
                iteration, run.total, run.train[iteration] = (
                    int(match[1]),
                    int(match[2]),
                    float(match[3]),
                )
                if match[4]:
                    run.excess[iteration] = float(match[4])
                if match := _TIME.search(line):
                    spent += (
                        float(match[2]) / 1000 * max(0, iteration - timed)
                    )  # a mean over the iterations since the last line
                    run.seconds[iteration], timed = spent, iteration
            elif match := _VALID.search(line):
                run.validation[int(match[1])] = float(match[2])
            elif match := _PHASE.search(line):
                run.raw_tokens[int(match[1])] = int(match[4])
            elif match := _BOUNDARY.search(line):
                run.boundary = int(match[1])
                run.raw_tokens[run.boundary] = int(match[2])
            elif match := _PARAMETERS.search(line):
                parameters.append(int(match[1]))
            elif match := _BLOCK.search(line):
                run.experts.append(f"{match[1]}: {match[2]}")
            elif match := _ARGUMENT.search(line):
                run.arguments[match[1]] = match[2]
        run.parameters = sum(parameters) or run.parameters
    _fill_raw_tokens(run)
    return run


def _fill_raw_tokens(run: Run) -> None:
    """Stock Megatron does not say how many: a baseline, or what went on without TST, reads a token
    a position.
    """
    said = max(run.raw_tokens, default=0)
    for step in [
        step for step in sorted({*run.train, *run.validation}) if step > said and run.positions
    ]:
        run.raw_tokens[step] = run.raw_tokens.get(said, 0) + (step - said) * run.positions


def read_events(path: Path) -> Run:
    """The scalars and arguments that Megatron and TST write to TensorBoard; times are of the clock,
    evaluation included.
    """
    reader = optional("tensorboard.backend.event_processing.event_accumulator", "tensorboard")
    events = reader.EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()

    def scalars(name):
        return {e.step: e.value for e in events.Scalars(name)} if name in tags["scalars"] else {}

    run = Run(
        train=scalars("lm loss"),
        excess=scalars("mce minus bag entropy"),
        validation=scalars("lm loss validation"),
    )
    run.raw_tokens = {step: int(value) for step, value in scalars("tst raw tokens").items()}
    bagged = [step for step, size in scalars("tst bag size").items() if size > 1]
    run.boundary, run.total = max(bagged, default=None), run.last or None
    if run.train:
        times = {e.step: e.wall_time for e in events.Scalars("lm loss")}
        first = min(times)
        run.seconds = {
            step: (time - times[first]) for step, time in times.items() if step > first
        } or {first: 0.0}
    for tag in tags["tensors"]:
        if tag.endswith("/text_summary"):
            run.arguments[tag.removesuffix("/text_summary")] = (
                events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
            )
    _fill_raw_tokens(run)
    return run


def reached(where: list[float], losses: list[float], loss: float) -> float | None:
    """Where a curve first comes down to `loss`, on straight lines between its points; None where it
    does not.
    """
    for i, (x, y) in enumerate(zip(where, losses)):
        if y <= loss:
            if i == 0 or losses[i - 1] == y:
                return x
            return where[i - 1] + (x - where[i - 1]) * (losses[i - 1] - loss) / (losses[i - 1] - y)
    return None


def speed_up(base: Run, other: Run, axis: str) -> float | None:
    """How many times less of `axis` the other run needs to reach the higher of both final
    validation losses; above 1: it is faster.

    A loss that one run reaches in the middle and the other at the end of its learning-rate decay
    favours the other.
    """
    curves = base.curve(axis), other.curve(axis)
    if None in curves or not all(losses for _, losses in curves):
        return None
    loss = max(losses[-1] for _, losses in curves)
    ours, theirs = (reached(*curve, loss) for curve in curves)
    return ours / theirs if ours and theirs else None


@dataclass(frozen=True)
class SpeedUp:
    """How many times sooner the runs of `name` reach the loss that they and those of `against` both
    reach, along `axis`: over pairs of runs, which have the same seed.

    Args:
        standard_error: of the mean; None for one pair.
    """

    name: str
    against: str
    axis: str
    mean: float
    lowest: float
    highest: float
    standard_error: float | None
    pairs: int


def speed_ups(groups: dict[str, list[Run]]) -> list[SpeedUp]:
    """Of each group but the first against the first, along each of AXES that both know; the n-th
    runs of two groups are a pair.
    """
    if not groups:
        return []
    (first, base), *others = groups.items()
    found = []
    for name, runs in others:
        for axis in AXES:
            pairs = [
                times for a, b in zip(base, runs) if (times := speed_up(a, b, axis)) is not None
            ]
            if pairs:
                mean, lowest, highest, error = spread(pairs)
                known = error if len(pairs) > 1 else None
                found.append(SpeedUp(name, first, axis, mean, lowest, highest, known, len(pairs)))
    return found


def summary(run: Run) -> dict:
    """What was read from a run, ready for JSON; None where its source does not say. Raw tokens,
    FLOPs (6 N D) and seconds of training are those up to the last iteration.
    """

    def up_to_the_last(axis):
        curve = run.curve(axis, {run.last: 0.0})
        return curve and curve[0][0]

    tokens = up_to_the_last("raw tokens")
    return {
        "iterations": run.last,
        "planned": run.total,
        "boundary": run.boundary,
        "training_loss": run.train.get(run.last),
        "validation_loss": run.final_validation,
        "raw_tokens": None if tokens is None else round(tokens),
        "flops": up_to_the_last("FLOPs"),
        "seconds": up_to_the_last("seconds"),
        "parameters": run.parameters,
    }


def spread(values: list[float]) -> tuple[float, float, float, float]:
    """Mean, lowest, highest, and standard error of the mean (NaN for one value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), min(values), max(values), error
