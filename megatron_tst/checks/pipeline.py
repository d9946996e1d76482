"""Which layers a pipeline stage has, and whether the flags that say so fit. No torch.

Megatron's rules: training/arguments.py, core/transformer/pipeline_parallel_layer_layout.py and
transformer_config.py; core/pipeline_parallel/schedules.py for the interleaved schedule.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator

_MOST = 1 << 18  # letters that repeating makes; more are no layers of a model
_CHANGE = "Change one of them."


def stages(layout: str) -> list[str]:
    """The stages of --pipeline-model-parallel-layout in the order of the layers, virtual ones too:
    "E" the embedding, "t" a decoder layer, "m" one of multi-token prediction, "L" the loss.

    Args:
        layout: as "Et*3|(tt|)*29,mL": commas say nothing, x*n and (...)*n repeat.
    """
    text, left = layout.replace(",", ""), _MOST

    def repeated(match):
        nonlocal left
        count = min(int(match[2][:9]), left // len(match[1]))
        left -= count * len(match[1])
        return match[1] * count

    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, repeated, text)
    return text.split("|")


def rules(args: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """(what, rule, fault or "") of each rule about layers and stages; layout.Check's.

    Args:
        args: Megatron's names, completed.
    """
    pp = args.pipeline_model_parallel_size
    if layout := getattr(args, "pipeline_model_parallel_layout", None):
        yield from _of_layout(layout, args)
        virtual = max(1, len(stages(layout)) // pp)
    elif "|" in (pattern := getattr(args, "hybrid_layer_pattern", None) or ""):
        segments = pattern.split("/")[0].count("|") + 1
        yield divides("--hybrid-layer-pattern: segments", segments, {"PP": pp})
        virtual = max(1, segments // pp)
    else:
        virtual = getattr(args, "num_virtual_stages_per_pipeline_rank", None) or 1
        yield from _of_counts(args, virtual)
    each = getattr(args, "num_layers_per_virtual_pipeline_stage", None)
    if virtual > 1 or each:
        yield from _interleaved(args)


def _of_layout(layout, args) -> Iterator[tuple[str, str, str]]:
    found, what = stages(layout), "--pipeline-model-parallel-layout"
    flat, mtp = "".join(found), getattr(args, "mtp_num_layers", None) or 0
    if others := sorted(set(flat) - set("EtmL")):
        yield _said(what, "E, t, m, L and | alone", " ".join(others))
        return
    yield divides(f"{what}: stages", len(found), {"PP": args.pipeline_model_parallel_size})
    ends = flat[:1] == "E" and flat[-1:] == "L" and flat.count("E") == flat.count("L") == 1
    yield _said(what, "one E at its start and one L at its end", "" if ends else layout)
    for letter, name, count in (("t", "--num-layers", args.num_layers), ("m", "MTP layers", mtp)):
        got = flat.count(letter)
        rule = f"as many {letter} as {name} = {count}"
        yield _said(what, rule, "" if got == count else f"{got} in {layout}")
    if mtp:
        behind = flat.rfind("t") < flat.find("m")
        together = sum("m" in stage for stage in found) == 1
        last = all("m" not in stage for stage in found[: -args.pipeline_model_parallel_size])
        rule = "m behind all t, in one stage, which is the last virtual one of its rank"
        yield _said(what, rule, "" if behind and together and last else layout)


def _said(what, rule, got) -> tuple[str, str, str]:
    return what, rule, f"{what}: expected {rule}, got {got}. Correct it." if got else ""


def _of_counts(args, virtual) -> Iterator[tuple[str, str, str]]:
    """The same number of layers in each stage, but for the first and the last."""

    def of(name):
        return getattr(args, name, None)

    pp, count = args.pipeline_model_parallel_size, args.num_layers
    for place in ("embedding", "loss"):
        count += bool(of(f"account_for_{place}_in_pipeline_split"))
    ends = {
        f"--decoder-{place}-pipeline-num-layers": value
        for place in ("first", "last")
        if (value := of(f"decoder_{place}_pipeline_num_layers"))
    }
    parts = {"PP": pp - len(ends)} if ends else {"PP": pp}
    if ends:
        parts = {f"(PP - {len(ends)})": pp - len(ends)}
    if each := of("num_layers_per_virtual_pipeline_stage"):
        parts["layers of a virtual stage"] = each
    elif virtual > 1:
        parts["VPP"] = virtual
    rest = count - sum(ends.values())
    what = "--num-layers" if rest == args.num_layers else "--num-layers of the other stages"
    others = pp - len(ends)
    if ends and (rest < others or (others <= 0 and rest)):
        rule = f"of {args.num_layers} layers some for each other stage, and none without one"
        got = f"{rest} for {max(0, others)}"
        yield ", ".join(ends), rule, f"{', '.join(ends)}: expected {rule}, got {got}. {_CHANGE}"
    elif not ends or pp > len(ends):
        yield divides(what, rest, parts)
    if virtual > 1:
        for flag, value in ends.items():
            yield divides(flag, value, {"VPP": virtual})


def _interleaved(args) -> Iterator[tuple[str, str, str]]:
    pp = args.pipeline_model_parallel_size
    what, rule = "--pipeline-model-parallel-size", "2 or more, with virtual stages"
    yield what, rule, "" if pp > 1 else f"{what}: expected {rule}, got {pp}. Raise it."
    parts = pp * args.tensor_model_parallel_size * args.context_parallel_size
    share = max(1, args.gpus // parts) * args.micro_batch_size
    if args.global_batch_size % share == 0:
        name = "micro-batches of a rank, with virtual stages"
        yield divides(name, args.global_batch_size // share, {"PP": pp})


def divides(
    what: str, value: int, parts: dict[str, int], do: str = _CHANGE
) -> tuple[str, str, str]:
    """The rule that a number is a multiple of others' product.

    Args:
        what: the flag that has the value.
        value: the number.
        parts: the others by their names.
        do: what the user can do.
    """
    divisor = math.prod(parts.values())
    names = " x ".join(parts)
    numbers = " x ".join(map(str, parts.values())) + (f" = {divisor}" if len(parts) > 1 else "")
    rule = f"a multiple of {names} = {numbers}"
    fault = f"{what}: expected {rule}, got {value}. {do}" if value % divisor else ""
    return f"{what} {value}", rule, fault
