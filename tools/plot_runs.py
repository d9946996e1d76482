"""A door to `megatron-tst plot`, for scripts that name this file."""

import sys

from megatron_tst.cli import plot


def main(argv: list[str] | None = None) -> int:
    return plot.main(argv, "plot_runs.py")


if __name__ == "__main__":
    sys.exit(main())
