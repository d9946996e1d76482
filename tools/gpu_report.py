"""What tools/gpu_check.sh asks of Python: which wheels are needed, what ptxas said of the kernels,
and OUT/report.md.

    python tools/gpu_report.py versions
    python tools/gpu_report.py wheels DIR SITE
    python tools/gpu_report.py resources COMPILE_LOG JSON sm_90 sm_100
    python tools/gpu_report.py report OUT

`wheels` installs into SITE what DIR has and the machine lacks. `resources` notes registers and
spills of each kernel; exit code 1: one spills, or is missing. `report` reads the files of all parts
that have run, on whatever machine.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = (
    "megatron-core",
    "transformer-engine",
    "transformer-engine-torch",
    "liger-kernel",
    "triton",
    "pytest",
    "hypothesis",
    "tokenizers",
)
PARTS = ("build", "test", "bench", "fp8", "train")
_TYPES = ("float", "c10::BFloat16", "c10::Half")
KERNELS = [
    "row_losses",
    *(
        f"{name}<{of}>"
        for name in ("softmax_sums", "row_statistics", "row_gradients")
        for of in _TYPES
    ),
]  # multi_hot_ce.cu


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> int:
    for package in PACKAGES:
        print(package, version(package) or "not there")
    return 0


def wheels(folder: str, site: str) -> int:
    """Exit code of pip, which gets the wheels whose package is not there."""
    files = sorted(Path(folder).glob("*.whl"))
    if not files:
        print(f"gpu_report: error: expected wheels in {folder}, found none.")
        return 1
    lacking = [path for path in files if version(path.name.split("-")[0].replace("_", "-")) is None]
    print("there:", *(path.name for path in files if path not in lacking))
    print("installed:", *(path.name for path in lacking))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--quiet",
        "--target",
        site,
    ]
    return subprocess.run([*command, *map(str, lacking)]).returncode if lacking else 0


# --- what ptxas -v says

_ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill "
    r"stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.S,
)


def kernels_in(log: str) -> list[dict]:
    """Of a compile log: each kernel's name, architecture, registers, and bytes of stack frame and
    spills.
    """
    found = [match.groups() for match in _ENTRY.finditer(log)]
    names = _demangled([entry[0] for entry in found])
    return [
        {
            "kernel": name,
            "architecture": arch,
            "registers": int(registers),
            "stack": int(stack),
            "spill_stores": int(stores),
            "spill_loads": int(loads),
        }
        for name, (_, arch, stack, stores, loads, registers) in zip(names, found)
    ]


def _demangled(names: list[str]) -> list[str]:
    """Without namespace and arguments, as "row_gradients<float>"."""
    if not names or not shutil.which("c++filt"):
        return names
    said = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    plain = [
        re.search(r"(\w+(?:<[\w:]+>)?)\(", name)
        for name in said.replace("(anonymous namespace)", "").splitlines()
    ]
    return [short[1] if short else name for short, name in zip(plain, names)]


def faults(kernels: list[dict], architectures: list[str]) -> list[str]:
    """What is wrong with the build: kernels that are missing for an architecture, and those that
    spill.
    """
    missing = [
        f"{kernel} is not there for {arch}"
        for arch in architectures
        for kernel in KERNELS
        if not any((found["architecture"], found["kernel"]) == (arch, kernel) for found in kernels)
    ]
    spilling = [
        f"{found['kernel']} for {found['architecture']} uses memory for registers: {found}"
        for found in kernels
        if found["stack"] or found["spill_stores"] or found["spill_loads"]
    ]
    return missing + spilling


def resources(log: str, output: str, *architectures: str) -> int:
    kernels = kernels_in(Path(log).read_text(errors="replace"))
    wrong = faults(kernels, list(architectures))
    Path(output).write_text(json.dumps({"kernels": kernels, "faults": wrong}, indent=1) + "\n")
    for found in kernels:
        print(
            f"{found['architecture']:8} {found['registers']:4} registers "
            f"{found['spill_stores']:4} spilled  {found['kernel']}"
        )
    print(
        *wrong or [f"{len(kernels)} kernels for {' '.join(architectures)}, none spills"], sep="\n"
    )
    return 1 if wrong else 0


# --- the report


def report(folder: str) -> int:
    """Write FOLDER/report.md beside and rename it."""
    out = Path(folder)
    text = "\n\n".join(
        section for section in (_head(out), _targets(out), _steps(out), *_tables(out)) if section
    )
    (out / "report.md.part").write_text(text + "\n")
    (out / "report.md.part").rename(out / "report.md")
    return 0


def _head(out: Path) -> str:
    machine = out / "machine.log"
    return (
        f"# GPU check\n\n```\n{machine.read_text().strip()}\n```"
        if machine.exists()
        else "# GPU check"
    )


def _targets(out: Path) -> str:
    """Each figure that the project wants, what was measured, and whether that is enough."""
    rows = [(what, want, *_judged(value, enough)) for what, want, value, enough in targets(out)]
    return "## Targets\n\n" + _markdown(["what", "wanted", "measured", ""], rows)


def _judged(value, enough):
    return ("-", "NOT RUN") if value is None else (value, "yes" if enough(value) else "**no**")


def targets(out: Path) -> list[tuple]:
    """(what, wanted, measured or None, whether that is enough) from the files in OUT."""
    loss = [
        row
        for row in _csv(out / "multi_hot_ce.csv")
        if (row["N"], row["V"], row["dtype"]) == ("8192", "151936", "bf16")
    ]

    def of(variant: str, s: str, column: str = "ms"):
        """The last measurement's."""
        return next(
            (
                float(row[column])
                for row in reversed(loss)
                if row["s"] == s and row["variant"].startswith(variant)
            ),
            None,
        )

    def ratio(a, b):
        return round(a / b, 3) if a and b else None

    ours = of("ours, in place", "16") or of("ours", "16")
    steps = {(row["model"], row["precision"]): row for row in _csv(out / "step.csv")}
    small = steps.get(("270m", "bfloat16"))
    fp8 = _json(out / "fp8" / "fp8.json")
    worst = [
        max(end["distance"] for end in row.values()) if row else float("nan")
        for row in (fp8 or {}).get("recipes", {}).values()
    ]
    codes = _codes(out)
    sanitizers = [codes.get(f"sanitizer_{tool}") for tool in ("memcheck", "racecheck", "synccheck")]
    spills = _json(out / "resources.json")

    def at_least(least):
        return lambda value: value >= least

    def at_most(most):
        return lambda value: value <= most

    return [
        (
            "kernels that spill registers",
            "0",
            len(spills["faults"]) if spills else None,
            at_most(0),
        ),
        ("tests on the GPU, exit code", "0", codes.get("test_gpu"), at_most(0)),
        (
            "two tensor-parallel ranks on the GPU, training, exit code",
            "0",
            codes.get("test_tp2_training"),
            at_most(0),
        ),
        (
            "compute-sanitizer, sum of exit codes",
            "0",
            None if None in sanitizers else sum(sanitizers),
            at_most(0),
        ),
        (
            "loss: share of copy bandwidth, N 8192, V 151936, s 16, bf16",
            ">= 0.85",
            of("ours, in place", "16", "share_of_copy"),
            at_least(0.85),
        ),
        (
            "loss: time at s = 16 over s = 1",
            "<= 1.1",
            ratio(ours, of("ours, in place", "1")),
            at_most(1.1),
        ),
        (
            "loss: Transformer Engine's time for one label over ours for 16",
            ">= 1.5",
            ratio(of("te, single", "16"), ours),
            at_least(1.5),
        ),
        (
            "loss: the paper's loop, compiled, over ours, s 16",
            ">= 3",
            ratio(of("paper's loop, compiled", "16"), ours),
            at_least(3),
        ),
        (
            "step: superposed over ordinary, 270M, bf16",
            "<= 1.02",
            float(small["time_ratio"]) if small else None,
            at_most(1.02),
        ),
        (
            "step: raw tokens/s superposed over ordinary, 270M, s 6",
            ">= 5.88",
            ratio(
                float(small["superposed_raw_tokens_per_s"]), float(small["ordinary_tokens_per_s"])
            )
            if small
            else None,
            at_least(6 / 1.02),
        ),
        (
            "FP8: largest distance of a loss from bf16's, either phase",
            "<= 0.01",
            round(max(worst), 5) if worst else None,
            at_most(0.01),
        ),
    ]


