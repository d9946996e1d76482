"""A door to `megatron-tst doctor`, with its options, that opens where nothing is installed yet."""

import importlib.util
import sys
from pathlib import Path

if __name__ == "__main__":
    package = Path(__file__).resolve().parent.parent / "megatron_tst"
    spec = importlib.util.spec_from_file_location("megatron_tst", package / "__init__.py")
    sys.modules["megatron_tst"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["megatron_tst"])
    from megatron_tst.cli.doctor import main

    sys.exit(main(prog="doctor.py"))
