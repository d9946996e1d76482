"""CUDA on the CPU: compiles csrc/*.cu with the C++ compiler and runs the kernels thread by thread.
README.md says how it works and how a kernel is added.

    kernels = build("multi_hot_ce")
    gpu = Gpu(kernels, seed=3)
    logits = gpu.input(logits)
    out = gpu.output((n, v), torch.bfloat16)
    gpu.call("gradient_bfloat16", logits, logits.stride(0), ..., out, out.stride(0))
    gradient = gpu.result(out)
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from support.paths import ROOT

HERE = Path(__file__).resolve().parent
CSRC = Path(os.environ.get("CUDA_ON_CPU_CSRC", ROOT / "csrc"))
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-O2", "-g1", "-std=c++17", "-fPIC", "-fno-tree-vectorize", "-fno-store-merging", "-w"]
# of the kernels: every access calls emulator.cpp
WATCHED = ["-fsanitize=thread", "-U_FORTIFY_SOURCE"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
KEPT = 7 * 24 * 3600  # seconds, of what was compiled and is not used

NOT_RUN = None if shutil.which(COMPILER.split()[0]) else f"NOT RUN: no C++ compiler ({COMPILER})"


class Fault(AssertionError):
    """What a kernel did that a GPU would not forgive, with the lines of csrc that led there."""


# ---- the text pass

LAUNCH = re.compile(r"([\w:]+(?:<[^<>;]*(?:<[^<>;]*>[^<>;]*)*>)?)\s*<<<(.*?)>>>\s*\(", re.S)
SHARED = re.compile(
    r"__shared__\s+(?:(?:alignas|__align__)\((\w+)\)\s+)?([^;\[\]]+?)\s+(\w+)((?:\[[^\]]+\])*);"
)
DYNAMIC = re.compile(
    r"extern\s+__shared__\s+(?:(?:alignas|__align__)\(\w+\)\s+)?([^;\[\]]+?)\s+(\w+)\[\];"
)
ASM = re.compile(
    r'\basm(?:\s+volatile)?\s*\(\s*((?:"[^"]*"\s*)+):([^:;]*)(?::([^:;]*))?(?::[^;]*)?\);'
)


def translate(text: str, constants: Mapping[str, int] = {}) -> str:
    """A file of csrc as C++ that includes emulator.h and ptx.h. Lines stay where they are.

    Args:
        constants: values for `constexpr TYPE NAME = ...;`.
    """
    for name, value in constants.items():
        text, count = re.subn(rf"(constexpr \w+ {name} = )[^;]+;", rf"\g<1>{value};", text)
        assert count <= 1, f"{name} is defined {count} times"
    text = re.sub(r"defined\((__CUDACC__|__CUDA_ARCH__)\)", "1", text)
    text = DYNAMIC.sub(r"auto* \2 = ::cuda_on_cpu::dynamic_shared<\1>();", text)
    text = SHARED.sub(_shared_array, text)
    text = ASM.sub(_ptx_call, text)
    text = LAUNCH.sub(r'::cuda_on_cpu::kernel("\1", \1, \2)(', text)
    return '#include "ptx.h"\n#line 1\n' + text


def _shared_array(match: re.Match) -> str:
    alignment, type_, name, extents = match.groups()
    alignment = alignment or f"alignof({type_})"
    return f"auto& {name} = ::cuda_on_cpu::shared_array<{type_}{extents}>(__LINE__, {alignment});"


def _ptx_call(match: re.Match) -> str:
    """ptx.h says what becomes of an asm."""
    quoted, outputs, inputs = match.groups()
    text = "".join(re.findall(r'"([^"]*)"', quoted)).strip("{} ")
    operands = re.findall(r'"[^"]*"\s*\(((?:[^()]|\([^()]*\))*)\)', f"{outputs},{inputs or ''}")
    names = [part.split()[0] for part in text.split(";") if part.strip()]
    name = "_".join(n for n in names if not n.startswith(".reg")).replace(".", "_")
    order = dict.fromkeys(int(number) for number in re.findall(r"%(\d+)", text))
    lines = "\n" * match[0].count("\n")
    return f"ptx::{name}({', '.join(operands[i] for i in order)});{lines}"


# ---- the build


def build(
    name: str,
    constants: tuple[tuple[str, int], ...] = (),
    defines: tuple[str, ...] = (),
    csrc: Path = CSRC,
    exports: Path | None = None,
    sanitized: bool | None = None,
) -> ctypes.CDLL:
    """The functions that NAME.cpp of this folder exports, which includes csrc/NAME.cu.

    What is compiled is kept in a temporary folder, under a name made of all that went into it, for
    all processes and later sessions.

    Args:
        constants: (name, value) for constants of csrc/NAME.cu.
        defines: names that are defined before it.
        csrc: the folder, or another with NAME.cu.
        exports: a file in place of NAME.cpp.
        sanitized: with AddressSanitizer and UndefinedBehaviorSanitizer in place of the emulator's
            checks of each access, as these two cannot be together. None: if the environment has
            SANITIZE_CUDA_ON_CPU=1.
    """
    if sanitized is None:
        sanitized = os.environ.get("SANITIZE_CUDA_ON_CPU") == "1"
    sources = {path.name: path.read_text() for path in sorted(csrc.glob("*.h"))}
    sources[f"{name}.cu"] = (csrc / f"{name}.cu").read_text()
    found = [c for c, _ in constants if f" {c} = " in sources[f"{name}.cu"]]
    assert len(found) == len(constants), f"expected constants {constants} in csrc/{name}.cu"
    sources = {file: translate(text, dict(constants)) for file, text in sources.items()}
    exports = exports or HERE / f"{name}.cpp"
    sources["exports.cpp"] = exports.read_text()
    return _library(tuple(sources.items()), defines, sanitized)


@functools.cache
def _library(
    sources: tuple[tuple[str, str], ...], defines: tuple[str, ...], sanitized: bool
) -> ctypes.CDLL:
    flags = FLAGS + (SANITIZED if sanitized else [])
    watched = flags + ([] if sanitized else WATCHED) + [f"-D{name}" for name in defines]
    own = [*sorted(HERE.rglob("*.h")), HERE / "emulator.cpp"]
    version = subprocess.run([*COMPILER.split(), "--version"], capture_output=True).stdout
    parts = [*sources, *((path.name, path.read_text()) for path in own), version]
    parts += [watched, torch.__version__]
    folder = _cache() / hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "kernels.so").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for file, text in sources:
                (folder / file).write_text(text)
            _compile(folder, watched, flags)
        os.utime(folder)
    library = ctypes.CDLL(str(folder / "kernels.so"))
    library.cuda_on_cpu_error.restype = ctypes.c_char_p
    return library


def _compile(folder: Path, watched: list[str], flags: list[str]) -> None:
    include = Path(torch.__file__).parent / "include"
    folders = [f"-I{folder}", f"-I{HERE}", f"-isystem{include}"]
    folders += [f"-isystem{sysconfig.get_paths()['include']}"]
    compiler = COMPILER.split()
    jobs = [
        [*compiler, *watched, *folders, "-c", "exports.cpp", "-o", "kernels.o"],
        [*compiler, *flags, *folders, "-c", str(HERE / "emulator.cpp"), "-o", "emulator.o"],
    ]
    running = [subprocess.Popen(job, cwd=folder, stderr=subprocess.PIPE, text=True) for job in jobs]
    errors = [process.communicate()[1] for process in running]
    assert not any(process.returncode for process in running), "\n".join(errors)[-4000:]
    # without -fsanitize=thread: emulator.cpp has the functions of that library
    link = [*compiler, "-shared", *flags, "kernels.o", "emulator.o", "-ldl", "-o", "linked.so"]
    subprocess.run(link, cwd=folder, check=True)
    os.replace(folder / "linked.so", folder / "kernels.so")


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"megatron_tst-cuda-on-cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} is another user's"
    for path in folder.iterdir():
        if path.is_dir() and time.time() - path.stat().st_mtime > KEPT:
            shutil.rmtree(path, ignore_errors=True)
    return folder


# ---- a device

# Bits that memory has before a kernel writes: a signalling NaN, an integer that is no index.
POISON = {
    torch.bfloat16: 0x7FA5,
    torch.float16: 0x7DA5,
    torch.float32: 0x7FA5A5A5,
    torch.int32: 0x7FA5A5A5,
    torch.int64: 0x7FA5A5A5A5A5A5A5,
}
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
MARGIN = 64  # bytes before and behind a tensor that must stay as they are


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers, so that NaNs are equal to themselves."""
    return tensor.view(BITS[tensor.element_size()])


