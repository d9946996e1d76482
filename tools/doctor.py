"""What is installed, what TST will use, and what to do about each fault. Needs nothing but Python.

    python tools/doctor.py            one screen
    python tools/doctor.py --json     the same as one JSON object

Exit code 0: training would start. 1: there is a FAULT. Packages are judged as for a GPU run: a
broken Transformer Engine or apex is a fault where MEGATRON_TST_CPU=1 would hide it, and a broken
extension is one although the torch kernels stand in.

Probes look, in processes of their own because a broken package may crash on import; judges turn
what a probe found into a row of the table and look at nothing themselves; `screen` prints.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

WIDTH = 110
TIMEOUT = 120  # seconds for a probe: imports from a network file system are slow
CPU_SWITCH = "MEGATRON_TST_CPU"
ON_CPU = f"{CPU_SWITCH}=1: on CPU with gloo, for the demo and tests"
INSTALL = "`pip install --no-build-isolation .` in the checkout"
TE_PARTS = (
    "transformer-engine",
    "transformer-engine-cu12",
    "transformer-engine-cu13",
    "transformer-engine-torch",
)
APEX_PARTS = ("apex.normalization.fused_layer_norm", "amp_C", "fused_weight_gradient_mlp_cuda")
OPTIONAL = {  # distribution: (module, what one does without)
    "nvidia-modelopt": ("modelopt", "no export_checkpoint.py quantize"),
    "megatron-bridge": (
        "megatron.bridge",
        "tests of the NeMo export that need it are skipped, nothing else",
    ),
    "transformers": (
        "transformers",
        "tests of export and import that need it are skipped, nothing else",
    ),
    "safetensors": ("safetensors", "no export_checkpoint.py hf and import-hf"),
    "nvidia-resiliency-ext": (
        "nvidia_resiliency_ext",
        "no --enable-ft-package; --async-save needs --async-strategy mcore",
    ),
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
    return Row(name, "FAULT", found, expected, do)


def needs() -> dict[str, str]:
    """The versions that pyproject.toml asks for: {"python": ">=3.12", "torch": ...,
    "megatron-core": ...}.
    """
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    found = {
        name: re.search(rf'"{name}([<>=][^"]*)"', text)[1] for name in ("torch", "megatron-core")
    }
    return {"python": re.search(r'requires-python = "([^"]*)"', text)[1], **found}


def numbers(version: str) -> list[int]:
    """[2, 11, 0] of "2.11.0+cu130"."""
    return [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]


def fits(version: str, wanted: str) -> bool:
    """Whether a version is in a range such as ">=0.18,<0.20"."""
    clauses = (re.fullmatch(r"(>=|<)([\d.]+)", clause).groups() for clause in wanted.split(","))
    return all((numbers(version) >= numbers(bound)) == (sign == ">=") for sign, bound in clauses)


# ---- probes: each fills `found`; what it raises becomes found["error"]


def version_of(distribution: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return ""


def folder_of(module: str) -> str:
    """Where a module is, without importing it (but the package that it is in); "" if there is none."""
    with suppress(ImportError):
        if spec := importlib.util.find_spec(module):
            return (
                os.path.dirname(spec.origin)
                if spec.origin
                else next(iter(spec.submodule_search_locations))
            )
    return ""


def probe_packages(found: dict) -> None:
    modules = {"megatron-tst": "megatron_tst", "megatron-core": "megatron.core"} | {
        name: OPTIONAL[name][0] for name in OPTIONAL
    }
    for name, module in modules.items():
        if folder := folder_of(module):
            found[name] = {"version": version_of(name) or "unknown version", "folder": folder}


def probe_torch(found: dict) -> None:
    """torch, the GPUs that it sees, and those that nvidia-smi lists ("name, driver")."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found["nvidia_smi"] = []
    with suppress(subprocess.SubprocessError):
        if shutil.which(query[0]):
            found["nvidia_smi"] = subprocess.run(
                query, capture_output=True, text=True, timeout=30, check=True
            ).stdout.splitlines()
    import torch

    found |= {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": []}
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(i)
        gpu = {
            "name": device.name,
            "capability": [device.major, device.minor],
            "GiB": round(device.total_memory / 2**30),
        }
        found["gpus"].append(gpu)
        try:
            torch.ones(1, device=f"cuda:{i}").add_(1).item()
        except RuntimeError as error:  # a torch without kernels for this GPU
            gpu["error"] = (
                f"{one_line(error)}; torch is built for {' '.join(torch.cuda.get_arch_list())}"
            )


def probe_extension(found: dict) -> None:
    """The extension, and what `--tst-kernel auto` chooses; that loss is computed once on every
    device.
    """
    found["built"] = bool(folder_of("megatron_tst._C"))
    import torch

    from megatron_tst import extension
    from megatron_tst.ops.loss import multi_hot_cross_entropy

    loaded = extension.load()
    found |= {
        "loaded": loaded.loaded,
        "cuda": loaded.cuda,
        "description": loaded.description,
        "architectures": "",
        "errors": {},
    }
    found["auto"] = {kind: extension.choose("auto", kind) for kind in ("cpu", "cuda")}
    if loaded.loaded:
        found["architectures"] = importlib.import_module("megatron_tst._C").cuda_architectures
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for device in ("cpu", *(f"cuda:{i}" for i in gpus)):
        try:
            logits, labels = (
                torch.zeros(1, 4, device=device),
                torch.zeros(1, 2, dtype=torch.int64, device=device),
            )
            multi_hot_cross_entropy(logits, labels).item()
        except RuntimeError as error:
            found["errors"][device] = one_line(error)


def probe_megatron(found: dict, *hidden: str) -> None:
    """Megatron as training finds it, but without the broken packages `hidden`: its seams, its
    optimizer, its norms.
    """
    sys.modules.update(dict.fromkeys(hidden))  # importing one is now a ModuleNotFoundError
    found["hidden"] = hidden
    import torch

    from megatron_tst import compat, cpu
    from megatron_tst.loop import seams as all_seams

    if not torch.cuda.is_available():
        cpu.enable_if_asked()

    found["version"], found["tested"] = compat.megatron_version(), compat.TESTED_MEGATRON
    seams = [seam for seam in vars(all_seams).values() if isinstance(seam, all_seams.Seam)]
    seams = [
        seam for seam in seams if seam != all_seams.MTP_ACCEPTANCE or seam.exists
    ]  # that one came with 0.19
    found["seams"], found["problems"] = (
        len(seams),
        [problem for seam in seams if (problem := seam.problem())],
    )

    from megatron.core import optimizer
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel import layers

    torch_norm = gpt_layer_specs.LNImpl.__name__ == "WrappedTorchNorm"
    needed = {
        "--transformer-impl local": not HAVE_TE,
        "--no-persist-layer-norm": torch_norm and not HAVE_TE,
        "--no-rope-fusion": rope_utils.fused_apply_rotary_pos_emb is None,
        "--no-masked-softmax-fusion": not HAVE_TE
        and not folder_of("scaled_upper_triang_masked_softmax_cuda"),
        "--no-gradient-accumulation-fusion": not layers._grad_accum_fusion_available,
    }
    found["uses"] = {
        "Adam": f"{optimizer.Adam.__module__}.{optimizer.Adam.__qualname__}",
        "norms": "Transformer Engine's"
        if HAVE_TE
        else "torch's"
        if torch_norm
        else "apex's LayerNorm",
        "flags for what is absent": " ".join(
            flag for flag, is_needed in needed.items() if is_needed
        )
        or "none",
    }


def probe_transformer_engine(found: dict) -> None:
    found["versions"] = {part: version for part in TE_PARTS if (version := version_of(part))}
    found["installed"] = bool(found["versions"] or folder_of("transformer_engine"))
    if found["installed"]:
        importlib.import_module(
            "torch"
        )  # it loads the CUDA libraries that Transformer Engine needs
        importlib.import_module("transformer_engine.pytorch")


def probe_apex(found: dict) -> None:
    found["folder"], found["missing"] = folder_of("apex"), []
    if found["folder"]:
        importlib.import_module("torch")  # as above
        importlib.import_module("apex")
        for part in APEX_PARTS:
            try:
                importlib.import_module(part)
            except Exception:
                found["missing"].append(part)


def one_line(error: BaseException) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def answer(names: str, *arguments: str) -> None:
    """In a probes' process: print what each found, and end without the exit handlers of what was
    imported.
    """
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = (
            os.getcwd()
        )  # where `python -m megatron_tst.launch` looks first; it was the folder of this file
    for name in names.split(","):
        found: dict = {}
        try:
            globals()[f"probe_{name}"](found, *arguments)
        except BaseException as error:  # whatever a broken package raises, SystemExit too
            found["error"] = one_line(error)
        print(f"\nprobe {name}: {json.dumps(found)}", flush=True)
    os._exit(0)


def ask(*names: str, hidden: tuple[str, ...] = ()) -> dict[str, dict]:
    """What these probes found, from one process; {"error": ...} for those that it did not come to,
    because it crashed or hung.
    """
    flags = (
        subprocess._args_from_interpreter_flags()
    )  # -I, -S and the like: look where this process looks
    command = [sys.executable, *flags, __file__, "--probe", ",".join(names), *hidden]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=TIMEOUT
        )
        output, code = done.stdout, done.returncode
        how = f"a crash ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
    except subprocess.TimeoutExpired as error:
        output, how = error.stdout or b"", f"no answer within {TIMEOUT} s"
    told = dict(re.findall(r"^probe (\w+): (.*)$", output.decode(errors="replace"), re.MULTILINE))
    return {name: json.loads(told[name]) if name in told else {"error": how} for name in names}


