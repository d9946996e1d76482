"""How far the run of this process has come on its way through the package: whether its arguments
are checked, and whether it has entered our pretrain.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megatron_tst.config import TSTConfig
from megatron_tst.errors import refuse


@dataclass
class Entered:
    """The way of one run.

    Args:
        checked: Megatron's arguments that were checked last; once is enough.
        pretrain: whether our pretrain was reached.
    """

    checked: argparse.Namespace | None = None
    pretrain: bool = False

    def require_pretrain(self) -> None:
        """Megatron is being initialised: by now a run that asks for TST must have come through our
        pretrain.

        Raises:
            TSTError: it has not.
        """
        if self.checked is None or not TSTConfig.from_args(self.checked).enabled or self.pretrain:
            return
        refuse(
            "the --tst flags",
            "a script that calls the pretrain that megatron_tst gives it",
            "one that took megatron.training.pretrain before megatron_tst was there, or has a "
            "loop of its own",
            "Run it through `python -m megatron_tst.launch`, or call "
            "megatron_tst.training.prepare() before importing megatron.training.",
        )


here = Entered()  # the run of this process
