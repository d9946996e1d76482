"""python stock_launch.py SCRIPT FLAGS: a Megatron script as it is, without TST. On CPU through
cpu.py's shims.
"""

import os
import runpy
import sys

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(
        0, os.path.dirname(os.path.abspath(sys.argv[0]))
    )  # a checkout's Megatron comes before an installed one
    from megatron_tst import cpu

    cpu.enable_if_asked()
    import megatron.core.datasets.utils

    megatron.core.datasets.utils.compile_helpers = lambda: (
        None
    )  # stock runs make; the helpers are built
    runpy.run_path(sys.argv[0], run_name="__main__")
