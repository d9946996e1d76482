"""TSTConfig, the command-line flags, and every refusal, in one place.

A refusal names the flag, what was expected, what was got and what to do, and comes before training starts.
"""

from __future__ import annotations

import argparse
import math
import os
import warnings
from dataclasses import dataclass

from megatron_tst import extension
from megatron_tst.extension import KERNELS
from megatron_tst.schedule import Schedule

TARGET_WEIGHTINGS = ("uniform", "power-law", "exponential", "first-token", "fitted-power-law")
SUPERPOSE = ("both", "input", "output")
LOSSES = ("mce", "mce-alt")
ROBUST_BAG_SIZES, LARGEST_BAG_SIZE, ROBUST_RATIOS = (4, 8), 16, (0.2, 0.4)  # paper, section 4 and tables 4 to 7


class TSTError(ValueError):
    """A mistake in how a run is set up; its text is one line for the user."""


def refuse(what: str, expected: str, got: object, do: str) -> None:
    raise TSTError(f"{what}: expected {expected}, got {got}. {do}")


@dataclass(frozen=True)
class TSTConfig:
    """What to superpose, for how long, and against which targets.

    Args:
        bag_size: s, raw tokens a bag; 1 leaves everything stock.
        step_ratio: r, share of the training iterations that are superposed, in [0, 1). One of this and `iters`.
        iters: T1, superposed iterations.
        target_weighting: weight of the places in the target bag, from its first token (paper, section 5).
        superpose: "both"; "input" (bags in, the next single token out); "output" (single tokens in, the next s tokens out).
        loss: "mce" or "mce-alt".
        exit_at_boundary: save and exit after the last superposed iteration.
        kernel: of the superposed loss: "extension" (C++/CUDA), "torch", or "auto", the extension where it is there.
        kernel_in_recovery: the extension computes the training loss of the recovery phase too, in Megatron's place.
        fused_linear_loss: output layer and training loss in one op, in both phases: less memory, a third more work in the output layer.
        stock_index: a folder for Megatron's index files with which a stock run goes on after the boundary (stock_index.py).

    Raises:
        TSTError: a value outside its range, or values that contradict each other.
    """

    bag_size: int = 1
    step_ratio: float | None = None
    iters: int | None = None
    target_weighting: str = "uniform"
    superpose: str = "both"
    loss: str = "mce"
    exit_at_boundary: bool = False
    kernel: str = "auto"
    kernel_in_recovery: bool = False
    fused_linear_loss: bool = False
    stock_index: str | None = None

    def __post_init__(self):
        s, r, t1 = self.bag_size, self.step_ratio, self.iters
        if not isinstance(s, int) or isinstance(s, bool) or s < 1:
            refuse("--tst-bag-size", "a whole number >= 1", s, "The paper found 4 to 8 robust; 1 switches TST off.")
        if r is not None and not (isinstance(r, (int, float)) and 0 <= r < 1):
            refuse("--tst-step-ratio", "a number in [0, 1)", r, "The paper found 0.2 to 0.4 robust; the rest of the run recovers.")
        if t1 is not None and (not isinstance(t1, int) or isinstance(t1, bool) or t1 < 0):
            refuse("--tst-iters", "a whole number >= 0", t1, "Give the number of superposed iterations.")
        if r is not None and t1 is not None:
            refuse("--tst-step-ratio and --tst-iters", "one of the two", f"{r} and {t1}", "Leave one out.")
        for flag, value, allowed in (
            ("--tst-target-weighting", self.target_weighting, TARGET_WEIGHTINGS),
            ("--tst-superpose", self.superpose, SUPERPOSE),
            ("--tst-loss", self.loss, LOSSES),
            ("--tst-kernel", self.kernel, KERNELS),
        ):
            if value not in allowed:
                refuse(flag, f"one of {', '.join(allowed)}", repr(value), "Choose one of these.")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> TSTConfig:
        """From Megatron's parsed arguments; flags that are absent take the defaults."""
        return cls(**{name: getattr(args, f"tst_{name}", default) for name, default in cls._defaults().items()})

    @classmethod
    def _defaults(cls) -> dict:
        return {name: field.default for name, field in cls.__dataclass_fields__.items()}

    @property
    def enabled(self) -> bool:
        """Whether any step is superposed."""
        return self.bag_size > 1 and bool(self.step_ratio or self.iters)

    def schedule(self, args: argparse.Namespace) -> Schedule:
        """Resolve the two phases for a run.

        Args:
            args: Megatron's validated arguments (global_batch_size, seq_length, train_iters or train_samples).
        """
        samples = args.train_samples or args.train_iters * args.global_batch_size
        total = samples // args.global_batch_size
        t1 = self.iters if self.iters is not None else round((self.step_ratio or 0) * total)
        if t1 >= total > 0:
            refuse(
                "--tst-iters",
                f"fewer than the {total} training iterations",
                t1,
                "Recovery needs the rest: the paper uses 60 to 80 %.",
            )
        if self.enabled and t1 == 0:
            refuse(
                "--tst-step-ratio", f"at least half an iteration of {total}", self.step_ratio, "Raise it, or drop the --tst- flags."
            )
        raw_per_position = 1 if self.superpose == "output" else self.bag_size
        return Schedule(self.bag_size, args.seq_length, args.global_batch_size, t1, samples, raw_per_position)


