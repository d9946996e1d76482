"""What a probe found -> a row of the table. Judges look at nothing themselves."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from megatron_tst import cpu
from megatron_tst.doctor.probes import APEX_PARTS, TE_PARTS
from megatron_tst.hardware import recipes

CPU_SWITCH = cpu.SWITCH
ON_CPU = f"{CPU_SWITCH}=1: on CPU with gloo, for the demo and tests"
INSTALL = "`pip install --no-build-isolation .` in the checkout"
WITHOUT = {  # what one does without an optional package
    "nvidia-modelopt": "no `megatron-tst quantize`",
    "megatron-bridge": "used by tests of the NeMo export alone",
    "transformers": "used by tests of export and import alone",
    "safetensors": "no `megatron-tst export-hf` and `import-hf`",
    "nvidia-resiliency-ext": "no --enable-ft-package; --async-save needs --async-strategy mcore",
}


@dataclass(frozen=True)
class Row:
    """A line of the table: state is "ok", "note" or "FAULT"; a fault has what was expected in place
    of `found`, and what to do.
    """

    name: str
    state: str
    found: str
    expected: str = ""
    do: str = ""


def fault(name: str, expected: str, found: str, do: str) -> Row:
    """A row that says what is wrong and what to do about it."""
    return Row(name, "FAULT", found, expected, do)


def numbers(version: str) -> list[int]:
    """[2, 11, 0] of "2.11.0+cu130"."""
    return [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]


def fits(version: str, wanted: str) -> bool:
    """Whether a version is in a range such as ">=0.18,<0.21"; "" is every version."""
    clauses = re.findall(r"(>=|<)([\d.]+)", wanted)
    return all((numbers(version) >= numbers(bound)) == (sign == ">=") for sign, bound in clauses)


def judge_python(version: tuple[int, ...], wanted: str) -> Row:
    """Whether this Python is in the range that the package asks for."""
    text = ".".join(map(str, version[:3]))
    if not fits(text, wanted):
        return fault("Python", wanted, text, "Use a newer one.")
    return Row("Python", "ok", f"{text}, {sys.executable}")


def judge_installed(packages: dict, name: str, do: str) -> Row:
    """Whether a package that training needs is there; `do` says what to do if not."""
    if name not in packages:
        return fault(name, "it to be installed", "none", do)
    return Row(name, "ok", "{version}, {folder}".format(**packages[name]))


def judge_optional(packages: dict, name: str) -> Row:
    """A package that one does without: its version, or what is missing without it."""
    if name in packages:
        return Row(name, "ok", packages[name]["version"])
    return Row(name, "note", f"absent: {WITHOUT[name]}")


def judge_torch(torch: dict, wanted: str) -> Row:
    """Whether torch can be imported and is in the range that the package asks for."""
    do = f"`pip install 'torch{wanted}'`, built for a CUDA that the driver runs."
    if "error" in torch:
        return fault("torch", "`import torch` to work", torch["error"], do)
    if not fits(torch["version"], wanted):
        return fault("torch", wanted, torch["version"], do)
    return Row("torch", "ok", f"{torch['version']}, CUDA {torch['cuda']}")


def judge_gpu(torch: dict, cpu_asked: bool) -> Row:
    """Whether there is a device to train on: GPUs that torch can use, or none and the switch to
    CPU.
    """
    gpus, listed = torch["gpus"], torch["nvidia_smi"]
    if not gpus and cpu_asked:
        return Row("GPU", "note", f"torch sees none; {ON_CPU}")
    if not gpus and listed:
        do = (
            "Install a torch built for a CUDA that this driver runs, and look at "
            "CUDA_VISIBLE_DEVICES."
        )
        got = f"none that torch {torch['version']} (CUDA {torch['cuda']}) sees"
        return fault("GPU", f"what nvidia-smi lists ({'; '.join(listed)})", got, do)
    if not gpus:
        return fault("GPU", "an NVIDIA GPU", "none", f"Train where there is one, or set {ON_CPU}.")
    if cpu_asked:
        return fault(
            "GPU",
            f"{CPU_SWITCH} unset on a machine with a GPU",
            f"{CPU_SWITCH}=1 and {gpus[0]['name']}",
            "Unset it.",
        )
    for gpu in gpus:
        if "error" in gpu:
            do = "Install a torch that is built for it, or mend the driver."
            return fault("GPU", f"torch to run on {gpu['name']}", gpu["error"], do)
    kinds = [
        "{} (sm_{}{}, {} GiB)".format(gpu["name"], *gpu["capability"], gpu["GiB"]) for gpu in gpus
    ]
    found = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    found += f"; driver {listed[0].split(', ')[-1]}" if listed else ""
    lowest = min(gpu["capability"] for gpu in gpus)
    if lowest < [8, 0]:
        return Row("GPU", "note", f"{found}; no bf16: train with --fp16")
    return Row(
        "GPU",
        "ok",
        f"{found}; bf16; FP8 and FP4 recipes: {' '.join(recipes(lowest, torch['cuda'])) or 'none'}",
    )


def how_it_runs(architectures: str, capability: list[int]) -> str:
    """How kernels built for a TORCH_CUDA_ARCH_LIST run on a GPU: "binary", "PTX" (compiled by the
    driver), "unknown" or "not".
    """
    ways = set()
    for entry in architectures.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d+)(\+PTX)?", entry)
        if not match:
            ways.add("unknown")  # Hopper, 9.0a
        elif int(match[1]) == capability[0] and int(match[2]) <= capability[1]:
            ways.add(
                "binary"
            )  # a GPU runs the binaries of its major version, up to its own minor one
        elif match[3] and [int(match[1]), int(match[2])] < capability:
            ways.add("PTX")
    return next((way for way in ("binary", "PTX", "unknown") if way in ways), "not")


def judge_extension(extension: dict, gpus: list[dict]) -> Row:
    """Whether the C++/CUDA extension loads, and runs on these GPUs."""
    name, again = "extension", f"Build it again: {INSTALL} (-e . where it is installed so)"
    if "error" in extension:
        return fault(name, "it to load", extension["error"], f"{again}.")
    found, architectures = extension["description"], extension["architectures"]
    if extension["built"] and not extension["loaded"]:
        do = f"{again}, or delete megatron_tst/_C*.so to train with the torch kernels."
        return fault(name, "one for this torch", found.removesuffix(". Build it again"), do)
    if extension["cuda"]:
        for gpu in gpus:
            if how_it_runs(architectures, gpu["capability"]) == "not":
                sm = "{}.{}".format(*gpu["capability"])
                do = (
                    f'{again} with TORCH_CUDA_ARCH_LIST="{sm}" before it, or train with '
                    f"--tst-kernel torch."
                )
                return fault(
                    name,
                    f"CUDA kernels for compute capability {sm}",
                    f"some for {architectures}",
                    do,
                )
    for device, error in extension["errors"].items():
        return fault(name, f"the superposed loss to run on {device}", error, f"{again}.")
    if gpus and not extension["cuda"]:
        return Row(
            name,
            "note",
            f"{found}: torch kernels on the GPU. A CUDA toolkit builds the extension's",
        )
    return Row(name, "ok" if extension["loaded"] else "note", found)


def judge_megatron(megatron: dict, wanted: str) -> Row:
    """Whether megatron-core can be imported, and is a tested version."""
    name, version, do = (
        "megatron-core",
        megatron.get("version"),
        f"`pip install 'megatron-core{wanted}'`.",
    )
    if version and not fits(version, wanted):
        return fault(name, wanted, version, do)
    if "error" in megatron:
        do = f"{do} What it needs besides comes with {INSTALL}."
        if "nvidia_resiliency_ext" in megatron["error"]:
            do = (
                "`pip uninstall nvidia-resiliency-ext`: Megatron-Core 0.19 wants 0.6, and PyPI "
                "has 0.4."
            )
        return fault(name, "`import megatron.core` to work", megatron["error"], do)
    if version not in megatron["tested"]:
        return Row(name, "note", f"{version}; tested are {', '.join(megatron['tested'])}")
    return Row(name, "ok", version)


def judge_seams(megatron: dict) -> Row:
    """Whether the functions that TST replaces look as they were tested."""
    name, problems = "seams of Megatron", megatron.get("problems")
    if problems is None:
        return Row(name, "note", "not looked at: see megatron-core")
    if problems:
        do = f"Use a tested version ({', '.join(megatron['tested'])}) or report this."
        return fault(
            name,
            f"all {megatron['seams']} to match",
            f"{len(problems)} that do not: {'; '.join(problems)}",
            do,
        )
    return Row(name, "ok", f"all {megatron['seams']} match")


def judge_transformer_engine(te: dict) -> Row:
    """Whether Transformer Engine is whole, absent, or half installed."""
    name, versions = "Transformer Engine", te.get("versions", {})
    found = (
        ", ".join(f"{part} {version}" for part, version in versions.items()) or "unknown version"
    )
    do = (
        f"Install {TE_PARTS[0]}, its core (-cu12 or -cu13) and {TE_PARTS[3]} in one version, or "
        f"uninstall all of them."
    )
    if "error" in te:
        got = (
            f"half-installed: {te['error']} ({found}). Megatron may die of it; TST goes on "
            f"without it"
        )
        return fault(name, "`import transformer_engine.pytorch` to work", got, do)
    if not te["installed"]:
        return Row(
            name,
            "note",
            "absent: no FP8, no context parallelism; train with --transformer-impl local",
        )
    if len(set(versions.values())) > 1:
        return fault(name, "parts of one version", f"half-installed: {found}", do)
    return Row(name, "ok", f"whole: {found}")


def judge_apex(apex: dict) -> Row:
    """Whether apex is NVIDIA's with its extensions, absent, or something else of that name."""
    without = "train with --no-gradient-accumulation-fusion"
    do = (
        "`pip uninstall apex`, or take it off the path; NVIDIA's, with C++ and CUDA extensions, "
        "is not on PyPI: build it from its repository."
    )
    if "error" in apex:
        return fault("apex", "`import apex` to work", apex["error"], do)
    if not apex["folder"]:
        return Row("apex", "note", f"absent: {without}")
    norm, adam, products = ((part, apex["missing"].get(part)) for part in APEX_PARTS)
    if norm[1]:
        got = f"another package of that name, which Megatron takes for it: {apex['folder']}"
        return fault("apex", "NVIDIA's or none", f"{got} ({norm[1]})", do)
    if adam[1]:
        got = f"NVIDIA's without {adam[0]} ({adam[1]}): {apex['folder']}"
        return fault("apex", "one with CUDA extensions or none", got, do)
    if products[1]:
        return Row("apex", "note", f"NVIDIA's without {products[0]} ({products[1]}): {without}")
    return Row("apex", "ok", f"NVIDIA's: {apex['folder']}")
