"""A door to `megatron-tst` inspect, boundary and verify, for launch scripts that name this file."""

import sys

from megatron_tst.cli import dispatch

VERBS = {"inspect": "inspect", "boundary": "boundary", "verify": "verify"}


def main(argv: list[str] | None = None) -> int:
    return dispatch("convert_checkpoint.py", VERBS, argv)


if __name__ == "__main__":
    sys.exit(main())
