"""The report: every probe asked, every judge heard."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from megatron_tst import cpu
from megatron_tst.doctor import judges, probes

# A small run, with the flags that Megatron needs on CPU.
ON_CPU = (
    f"{cpu.SWITCH}=1 torchrun --standalone -m megatron_tst.pretrain_gpt {cpu.FLAGS} --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 512 --num-layers 2 --hidden-size 32 "
    "--num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 "
    "--global-batch-size 4 --train-iters 10 --lr 1e-3 --eval-iters 0 --eval-interval 10 "
    "--log-interval 1 "
    "--tst-bag-size 4 --tst-iters 3"
)


def needs() -> dict[str, str]:
    """The versions that this package asks for: {"python": ">=3.12", "torch": ">=2.6",
    "megatron-core": ...}, from the installed distribution, else from the checkout that this file
    lies in; "" (any version) where neither says.
    """
    try:
        about = importlib.metadata.metadata("megatron-tst")
        python, asked = about["Requires-Python"], about.get_all("Requires-Dist") or []
    except importlib.metadata.PackageNotFoundError:
        project = _checkout()
        python, asked = project.get("requires-python", ""), project.get("dependencies", [])
    found = {"python": python, "torch": "", "megatron-core": ""}
    for requirement in asked:
        name, versions = re.match(r"([\w.-]+)\s*([^;]*)", requirement).groups()
        if name in found:  # ">=0.18,<0.21": the lowest first
            found[name] = ",".join(sorted(versions.strip().split(","), reverse=True))
    return found


def _checkout() -> dict:
    """[project] of the pyproject.toml beside the package; empty where there is none."""
    try:
        import tomllib
    except ImportError:  # an older Python: all that can be said is that it will not do
        return {"requires-python": ">=3.11"}
    file = Path(__file__).resolve().parent.parent.parent / "pyproject.toml"
    if not file.is_file():
        return {}
    project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
    return project if project.get("name") == "megatron-tst" else {}


def ask_all() -> dict[str, dict]:
    """What every probe found. Megatron is looked at without what is broken, so that its rows are
    about itself.
    """
    with ThreadPoolExecutor() as pool:
        groups = ("packages",), ("transformer_engine",), ("apex",), ("torch", "extension")
        packages, te, apex, torch = (pool.submit(probes.ask, *group) for group in groups)
        found = packages.result() | te.result() | apex.result()
        judged = {"transformer_engine": judges.judge_transformer_engine, "apex": judges.judge_apex}
        hidden = tuple(
            name for name, judge in judged.items() if judge(found[name]).state == "FAULT"
        )
        return found | probes.ask("megatron", hidden=hidden) | torch.result()


def will_use(extension: dict, megatron: dict, gpus: list[dict]) -> dict[str, str]:
    """What a run takes here: {what: which}, as far as that is certain."""
    unknown = "unknown until the faults are mended"
    kernels = {None: unknown, "torch": "torch kernels"}
    auto, architectures = extension.get("auto", {}), extension.get("architectures", "")
    on_gpu = f"the extension's CUDA kernels for {architectures}"
    ways = {judges.how_it_runs(architectures, gpu["capability"]) for gpu in gpus}
    if "not" in ways or any(device != "cpu" for device in extension.get("errors", {})):
        on_gpu += ", which do not run here"
    elif "PTX" in ways:
        on_gpu += ", compiled from PTX by the driver"
    certain = "uses" in megatron and not megatron["hidden"]
    return {
        "embedding and loss on CPU": (kernels | {"extension": "the extension's C++ kernels"})[
            auto.get("cpu")
        ],
        "embedding and loss on GPU": (kernels | {"extension": on_gpu})[auto.get("cuda")],
        **(
            megatron["uses"]
            if certain
            else dict.fromkeys(("Adam", "norms", "flags for what is absent"), unknown)
        ),
    }


def examine() -> dict:
    """The report: {"would_train": bool, "rows": [judges.Row as a dict], "will_use": {what: which},
    "run_on_cpu": a command, or "" where there is a GPU}, as JSON takes it.
    """
    found, wanted = ask_all(), needs()
    packages, torch, megatron = found["packages"], found["torch"], found["megatron"]
    gpus, core = torch.get("gpus", []), "megatron-core"
    rows = [
        judges.judge_python(sys.version_info, wanted["python"]),
        judges.judge_installed(packages, "megatron-tst", f"{judges.INSTALL}."),
        judges.judge_torch(torch, wanted["torch"]),
        judges.judge_installed(packages, core, f"`pip install '{core}{wanted[core]}'`."),
    ]
    if first := [
        row.name for row in rows if row.name in ("megatron-tst", "torch") and row.state == "FAULT"
    ]:
        others = ("seams of Megatron", "GPU", "extension", "Transformer Engine", "apex")
        rows += [
            judges.Row(name, "note", f"not looked at: see {' and '.join(first)}") for name in others
        ]
    else:
        if rows[-1].state == "ok":
            rows[-1] = judges.judge_megatron(megatron, wanted[core])
        rows += [
            judges.judge_seams(megatron),
            judges.judge_gpu(torch, cpu.asked_for()),
            judges.judge_extension(found["extension"], gpus),
            judges.judge_transformer_engine(found["transformer_engine"]),
            judges.judge_apex(found["apex"]),
        ]
    rows += [judges.judge_optional(packages, name) for name in probes.OPTIONAL]
    would_train = all(row.state != "FAULT" for row in rows)
    return {
        "run_on_cpu": "" if gpus else ON_CPU,
        "would_train": would_train,
        "rows": [asdict(r) for r in rows],
        "will_use": will_use(found["extension"], megatron, gpus),
    }
