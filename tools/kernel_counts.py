"""What can be said of the CUDA kernels without a GPU: counts, read in their machine code, and the
times that follow from counts and assumed rates. No figure here was measured.

    python tools/kernel_counts.py [--csv FILE] [--times FILE] [--embedding FILE]

Needs nvcc and a disassembler: cuobjdump of the CUDA toolkit, or the one in triton's wheel.

Counts, of each kernel that reads all logits: registers, spilled bytes, blocks that a multiprocessor
holds, and of the hot loop instructions and exponentials an element and the 16-byte loads of one
thread before the first is used. The hot loop is the innermost one with the most exponentials.
instructions_outside counts all the others once, slow paths too: more than a block runs.

Of the embedding's kernels: registers (the most of any type), spilled bytes and blocks.

Times of the loss: the largest of what memory, exponentials and instructions need at the rates of
RATES, half a block's time for the end of a kernel, where multiprocessors run out of blocks, 2 us
for each kernel that is started, and 3 us for the work of each of the three that look at rows.
share_of_copy is what benchmarks/bench_multi_hot_ce.py calls so.

Times of the embedding, at Zipf-distributed ids: the larger of what the bytes to memory and those to
L2 need, each distinct row of the table read once from memory. `apart_us` is their sum: if the two
did not overlap at all.

Exit code 1: a kernel spills, takes more than 5 instructions an element, or leaves room for fewer
than 8 blocks. 2: no compiler or disassembler.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("90", "100")
HOT_KERNELS = ("softmax_sums", "row_gradients")
KERNELS = (*HOT_KERNELS, "row_statistics", "row_losses", "label_gradients")
MOST_INSTRUCTIONS, FEWEST_BLOCKS = 5.0, 8
BLOCK = 256  # threads, multi_hot_ce.cu
# of a multiprocessor, sm_90 and sm_100 alike: CUDA C++ programming guide, compute capabilities
REGISTERS, REGISTER_UNIT, THREADS = 65536, 8, 2048
EXPONENTIALS, INSTRUCTIONS = 16, 128  # a clock
LAUNCH_US = 2.0
ROWS_US = 3.0  # three loads that wait for each other, all rows at once
SORT_US = 40.0  # of 131072 keys of 32 bits, assumed
EMBEDDING = {"pool": 256, "write_keys": 256, "add_windows": 128, "add_across": 128}  # threads
WINDOW = 32  # sorted places, superposed_embedding.h


@dataclass(frozen=True)
class Rates:
    """Assumed for one GPU: clock in GHz; reading, copying (bytes read and written) and reading from
    L2 in TB/s.
    """

    arch: str
    multiprocessors: int
    ghz: float
    read: float
    copy: float
    l2: float


RATES = {
    "H100": Rates("90", 132, 1.755, 3.1, 2.95, 5.5),
    "B200": Rates("100", 148, 1.9, 7.3, 7.0, 10.0),
}
_TYPES = {"BFloat16": "bf16", "Half": "fp16"}
_LANES = {"fp32": 4, "bf16": 8, "fp16": 8}  # of a 16-byte load


def disassembler() -> str | None:
    """cuobjdump: on PATH, or triton's."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(path) if path.exists() else None


