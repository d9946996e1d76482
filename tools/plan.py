"""A door to `megatron-tst plan`, with its options."""

import sys

from megatron_tst.cli.plan import main

if __name__ == "__main__":
    sys.exit(main(prog="plan.py"))
