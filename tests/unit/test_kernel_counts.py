"""tools/kernel_counts.py: what it reads in a listing, and that the kernels are as lean as claimed
(where nvcc is).
"""

import csv
import shutil

import kernel_counts
import pytest
from support.paths import ROOT

LISTING = """\
0000 MOV R1, c[0x0][0x28]
0010 LDG.E.EF.128 R4, desc[UR4][R2.64]
0020 LDG.E.EF.128 R8, desc[UR4][R2.64+0x1000]
0030 IADD3 R20, R20, 0x400, RZ
0040 MUFU.EX2 R9, R7
0050 LDG.E.EF.128 R12, desc[UR4][R2.64+0x2000]
0060 @P0 BRA 0x50
0070 ISETP.GT.AND P0, PT, R22, 0x1, PT
0080 @P1 BRA 0x10
0090 BRA 0xb0
00a0 EXIT""".splitlines()


def test_loops_and_loads_of_a_listing():
    assert kernel_counts.loops(LISTING) == [LISTING[5:7]]  # the outer one holds another
    assert kernel_counts.loops(LISTING[:6] + LISTING[7:]) == [LISTING[1:6] + LISTING[7:9]]
    assert kernel_counts.loads_in_flight(LISTING[1:6]) == 2
    assert kernel_counts.loads_in_flight(LISTING[3:5]) == 0


def test_faults_are_named():
    good = dict(kernel="row_gradients", dtype="bf16", arch="sm_90", spilled_bytes=0, blocks=8)
    good["instructions_an_element"] = 5.0
    assert kernel_counts.faults([good]) == []
    bad = [good | change for change in (
        dict(spilled_bytes=8), dict(instructions_an_element=5.01), dict(blocks=7)
    )]  # fmt: skip
    said = kernel_counts.faults(bad)
    assert [line.split("expected ")[1].split(",")[0] for line in said] == [
        "no spills",
        "at most 5.0 instructions an element",
        "8 blocks",
    ]


def test_predicted_times_by_hand():
    """1.2e9 logits in bf16: 2.49 GB read at 3.1 TB/s."""
    row = dict(dtype="bf16", arch="sm_90", blocks=8, instructions_outside=0)
    row |= dict(instructions_an_element=5.0, exponentials_an_element=1.0)
    rows = [row | dict(kernel=name) for name in kernel_counts.HOT_KERNELS]
    rows += [one | dict(arch="sm_100") for one in rows]
    first = kernel_counts.times(rows, vocabularies=(151936,))[0]
    assert first["memory_us"] == 803.0 and first["exponentials_us"] == 335.8
    assert first["instructions_us"] == 209.9
    # half a block's time at the end: 132 * 8 of 8192 blocks at once
    assert first["us"] == pytest.approx(803.0 * (1 + 132 * 8 / 8192 / 2), abs=0.1)


def test_bytes_of_the_embedding_by_hand():
    """Two positions of 40 places: one id 33 times (two windows), 47 others once."""
    moved = kernel_counts.embedding_bytes([33, 0, *[1] * 47], positions=2, columns=4, s=40)
    assert moved == {
        "pool": (48 * 8 + 2 * 8, 0, 80 * 8),
        "add_windows": (2 * 8, 2 * 47 * 16 + 2 * 16, 80 * 8),
        "add_across": (0, (2 + 2) * 16, 0),
    }


@pytest.mark.skipif(
    not shutil.which("nvcc") or kernel_counts.disassembler() is None,
    reason="NOT RUN: the kernels' machine code: no nvcc or no disassembler",
)
def test_the_kernels_have_no_faults():
    rows = [row for arch in kernel_counts.ARCHITECTURES for row in kernel_counts.counts(arch)]
    assert kernel_counts.faults(rows) == []
    hot = [row for row in rows if row["kernel"] in kernel_counts.HOT_KERNELS]
    assert len(hot) == 12 and all(row["loads_in_flight"] == 4 for row in hot)


def test_the_committed_table_has_no_faults():
    with open(ROOT / "benchmarks/data/kernel_counts.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.update(spilled_bytes=int(row["spilled_bytes"]), blocks=int(row["blocks"]))
        if row["instructions_an_element"]:
            row["instructions_an_element"] = float(row["instructions_an_element"])
    assert len(rows) >= 26 and kernel_counts.faults(rows) == []
