"""Does the wheel work where no checkout is? make test-wheel, or: python tools/test_wheel.py

Builds the wheel, installs it without extras into a new environment, and runs every verb in an empty
folder: --help, plan, doctor, what a verb says whose extra is missing, and, with the demo's extra, a
short demo and the verbs on its checkpoints. No output may name a file that only a checkout has. At
last it runs story.sh, a user's whole way from text of one's own to text of the model's.
Needs the network or pip's cache, about 6 GB in the temporary folder, and some minutes. No GPU.
Exit code 1: something was not as it should be; it says what.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "megatron_tst",
    "csrc",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)
OF_A_CHECKOUT = re.compile(r"(?<![\w/.-])(tools|examples|docs|benchmarks|tests)/\w")
LOG = " iteration       10/      10 | x | lm loss: 4.5E+00 |\n"


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="megatron_tst_wheel_") as folder:
        here = Path(folder)
        venv.create(here / "venv", with_pip=True)
        wheel = build(here)
        contents(wheel)
        pip(here, "install", "--constraint", ROOT / "constraints.txt", wheel)
        (here / "empty").mkdir()
        without_extras(here)
        pip(here, "install", "--constraint", ROOT / "constraints.txt", f"{wheel}[demo]")
        with_the_demo(here)
        wanted = f"{wheel}[demo,hf]", "transformers"
        pip(here, "install", "--constraint", ROOT / "constraints.txt", *wanted)
        story(here)
    print("test_wheel: all is well")
    return 0


def build(here: Path) -> Path:
    """The wheel, of a copy of the sources: setuptools leaves files where it builds."""
    here = here.resolve()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, here / "sources" / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, here / "sources" / name)
    pip(here, "wheel", "--no-deps", "--wheel-dir", here / "dist", here / "sources")
    (wheel,) = (here / "dist").glob("megatron_tst-*.whl")
    return wheel


def contents(wheel: Path) -> None:
    """All of the package is in it, and nothing else of the checkout."""
    inside = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "megatron_tst"
    wanted = [
        *package.rglob("*.py"),
        package / "py.typed",
        *package.glob("planning/paper_tables/*"),
    ]
    missing = {str(path.relative_to(ROOT)) for path in wanted} - inside
    expect(not missing, f"not in the wheel: {sorted(missing)}")
    others = {name.split("/")[0] for name in inside if ".dist-info/" not in name}
    expect(others == {"megatron_tst"}, f"in the wheel: {sorted(others)}")


def without_extras(here: Path) -> None:
    python = here / "venv" / "bin" / "python"
    listed = [python, "-c", "from megatron_tst.cli import VERBS; print(*VERBS)"]
    verbs = subprocess.run(listed, check=True, capture_output=True, text=True, cwd=here / "empty")
    for verb in verbs.stdout.split():
        said = tst(here, verb, "--help")
        expect(said.stdout.startswith("usage: megatron-tst"), said.stdout)
    tst(here, "--version")
    tst(here, "plan", "--preset", "3b")
    tst(here, "plan", "--preset", "moe-10b-a1b")
    tst(here, "doctor")
    (here / "empty" / "log").write_text(LOG)
    lacks(here, "demo", "plot", "a=log")
    lacks(here, "demo", "corpus", "--output", "corpus")
    lacks(here, "demo", "demo", "--out", "demo")
    left = [path.name for path in (here / "empty").iterdir()]
    expect(left == ["log"], f"refused, but it left {left}")


def with_the_demo(here: Path) -> None:
    """A demo of a model that can be exported, and what a user does next."""
    tst(here, "demo", "--iterations", "20", "--architecture", "llama", "--out", "demo")
    ck, corpus = "demo/llama/checkpoints_tst", "demo/corpus"
    found = json.loads(tst(here, "inspect", ck, "--json").stdout)
    expect(found["phase"] == "recovery", found["phase"])
    tst(here, "boundary", ck, "stock")
    same = json.loads(tst(here, "verify", ck, "stock", "--json").stdout)
    expect(same["same"], same)
    tst(here, "verify", ck, "demo/llama/checkpoints_baseline", code=1)
    tst(here, "export-hf", ck, "hf", "--tokenizer", f"{corpus}.tokenizer.json")
    tst(here, "export-nemo", ck, "nemo")
    logs = [f"{name}=demo/llama/{name}.log" for name in ("baseline", "tst")]
    found = json.loads(tst(here, "plot", "--json", *logs).stdout)
    expect(found["runs"]["tst"][0]["boundary"] == 4, found)
    lacks(here, "hf", "import-hf", "hf", "back")
    quantize = ("quantize", ck, "fp8", "--recipe", "fp8", "--data-path", corpus, "--device", "cpu")
    lacks(here, "modelopt", *quantize, cpu="0")  # the shims for training on CPU are not for it


def story(here: Path) -> None:
    start, path = time.time(), f"{here / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(ROOT / "tools" / "story.sh"), str(here / "story")]
    done = subprocess.run(command, cwd=here, env=_environment("1") | {"PATH": path})
    print(f"test_wheel: {time.time() - start:5.1f} s  story.sh", flush=True)
    expect(done.returncode == 0, "story.sh")


def lacks(here: Path, extra: str, *arguments: str, cpu: str = "1") -> None:
    """A verb that needs an extra says which, in one line."""
    said = tst(here, *arguments, code=2, cpu=cpu)
    lines = [line for line in said.stderr.splitlines() if "error:" in line]
    wanted = f"pip install 'megatron-tst[{extra}]'."
    expect(len(lines) == 1 and lines[0].endswith(wanted), f"wanted {wanted}, got {said.stderr}")


def tst(here: Path, *arguments: str, code: int = 0, cpu: str = "1") -> subprocess.CompletedProcess:
    """Run the command in the empty folder, with nothing of the checkout in its environment."""
    start = time.time()
    command = [here / "venv" / "bin" / "megatron-tst", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=here / "empty", env=_environment(cpu)
    )
    said = done.stdout + done.stderr
    print(
        f"test_wheel: {time.time() - start:5.1f} s  megatron-tst {' '.join(arguments)}", flush=True
    )
    expect(done.returncode == code, f"expected exit code {code}, got {done.returncode}:\n{said}")
    expect("Traceback" not in said, said)
    expect(not OF_A_CHECKOUT.search(said), f"it names a file of the checkout:\n{said}")
    return done


def _environment(cpu: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return environment | {"MEGATRON_TST_CPU": cpu, "CUDA_VISIBLE_DEVICES": ""}


def pip(here: Path, *arguments) -> None:
    python = here / "venv" / "bin" / "python"
    environment = {**os.environ, "MEGATRON_TST_SKIP_EXTENSION": "1"}
    quiet = ("--quiet", "--disable-pip-version-check")
    command = [python, "-m", "pip", arguments[0], *quiet, *arguments[1:]]
    print("test_wheel: pip", *arguments, flush=True)
    subprocess.run(list(map(str, command)), check=True, cwd=here, env=environment)


def expect(holds: object, otherwise: object) -> None:
    if not holds:
        print(f"test_wheel: FAILED: {otherwise}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
