"""python -m megatron_tst VERB ...: the same as megatron-tst VERB ..."""

import sys

from megatron_tst.cli import main

if __name__ == "__main__":
    sys.exit(main())
