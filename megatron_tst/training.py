"""How a script reaches TST: `prepare()` in its first lines, or `pretrain` in the place of
Megatron's. All else is in loop/.
"""

from megatron_tst.loop.entry import check, prepare, pretrain

__all__ = ["check", "prepare", "pretrain"]
