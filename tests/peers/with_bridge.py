"""megatron-tst where Megatron-Bridge is, and neither Transformer Engine nor a GPU: python
with_bridge.py VERB ...

Bridge imports what it does not use on CPU (ask_bridge.py's stand_in).
"""

import sys

from ask_bridge import on_cpu

from megatron_tst import cli

if __name__ == "__main__":
    on_cpu()
    sys.exit(cli.main(sys.argv[1:]))
