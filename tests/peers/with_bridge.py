"""megatron-tst as on a login node: Megatron-Bridge is there, no GPU is, and no shims of the tests:
python with_bridge.py VERB ...

Transformer Engine is stood in for (ask_bridge.py), which Bridge imports and does not use here.
"""

import sys

from ask_bridge import import_without_engine

from megatron_tst import cli

if __name__ == "__main__":
    import_without_engine()
    sys.exit(cli.main(sys.argv[1:]))
