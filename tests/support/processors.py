"""Run the numeric tests as other processors would compute them, and say how much room each
tolerance has: make test-processors

    python tests/support/processors.py [PYTEST ARGUMENTS]

A row for each comparison (close.py): where it is, its tolerance, the largest difference, and how
often that fits into the tolerance. Exit code 1 where a test failed or the room is below 3.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SETTINGS = [
    {},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"MKL_CBWR": "COMPATIBLE"},
    {"MKL_CBWR": "AVX2"},
    {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    {"OMP_NUM_THREADS": "2"},
]
ROOM = 3


def main(arguments: list[str]) -> int:
    failed, largest = [], collections.defaultdict(lambda: (-1.0, ""))
    for setting in SETTINGS:
        name = " ".join(f"{key}={value}" for key, value in setting.items()) or "as it is"
        print(f"== {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "differences.jsonl"
            file.touch()
            command = [sys.executable, "-m", "pytest", "-q", "-m", "numeric and not slow"]
            command += ["-W", "ignore", "-n", "2", "--dist", "worksteal", *arguments]
            done = subprocess.run(command, env=os.environ | setting | {"DIFFERENCES": str(file)})
            failed += [name] * (done.returncode != 0)
            for row in map(json.loads, file.read_text().splitlines()):
                found = row["difference"], name
                place = row["where"], row["tolerance"]
                if not found[0] <= largest[place][0]:
                    largest[place] = found
    tight = False
    for (where, tolerance), (difference, name) in sorted(largest.items()):
        room = tolerance / difference if difference else float("inf")
        tight |= not room >= ROOM
        print(f"{where}: {difference:.1e} of {tolerance:.1e}, room {room:.1f} ({name})")
    print(f"failed: {failed or 'none'}")
    return int(bool(failed) or tight)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
