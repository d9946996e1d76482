"""What the pages say against the code: flags and their defaults, flags that commands use, files and
links, messages that troubleshooting quotes.
"""

import argparse
import json
import os
import re
import subprocess
import sys

import pytest
from support.runs import ROOT

from megatron_tst.config import add_tst_arguments

PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "{}/**/*.md")
    for folder in ("benchmarks", "examples", "megatron_tst", "tests", "tools")
    for page in set(ROOT.glob(pattern.format(folder)))
)
PAGES = list(dict.fromkeys(PAGES))
HISTORY = ("LOG.md", "CHANGELOG.md")  # what was there once
USER_PAGES = [page for page in PAGES if page.name not in HISTORY]
NONE_OF_OURS = {  # torchrun, pip, pytest, sbatch
    "--nproc-per-node",
    "--nnodes",
    "--node-rank",
    "--master-addr",
    "--master-port",
    "--rdzv-",
    "--no-build-isolation",
    "--durations",
    "--nodes",
    "--tasks",
    "--help",
    "--no-deps",
    "--find-links",
    "--no-index",
}


def tst_flags():
    parser = add_tst_arguments(argparse.ArgumentParser(add_help=False))
    return {action.option_strings[0]: action for action in parser._actions}


def test_the_reference_has_every_flag_with_its_default():
    rows = re.findall(
        r"^\| `(--tst-[a-z-]+)([^`]*)` \| ([^|]*) \|", (ROOT / "docs/flags.md").read_text(), re.M
    )
    flags = tst_flags()
    assert [name for name, *_ in rows] == list(dict.fromkeys(name for name, *_ in rows)) and {
        name for name, *_ in rows
    } == set(flags)
    for name, value, default in rows:
        action = flags[name]
        assert bool(value) == (action.nargs != 0), f"{name}: takes a value or not"
        want = (
            "off"
            if action.default is False
            else "none"
            if action.default is None
            else str(action.default)
        )
        assert default.strip() == want, name