def ask_all() -> dict[str, dict]:
    """What every probe found. Megatron is looked at without what is broken, so that its rows are
    about itself.
    """
    with ThreadPoolExecutor() as pool:
        groups = ("packages",), ("transformer_engine",), ("apex",), ("torch", "extension")
        packages, te, apex, torch = (pool.submit(ask, *group) for group in groups)
        found = packages.result() | te.result() | apex.result()
        judged = {"transformer_engine": judge_transformer_engine, "apex": judge_apex}
        hidden = tuple(
            name for name, judge in judged.items() if judge(found[name]).state == "FAULT"
        )
        return found | ask("megatron", hidden=hidden) | torch.result()


# ---- judges: what a probe found -> a row


def judge_python(version: tuple[int, ...], wanted: str) -> Row:
    text = ".".join(map(str, version[:3]))
    if not fits(text, wanted):
        return fault(
            "Python", wanted, text, "Use a newer one: `sh tools/find_python.sh` looks for it."
        )
    return Row("Python", "ok", f"{text}, {sys.executable}")


def judge_installed(packages: dict, name: str, do: str) -> Row:
    if name not in packages:
        return fault(name, "it to be installed", "none", do)
    return Row(name, "ok", "{version}, {folder}".format(**packages[name]))


def judge_optional(packages: dict, name: str) -> Row:
    return (
        Row(name, "ok", packages[name]["version"])
        if name in packages
        else Row(name, "note", f"absent: {OPTIONAL[name][1]}")
    )


