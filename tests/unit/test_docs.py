"""What the pages say against the code: flags and their defaults, flags that commands use, files and links, messages that troubleshooting quotes."""

import argparse
import re
import subprocess
import sys

import pytest
from runner import ROOT

from megatron_tst.config import add_tst_arguments

PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("[!.]*/README.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
USER_PAGES = [page for page in PAGES if page.name != "LOG.md"]
NONE_OF_OURS = {  # torchrun, pip, pytest, sbatch
    "--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port", "--rdzv-", "--no-build-isolation", "--durations", "--nodes",
    "--tasks", "--help", "--no-deps", "--find-links", "--no-index",
}  # fmt: skip


def tst_flags():
    parser = add_tst_arguments(argparse.ArgumentParser(add_help=False))
    return {action.option_strings[0]: action for action in parser._actions}


def test_the_reference_has_every_flag_with_its_default():
    rows = re.findall(r"^\| `(--tst-[a-z-]+)([^`]*)` \| ([^|]*) \|", (ROOT / "docs/flags.md").read_text(), re.M)
    flags = tst_flags()
    assert [name for name, *_ in rows] == list(dict.fromkeys(name for name, *_ in rows)) and {name for name, *_ in rows} == set(
        flags
    )
    for name, value, default in rows:
        action = flags[name]
        assert bool(value) == (action.nargs != 0), f"{name}: takes a value or not"
        want = "off" if action.default is False else "none" if action.default is None else str(action.default)
        assert default.strip() == want, name


@pytest.fixture(scope="module")
def known():
    """Every option of Megatron's parser and of this project's own programs."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, conflict_handler="resolve"))
    options = {option for action in parser._actions for option in action.option_strings} | set(tst_flags()) | NONE_OF_OURS
    for path in [
        *ROOT.glob("tools/*"),
        *ROOT.glob("examples/**/*"),
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("tests/*.py"),
        *ROOT.glob("megatron_tst/*.py"),
    ]:
        if path.suffix in (".py", ".sh", ".sbatch"):
            options |= set(re.findall(r"--[a-z][a-z0-9_-]+", path.read_text()))
    return options


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_on_the_page_exist(page, known):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", page.read_text()))
    assert not (unknown := sorted(flag for flag in named if flag not in known)), unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_programs_on_the_page_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
        assert (page.parent / target).exists(), target
    programs = re.findall(r"(?:^|\s)(?:python|pytest) ((?:tools|examples|benchmarks|tests)/[\w./-]+)", text, re.M)
    programs += re.findall(
        r"`((?:tools|examples|benchmarks|tests|megatron_tst|csrc)/[\w./-]+\.(?:py|sh|sbatch|csv|toml|txt|cu|h|cpp))`", text
    )
    for program in programs:
        assert (ROOT / program).exists(), program
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"[`\n]make ([a-z-]+)", text):
        assert target in targets, target


def test_messages_that_troubleshooting_quotes_are_in_the_code():
    text = (ROOT / "docs/troubleshooting.md").read_text()
    code = "\n".join(path.read_text() for path in ROOT.glob("megatron_tst/**/*.py"))
    refused = text[text.index("## Refused") : text.index("## Installation")]
    quoted = [part for row in re.findall(r"^\| (`[^|]+) \|", refused, re.M) for part in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 10
    for message in quoted:
        for piece in re.split(r"\.\.\.|\(|\)|: ", message):
            assert (piece := piece.strip(" :")) == "" or piece in code or piece.replace("-", "_").strip("_") in code, (
                message,
                piece,
            )


@pytest.mark.parametrize(
    "command",
    [
        "-m megatron_tst.extension",
        "tools/plan.py --preset moe-10b-a1b",
        "tools/plan.py --preset 3b --tokens 80B",
        "tools/plan.py --preset 3b --tokens 80B --gpu h100 --gpus 64 --mfu 0.4",
    ],
)
def test_commands_of_the_pages_run(command):
    assert any(f"python {command}" in page.read_text() for page in PAGES)
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout, done.stderr
