"""What the pages say against the code: flags and their defaults, verbs, flags that commands use,
files, links and their sections, messages that troubleshooting quotes, what is patched, the rooms.
Every command of a page is run, here or elsewhere. And how the pages are written: 100 columns, short
cells, plain words.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib

import pytest
from support.runs import ROOT

from megatron_tst import cli
from megatron_tst.config import add_tst_arguments
from megatron_tst.loop import seams

FOLDERS = ("benchmarks", "docs", "examples", "megatron_tst", "tests", "tools")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md"))),
]
HISTORY = ("LOG.md", "CHANGELOG.md")  # these name what is no longer there, too
USER_PAGES = [page for page in PAGES if page.name not in HISTORY]
NONE_OF_OURS = {  # torchrun, pip, pytest, sbatch
    "--nproc-per-node",
    "--nnodes",
    "--node-rank",
    "--master-addr",
    "--master-port",
    "--max-restarts",
    "--no-build-isolation",
    "--nodes",
    "--help",
}


def named(page):
    return str(page.relative_to(ROOT))


def each(pages):
    return pytest.mark.parametrize("page", pages, ids=named)


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
    programs = [
        "tests/**/conftest.py",
        "tests/mutation/*.py",
        *(f"{folder}/**/*" for folder in FOLDERS if folder != "tests"),
    ]
    for path in (path for pattern in programs for path in ROOT.glob(pattern)):
        if path.suffix in (".py", ".sh", ".sbatch"):
            options |= set(FLAG.findall(path.read_text()))
    return options


FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]+")


@each(USER_PAGES)
def test_flags_on_the_page_exist(page, known):
    assert not (unknown := sorted(set(FLAG.findall(page.read_text())) - known)), unknown


@each(PAGES)
def test_verbs_on_the_page_exist(page):
    """Of "megatron-tst VERB" in code."""
    verbs = set(re.findall(r"(?:^|`)megatron-tst ([a-z][a-z-]*)", page.read_text(), re.M))
    assert verbs <= set(cli.VERBS), verbs - set(cli.VERBS)


def sections(text):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each(PAGES)
def test_links_and_programs_on_the_page_exist(page):
    text = page.read_text()
    for target, section in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        assert (place := page.parent / target if target else page).exists(), target
        assert not section or section in sections(place.read_text()), (target, section)
    programs = re.findall(
        r"(?:^|\s)(?:python|pytest) ((?:tools|examples|benchmarks|tests)/[\w./-]+)", text, re.M
    )
    programs += re.findall(
        r"`((?:tools|examples|benchmarks|tests|megatron_tst|csrc)/[\w./-]+"
        r"\.(?:py|sh|sbatch|csv|toml|txt|cu|h|cpp))`",
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
        for entry in re.findall(
            r"^- (`.*?`): ", " ".join(refused.split()).replace(" - ", "\n- "), re.M
        )
        for part in re.findall(r"`([^`]+)`", entry)
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


def test_the_map_of_the_house_is_the_house():
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"^## The house\n\n```\n(.*?)^```", text, re.M | re.S)[1]
    inside = " ".join(re.findall(r"^  ((?:[\w.]+(?:/|\.py) +)+)", tree, re.M)).split()
    outside = re.findall(r"^([\w.]+/)", tree, re.M)
    package = ROOT / "megatron_tst"
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    modules = {path.name for path in package.glob("[!_]*.py")}
    assert sorted(inside) == sorted(rooms | modules)
    assert {*outside, "megatron_tst/"} == {f"{folder}/" for folder in (*FOLDERS, "csrc")}


def test_the_order_of_the_rooms_is_that_of_the_contracts():
    """docs/design.md says which room is above which; pyproject.toml holds it."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = (it["layers"] for it in contracts["contracts"] if it["type"] == "layers")
    place = {
        module.strip().removeprefix("megatron_tst."): level
        for level, layer in enumerate(layers)
        for module in layer.replace(":", "|").split("|")
    }
    text = " ".join((ROOT / "docs/design.md").read_text().split())
    said = re.search(r"pyproject.toml lists them: (.*?)\. A room may", text)[1]
    rooms = [word for word in re.findall(r"\w+", said) if word in place]
    assert len(rooms) >= 8 and [place[room] for room in rooms] == sorted(
        place[room] for room in rooms
    )


