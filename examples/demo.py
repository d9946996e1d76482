"""A door to `megatron-tst demo`, for scripts that name this file."""

import sys

from megatron_tst.cli import demo


def main(argv: list[str] | None = None) -> int:
    return demo.main(argv, "demo.py")


if __name__ == "__main__":
    sys.exit(main())
