"""TSTConfig and the command-line flags. What TST cannot work with is in checks/refusals.py, what a resume
may change in loop/resume.py.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from megatron_tst.errors import refuse
from megatron_tst.extension import KERNELS
from megatron_tst.ops.names import ABLATIONS, LOSSES, TARGET_WEIGHTINGS
from megatron_tst.schedule import Schedule

SUPERPOSE = ("both", "input", "output")
SWITCHES = ("fixed", "auto")


@dataclass(frozen=True)
class TSTConfig:
    """What to superpose, for how long, and against which targets.

    Args:
        bag_size: s, raw tokens a bag; 1 leaves everything stock. Several: successive superposition
            phases.
        step_ratio: r, share of the training iterations that are superposed, in [0, 1); one for each
            bag size. One of this and `iters`.
        iters: T1, superposed iterations; one for each bag size.
        target_weighting: weight of the places in the target bag, from its first token (paper,
            section 5).
        superpose: "both"; "input" (bags in, the next single token out); "output" (single tokens in,
            the next s tokens out).
        loss: "mce" or "mce-alt"; for ablations alone "bce" or "hinge" (ops/ablations.py).
        exit_at_boundary: save and exit after the last superposed iteration.
        switch: "fixed", or "auto": a superposition phase ends as soon as its loss hardly falls any
            more, at the latest after `iters` (loop/switch.py).
        switch_slope: with "auto": nats by which the loss must fall over a hundredth of the run's
            iterations for superposition to go on.
        switch_window: with "auto": share of the run's iterations over which the loss is smoothed.
        override: a resume may change bag sizes and lengths of what lies ahead.
        kernel: of the superposed loss: "extension" (C++/CUDA), "torch", or "auto", the extension
            where it is there.
        kernel_in_recovery: the extension computes the training loss of the recovery phase too, in
            Megatron's place.
        fused_linear_loss: output layer and training loss in one op, in both phases: less memory, a
            third more work in the output layer.
        stock_index: a folder for Megatron's index files with which a stock run goes on after the
            boundary (data/stock_index.py).

    Raises:
        TSTError: a value outside its range, or values that contradict each other.
    """

    bag_size: int | tuple[int, ...] = 1
    step_ratio: float | tuple[float, ...] | None = None
    iters: int | tuple[int, ...] | None = None
    target_weighting: str = "uniform"
    superpose: str = "both"
    loss: str = "mce"
    exit_at_boundary: bool = False
    switch: str = "fixed"
    switch_slope: float = 0.002
    switch_window: float = 0.01
    override: bool = False
    kernel: str = "auto"
    kernel_in_recovery: bool = False
    fused_linear_loss: bool = False
    stock_index: str | None = None

    def __post_init__(self):
        for s in self.bag_sizes:
            if not _whole(s) or s < 1:
                refuse(
                    "--tst-bag-size",
                    "a whole number >= 1",
                    s,
                    "The paper found 4 to 8 robust; 1 switches TST off.",
                )
        if len(self.bag_sizes) > 1 and min(self.bag_sizes) == 1:
            do = "The recovery phase follows by itself."
            refuse("--tst-bag-size", "bags of 2 and more in a list", _shown(self.bag_size), do)
        for r in _several(self.step_ratio):
            if not (isinstance(r, (int, float)) and 0 <= r < 1):
                do = "The paper found 0.2 to 0.4 robust; the rest of the run recovers."
                refuse("--tst-step-ratio", "a number in [0, 1)", r, do)
        for t1 in _several(self.iters):
            if not _whole(t1) or t1 < 0:
                refuse(
                    "--tst-iters",
                    "a whole number >= 0",
                    t1,
                    "Give the number of superposed iterations.",
                )
        if self.step_ratio is not None and self.iters is not None:
            got = f"{_shown(self.step_ratio)} and {_shown(self.iters)}"
            refuse("--tst-step-ratio and --tst-iters", "one of the two", got, "Leave one out.")
        for flag, value in (("--tst-step-ratio", self.step_ratio), ("--tst-iters", self.iters)):
            if value is not None and len(_several(value)) != len(self.bag_sizes):
                refuse(
                    flag,
                    f"one for each of the bag sizes {_shown(self.bag_size)}",
                    _shown(value),
                    "Separate them by commas.",
                )
        for flag, value, allowed in (
            ("--tst-target-weighting", self.target_weighting, TARGET_WEIGHTINGS),
            ("--tst-superpose", self.superpose, SUPERPOSE),
            ("--tst-loss", self.loss, LOSSES + ABLATIONS),
            ("--tst-switch", self.switch, SWITCHES),
            ("--tst-kernel", self.kernel, KERNELS),
        ):
            if value not in allowed:
                refuse(flag, f"one of {', '.join(allowed)}", repr(value), "Choose one of these.")
        for flag, value, top in (
            ("--tst-switch-slope", self.switch_slope, math.inf),
            ("--tst-switch-window", self.switch_window, 0.1),
        ):
            if not (isinstance(value, (int, float)) and 0 < value <= top) or math.isinf(value):
                refuse(
                    flag,
                    "a number > 0" + (f", at most {top}" if top < 1 else ""),
                    value,
                    "Leave it out for the default.",
                )

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> TSTConfig:
        """From Megatron's parsed arguments; flags that are absent take the defaults."""
        return cls(
            **{
                name: getattr(args, f"tst_{name}", default)
                for name, default in cls._defaults().items()
            }
        )

    @classmethod
    def _defaults(cls) -> dict:
        return {name: field.default for name, field in cls.__dataclass_fields__.items()}

    @property
    def bag_sizes(self) -> tuple[int, ...]:
        """Of the superposition phases, in order."""
        return _several(self.bag_size)

    @property
    def enabled(self) -> bool:
        """Whether any step is superposed."""
        return max(self.bag_sizes) > 1 and any(_several(self.step_ratio) + _several(self.iters))

    def schedule(self, args: argparse.Namespace) -> Schedule:
        """Resolve the phases for a run.

        Args:
            args: Megatron's validated arguments (global_batch_size, seq_length, train_iters or
                train_samples).
        """
        batch = args.global_batch_size
        samples = args.train_samples or args.train_iters * batch
        total = samples // batch
        lengths = _several(self.iters) or [round(r * total) for r in _several(self.step_ratio)]
        if sum(lengths) >= total > 0:
            do = "Recovery needs the rest: the paper uses 60 to 80 %."
            refuse("--tst-iters", f"fewer than the {total} training iterations", sum(lengths), do)
        if self.enabled and not all(lengths):
            flag, got = (
                ("--tst-iters", self.iters) if self.iters else ("--tst-step-ratio", self.step_ratio)
            )
            expected = (
                "at least one iteration of each bag size"
                if self.iters
                else f"at least half an iteration of {total}"
            )
            refuse(flag, expected, _shown(got), "Raise it, or drop the --tst- flags.")
        superposed = [length * batch for length in lengths]
        sizes = self.bag_sizes if lengths else ()
        return Schedule(
            (*sizes, 1),
            (*superposed, samples - sum(superposed)),
            args.seq_length,
            batch,
            single_tokens_in=self.superpose == "output",
        )


