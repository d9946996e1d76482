"""Looks at what is installed, in processes of their own: a broken package may crash on import.

This file is also what those processes run, with nothing but Python: it imports neither torch nor
this package before a probe does. `ask` starts them.
"""

from __future__ import annotations

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
from contextlib import suppress

TIMEOUT = 120  # seconds for a process: imports from a network file system are slow
TE_PARTS = (
    "transformer-engine",
    "transformer-engine-cu12",
    "transformer-engine-cu13",
    "transformer-engine-torch",
)
APEX_PARTS = ("apex.normalization.fused_layer_norm", "amp_C", "fused_weight_gradient_mlp_cuda")
OPTIONAL = {  # distribution: its module
    "nvidia-modelopt": "modelopt",
    "megatron-bridge": "megatron.bridge",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "nvidia-resiliency-ext": "nvidia_resiliency_ext",
}
# Runs this file as `python -m` would be run: what lies in the current folder comes first.
_RUN = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"


def ask(*names: str, hidden: tuple[str, ...] = ()) -> dict[str, dict]:
    """What these probes found, from one process; {"error": ...} for those that it did not come to,
    because it crashed or hung.

    Args:
        names: of the functions below, without "probe_".
        hidden: packages that are as if they were not installed.
    """
    flags = (
        subprocess._args_from_interpreter_flags()
    )  # -I, -S and the like: look where this process looks
    command = [sys.executable, *flags, "-c", _RUN, __file__, ",".join(names), *hidden]
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


def version_of(distribution: str) -> str:
    """Of an installed distribution; "" if there is none."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return ""


def folder_of(module: str) -> str:
    """Where a module is, without importing it (but the package that it is in); "": there is
    none.
    """
    with suppress(ImportError):
        if spec := importlib.util.find_spec(module):
            return (
                os.path.dirname(spec.origin)
                if spec.origin
                else next(iter(spec.submodule_search_locations))
            )
    return ""


def one_line(error: BaseException) -> str:
    """An error as its type and text, at most 300 characters."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


# ---- probes: each fills `found`; what it raises becomes found["error"]


def probe_packages(found: dict) -> None:
    """Which packages are there, without importing them: {name: {"version", "folder"}}."""
    modules = {"megatron-tst": "megatron_tst", "megatron-core": "megatron.core"}
    for name, module in (modules | OPTIONAL).items():
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
    """The extension, and what `--tst-kernel auto` chooses; that loss, and the extension's embedding
    with its gradient, are computed once on every device.
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
            if extension.choose("auto", device.split(":")[0]) == "extension":
                ops, table = torch.ops.megatron_tst, torch.zeros(4, 4, device=device)
                mean = ops.superposed_embedding(table, labels, 0, len(table), table.dtype)
                ops.superposed_embedding_gradient_(table, mean, labels, 0, len(table))
                table.sum().item()
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
    """Its parts by version, and whether they can be imported together."""
    found["versions"] = {part: version for part in TE_PARTS if (version := version_of(part))}
    found["installed"] = bool(found["versions"] or folder_of("transformer_engine"))
    if found["installed"]:
        importlib.import_module(
            "torch"
        )  # it loads the CUDA libraries that Transformer Engine needs
        importlib.import_module("transformer_engine.pytorch")


def probe_apex(found: dict) -> None:
    """Where apex is, and why each part that Megatron asks for cannot be imported."""
    found["folder"], found["missing"] = folder_of("apex"), {}
    if found["folder"]:
        importlib.import_module("torch")  # as above
        importlib.import_module("apex")
        for part in APEX_PARTS:
            try:
                importlib.import_module(part)
            except Exception as error:  # whatever a broken extension raises
                found["missing"][part] = one_line(error)


def answer(names: str, *arguments: str) -> None:
    """In a process of its own: print what each probe found, and end without the exit handlers of
    what was imported.
    """
    for name in names.split(","):
        found: dict = {}
        try:
            globals()[f"probe_{name}"](found, *arguments)
        except BaseException as error:  # whatever a broken package raises, SystemExit too
            found["error"] = one_line(error)
        print(f"\nprobe {name}: {json.dumps(found)}", flush=True)
    os._exit(0)


if __name__ == "__main__":
    answer(*sys.argv[1:])