def compile_kernels(source: str, arch: str, folder: Path, *flags: str) -> tuple[Path, str]:
    """-> the machine code, and what ptxas says of it."""
    import torch

    output = folder / f"{source}_{arch}.cubin"
    include = Path(torch.__file__).parent / "include"
    done = subprocess.run(
        [
            *("nvcc", "-O3", "-std=c++17", "--extended-lambda", "-Xptxas", "-v", "-cubin"),
            *(f"-arch=sm_{arch}", f"-I{include}", *flags),
            *(str(ROOT / "csrc" / f"{source}.cu"), "-o", str(output)),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return output, done.stderr


def listings(cubin: Path) -> dict[str, list[str]]:
    """kernel's symbol -> its instructions, each "address text"."""
    text = subprocess.run(
        [disassembler(), "-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    found, lines = {}, None
    for line in text.splitlines():
        if match := re.search(r"Function : (\w+)", line):
            lines = found.setdefault(match[1], [])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            lines.append(f"{match[1]} {match[2]}")
    return found


def loops(listing: list[str]) -> list[list[str]]:
    """The innermost loops: from the target of a branch backwards to the branch."""
    address = [int(line.split()[0], 16) for line in listing]
    spans = []
    for end, line in enumerate(listing):
        match = re.search(r"\bBRA(?:\.\w+)* .*?(0x[0-9a-f]+)", line)
        target = int(match[1], 16) if match else None
        if target is not None and target < address[end]:
            spans.append((address.index(target), end))
    inner = [
        (a, b) for a, b in spans if not any(a <= c and d < b and (a, b) != (c, d) for c, d in spans)
    ]
    return [listing[a : b + 1] for a, b in inner]


def _count(loop: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in loop)


def loads_in_flight(loop: list[str]) -> int:
    """16-byte loads before an instruction uses what one of them brings."""
    pending, count = set(), 0
    for line in loop:
        registers = [int(number) for number in re.findall(r"\bR(\d+)", line)]
        if re.search(r"\bLDG\.\S*128", line):
            pending.update(range(registers[0], registers[0] + 4))
            count += 1
        elif pending & set(registers):
            break
    return count


def counts(arch: str) -> list[dict]:
    """A row for each kernel of the loss in each dtype, and for each of the embedding."""
    rows = []
    listing, said = _compiled("multi_hot_ce", arch)
    for symbol, registers, spilled in said:
        kernel = next(name for name in KERNELS if name in symbol)
        dtype = next((_TYPES[t] for t in ("BFloat16", "Half") if t in symbol), "fp32")
        row = _row(arch, kernel, dtype, registers, spilled, BLOCK)
        if kernel in HOT_KERNELS:
            hot = max(loops(listing[symbol]), key=lambda loop: _count(loop, r"MUFU\.EX2"))
            elements = _LANES[dtype] * _count(hot, r"LDG\.\S*128")
            row |= {
                "instructions_an_element": round(len(hot) / elements, 2),
                "exponentials_an_element": round(_count(hot, r"MUFU\.EX2") / elements, 3),
                "loads_in_flight": loads_in_flight(hot),
                "instructions_outside": len(listing[symbol]) - len(hot),
            }
        rows.append(row)
    _, said = _compiled("superposed_embedding", arch)
    for kernel, threads in EMBEDDING.items():
        mine = [(registers, spilled) for symbol, registers, spilled in said if kernel in symbol]
        most, spilled = max(r for r, _ in mine), sum(s for _, s in mine)
        rows.append(_row(arch, kernel, "all", most, spilled, threads))
    return sorted(rows, key=lambda row: (row["kernel"], row["dtype"]))


def _compiled(source, arch):
    """-> listings, and of each kernel (symbol, registers, spilled bytes)"""
    with tempfile.TemporaryDirectory() as folder:
        cubin, said = compile_kernels(source, arch, Path(folder))
        listing = listings(cubin)
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used "
        r"(\d+) registers",
        said,
        re.S,
    )
    return listing, [(name, int(used), int(a) + int(b)) for name, a, b, used in found]


def _row(arch, kernel, dtype, registers, spilled, threads):
    of_warp = -(-registers // REGISTER_UNIT) * REGISTER_UNIT * 32
    return {
        "kernel": kernel,
        "dtype": dtype,
        "arch": f"sm_{arch}",
        "registers": registers,
        "spilled_bytes": spilled,
        "blocks": min(THREADS // threads, REGISTERS // (of_warp * threads // 32)),
        "instructions_an_element": "",
        "exponentials_an_element": "",
        "loads_in_flight": "",
        "instructions_outside": "",
    }


def faults(rows: list[dict]) -> list[str]:
    """What is not as it should be, a sentence each."""
    found = []
    for row in rows:
        what = f"{row['kernel']} {row['dtype']} {row['arch']}"
        if row["spilled_bytes"]:
            found.append(f"{what}: expected no spills, got {row['spilled_bytes']} bytes.")
        if row["kernel"] in HOT_KERNELS and row["instructions_an_element"] > MOST_INSTRUCTIONS:
            found.append(
                f"{what}: expected at most {MOST_INSTRUCTIONS} instructions an element, got "
                f"{row['instructions_an_element']}."
            )
        if row["kernel"] in HOT_KERNELS and row["blocks"] < FEWEST_BLOCKS:
            found.append(f"{what}: expected {FEWEST_BLOCKS} blocks, got {row['blocks']}.")
    return found


def times(rows: list[dict], n: int = 8192, vocabularies=(151936, 18992)) -> list[dict]:
    """Predicted times of the loss in bf16, one process's share of the vocabulary at a time."""
    predicted = []
    for gpu, rate in RATES.items():
        hot = {
            row["kernel"]: row
            for row in rows
            if (row["arch"], row["dtype"]) == (f"sm_{rate.arch}", "bf16")
        }
        for v in vocabularies:
            read_us = n * v * 2 / rate.read / 1e6
            copy_us = n * v * 4 / rate.copy / 1e6
            passes = {
                "softmax_sums": _pass(hot["softmax_sums"], read_us, n, v, rate),
                "row_gradients": _pass(hot["row_gradients"], copy_us, n, v, rate),
            }
            for kernel, row in passes.items():
                predicted.append({"gpu": gpu, "N": n, "V": v, "kernel": kernel, **row})
            # two kernels in `statistics`, one in `loss`, two in `gradient`
            whole = sum(row["us"] for row in passes.values()) + 5 * LAUNCH_US + 3 * ROWS_US
            predicted.append(
                {
                    "gpu": gpu,
                    "N": n,
                    "V": v,
                    "kernel": "whole op",
                    **dict.fromkeys(("memory_us", "exponentials_us", "instructions_us"), ""),
                    "us": round(whole, 1),
                    "share_of_copy": round(1.5 * copy_us / whole, 3),
                }
            )
    return predicted


def _pass(row, memory_us, n, v, rate):
    clocks = rate.multiprocessors * rate.ghz * 1e3  # of all multiprocessors in a us
    exponentials = n * v * row["exponentials_an_element"] / EXPONENTIALS / clocks
    each = v * row["instructions_an_element"] + BLOCK * row["instructions_outside"]
    instructions = n * each / INSTRUCTIONS / clocks
    bound = max(memory_us, exponentials, instructions)
    end = bound * rate.multiprocessors * row["blocks"] / n / 2
    return {
        "memory_us": round(memory_us, 1),
        "exponentials_us": round(exponentials, 1),
        "instructions_us": round(instructions, 1),
        "us": round(bound + end, 1),
        "share_of_copy": round(memory_us / (bound + end), 3),
    }


def embedding_times(
    positions: int = 8192, columns: int = 4096, s: int = 16, v: int = 128256
) -> list[dict]:
    """Predicted times of the superposed embedding in bf16 into fp32 main_grad, tp = 1."""
    import torch

    generator = torch.Generator().manual_seed(0)
    frequency = 1 / torch.arange(1, v + 1, dtype=torch.float64)
    places = positions * s
    ids = torch.multinomial(frequency, places, replacement=True, generator=generator)
    moved = embedding_bytes(ids.bincount().tolist(), positions, columns, s)
    rows = []
    for gpu, rate in RATES.items():
        steps = []
        for step, (read, copied, l2) in moved.items():
            memory_us, l2_us = read / rate.read / 1e6 + copied / rate.copy / 1e6, l2 / rate.l2 / 1e6
            steps.append((step, memory_us, l2_us, LAUNCH_US * (2 if step != "pool" else 1)))
        for step, memory_us, l2_us, launch in steps:
            rows.append(_embedding_row(gpu, step, memory_us, l2_us, launch))
        rows.append(_embedding_row(gpu, "keys and sort", 0.0, 0.0, SORT_US))
        whole = [row for row in rows if row["gpu"] == gpu]
        total = {
            name: round(sum(row[name] for row in whole), 1) for name in whole[0] if "us" in name
        }
        rows.append({"gpu": gpu, "step": "forward and backward"} | total)
    return rows


def embedding_bytes(
    run_lengths: list[int], positions: int, columns: int, s: int
) -> dict[str, tuple[float, float, float]]:
    """step -> bytes read from memory, bytes read and written there, bytes from L2.

    Args:
        run_lengths: how often each id occurs, in the order of ids; zeros do not matter.
    """
    distinct = across = partials = start = 0
    for length in filter(None, run_lengths):
        windows = (start + length - 1) // WINDOW - start // WINDOW + 1
        distinct, start = distinct + 1, start + length
        if windows > 1:
            across, partials = across + 1, partials + windows
    row16, row32 = 2 * columns, 4 * columns
    places = positions * s
    return {
        # each distinct row once, and the result
        "pool": (distinct * row16 + positions * row16, 0, places * row16),
        # the gradient once; rows of main_grad and partial sums
        "add_windows": (
            positions * row16,
            2 * (distinct - across) * row32 + partials * row32,
            places * row16,
        ),
        "add_across": (0, (partials + 2 * across) * row32, 0),
    }


def _embedding_row(gpu, step, memory_us, l2_us, launch_us):
    return {
        "gpu": gpu,
        "step": step,
        "memory_us": round(memory_us, 1),
        "l2_us": round(l2_us, 1),
        "us": round(max(memory_us, l2_us) + launch_us, 1),
        "apart_us": round(memory_us + l2_us + launch_us, 1),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, help="write the counts there")
    parser.add_argument("--times", type=Path, help="write the loss's predicted times there")
    parser.add_argument("--embedding", type=Path, help="write the embedding's there")
    options = parser.parse_args(argv)
    if not shutil.which("nvcc") or disassembler() is None:
        print(
            "kernel_counts: error: expected nvcc and cuobjdump (of the CUDA toolkit or of "
            "triton's wheel), did not find both.",
            file=sys.stderr,
        )
        return 2
    rows = [row for arch in ARCHITECTURES for row in counts(arch)]
    predicted = times(rows)
    tables = (
        (options.csv, rows),
        (options.times, predicted),
        (options.embedding, embedding_times()),
    )
    for path, table in tables:
        if path:
            _write(path, table)
        _print(table)
    wrong = faults(rows)
    print(*wrong or ["No fault."], sep="\n")
    return 1 if wrong else 0


def _write(path, rows):
    part = path.with_name(path.name + ".part")
    with open(part, "w", newline="") as out:
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.rename(path)


def _print(rows):
    for line in [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]:
        print("| " + " | ".join(map(str, line)) + " |")
    print()


if __name__ == "__main__":
    sys.exit(main())