class Gpu:
    """Memory that kernels see, and calls of them. One is in use at a time.

    Args:
        kernels: of `build`.
        seed: of the order in which threads run.
        exp_seed: of the errors of the GPU's exp, up to 2 ulp; 0: it rounds to nearest.
    """

    def __init__(self, kernels: ctypes.CDLL, seed: int = 1, exp_seed: int = 0):
        self.kernels, self.places = kernels, {}
        kernels.cuda_on_cpu_start(ctypes.c_uint64(seed), ctypes.c_uint64(exp_seed))

    def input(self, tensor: torch.Tensor, start: int = 0, stride: int | None = None, name=""):
        """A copy that kernels may read. -> a tensor of the same shape.

        Args:
            tensor: of any shape; rows are those of the last dimension.
            start: of the first row, in elements behind a multiple of 128 bytes.
            stride: elements from row to row, of a matrix; None: the rows are adjacent.
            name: for messages.
        """
        return self._place(tensor, start, stride, name or "an input", False, True)

    def output(self, shape, dtype, start: int = 0, stride: int | None = None, name=""):
        """Memory that kernels must write before they read it."""
        empty = torch.empty(shape, dtype=dtype)
        return self._place(empty, start, stride, name or "an output", True, False)

    def update(self, tensor: torch.Tensor, start: int = 0, stride: int | None = None, name=""):
        """A copy that kernels may read and write."""
        return self._place(tensor, start, stride, name or "memory", True, True)

    def allow_writing(self, tensor: torch.Tensor) -> None:
        """From now on kernels may write into this input."""
        self.kernels.cuda_on_cpu_allow_writing(ctypes.c_void_p(tensor.data_ptr()))

    def call(self, function: str, *arguments, returns=None):
        """Run an exported function, which launches kernels.

        Args:
            arguments: tensors (of this device), integers (64 bits), booleans and floats (32 bits).
            returns: its type, of ctypes.

        Raises:
            Fault: at the first thing that a kernel did wrong.
        """
        converted = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                assert argument.data_ptr() in self.places, "a tensor that is not of this device"
                converted.append(ctypes.c_void_p(argument.data_ptr()))
            else:
                types = {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_float}
                converted.append(types[type(argument)](argument))
        called = getattr(self.kernels, function)
        called.restype = returns
        result = called(*converted)
        if error := self.kernels.cuda_on_cpu_error().decode():
            message, _, addresses = error.partition("\n")
            raise Fault("\n  ".join([message, *_lines(self.kernels, addresses)]))
        return result

    def result(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a tensor holds, after a look at all around it, and at what is not written."""
        storage, fresh, poisoned = self.places[tensor.data_ptr()]
        now, before = bits(storage).clone(), bits(fresh).clone()
        for memory in (now, before):
            memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).zero_()
        if not torch.equal(now, before):
            raise Fault(f"bytes around a tensor {list(tensor.shape)} have changed")
        if poisoned:
            unwritten = (bits(tensor) == POISON[tensor.dtype]).nonzero()
            if len(unwritten):
                raise Fault(
                    f"{len(unwritten)} elements of {tensor.numel()} are not written, the first at "
                    f"{unwritten[0].tolist()} of {list(tensor.shape)}"
                )
        return tensor.clone(memory_format=torch.contiguous_format)

    def _place(self, tensor, start, stride, name, writable, initialised):
        size = tensor.element_size()
        rows = tensor.shape[0] if tensor.dim() > 1 and stride else 1
        width = tensor.numel() // max(rows, 1)
        stride = stride or max(width, 1)
        assert stride >= width and (rows == 1 or tensor.dim() == 2)
        margin = MARGIN // size
        storage = torch.empty(2 * margin + 128 // size + start + rows * stride, dtype=tensor.dtype)
        bits(storage).fill_(POISON[tensor.dtype])
        first = margin + start + -(storage.data_ptr() + MARGIN) % 128 // size
        shape = tensor.shape if tensor.dim() else (1,)
        strides = (stride, 1) if rows > 1 else torch.empty(shape).stride()
        placed = storage.as_strided(shape, strides, first)
        if initialised:
            placed.copy_(tensor)
        pointer = placed.data_ptr()
        self.places[pointer] = storage, storage.clone(), not initialised
        self.kernels.cuda_on_cpu_register(
            name.encode(),
            *(ctypes.c_void_p(pointer), ctypes.c_size_t(rows), ctypes.c_size_t(width * size)),
            *(ctypes.c_size_t(stride * size), ctypes.c_int(writable), ctypes.c_int(initialised)),
        )
        return placed


def _lines(kernels: ctypes.CDLL, addresses: str) -> list[str]:
    """The places of csrc that a fault's addresses are of, the innermost first."""
    if not addresses or not shutil.which("addr2line"):
        return []
    command = ["addr2line", "-i", "-e", kernels._name, *addresses.split()]
    shown = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
    places = [Path(line.split(" ")[0]) for line in shown if line]
    folder = Path(kernels._name).parent
    return [f"at csrc/{place.name}" for place in places if folder in place.parents]
