"""python -m support.stock_launch SCRIPT FLAGS: a Megatron script as it is, without TST. On CPU
through cpu.py's shims.
"""

import runpy
import sys

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    from megatron_tst import cpu

    cpu.enable_if_asked()
    import megatron.core.datasets.utils as utils

    utils.compile_helpers = lambda: None  # stock runs make; the helpers are built
    runpy.run_path(sys.argv[0], run_name="__main__")
