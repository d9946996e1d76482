"""TSTConfig and the command-line flags. What TST cannot work with is in checks/refusals.py, what a
resume may change in loop/resume.py.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
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
        kernel: of the superposed embedding and loss: "extension" (C++/CUDA), "torch", or "auto",
            the extension where it is there.
        kernel_in_recovery: the extension computes the training loss of the recovery phase too, in
            Megatron's place.
        fused_linear_loss: output layer and training loss in one op, in both phases: less memory, a
            third more work in the output layer.
        stock_index: a folder for Megatron's index files with which a stock run goes on after the
            boundary (data/stock_index.py).
        verify_load: read the checkpoint of --load through before the run starts, and refuse a
            damaged one (loop/resume.py).
        max_epochs: how often the run may read a corpus of its training data (checks/text.py).

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
    verify_load: bool = False
    max_epochs: float = 4

    def __post_init__(self):
        self._check_bag_sizes()
        self._check_lengths()
        for flag, value, allowed in (
            ("--tst-target-weighting", self.target_weighting, TARGET_WEIGHTINGS),
            ("--tst-superpose", self.superpose, SUPERPOSE),
            ("--tst-loss", self.loss, LOSSES + ABLATIONS),
            ("--tst-switch", self.switch, SWITCHES),
            ("--tst-kernel", self.kernel, KERNELS),
        ):
            if value not in allowed:
                refuse(flag, f"one of {', '.join(allowed)}", repr(value), "Choose one of these.")
        for flag, value, top, range_ in (
            ("--tst-switch-slope", self.switch_slope, sys.float_info.max, "a number > 0"),
            ("--tst-switch-window", self.switch_window, 0.1, "a number > 0, at most 0.1"),
            ("--tst-max-epochs", self.max_epochs, sys.float_info.max, "a number > 0"),
        ):
            if not (isinstance(value, (int, float)) and 0 < value <= top):
                refuse(flag, range_, value, "Leave it out for the default.")

    def _check_bag_sizes(self):
        for s in self.bag_sizes:
            if not _whole(s) or s < 1:
                do = "The paper found 4 to 8 robust; 1 switches TST off."
                refuse("--tst-bag-size", "a whole number >= 1", s, do)
        if len(self.bag_sizes) > 1 and min(self.bag_sizes) == 1:
            do = "The recovery phase follows by itself."
            refuse("--tst-bag-size", "bags of 2 and more in a list", _shown(self.bag_size), do)

    def _check_lengths(self):
        for r in _several(self.step_ratio):
            if not (isinstance(r, (int, float)) and 0 <= r < 1):
                do = "The paper found 0.2 to 0.4 robust; the rest of the run recovers."
                refuse("--tst-step-ratio", "a number in [0, 1)", r, do)
        for t1 in _several(self.iters):
            if not _whole(t1) or t1 < 0:
                do = "Give the number of superposed iterations."
                refuse("--tst-iters", "a whole number >= 0", t1, do)
        if self.step_ratio is not None and self.iters is not None:
            got = f"{_shown(self.step_ratio)} and {_shown(self.iters)}"
            refuse("--tst-step-ratio and --tst-iters", "one of the two", got, "Leave one out.")
        for flag, value in (("--tst-step-ratio", self.step_ratio), ("--tst-iters", self.iters)):
            if value is not None and len(_several(value)) != len(self.bag_sizes):
                expected = f"one for each of the bag sizes {_shown(self.bag_size)}"
                refuse(flag, expected, _shown(value), "Separate them by commas.")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> TSTConfig:
        """From Megatron's parsed arguments; flags that are absent take the defaults.

        Raises:
            TSTError: a value outside its range, or values that contradict each other.
        """
        defaults = cls._defaults()
        return cls(**{name: getattr(args, f"tst_{name}", defaults[name]) for name in defaults})

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

        Example: 30 % of 100 iterations are superposed, 8 samples each: 240 samples with bags of 6,
        and 560 of recovery. A ratio is rounded to whole iterations.

        >>> run = argparse.Namespace(train_iters=100, global_batch_size=8, seq_length=32)
        >>> run.train_samples = None
        >>> TSTConfig(6, step_ratio=0.3).schedule(run).samples
        (240, 560)
        >>> TSTConfig((16, 8), iters=(10, 20)).schedule(run).described
        'bag size 16 for 10 iterations, bag size 8 for 20 iterations, recovery for 70'

        Args:
            args: Megatron's validated arguments (global_batch_size, seq_length, train_iters or
                train_samples).

        Raises:
            TSTError: superposition leaves no iteration for recovery, or has none itself.
        """
        batch = args.global_batch_size
        samples = args.train_samples or args.train_iters * batch
        total = samples // batch
        lengths = _several(self.iters) or [round(r * total) for r in _several(self.step_ratio)]
        if sum(lengths) >= total > 0:
            do = "Recovery needs the rest: the paper uses 60 to 80 %."
            refuse("--tst-iters", f"fewer than the {total} training iterations", sum(lengths), do)
        if self.enabled and not all(lengths):
            do = "Raise it, or drop the --tst- flags."
            if self.iters:
                expected = "at least one iteration of each bag size"
                refuse("--tst-iters", expected, _shown(self.iters), do)
            expected = f"at least half an iteration of {total}"
            refuse("--tst-step-ratio", expected, _shown(self.step_ratio), do)
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
    parse_args). -> the parser
    """
    group = parser.add_argument_group("token superposition (TST)")
    d = TSTConfig._defaults()

    def add(name, help_, **more):
        group.add_argument(f"--tst-{name}", help=help_, **more)

    # Values are checked in TSTConfig: argparse would print Megatron's thousand lines of usage with
    # each mistake.
    add(
        "bag-size",
        "raw tokens a bag, s; 1 (default): everything stock. 16,8,4: one phase after the other",
        type=_numbers,
        default=d["bag_size"],
    )
    add(
        "step-ratio",
        "share of the iterations that are superposed, r, in [0, 1); one for each bag size",
        type=_numbers,
    )
    add("iters", "superposed iterations, instead of --tst-step-ratio", type=_numbers)
    add(
        "target-weighting",
        f"one of {', '.join(TARGET_WEIGHTINGS)}",
        default=d["target_weighting"],
    )
    add("superpose", f"one of {', '.join(SUPERPOSE)}", default=d["superpose"])
    add(
        "loss",
        f"one of {', '.join(LOSSES)}; ablations, worse than no TST in the paper: "
        f"{', '.join(ABLATIONS)}",
        default=d["loss"],
    )
    add(
        "exit-at-boundary",
        "save and exit after the last superposed iteration",
        action="store_true",
    )
    add(
        "switch",
        "fixed, or auto: as soon as the loss hardly falls, at the latest after --tst-iters",
        default=d["switch"],
    )
    add(
        "switch-slope",
        "auto: go on while the loss falls by so many nats over a hundredth of the run",
        type=_number,
        default=d["switch_slope"],
    )
    add(
        "switch-window",
        "auto: share of the run over which the loss is smoothed",
        type=_number,
        default=d["switch_window"],
    )
    add(
        "override",
        "on a resume: change bag sizes and lengths of what lies ahead",
        action="store_true",
    )
    add(
        "kernel",
        f"of the superposed embedding and loss, one of {', '.join(KERNELS)}",
        default=d["kernel"],
    )
    add(
        "kernel-in-recovery",
        "the extension's loss in the recovery phase too",
        action="store_true",
    )
    add(
        "stock-index",
        "write index files there with which stock Megatron (--data-cache-path DIR) recovers",
        metavar="DIR",
    )
    add(
        "max-epochs",
        "how often each corpus may be read; more is refused",
        type=_number,
        default=d["max_epochs"],
    )
    add(
        "fused-linear-loss",
        "output layer and loss in one op: no [L, b, V/tp] logits",
        action="store_true",
    )
    add(
        "verify-load",
        "hold the checkpoint of --load against its checksums and description first",
        action="store_true",
    )
    return parser


def check_spelling(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Refuse a --tst flag that there is not, or that has no value or one too many. argparse would
    say so after all of Megatron's usage.

    Args:
        parser: after add_tst_arguments.
        argv: the command line without the script.

    Raises:
        TSTError: with the flag, and the one that was probably meant.
    """
    ours = {
        flag: action
        for flag, action in parser._option_string_actions.items()
        if flag.startswith("--tst-")
    }
    for word, after in zip(argv, [*argv[1:], None]):
        name, equals, _ = word.partition("=")
        if not re.match(r"--?tst(?![a-z])", name, re.IGNORECASE):
            continue
        if name not in ours:
            meant = f"--{name.lstrip('-').lower().replace('_', '-')}"
            near = [flag for flag in ours if flag.startswith(meant) and meant != "--tst"]
            near = near or difflib.get_close_matches(meant, ours, n=1, cutoff=0.5)
            do = f"Did you mean {near[0]}?" if near else "`megatron-tst plan --help` lists them."
            refuse("the command line", "a flag of TST", name, do)
        value = after is not None and not re.match(r"-[^\d.]", after)
        if ours[name].nargs == 0 and (equals or value):
            got = word if equals else f"{word} {after}"
            refuse(name, "no value", got, "It is on where it is given: leave the value out.")
        if ours[name].nargs is None and not (equals or value):
            refuse(name, "a value", "none", f"Give one: {name} {ours[name].metavar or 'VALUE'}.")


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _numbers(text: str) -> int | float | str | tuple:
    values = tuple(_number(part) for part in text.split(","))
    return values if len(values) > 1 else values[0]


def _several(value) -> tuple:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _shown(value) -> str:
    return ",".join(map(str, _several(value)))


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
