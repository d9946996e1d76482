"""Whether a run's numbers fit its parallel layout, before a GPU or Megatron is there to say so. No
torch.

Megatron's own rules are asked one by one here, so that all that is wrong is said at once (it stops
at the first, at some only in the first step). Those of TST and of FP8 are asked of
checks/refusals.py and checks/precision.py. checks/dry_run.py has Megatron itself check a command.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator

from megatron_tst.checks import refusals
from megatron_tst.checks.precision import check_precision, recipe_of
from megatron_tst.config import TSTConfig
from megatron_tst.errors import TSTError


@dataclasses.dataclass(frozen=True)
class Check:
    """One rule and its outcome.

    Args:
        what: the flag that it is about.
        rule: what it asks, with the numbers.
        fault: "", or the sentence for the user: what, expected, got, what to do.
    """

    what: str
    rule: str
    fault: str = ""


def checks(
    args: argparse.Namespace, config: TSTConfig, capability: tuple[int, int], cuda: str
) -> tuple[list[Check], list[str]]:
    """Every rule with its outcome, and TST's warnings.

    Args:
        args: Megatron's names, completed as its validation does; `gpus` is the number of processes.
        config: the TST settings.
        capability, cuda: of the GPUs that the run is for.
    """
    found = list(_of_megatron(args))
    # What follows from the machine or from the other flags is not the plan's to refuse:
    # kernels, folders.
    config = dataclasses.replace(
        config, kernel="auto", kernel_in_recovery=False, exit_at_boundary=False
    )
    in_16_bit = copy.copy(args)
    in_16_bit.fp8 = in_16_bit.fp4 = None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        rule = (
            "all that checks/refusals.py asks, --seq-length (even over CP and, with "
            "--sequence-parallel, TP) first"
        )
        found.append(_asked("TST", rule, lambda: refusals.check_arguments(config, in_16_bit)))
        if (recipe := recipe_of(args)) and not any(
            check.fault for check in found
        ):  # shapes of a layout that divides
            rule = (
                f"sm_{capability[0]}{capability[1]}, CUDA {cuda} (assumed) and the shapes of a "
                f"rank, as checks/precision.py asks"
            )
            found.append(
                _asked(recipe, rule, lambda: check_precision(config, args, (capability, cuda)))
            )
    return found, [str(warning.message).removeprefix("megatron_tst: ") for warning in warned]


def _of_megatron(args) -> Iterator[Check]:
    """The rules of megatron-core 0.19 (training/arguments.py, transformer_config.py,
    parallel_state.py, moe_layer.py).
    """
    tp, pp, cp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    ep, etp, heads = (
        args.expert_model_parallel_size,
        args.expert_tensor_parallel_size,
        args.num_attention_heads,
    )
    change = "Change one of them."
    yield _divides("--gpus", args.gpus, {"TP": tp, "PP": pp, "CP": cp}, change)
    dp = max(1, args.gpus // (tp * pp * cp))
    yield _divides(
        "--global-batch-size",
        args.global_batch_size,
        {"micro-batch": args.micro_batch_size, "DP": dp},
        change,
    )
    yield _divides("--num-layers", args.num_layers, {"PP": pp}, change)
    yield _divides("--num-attention-heads", heads, {"TP": tp}, change)
    if (groups := args.num_query_groups) != heads:
        yield _divides("--num-attention-heads", heads, {"query groups": groups}, change)
        rule = f"a multiple or a divisor of TP = {tp}"
        fault = (
            f"--num-query-groups: expected {rule}, got {groups}. {change}"
            if groups % tp and tp % groups
            else ""
        )
        yield Check(f"--num-query-groups {groups}", rule, fault)
    if not args.num_experts:
        yield _divides("--ffn-hidden-size", args.ffn_hidden_size, {"TP": tp}, change)
        if ep > 1:
            fault = (
                f"--expert-model-parallel-size: expected 1 without --num-experts, got {ep}. "
                f"Leave it out."
            )
            yield Check("--expert-model-parallel-size", "1 without --num-experts", fault)
        return
    yield _divides("--num-experts", args.num_experts, {"EP": ep}, change)
    yield _divides("--moe-ffn-hidden-size", args.moe_ffn_hidden_size, {"expert TP": etp}, change)
    yield _divides("--gpus", args.gpus, {"EP": ep, "expert TP": etp, "PP": pp}, change)
    if tp > 1:
        fault = (
            "--sequence-parallel: expected it beside experts and TP, got none. Add it: "
            "Megatron stops in the first step without it."
        )
        yield Check(
            "--sequence-parallel",
            "set, with experts and TP",
            "" if args.sequence_parallel else fault,
        )


def _divides(what: str, value: int, parts: dict[str, int], do: str) -> Check:
    divisor = math.prod(parts.values())
    names = " x ".join(parts)
    numbers = " x ".join(map(str, parts.values())) + (f" = {divisor}" if len(parts) > 1 else "")
    fault = (
        f"{what}: expected a multiple of {names} = {numbers}, got {value}. {do}"
        if value % divisor
        else ""
    )
    return Check(f"{what} {value}", f"a multiple of {names} = {numbers}", fault)


def _asked(what: str, rule: str, ask: Callable[[], None]) -> Check:
    try:
        ask()
    except TSTError as error:
        return Check(what, rule, str(error))
    return Check(what, rule)
