"""A door to `megatron-tst corpus`, for scripts that name this file."""

import sys

from megatron_tst.cli import corpus


def main(argv: list[str] | None = None) -> int:
    return corpus.main(argv, "prepare_corpus.py")


if __name__ == "__main__":
    sys.exit(main())