@pytest.fixture(scope="module")
def known():
    """Every option of Megatron's parser and of this project's own programs."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(
        argparse.ArgumentParser(allow_abbrev=False, conflict_handler="resolve")
    )
    options = (
        {option for action in parser._actions for option in action.option_strings}
        | set(tst_flags())
        | NONE_OF_OURS
    )
    for path in [
        *ROOT.glob("tools/*"),
        *ROOT.glob("examples/**/*"),
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("tests/*.py"),
        *ROOT.glob("megatron_tst/**/*.py"),
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
    programs = re.findall(
        r"(?:^|\s)(?:python|pytest) ((?:tools|examples|benchmarks|tests)/[\w./-]+)", text, re.M
    )
    programs += re.findall(
        r"`((?:tools|examples|benchmarks|tests|megatron_tst|csrc)/[\w./-]+\.(?:py|sh|sbatch|csv|toml|txt|cu|h|cpp))`",
        text,
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
    quoted = [
        part
        for row in re.findall(r"^\| (`[^|]+) \|", refused, re.M)
        for part in re.findall(r"`([^`]+)`", row)
    ]
    assert len(quoted) > 10
    for message in quoted:
        for piece in re.split(r"\.\.\.|\(|\)|: ", message):
            assert (
                (piece := piece.strip(" :")) == ""
                or piece in code
                or piece.replace("-", "_").strip("_") in code
            ), (
                message,
                piece,
            )


PROGRAM = re.compile(
    r"(?:[A-Z_]+=(?:\"[^\"]*\"|\S+) "
    r"+)*(?:python|make|pip|torchrun|bash|sbatch|pytest|examples/\w+\.sh|tools/\w+\.sh)\b"
)
RUN_HERE = [
    "python -m megatron_tst.extension",
    "python tools/doctor.py",
    "python tools/plan.py --preset moe-10b-a1b",
    "python tools/plan.py --preset 3b --tokens 80B",
    "python tools/plan.py --preset 3b --tokens 80B --gpu h100 --gpus 64 --mfu 0.4",
    "python tools/plan.py --hf-config Qwen3-8B/config.json --seq-length 4096 --global-batch-size "
    "1024 --train-iters 40000 "
    "--data-path data/text_document --gpus 128 --tflops 420",
    "python tools/plan.py ... --sweep",
    *(
        f"python examples/experiments/plot.py benchmarks/data/experiments.csv --question "
        f"{question} --output docs/images/{question}.png"
        for question in ("equal_flops", "superpose", "boundary_state")
    ),
]
# how the command begins: the test that runs it (with sizes of its own), or what calls it
RUN_ELSEWHERE = {
    "make demo": "tests/training/test_tools.py::test_demo",
    "make test": ".ci/run",
    "pip install": "Makefile",
    "torchrun ... -m megatron_tst.launch pretrain_gpt.py $ARGS --save ck": "tests/checkpoint/test_stock.py::test_three_ways_over_the_boundary",
    "python tools/convert_checkpoint.py boundary ck ck_stock": "tests/checkpoint/test_stock.py::test_three_ways_over_the_boundary",
    "torchrun ... pretrain_gpt.py $ARGS --load ck_stock": "tests/checkpoint/test_stock.py::test_three_ways_over_the_boundary",
    "python tools/export_checkpoint.py hf": "tests/checkpoint/test_export_hf.py::test_killed_at_any_moment",
    "python tools/export_checkpoint.py nemo": "tests/checkpoint/test_export_hf.py::test_killed_at_any_moment",
    "python tools/export_checkpoint.py import-hf": "tests/checkpoint/test_export_hf.py::test_killed_at_any_moment",
    "python tools/export_checkpoint.py quantize": "tests/peers/quantize_jobs.py::kill",
    "python -m megatron_tst.launch pretrain_gpt.py": "tests/training/test_launch.py::test_megatron_lms_own_script",
    "DRY_RUN=1 examples/3b.sh": "tests/training/test_recipes.py::test_dry_run_from_the_shell",
    "MEGATRON_LM=/path/to/Megatron-LM examples/prepare_data.sh": "tests/training/test_recipes.py::test_prepare_data",
    "python $E/run.py": "tests/training/test_experiments.py::test_rows_say_what_was_run",
    "python $E/plot.py": "tests/unit/test_training_curves.py::test_the_experiments_figure",
    "python tools/plot_runs.py": "tests/unit/test_training_curves.py::test_plots_of_groups",
}


def commands():
    """(page, command, marked): the command lines in the pages' blocks; marked: a comment on the
    line or above it in the block says "on GPUs".
    """
    for page in USER_PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S):
            marked = False
            for line in block.replace("\\\n", " ").splitlines():
                command, _, comment = re.sub(" +", " ", line).partition(
                    " #" if not line.startswith("#") else "#"
                )
                marked |= line.startswith("#") and "on GPUs" in comment
                if PROGRAM.match(command) and not language:
                    yield page, command.strip(), marked or "on GPUs" in comment


def test_every_command_of_the_pages_is_run_or_says_that_it_needs_gpus():
    found = list(commands())
    assert len(found) > 25
    homeless = [
        (page.name, command)
        for page, command, marked in found
        if command not in RUN_HERE
        and not marked
        and not any(command.startswith(begin) for begin in RUN_ELSEWHERE)
    ]
    assert not homeless, homeless
    for begin, place in RUN_ELSEWHERE.items():
        assert any(command.startswith(begin) for _, command, _ in found), (
            f"on no page any more: {begin}"
        )
        path, _, function = place.partition("::")
        text = (ROOT / path).read_text()
        assert (
            f"def {function}(" in text
            if function
            else begin.split(" ... ")[0].removeprefix("make ") in text
        ), place


@pytest.mark.parametrize("command", RUN_HERE)
def test_commands_of_the_pages_run(command, corpus, tmp_path):
    assert command in [found for _, found, _ in commands()]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    for name in ("tools", "examples", "megatron_tst", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    if "Qwen3-8B" in command:
        (tmp_path / "Qwen3-8B").mkdir()
        (tmp_path / "Qwen3-8B" / "config.json").write_text(json.dumps(QWEN3_8B))
        (tmp_path / "data").mkdir()
        for suffix in (".bin", ".idx"):
            (tmp_path / "data" / f"text_document{suffix}").symlink_to(f"{corpus}{suffix}")
    command = command.replace("...", "--preset 600m")
    done = subprocess.run(
        [sys.executable, *command.split()[1:]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0 and done.stdout, done.stdout + done.stderr
    if "plot.py" in command:  # what it prints is what the page shows, but for the figure's name
        page = (ROOT / "docs/results.md").read_text()
        assert (
            done.stdout.rpartition("docs/images")[0] in page
            and (tmp_path / done.stdout.split()[-1]).stat().st_size > 10_000
        )


QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
}
