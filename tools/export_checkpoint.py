"""A door to `megatron-tst` export-hf, export-nemo, import-hf and quantize, for launch scripts that
name this file.
"""

import sys

from megatron_tst.cli import dispatch

VERBS = {"hf": "export-hf", "nemo": "export-nemo", "import-hf": "import-hf", "quantize": "quantize"}


def main(argv: list[str] | None = None) -> int:
    return dispatch("export_checkpoint.py", VERBS, argv)


if __name__ == "__main__":
    sys.exit(main())
