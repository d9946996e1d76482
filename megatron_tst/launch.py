"""Run an unmodified Megatron-LM script with TST.

    torchrun ... -m megatron_tst.launch path/to/pretrain_gpt.py <its flags> \\
        --tst-bag-size 6 --tst-step-ratio 0.3

instead of `torchrun ... path/to/pretrain_gpt.py <its flags>`. Works for pretrain_gpt.py and
pretrain_hybrid.py of 0.18 to 0.20, and for any script that calls megatron.training.pretrain.
Without --tst- flags the script runs as it is.
"""

from __future__ import annotations

import os
import runpy
import sys

from megatron_tst import training


def main(argv: list[str]) -> None:
    """Run the script argv[0] with the arguments argv[1:]. Ends the process with exit code 2 where
    it is no file.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0 if argv else 2)
    script = argv[0]
    if not os.path.isfile(script):
        print(
            "megatron_tst: error: launch: expected the path of a Megatron script, got "
            f"{script!r}, which is no file.",
            file=sys.stderr,
        )
        sys.exit(2)
    # what `python script` does, so that its checkout's megatron and its neighbours are found first;
    # nothing of megatron_tst is found by it
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    sys.argv = argv
    training.prepare()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
