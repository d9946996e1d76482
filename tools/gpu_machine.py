"""What tools/gpu_check.sh asks of the machine: what is there, which wheels are needed, whether an
extension fits, what ptxas said of the kernels.

    python tools/gpu_machine.py machine
    python tools/gpu_machine.py wheels DIR SITE
    python tools/gpu_machine.py extension [FILE]
    python tools/gpu_machine.py resources COMPILE_LOG JSON sm_90 sm_100

`machine` names versions and the GPU, whose capability is the last line. `wheels` installs into SITE
what DIR has and the machine lacks. `extension` says "fits: ..." of the package's extension, or of
the one in FILE, which it then puts into the package; else "does not fit: ..." and why, with exit
code 1 for a FILE. `resources` notes registers and spills of each kernel; exit code 1: one spills,
or is missing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- what is there


def machine() -> int:
    """Exit code 2 and one line: something without which nothing can be started."""
    try:
        import torch
    except ImportError as error:
        print(f"expected a Python with torch, got {sys.executable} ({error}). Set PYTHON.")
        return 2
    if not importlib.util.find_spec("megatron") or version("megatron-core") is None:
        print(
            "expected megatron-core, got none. Give a folder that has its wheel with --wheels, or "
            "install it."
        )
        return 2
    _say("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv")
    _say("nvcc", "--version", last=2)
    print("python", platform.python_version())
    print("torch", torch.__version__)
    for package in PACKAGES:
        print(package, version(package) or "not there")
    _say("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties("cuda")
        print(f"gpu {properties.name}, {properties.multi_processor_count} multiprocessors")
        print(f"L2 {properties.L2_cache_size >> 20} MB, {properties.total_memory >> 30} GB")
        print("capability {}.{}".format(*torch.cuda.get_device_capability()))
    return 0


def _say(*command: str, last: int = 0) -> None:
    try:
        said = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        print(*said[-last:], sep="\n")
    except OSError:
        print(f"no {command[0]}")


# --- wheels


def wheels(folder: str, site: str) -> int:
    """Exit code of pip, which gets the wheels whose package is not there."""
    files = sorted(Path(folder).glob("*.whl"))
    if not files:
        print(f"gpu_machine: error: expected wheels in {folder}, found none.")
        return 1
    lacking = [path for path in files if version(path.name.split("-")[0].replace("_", "-")) is None]
    print("there:", *(path.name for path in files if path not in lacking))
    print("installed:", *(path.name for path in lacking))
    if not lacking:
        return 0
    # into a folder of their own, then beside what is there: Transformer Engine's wheels share
    # folders, and pip would put those of a second call in the place of the first's
    with tempfile.TemporaryDirectory() as new:
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
        command += ["--no-compile", "--quiet", "--target", new, *map(str, lacking)]
        code = subprocess.run(command).returncode
        if code == 0:
            shutil.copytree(new, site, dirs_exist_ok=True)
    return code


# --- an extension that was built elsewhere


def extension(file: str | None = None) -> int:
    installed = ROOT / "megatron_tst" / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    path = Path(file) if file else installed
    if why := unfit(path):
        print(f"does not fit: {path}: {why}")
        return 1 if file else 0
    if file and path.resolve() != installed.resolve():
        part = installed.with_suffix(".part")  # beside, since a process may have it open
        shutil.copyfile(path, part)
        part.rename(installed)
    from megatron_tst import extension

    print(f"fits: {path}: {extension.load().description}")
    return 0


def unfit(path: Path) -> str | None:
    """Why this extension cannot be used with this torch on this GPU; None: it can."""
    import torch

    from megatron_tst import extension

    if not path.is_file():
        return "not there."
    tag = re.search(r"\.(cpython-\d+)", path.name)
    if tag and tag[1] not in sysconfig.get_config_var("EXT_SUFFIX"):
        return f"built for {tag[1]}, this is Python {platform.python_version()}."
    try:  # as megatron_tst._C, though it may lie elsewhere
        spec = importlib.util.spec_from_file_location("megatron_tst._C", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, AttributeError) as error:
        return f"cannot be loaded with torch {torch.__version__}: {error}"
    sys.modules["megatron_tst._C"] = module
    found = extension.load()
    if not found.loaded:
        return found.description
    if getattr(module, "sources", None) != sources():
        return "built of other sources than those in csrc. Build it again."
    if torch.cuda.is_available():
        own = "{}.{}".format(*torch.cuda.get_device_capability())
        if own not in re.findall(r"\d+\.\d+", module.cuda_architectures):
            return f"it holds {found.description}, this GPU is {own}."
    return None


def sources() -> str:
    """As setup.py writes it into what it builds."""
    text = b"".join(path.read_bytes() for path in sorted((ROOT / "csrc").iterdir()))
    return hashlib.sha256(text).hexdigest()[:16]


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
        re.search(r"(\w+(?:<[^()]*>)?)\(", name)
        for name in said.replace("(anonymous namespace)", "").splitlines()
    ]
    return [short[1] if short else name for short, name in zip(plain, names)]


def kernels() -> list[str]:
    """The names of the sources' kernels, without template arguments."""
    text = "".join(path.read_text() for path in sorted((ROOT / "csrc").glob("*.cu")))
    return re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(", text)


def faults(found: list[dict], architectures: list[str]) -> list[str]:
    """What is wrong with the build: kernels that are missing for an architecture, and those that
    spill.
    """
    there = {(kernel["architecture"], kernel["kernel"].partition("<")[0]) for kernel in found}
    missing = [
        f"{kernel} is not there for {arch}"
        for arch in architectures
        for kernel in kernels()
        if (arch, kernel) not in there
    ]
    spilling = [
        f"{kernel['kernel']} for {kernel['architecture']} uses memory for registers: {kernel}"
        for kernel in found
        if kernel["stack"] or kernel["spill_stores"] or kernel["spill_loads"]
    ]
    return missing + spilling


def resources(log: str, output: str, *architectures: str) -> int:
    found = kernels_in(Path(log).read_text(errors="replace"))
    wrong = faults(found, list(architectures))
    Path(output).write_text(json.dumps({"kernels": found, "faults": wrong}, indent=1) + "\n")
    for kernel in found:
        print(
            f"{kernel['architecture']:8} {kernel['registers']:4} registers "
            f"{kernel['spill_stores']:4} spilled  {kernel['kernel']}"
        )
    print(*wrong or [f"{len(found)} kernels for {' '.join(architectures)}, none spills"], sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    verbs = {"machine": machine, "wheels": wheels, "extension": extension, "resources": resources}
    sys.exit(verbs[sys.argv[1]](*sys.argv[2:]))