def test_what_is_patched_is_on_the_page():
    text = (ROOT / "docs/patch_points.md").read_text()
    found = {name: seam for name, seam in vars(seams).items() if isinstance(seam, seams.Seam)}
    groups = {
        "in the model": [name for name in found if name in ("EMBEDDING", "LOSS")],
        "for multi-token prediction": [name for name in found if name.startswith("MTP_")],
        "for graphs of whole steps": [name for name in found if name == "FULL_GRAPH"],
        "for the fused loss": [name for name in found if name.endswith("_FORWARD")],
    }
    groups["in the training loop"] = [
        name for name in found if not any(name in names for names in groups.values())
    ]
    for group, names in groups.items():
        assert f"**{len(names)} {group}**" in text, (group, names)
        section = text.partition(f"## {group.capitalize()}\n")[2].partition("\n## ")[0]
        for name in names:
            assert f"{found[name].name}`" in section, (group, name)


def test_the_ten_lines_of_the_readme_are_the_examples():
    """What stands in README is what examples/own_loop.py runs."""
    program = (ROOT / "examples/own_loop.py").read_text()
    lines = re.search(
        r"^ *# --- the essential lines[^\n]*\n(.*?)^ *# --- end", program, re.M | re.S
    )[1]
    text = (ROOT / "README.md").read_text()
    shown = re.search(r"own_loop\.py`[^`]*```python\n(.*?)^```", text, re.M | re.S)[1]
    assert textwrap.dedent(lines).strip() == shown.strip()


WIDTH, WORDS = 100, 15
NOT_PLAIN = re.compile(r"\b(hang(s|ing)? on|of which|homeless|but for)\b", re.I)