def add_tst_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the --tst-* flags in a group of their own (an extra_args_provider for Megatron's
    parse_args).
    """
    group = parser.add_argument_group("token superposition (TST)")
    d = TSTConfig._defaults()
    # Values are checked in TSTConfig: argparse would print Megatron's thousand lines of usage with
    # each mistake.
    group.add_argument(
        "--tst-bag-size",
        type=_numbers,
        default=1,
        help="raw tokens a bag, s; 1 (default): everything stock. 16,8,4: one phase after the "
        "other",
    )
    group.add_argument(
        "--tst-step-ratio",
        type=_numbers,
        help="share of the iterations that are superposed, r, in [0, 1); one for each bag size",
    )
    group.add_argument(
        "--tst-iters", type=_numbers, help="superposed iterations, instead of --tst-step-ratio"
    )
    group.add_argument(
        "--tst-target-weighting", default="uniform", help=f"one of {', '.join(TARGET_WEIGHTINGS)}"
    )
    group.add_argument("--tst-superpose", default="both", help=f"one of {', '.join(SUPERPOSE)}")
    group.add_argument(
        "--tst-loss",
        default="mce",
        help=f"one of {', '.join(LOSSES)}; ablations, worse than no TST in the paper: "
        f"{', '.join(ABLATIONS)}",
    )
    group.add_argument(
        "--tst-exit-at-boundary",
        action="store_true",
        help="save and exit after the last superposed iteration",
    )
    group.add_argument(
        "--tst-switch",
        default="fixed",
        help="fixed, or auto: as soon as the loss hardly falls, at the latest after --tst-iters",
    )
    group.add_argument(
        "--tst-switch-slope",
        type=_number,
        default=d["switch_slope"],
        help="auto: go on while the loss falls by so many nats over a hundredth of the run",
    )
    group.add_argument(
        "--tst-switch-window",
        type=_number,
        default=d["switch_window"],
        help="auto: share of the run over which the loss is smoothed",
    )
    group.add_argument(
        "--tst-override",
        action="store_true",
        help="on a resume: change bag sizes and lengths of what lies ahead",
    )
    group.add_argument(
        "--tst-kernel", default="auto", help=f"of the superposed loss, one of {', '.join(KERNELS)}"
    )
    group.add_argument(
        "--tst-kernel-in-recovery",
        action="store_true",
        help="the extension's loss in the recovery phase too",
    )
    group.add_argument(
        "--tst-stock-index",
        metavar="DIR",
        help="write index files there with which stock Megatron (--data-cache-path DIR) recovers",
    )
    group.add_argument(
        "--tst-fused-linear-loss",
        action="store_true",
        help="output layer and loss in one op: no [L, b, V/tp] logits",
    )
    return parser


def _number(text: str):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _numbers(text: str):
    values = tuple(_number(part) for part in text.split(","))
    return values if len(values) > 1 else values[0]


def _several(value) -> tuple:
    return () if value is None else tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _shown(value) -> str:
    return ",".join(map(str, _several(value)))


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
