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
import warnings
from collections.abc import Callable, Iterator

from megatron_tst.checks import pipeline, refusals
from megatron_tst.checks.precision import check_precision, recipe_of
from megatron_tst.config import TSTConfig
from megatron_tst.errors import TSTError
from megatron_tst.model_size import blocks


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
    for row in pipeline.rules(args):
        yield Check(*row)
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
    if getattr(args, "multi_latent_attention", False):
        rule = "none with --multi-latent-attention"
        fault = f"--group-query-attention: expected {rule}, got it. Leave it out."
        yield Check("--group-query-attention", rule, fault if args.group_query_attention else "")
    if blocks(args)[0].dense:
        yield _divides("--ffn-hidden-size", args.ffn_hidden_size, {"TP": tp}, change)
    if not args.num_experts:
        if ep > 1:
            fault = (
                f"--expert-model-parallel-size: expected 1 without --num-experts, got {ep}. "
                f"Leave it out."
            )
            yield Check("--expert-model-parallel-size", "1 without --num-experts", fault)
        return
    yield _divides("--num-experts", args.num_experts, {"EP": ep}, change)
    if shared := getattr(args, "moe_shared_expert_intermediate_size", None):
        what = "--moe-shared-expert-intermediate-size"
        yield _divides(what, shared, {"TP": tp}, change)
    yield from _of_groups(args, change)
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


def _of_groups(args, change) -> Iterator[Check]:
    """A router that first chooses groups of experts (moe_utils.py, group_limited_topk)."""
    if not (chosen := getattr(args, "moe_router_group_topk", None)):
        return
    groups, what = getattr(args, "moe_router_num_groups", None), "--moe-router-group-topk"
    fault = f"{what}: expected --moe-router-num-groups beside it, got none. Add it."
    yield Check(what, "--moe-router-num-groups beside it", "" if groups else fault)
    if groups:
        rule = f"at most --moe-router-num-groups = {groups}"
        fault = f"{what}: expected {rule}, got {chosen}. Lower it."
        yield Check(f"{what} {chosen}", rule, fault if chosen > groups else "")
        yield _divides("--num-experts", args.num_experts, {"router groups": groups}, change)
    # of each chosen group so many experts make its score; none of them is no score
    parts = {"groups of a token": chosen}
    yield _divides("--moe-router-topk", args.moe_router_topk, parts, change)


def _divides(what: str, value: int, parts: dict[str, int], do: str) -> Check:
    return Check(*pipeline.divides(what, value, parts, do))


def _asked(what: str, rule: str, ask: Callable[[], None]) -> Check:
    try:
        ask()
    except TSTError as error:
        return Check(what, rule, str(error))
    return Check(what, rule)