def judge_torch(torch: dict, wanted: str) -> Row:
    do = f"`pip install 'torch{wanted}'`, built for a CUDA that the driver runs."
    if "error" in torch:
        return fault("torch", "`import torch` to work", torch["error"], do)
    if not fits(torch["version"], wanted):
        return fault("torch", wanted, torch["version"], do)
    return Row("torch", "ok", f"{torch['version']}, CUDA {torch['cuda']}")


def judge_gpu(torch: dict, cpu_asked: bool) -> Row:
    """Whether there is a device to train on: GPUs that torch can use, or none and the CPU switch."""
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


def recipes(capability: list[int], cuda: str) -> list[str]:
    """The low-precision recipes of Transformer Engine 2.20 that run there
    (transformer_engine/pytorch/quantization.py).
    """
    runs = {
        "delayed": capability >= [8, 9],
        "tensorwise": capability >= [8, 9],
        "blockwise": capability >= [9, 0] and numbers(cuda) >= [12, 9],
        "mxfp8": [10, 0] <= capability < [12, 0],
        "nvfp4": capability >= [10, 0],
    }
    return [recipe for recipe in runs if runs[recipe]]


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
    without = "train with --no-gradient-accumulation-fusion"
    do = (
        "`pip uninstall apex`, or take it off the path; NVIDIA's, with C++ and CUDA extensions, "
        "is not on PyPI: build it from its repository."
    )
    if "error" in apex:
        return fault("apex", "`import apex` to work", apex["error"], do)
    if not apex["folder"]:
        return Row("apex", "note", f"absent: {without}")
    if APEX_PARTS[0] in apex["missing"]:
        return fault(
            "apex",
            "NVIDIA's or none",
            f"another package of that name, which Megatron takes for it: {apex['folder']}",
            do,
        )
    if APEX_PARTS[1] in apex["missing"]:
        return fault(
            "apex",
            "one with CUDA extensions or none",
            f"NVIDIA's without amp_C: {apex['folder']}",
            do,
        )
    if apex["missing"]:
        return Row("apex", "note", f"NVIDIA's without {APEX_PARTS[2]}: {without}")
    return Row("apex", "ok", f"NVIDIA's: {apex['folder']}")


