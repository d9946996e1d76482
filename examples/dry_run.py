"""A door to megatron_tst/checks/dry_run.py: validate a training command without GPUs."""

import sys

from megatron_tst.checks.dry_run import main

if __name__ == "__main__":
    sys.exit(main())
