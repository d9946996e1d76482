"""Packaging of megatron_tst: the C++/CUDA extension megatron_tst._C. Everything else is in
pyproject.toml.

The CPU kernels are built where torch and a C++ compiler are found, the CUDA kernels where a CUDA
toolkit of torch's CUDA version is found: the toolkit decides, not a visible GPU. What is missing is
left out and named, and the package works without it (torch kernels).

    MEGATRON_TST_SKIP_CUDA=1        CPU kernels alone
    MEGATRON_TST_SKIP_EXTENSION=1   no extension
    TORCH_CUDA_ARCH_LIST            GPUs to compile for; default: 8.0 9.0 10.0, as far as the
                                    toolkit goes, and PTX of the last

Build with `pip install --no-build-isolation`: the extension fits the torch that it was built with.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ARCHITECTURES = ("8.0", "9.0", "10.0")
CPU_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fopenmp",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
]


def main() -> None:
    extensions, summary = find_extension()
    print(f"megatron_tst: {summary}", file=sys.stderr)
    if not extensions:
        setup()
        return
    from torch.utils.cpp_extension import BuildExtension

    build = BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)
    setup(ext_modules=extensions, cmdclass={"build_ext": build})


def find_extension() -> tuple[list, str]:
    """What to build (nothing, or one extension), and one line that says what and why."""
    if os.environ.get("MEGATRON_TST_SKIP_EXTENSION") == "1":
        return [], "no extension: MEGATRON_TST_SKIP_EXTENSION=1."
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler.split()[0]):
        return [], (
            f"no extension, torch kernels alone: no C++ compiler ({compiler}). Install g++ or set "
            "CXX, and install again."
        )
    home = cuda_home()
    if home:  # torch takes the folder above nvcc's, wrong where that is a link or a wrapper
        os.environ["CUDA_HOME"] = str(home)
    try:
        import torch
        from torch.utils.cpp_extension import CppExtension, CUDAExtension
    except ImportError as error:
        return [], (
            f"no extension, torch kernels alone: {error} in the building environment. Install "
            "torch first, then `pip install --no-build-isolation` this package."
        )
    cpu = [
        "csrc/ops.cpp",
        "csrc/multi_hot_ce_cpu.cpp",
        "csrc/superposed_embedding_ops.cpp",
        "csrc/superposed_embedding_cpu.cpp",
    ]
    headers = [str(path) for path in sorted(Path("csrc").glob("*.h"))]
    without = why_no_cuda(torch, home)
    if without:
        extension = CppExtension(
            "megatron_tst._C",
            cpu,
            depends=headers,
            define_macros=[sources()],
            extra_compile_args=CPU_FLAGS,
            extra_link_args=["-fopenmp"],
        )
        return [extension], f"building the CPU kernels; no CUDA kernels: {without}"
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_architectures(home))
    extension = CUDAExtension(
        "megatron_tst._C",
        [*cpu, "csrc/multi_hot_ce.cu", "csrc/superposed_embedding.cu"],
        depends=headers,
        define_macros=[
            ("MHCE_WITH_CUDA", None),
            ("MHCE_CUDA_ARCHITECTURES", f'"{architectures}"'),
            sources(),
        ],
        extra_compile_args={
            "cxx": CPU_FLAGS,
            "nvcc": ["-O3", "-std=c++17", "--extended-lambda", "-Xptxas", "-v"],
        },
        extra_link_args=["-fopenmp"],
    )
    what = f"the CPU kernels and the CUDA kernels for {architectures} with {home}"
    return [extension], f"building {what}."


def sources() -> tuple[str, str]:
    """The macro that says of an extension which sources it was built of: tools/gpu_machine.py asks
    for it, so that nobody measures an old build.
    """
    text = b"".join(path.read_bytes() for path in sorted(Path("csrc").iterdir()))
    return "MHCE_SOURCES", f'"{hashlib.sha256(text).hexdigest()[:16]}"'


def cuda_home() -> Path | None:
    """The CUDA toolkit's folder: the one that holds nvcc and the headers."""
    found = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        found.append(str(Path(nvcc).resolve().parent.parent))
    for home in (Path(path) for path in [*found, "/usr/local/cuda"] if path):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def why_no_cuda(torch, home: Path | None) -> str | None:
    """The reason to leave the CUDA kernels out; None: build them."""
    if os.environ.get("MEGATRON_TST_SKIP_CUDA") == "1":
        return "MEGATRON_TST_SKIP_CUDA=1."
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA."
    if home is None:
        return "no CUDA toolkit (nvcc and headers) in CUDA_HOME, PATH or /usr/local/cuda."
    version = toolkit_version(home)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"the toolkit in {home} is CUDA {version}, torch's is {torch.version.cuda}. Set "
            "CUDA_HOME to one of the same major version."
        )
    return None


def toolkit_version(home: Path) -> str:
    return re.search(r"release (\d+\.\d+)", _nvcc(home, "--version"))[1]


def default_architectures(home: Path) -> str:
    known = _nvcc(home, "--list-gpu-arch")
    chosen = [arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known.split()]
    return " ".join(chosen) + "+PTX"


def _nvcc(home: Path, *arguments: str) -> str:
    return subprocess.run(
        [home / "bin/nvcc", *arguments], check=True, capture_output=True, text=True
    ).stdout


main()