# ---- the report


def will_use(extension: dict, megatron: dict, gpus: list[dict]) -> dict[str, str]:
    """What a run takes here: {what: which}, as far as that is certain."""
    unknown = "unknown until the faults are mended"
    kernels = {None: unknown, "torch": "torch kernels (megatron_tst/ops/torch_kernel.py)"}
    auto, architectures = extension.get("auto", {}), extension.get("architectures", "")
    on_gpu = f"the extension's CUDA kernels for {architectures}"
    ways = {how_it_runs(architectures, gpu["capability"]) for gpu in gpus}
    if "not" in ways or any(device != "cpu" for device in extension.get("errors", {})):
        on_gpu += ", which do not run here"
    elif "PTX" in ways:
        on_gpu += ", compiled from PTX by the driver"
    certain = "uses" in megatron and not megatron["hidden"]
    return {
        "superposed loss on CPU": (kernels | {"extension": "the extension's C++ kernels"})[
            auto.get("cpu")
        ],
        "superposed loss on GPU": (kernels | {"extension": on_gpu})[auto.get("cuda")],
        **(
            megatron["uses"]
            if certain
            else dict.fromkeys(("Adam", "norms", "flags for what is absent"), unknown)
        ),
    }


def examine() -> dict:
    """The report: {"would_train": bool, "rows": [Row as a dict], "will_use": {what: which}}."""
    found, wanted = ask_all(), needs()
    packages, torch, megatron = found["packages"], found["torch"], found["megatron"]
    gpus, core = torch.get("gpus", []), "megatron-core"
    rows = [
        judge_python(sys.version_info, wanted["python"]),
        judge_installed(packages, "megatron-tst", f"{INSTALL}."),
        judge_torch(torch, wanted["torch"]),
        judge_installed(packages, core, f"`pip install '{core}{wanted[core]}'`."),
    ]
    if first := [
        row.name for row in rows if row.name in ("megatron-tst", "torch") and row.state == "FAULT"
    ]:
        others = ("seams of Megatron", "GPU", "extension", "Transformer Engine", "apex")
        rows += [Row(name, "note", f"not looked at: see {' and '.join(first)}") for name in others]
    else:
        if rows[-1].state == "ok":
            rows[-1] = judge_megatron(megatron, wanted[core])
        rows += [
            judge_seams(megatron),
            judge_gpu(torch, os.environ.get(CPU_SWITCH) == "1"),
            judge_extension(found["extension"], gpus),
            judge_transformer_engine(found["transformer_engine"]),
            judge_apex(found["apex"]),
        ]
    rows += [judge_optional(packages, name) for name in OPTIONAL]
    would_train = all(row.state != "FAULT" for row in rows)
    return {
        "would_train": would_train,
        "rows": [asdict(r) for r in rows],
        "will_use": will_use(found["extension"], megatron, gpus),
    }


def screen(report: dict) -> str:
    """The table, what TST will use, the faults."""

    def columns(head: str, text: str) -> list[str]:
        return textwrap.wrap(
            text,
            WIDTH,
            initial_indent=head,
            subsequent_indent=" " * len(head),
            break_on_hyphens=False,
        )

    faults = [row for row in report["rows"] if row["state"] == "FAULT"]
    lines = []
    for row in report["rows"]:  # a fault is shown whole below
        found = textwrap.shorten(row["found"], WIDTH - 28) if row in faults else row["found"]
        lines += columns(f"{row['name']:22}{row['state']:6}", found)
    lines += [
        "",
        "TST will use",
        *(
            line
            for what, which in report["will_use"].items()
            for line in columns(f"  {what:26}", which)
        ),
    ]
    lines += [
        "",
        f"{len(faults) or 'no'} fault{'s' * (len(faults) > 1)}: training would "
        f"{'fail' if faults else 'start'}",
    ]
    for row in faults:
        lines += columns(
            f"  {row['name']}: ", f"expected {row['expected']}, got {row['found']}. {row['do']}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object in place of the screen"
    )
    parser.add_argument("--probe", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.probe:
        answer(*options.probe)
    report = examine()
    print(json.dumps(report, indent=2) if options.json else screen(report))
    return 0 if report["would_train"] else 1


if __name__ == "__main__":
    sys.exit(main())
