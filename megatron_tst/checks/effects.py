"""--tst flags that would have no effect. Each is refused: a run that ignores what it was asked for
looks like one that does it.

A flag counts as given where its value is not the default, since the default asks for nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from megatron_tst.config import TSTConfig
from megatron_tst.errors import refuse


@dataclass(frozen=True)
class Need:
    """What a flag has no effect without.

    Args:
        expected: in the words of the message.
        got: what there is in its place, as text.
        met: whether it is there, by the TST settings and Megatron's arguments.
    """

    expected: str
    got: Callable[[TSTConfig, argparse.Namespace], object]
    met: Callable[[TSTConfig, argparse.Namespace], bool]


def _bag_size(config):
    return ",".join(map(str, config.bag_sizes))


_BAGS = Need(
    "--tst-bag-size of 2 or more beside it",
    lambda config, args: _bag_size(config),
    lambda config, args: max(config.bag_sizes) > 1,
)
_AUTO = Need(
    "--tst-switch auto beside it",
    lambda config, args: config.switch,
    lambda config, args: config.switch == "auto",
)
_BAGS_OUT = Need(
    "--tst-superpose both or output: with single tokens out the loss is Megatron's",
    lambda config, args: config.superpose,
    lambda config, args: config.superpose != "input",
)
_LOGITS = Need(
    "no --tst-fused-linear-loss, which computes recovery's loss too",
    lambda config, args: "both",
    lambda config, args: not config.fused_linear_loss,
)
_LOAD = Need(
    "--load beside it, without --finetune",
    lambda config, args: "--finetune" if getattr(args, "finetune", False) else "none",
    lambda config, args: bool(getattr(args, "load", None)) and not getattr(args, "finetune", False),
)
_WEIGHTS = Need(
    "--load beside it",
    lambda config, args: "none",
    lambda config, args: bool(getattr(args, "load", None)),
)
_TEXT = Need(
    "a corpus",
    lambda config, args: "--mock-data",
    lambda config, args: not getattr(args, "mock_data", False),
)
# of every field of TSTConfig but bag_size; what is looked at first comes first
NEEDS: dict[str, tuple[Need, ...]] = {
    "step_ratio": (_BAGS,),
    "iters": (_BAGS,),
    "target_weighting": (_BAGS, _BAGS_OUT),
    "superpose": (_BAGS,),
    "loss": (_BAGS, _BAGS_OUT),
    "exit_at_boundary": (_BAGS,),
    "switch": (_BAGS,),
    "switch_slope": (_BAGS, _AUTO),
    "switch_window": (_BAGS, _AUTO),
    "override": (_BAGS, _LOAD),
    "kernel": (_BAGS,),  # of the embedding with bags in, of the loss with bags out
    "kernel_in_recovery": (_BAGS, _LOGITS),
    "fused_linear_loss": (_BAGS,),
    "stock_index": (_BAGS, _TEXT),
    "max_epochs": (_BAGS, _TEXT),
    "verify_load": (_WEIGHTS,),
}


def check_effects(config: TSTConfig, args: argparse.Namespace) -> None:
    """Refuse a --tst flag without effect.

    Args:
        config: the TST settings.
        args: Megatron's arguments, validated or not.

    Raises:
        TSTError: with the first such flag, what it needs, and what there is.
    """
    defaults = TSTConfig()
    for name, needs in NEEDS.items():
        if getattr(config, name) == getattr(defaults, name):
            continue
        for need in needs:
            if not need.met(config, args):
                do = "It would have no effect: drop one of the two."
                if need is _BAGS:
                    do = "The run would be stock Megatron: add it, or drop the --tst- flags."
                flag = f"--tst-{name.replace('_', '-')}"
                refuse(flag, need.expected, need.got(config, args), do)
    lengths = config.iters if config.iters is not None else config.step_ratio
    if lengths is not None and not config.enabled:
        flag = "--tst-iters" if config.iters is not None else "--tst-step-ratio"
        do = "No iteration would be superposed: raise it, or drop the --tst- flags."
        refuse(flag, "more than 0", lengths, do)