def add_tst_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the --tst-* flags in a group of their own (an extra_args_provider for Megatron's parse_args)."""
    group = parser.add_argument_group("token superposition (TST)")
    # Values are checked in TSTConfig: argparse would print Megatron's thousand lines of usage with each mistake.
    group.add_argument("--tst-bag-size", type=_number, default=1, help="raw tokens a bag, s; 1 (default): everything stock")
    group.add_argument("--tst-step-ratio", type=_number, help="share of the iterations that are superposed, r, in [0, 1)")
    group.add_argument("--tst-iters", type=_number, help="superposed iterations, instead of --tst-step-ratio")
    group.add_argument("--tst-target-weighting", default="uniform", help=f"one of {', '.join(TARGET_WEIGHTINGS)}")
    group.add_argument("--tst-superpose", default="both", help=f"one of {', '.join(SUPERPOSE)}")
    group.add_argument("--tst-loss", default="mce", help=f"one of {', '.join(LOSSES)}")
    group.add_argument("--tst-exit-at-boundary", action="store_true", help="save and exit after the last superposed iteration")
    group.add_argument("--tst-kernel", default="auto", help=f"of the superposed loss, one of {', '.join(KERNELS)}")
    group.add_argument("--tst-kernel-in-recovery", action="store_true", help="the extension's loss in the recovery phase too")
    group.add_argument(
        "--tst-stock-index",
        metavar="DIR",
        help="write index files there with which stock Megatron (--data-cache-path DIR) recovers",
    )
    group.add_argument(
        "--tst-fused-linear-loss", action="store_true", help="output layer and loss in one op: no [L, b, V/tp] logits"
    )
    return parser


def _number(text: str):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def check_arguments(config: TSTConfig, args: argparse.Namespace) -> None:
    """Refuse what cannot work with TST; warn outside the range that the paper found robust.

    Args:
        config: the TST settings.
        args: Megatron's arguments after its own validation.

    Raises:
        TSTError: with the flag, what was expected, what was got, what to do.
    """
    if config.bag_size == 1:
        if config.step_ratio or config.iters or config.exit_at_boundary or config.kernel_in_recovery or config.fused_linear_loss:
            _warn("--tst-bag-size is 1: the other --tst flags have no effect and the run is stock Megatron")
        return
    if config.step_ratio is None and config.iters is None:
        refuse("--tst-bag-size", "--tst-step-ratio or --tst-iters beside it", config.bag_size, "Say how long to superpose.")
    if not config.enabled:
        _warn("no iteration is superposed: the run is stock Megatron")
        return
    check_sequence_length(config, args)
    for what, bad, expected, got, do in _conflicts(args):
        if bad:
            refuse(f"{what} with TST", expected, got, do)
    for name in _NOT_WITH_FUSED_LINEAR_LOSS if config.fused_linear_loss else ():
        if getattr(args, name, None):
            flag = f"--{name.replace('_', '-')}"
            refuse(
                f"{flag} with --tst-fused-linear-loss",
                "unset",
                "set",
                "It needs the output layer's own forward. Drop one of the two.",
            )
    if config.exit_at_boundary and not getattr(args, "save", None):
        refuse("--tst-exit-at-boundary", "--save beside it", "none", "Without a checkpoint the superposition phase would be lost.")
    _check_kernel(config)
    schedule = config.schedule(args)
    ratio = schedule.superposition_samples / schedule.train_samples
    low, high = ROBUST_BAG_SIZES
    if not low <= config.bag_size <= high:
        _warn(f"bag size {config.bag_size}: the paper found {low} to {high} robust, and up to {LARGEST_BAG_SIZE} at 10B parameters")
    if getattr(args, "context_parallel_size", 1) > 1:
        _warn_of_unequal_ranks(args)
    if not ROBUST_RATIOS[0] - 0.005 <= ratio <= ROBUST_RATIOS[1] + 0.005:
        _warn(f"step ratio {ratio:.3f}: the paper found {ROBUST_RATIOS[0]} to {ROBUST_RATIOS[1]} robust")


def check_sequence_length(config: TSTConfig, args: argparse.Namespace) -> None:
    """Refuse a number of positions that the layout cannot cut into equal parts of whole bags; Megatron's arguments, validated or not.

    Raises:
        TSTError: with --seq-length and what it must be a multiple of.
    """
    length = getattr(args, "seq_length", None)
    if not config.enabled or not length:
        return
    cp, tp = getattr(args, "context_parallel_size", 1), getattr(args, "tensor_model_parallel_size", 1)
    tp = tp if getattr(args, "sequence_parallel", False) else 1
    two = 2 * cp if cp > 1 else 1  # each context-parallel rank holds two chunks
    multiple = math.lcm(two, cp * tp)
    if length % multiple:
        layout = [f"--context-parallel-size {cp}"] * (cp > 1) + [f"--tensor-model-parallel-size {tp} --sequence-parallel"] * (
            tp > 1
        )
        refuse(
            f"--seq-length with {' and '.join(layout)}",
            f"a multiple of {multiple}",
            length,
            "It counts positions (bags or tokens), which are spread evenly over the ranks. Change it or the layout.",
        )


# MuP scales logits between the output layer and the loss, multi-token prediction counts right guesses from them; the others take
# the output layer or its gradient elsewhere.
_NOT_WITH_FUSED_LINEAR_LOSS = (
    "use_mup", "mtp_num_layers", "defer_embedding_wgrad_compute", "overlap_moe_expert_parallel_comm", "use_megatron_fsdp", "use_torch_fsdp2",
)  # fmt: skip


def _warn_of_unequal_ranks(args):
    """Megatron averages each context-parallel rank's own positions and then the ranks: the same only where their numbers are."""
    per_token = getattr(args, "calculate_per_token_loss", False)
    if getattr(args, "eod_mask_loss", False) and not per_token:
        _warn(
            "--context-parallel-size with --eod-mask-loss: Megatron weighs a label by how many its rank has. "
            "Add --calculate-per-token-loss to weigh all alike"
        )
    if getattr(args, "mtp_num_layers", None):
        _warn(
            "--context-parallel-size with --mtp-num-layers: Megatron averages the heads' losses over each rank's own positions, so that "
            "the result hangs a little on the number of ranks, with and without TST"
        )


def _check_kernel(config):
    """Refuse kernels that are not there before training, not at the first loss."""
    device = "cpu" if os.environ.get("MEGATRON_TST_CPU") == "1" else "cuda"
    for flag, asked, kernel in (
        ("--tst-kernel extension", config.kernel == "extension", "extension"),
        ("--tst-kernel-in-recovery", config.kernel_in_recovery, "torch" if config.kernel == "torch" else "extension"),
    ):
        if not asked:
            continue
        try:
            if extension.choose(kernel, device) == "extension":
                continue
            got = "--tst-kernel torch"
        except ValueError:
            got = f"an extension that is {extension.load().description}"
        refuse(flag, f"the extension's {device} kernels", got, "Build the extension, or drop the flag.")


def _conflicts(args):
    """(what, whether it is asked for, expected, got, what to do) of everything in Megatron that TST does not work with."""

    def of(name, default=None):
        return getattr(args, name, default)

    one_document = (
        "Bags would mix documents that must not see each other. Drop the flag: TST packs documents as plain pre-training does."
    )
    constant = "The boundary is a number of samples of one batch size. Use a constant --global-batch-size."
    graph = of("cuda_graph_impl"), [str(getattr(x, "name", x)) for x in of("cuda_graph_scope") or []]
    fusion = of("cross_entropy_fusion_impl") if of("cross_entropy_loss_fusion") else None
    fused_linear = bool(of("fuse_linear_cross_entropy")) or fusion == "linear"
    yield "--sft", of("sft"), "plain pre-training data", "packed sequences", "Use TST for pre-training alone."
    for name in ("reset_position_ids", "reset_attention_mask", "dataloader_inter_document_masking"):
        yield f"--{name.replace('_', '-')}", of(name), "unset", "set", one_document
    yield "--rampup-batch-size", of("rampup_batch_size"), "none", of("rampup_batch_size"), constant
    yield "--step-batch-size-schedule", of("step_batch_size_schedule"), "none", of("step_batch_size_schedule"), constant
    yield "--decrease-batch-size-if-needed", of("decrease_batch_size_if_needed"), "unset", "set", constant
    yield (
        "cross-entropy fusion",
        fused_linear or fusion == "te",
        "a loss that goes through compute_language_model_loss with ordinary logits (fusion off, or 'native')",
        "fuse_linear_cross_entropy" if fused_linear else f"--cross-entropy-fusion-impl {fusion}",
        "It takes one label a position. Drop the fusion flag; the superposed loss has its own kernel.",
    )
    yield (
        "--cuda-graph-impl",
        graph[0] == "full_iteration" or "full_iteration" in graph[1],
        "none or a per-layer graph",
        "full_iteration",
        "The graph would be captured with the shapes of one phase. Use --cuda-graph-impl local or transformer_engine.",
    )
    yield (
        "--dataloader-type",
        of("dataloader_type", "single") not in (None, "single"),
        "single",
        of("dataloader_type"),
        "A sample's index says its phase, so samples must come in order. Use --dataloader-type single.",
    )
    yield (
        "label smoothing",
        of("label_smoothing"),
        "0",
        of("label_smoothing"),
        "It is defined for one label a position. Switch it off.",
    )
    yield "--hybrid-context-parallel", of("hybrid_context_parallel"), "unset", "set", "Use --context-parallel-size alone."
    yield "--fim-data", of("fim_data"), "unset", "set", "Fill-in-the-middle rearranges samples of ordinary length. Drop the flag."
    yield "--perform-rl-step", of("perform_rl_step"), "unset", "set", "Use TST for pre-training alone."
    yield "--logits-load-dir", of("logits_load_dir"), "none", of("logits_load_dir"), "Distillation needs one label a position."
    yield "ModelOpt", of("modelopt_enabled"), "off", "on", "Quantise or distil after recovery, without the --tst- flags."
    yield "--gtp-weight-remat-size", of("gtp_weight_remat_size", 1) > 1, "1", of("gtp_weight_remat_size"), "Not verified with bags."
    phases = of("phase_transition_iterations")
    yield "--phase-transition-iterations", phases, "none", phases, "The run has two phases already. Use --tst-exit-at-boundary."


# What must not change between a checkpoint and the run that resumes from it: the data order and the objective hang on it.
_KEPT = {
    "tst_bag_size": 1,
    "tst_superposition_samples": 0,
    "tst_recovery_samples": 0,
    "tst_superpose": "both",
    "tst_target_weighting": "uniform",
    "tst_loss": "mce",
    "seq_length": None,
}


def record_in_arguments(config: TSTConfig, schedule: Schedule, args: argparse.Namespace) -> None:
    """Put the resolved phases into Megatron's arguments, which every checkpoint stores whole."""
    args.tst_superposition_samples = schedule.superposition_samples
    args.tst_recovery_samples = schedule.recovery_samples


def check_resume(args: argparse.Namespace, checkpoint_args: argparse.Namespace) -> None:
    """Refuse to resume a run with TST settings that differ from its checkpoint's (not asked with --finetune).

    Raises:
        TSTError: naming the first setting that differs, its value in the checkpoint and in this run.
    """
    ours, theirs = (getattr(x, "tst_superposition_samples", 0) for x in (args, checkpoint_args))
    if not ours and not theirs:
        return
    if not theirs:
        refuse(
            "resuming with TST",
            "a checkpoint of a TST run",
            "one without TST settings",
            "Add --finetune to start TST from its weights, or drop the --tst- flags.",
        )
    if not ours:
        refuse(
            "resuming without TST",
            "the --tst- flags of the checkpoint's run",
            "none",
            f"Add --tst-bag-size {checkpoint_args.tst_bag_size} and the run's other --tst- flags, or --finetune to keep the weights alone.",
        )
    for name, default in _KEPT.items():
        value, stored = getattr(args, name, default), getattr(checkpoint_args, name, default)
        if value != stored:
            refuse(
                f"resuming with another {name}",
                f"{stored} as in the checkpoint",
                value,
                "The order of the data and the boundary hang on it. Give the flags of the first run (--train-iters and --global-batch-size too).",
            )
    ep, stored = (getattr(x, "expert_model_parallel_size", 1) for x in (args, checkpoint_args))
    if (ep == 1) != (stored == 1) and not getattr(args, "no_load_optim", False):
        refuse(
            "--expert-model-parallel-size with the optimizer's state",
            f"{'1' if stored == 1 else 'more than 1'}, as the checkpoint's {stored}",
            ep,
            "Megatron keeps the experts' optimizer apart only above 1. Keep to that side of 1, or add --no-load-optim.",
        )


def _warn(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(f"megatron_tst: {text}", stacklevel=3)