def faults_of_style(text):
    """(line or None, fault) of a page: lines over 100 columns, cells of over 15 words, words that
    are not plain, chains of semicolons. Not of code in fences; a line without a space cannot break.
    """
    fence = re.compile(r"^```.*?^```", re.M | re.S)
    prose = fence.sub(lambda block: "\n" * block[0].count("\n"), text)
    for number, line in enumerate(prose.splitlines(), 1):
        rest = re.sub(r"^\s*([-*>]|\d+\.)?\s*", "", line)
        if len(line) > WIDTH and " " in rest:
            yield number, f"{len(line)} columns"
        for cell in re.split(r"(?<!\\)\|", line)[1:-1] if line.startswith("|") else ():
            words = re.sub(r"\]\([^)]*\)", "]", cell).split()
            if len(words) > WORDS:
                yield number, f"a cell of {len(words)} words: {' '.join(words[:6])} ..."
    for match in NOT_PLAIN.finditer(" ".join(prose.split())):
        yield None, f"not plain: {match[0]}"
    for part in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|[|]", re.sub(r"`[^`]*`", "x", prose)):
        for sentence in re.split(r"(?<=[.!?:])\s", part):
            if sentence.count(";") > 1:
                yield None, f"a chain of semicolons: {' '.join(sentence.split())[:70]}"


@each(PAGES)
def test_the_page_is_written_plainly(page):
    assert not (faults := list(faults_of_style(page.read_text()))), faults


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("word " * 21 + "\n", "105 columns"),
        ("- " + "x" * 120 + "\n", None),  # cannot break
        ("```\n" + "word " * 30 + "\n```\n", None),
        ("| a | b |\n|---|---|\n| " + "w " * 16 + "| x |\n", "a cell of 16 words"),
        ("| a | b |\n|---|---|\n| " + "w " * 15 + "| x |\n", None),
        ("It hangs\non a nail.\n", "hangs on"),
        ("Ten files, of which two are new.\n", "of which"),
        ("Nothing but for this.\n", "but for"),
        ("One; two; three.\n", "semicolons"),
        ("One; two. Three; four `a;b;c`.\n", None),
    ],
)
def test_faults_of_style_are_found(text, fault):
    found = [said for _, said in faults_of_style(text)]
    assert not found if fault is None else len(found) == 1 and fault in found[0], found


PROGRAM = re.compile(
    r"(?:[A-Z_]+=(?:\"[^\"]*\"|\S+) +)*"
    r"(?:python|make|pip|torchrun|bash|sbatch|pytest|megatron-tst|(?:examples|tools)/\w+\.sh)"
    r"(?![\w.])"
)
RUN_HERE = [
    "megatron-tst plan --preset moe-10b-a1b",
    "megatron-tst plan --preset 3b --tokens 80B --gpu h100 --gpus 64 --mfu 0.4",
    "megatron-tst plan --hf-config Qwen3-8B/config.json --seq-length 4096 --global-batch-size 1024 "
    "--train-iters 40000 --data-path data/text_document --gpus 128 --tflops 420",
    "megatron-tst plan ... --sweep",
    *(
        f"python examples/experiments/plot.py benchmarks/data/experiments.csv --question "
        f"{question} --output docs/images/{question}.png"
        for question in ("equal_flops", "superpose", "boundary_state")
    ),
]
STOCK = "tests/checkpoint/test_stock.py::test_three_ways_over_the_boundary"
EXPORT = "tests/checkpoint/test_export_hf.py::test_killed_at_any_moment"
# how the command begins: the test that runs it (with sizes of its own), or what calls it
RUN_ELSEWHERE = {
    "make demo": "tests/training/test_tools.py::test_demo",
    "make test": ".ci/run",
    "make matrix": "tests/distributed/test_parallel_tools.py::test_the_page_is_not_stale",
    "pip install": "Makefile",
    "pytest tests/distributed": "Makefile",
    "torchrun ... -m megatron_tst.launch pretrain_gpt.py $ARGS --save ck": STOCK,
    "megatron-tst boundary ck ck_stock": STOCK,
    "torchrun ... pretrain_gpt.py $ARGS --load ck_stock": STOCK,
    "megatron-tst export-hf CHECKPOINT": EXPORT,
    "megatron-tst export-nemo CHECKPOINT": EXPORT,
    "megatron-tst import-hf FOLDER": EXPORT,
    "megatron-tst quantize CHECKPOINT": "tests/peers/quantize_jobs.py::kill",
    "python -m megatron_tst.launch pretrain_gpt.py": (
        "tests/training/test_launch.py::test_megatron_lms_own_script"
    ),
    "DRY_RUN=1 examples/3b.sh": "tests/training/test_recipes.py::test_dry_run_from_the_shell",
    "MEGATRON_LM=/path/to/Megatron-LM examples/prepare_data.sh": (
        "tests/training/test_recipes.py::test_prepare_data"
    ),
    "python $E/run.py": "tests/training/test_experiments.py::test_rows_say_what_was_run",
    "python $E/plot.py": "tests/unit/test_questions.py::test_the_experiments_figure",
    "megatron-tst plot --output curves.png baseline=$BASE": (
        "tests/unit/test_plots.py::test_the_verb_draws_what_the_logs_say"
    ),
}


def quick_start():
    """The commands of the quick start that need no GPU, in order."""
    found = [(command, marked) for page, command, marked in commands() if page.stem == "quickstart"]
    return [it for it, marked in found if it.startswith("megatron-tst ") and not marked]


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
    nowhere = [
        (page.name, command)
        for page, command, marked in found
        if command not in RUN_HERE + quick_start()
        and not marked
        and not any(command.startswith(begin) for begin in RUN_ELSEWHERE)
    ]
    assert not nowhere, nowhere
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
    for name in ("tools", "examples", "megatron_tst", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    if "Qwen3-8B" in command:
        (tmp_path / "Qwen3-8B").mkdir()
        (tmp_path / "Qwen3-8B" / "config.json").write_text(json.dumps(QWEN3_8B))
        (tmp_path / "data").mkdir()
        for suffix in (".bin", ".idx"):
            (tmp_path / "data" / f"text_document{suffix}").symlink_to(f"{corpus}{suffix}")
    done = run(command.replace("...", "--preset 600m"), tmp_path)
    if "plot.py" in command:  # what it prints is what the page shows, except the figure's name
        page = (ROOT / "docs/results.md").read_text()
        assert (
            done.stdout.rpartition("docs/images")[0] in page
            and (tmp_path / done.stdout.split()[-1]).stat().st_size > 10_000
        )


def run(command, folder):
    """Run `megatron-tst ...` or `python ...` in `folder`, with this Python. -> what it printed"""
    program, *rest = command.split()
    module = ["-m", "megatron_tst"] if program == "megatron-tst" else []
    done = subprocess.run(
        [sys.executable, *module, *rest],
        capture_output=True,
        text=True,
        cwd=folder,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 0 and done.stdout, (command, done.stdout, done.stderr)
    return done


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quick_start_runs_from_its_first_command_to_its_last(tmp_path):
    """In one empty folder, without a checkout; the demo with 20 iterations in place of 1000."""
    made = ["demo_out/llama/loss.png", "demo_out/llama/hf/config.json", "curves.png"]
    walk = quick_start()
    assert [command.split()[1] for command in walk] == [
        *("doctor", "demo", "inspect", "export-hf", "boundary", "verify", "corpus", "plot", "plan")
    ]
    for command in walk:
        run(f"{command} --iterations 20" if " demo " in command else command, tmp_path)
    assert all((tmp_path / name).stat().st_size for name in made)


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