def _codes(out: Path) -> dict[str, int]:
    """The last exit code of each step."""
    return {row["step"]: row["code"] for row in _lines(out / "steps.jsonl")}


def _steps(out: Path) -> str:
    last = {(row["part"], row["step"]): row for row in _lines(out / "steps.jsonl")}
    rows = [
        (part, step, "ok" if row["code"] == 0 else f"**FAILED ({row['code']})**", row["seconds"])
        for (part, step), row in last.items()
    ]
    missing = [
        (part, "", "NOT RUN", "") for part in PARTS if part not in {part for part, _ in last}
    ]
    return "## Steps\n\n" + _markdown(["part", "step", "", "seconds"], rows + missing)


def _tables(out: Path) -> list[str]:
    sections = []
    if found := _json(out / "resources.json"):
        rows = [list(kernel.values()) for kernel in found["kernels"]]
        sections.append(
            "## Kernels\n\n"
            + _markdown(
                ["kernel", "architecture", "registers", "stack", "spill stores", "spill loads"],
                rows,
            )
        )
    if found := _json(out / "fp8" / "fp8.json"):
        rows = [
            (recipe, *[f"{end['loss']:.4f} ({end['distance']:.3%})" for end in row.values()])
            if row
            else (recipe, "FAILED", "FAILED")
            for recipe, row in found["recipes"].items()
        ]
        head = (
            f"Mean loss of the last {found['last']} of {found['iterations']} steps (distance "
            f"from {found['reference']})"
        )
        sections.append(
            f"## FP8\n\n{head}\n\n" + _markdown(["recipe", "superposition", "recovery"], rows)
        )
    for path in sorted(out.glob("*.csv")):
        rows = _csv(path)
        sections.append(
            f"## {path.name}\n\n" + _markdown(list(rows[0]), [list(row.values()) for row in rows])
        )
    sections += [
        f"![{path.stem}]({path.relative_to(out)})"
        for path in sorted([*out.glob("*.png"), *out.glob("demo/*/*.png")])
    ]
    return sections


def _markdown(head: list[str], rows: list) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _csv(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open())) if path.exists() else []


def _json(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    verbs = {"versions": versions, "wheels": wheels, "resources": resources, "report": report}
    sys.exit(verbs[sys.argv[1]](*sys.argv[2:]))
