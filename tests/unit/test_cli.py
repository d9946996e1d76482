"""The command: help, examples, exit codes, missing packages, doors of the checkout."""

import argparse
import ast
import json
import re
import shlex
import subprocess
import sys
from importlib import import_module

import pytest
from support.runs import ROOT

from megatron_tst import __version__, cli

LOG = """\
  global_batch_size ............................... 4
  seq_length ...................................... 8
 iteration       10/      10 | elapsed time per iteration (ms): 100.0 | lm loss: 4.5E+00 | x
 validation loss at iteration 10 | lm loss value: 4.0E+00 | x
"""
LLAMA = {
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "vocab_size": 8,
}
OPTIONAL = ("tokenizers", "matplotlib", "safetensors", "transformers", "modelopt", "tensorboard")


def module_of(verb):
    return import_module(f"megatron_tst.cli.{verb.replace('-', '_')}")


def examples_of(verb):
    """Command lines in the help of a verb, without what stands before the verb's arguments."""
    text = module_of(verb).__doc__.replace("\\\n", " ")
    lines = re.findall(rf"^    .*?(?:megatron-tst|-m megatron_tst) {verb}(?: .*)?$", text, re.M)
    return [shlex.split(line.partition(f" {verb}")[2]) for line in lines]


class Parsed(BaseException):
    """Carries what argparse made of a command line out of a verb before it does anything."""


def parsed(monkeypatch, main, argv):
    """The Namespace that a verb's parser makes of these arguments."""

    def stop(self, args=None, namespace=None, parse=argparse.ArgumentParser.parse_args):
        raise Parsed(vars(parse(self, args, namespace)))

    with monkeypatch.context() as patch, pytest.raises(Parsed) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        main(argv)
    return caught.value.args[0]


def refused(capsys, *argv):
    """The line with which the command refuses these arguments."""
    capsys.readouterr()
    assert cli.main(list(map(str, argv))) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, said
    return said.err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_is_one_screen_with_an_example_that_parses(verb, capsys, monkeypatch):
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and lines[0].startswith(f"usage: megatron-tst {verb} ")
    assert len(lines) <= 40 and max(map(len, lines)) <= 100, (len(lines), max(lines, key=len))
    examples = examples_of(verb)
    assert examples, "no example"
    for example in examples:
        found = parsed(monkeypatch, cli.main, [verb, *example])
        for flag in (word for word in example if word.startswith("--")):
            name, of_the_script = flag[2:].replace("-", "_"), found.get("arguments", [])
            assert found.get(name) or flag in of_the_script, (flag, found)


def test_help_needs_neither_torch_nor_an_extra():
    code = f"""
import contextlib, sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))
from megatron_tst import cli
for verb in cli.VERBS:
    with contextlib.suppress(SystemExit):
        cli.main([verb, "--help"])
print("torch" in sys.modules, "megatron.core" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False False"
    assert len(re.findall("^usage: ", done.stdout, re.M)) == len(cli.VERBS)


def test_the_command_itself(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron-tst {__version__}\n"
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in cli.VERBS) and len(text.splitlines()) <= 40
    assert cli.main([]) == 2 and capsys.readouterr().out == text
    line = refused(capsys, "plott")
    assert (
        line.startswith("megatron-tst: error: the verb: expected one of demo, ") and "plott" in line
    )


def test_python_m_and_the_console_script_are_the_same_function():
    done = subprocess.run(
        [sys.executable, "-m", "megatron_tst", "nothing"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith(
        "megatron-tst: error: the verb: expected"
    )
    assert 'megatron-tst = "megatron_tst.cli:main"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "argv, said",
    [
        (["verify", "one"], "verify: error: the following arguments are required: CHECKPOINT"),
        (["inspect", "x", "--jason"], "inspect: error: unrecognized arguments: --jason"),
        (["inspect", "/nowhere"], "inspect: error: /nowhere: expected a checkpoint folder"),
        (["boundary", "/nowhere", "x", "--format", "1"], "boundary: error: argument --format"),
        (["launch"], "launch: error: the following arguments are required: SCRIPT"),
        (["plot", "/nowhere"], "plot: error: a run: expected NAME=LOG with an existing log"),
        (["plot", "a=/nowhere"], "plot: error: a run: expected NAME=LOG with an existing log"),
        (["demo", "--device", "tpu"], "demo: error: argument --device: invalid choice: 'tpu'"),
        (["demo", "--out", "/proc/x"], "demo: error: /proc/x/gpt: expected a place that can be"),
        (["import-hf", "/nowhere", "x"], "import-hf: error: /nowhere: expected a Hugging Face"),
        (
            ["import-hf", "x", "y", "--layer-spec", "z"],
            "import-hf: error: --layer-spec: expected local or transformer_engine, got z",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, said, capsys):
    line = refused(capsys, *argv)
    assert line.startswith(f"megatron-tst {said}"), line
    if "argument" in said:
        assert f"`megatron-tst {argv[0]} --help` says more." in line


@pytest.fixture
def hidden(monkeypatch):
    """A function that makes a package look as if it were not installed."""

    def hide(package):
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return hide


@pytest.mark.parametrize(
    "package, install, argv",
    [
        ("matplotlib", "megatron-tst[demo]", "plot --output {here}/x.png a={here}/log"),
        ("tensorboard", "tensorboard", "plot --output {here}/x.png a={here}/events"),
        ("tokenizers", "megatron-tst[demo]", "corpus --output {here}/x --input {here}/text.txt"),
        ("tokenizers", "megatron-tst[demo]", "demo --out {here}/x"),
        ("matplotlib", "megatron-tst[demo]", "demo --out {here}/x"),
        ("safetensors", "megatron-tst[hf]", "import-hf {here}/model {here}/x"),
    ],
)
def test_a_missing_package_is_one_line(package, install, argv, hidden, tmp_path, capsys):
    (tmp_path / "log").write_text(LOG)
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "events").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    hidden(package)
    line = refused(capsys, *argv.format(here=tmp_path).split())
    assert f"{package}: expected an installed package" in line, line
    assert line.endswith(f"pip install '{install}'.\n"), line
    assert not list(tmp_path.glob("x*"))


OLD = [  # lines of launch scripts: door, arguments, the command's arguments
    ("convert_checkpoint", "inspect ck --json", "inspect ck --json"),
    (
        "convert_checkpoint",
        "boundary ck out --drop-optimizer --reset-optimizer --reinit embedding,head --seed 3 "
        "--layer-spec local --format 0.18 --drop-fp8-state --force",
        "boundary ck out --drop-optimizer --reset-optimizer --reinit embedding,head --seed 3 "
        "--layer-spec local --format 0.18 --drop-fp8-state --force",
    ),
    ("convert_checkpoint", "verify a b --weights-only", "verify a b --weights-only"),
    (
        "export_checkpoint",
        "hf ck out --tokenizer t --vocab-size 5 --allow-superposition --force --dtype float32",
        "export-hf ck out --tokenizer t --vocab-size 5 --allow-superposition --force --dtype "
        "float32",
    ),
    (
        "export_checkpoint",
        "nemo ck out --layer-spec local --drop-optimizer --tokenizer t",
        "export-nemo ck out --layer-spec local --drop-optimizer --tokenizer t",
    ),
    (
        "export_checkpoint",
        "import-hf model out --layer-spec local --force",
        "import-hf model out --layer-spec local --force",
    ),
    (
        "export_checkpoint",
        "quantize ck out --recipe fp8 --data-path p --samples 2 --sequence-length 4 --device cpu",
        "quantize ck out --recipe fp8 --data-path p --samples 2 --sequence-length 4 --device cpu",
    ),
    (
        "prepare_corpus",
        "--output p --input a b --vocab-size 300 --seed 2 --force",
        "corpus --output p --input a b --vocab-size 300 --seed 2 --force",
    ),
    (
        "plot_runs",
        "--output x.svg --title t --axes --parameters 5 a=b c=d",
        "plot --output x.svg --title t --axes --parameters 5 a=b c=d",
    ),
    (
        "demo",
        "--out o --architecture llama --device cuda --iterations 5 --seed 2",
        "demo --out o --architecture llama --device cuda --iterations 5 --seed 2",
    ),
]


@pytest.mark.parametrize("door, old, new", OLD)
def test_doors_of_the_checkout_lead_to_the_verbs(door, old, new, monkeypatch):
    through_the_door = parsed(monkeypatch, import_module(door).main, old.split())
    assert through_the_door == parsed(monkeypatch, cli.main, new.split())


def test_a_door_says_what_it_leads_to_and_refuses_in_its_own_name(capsys):
    import convert_checkpoint

    assert convert_checkpoint.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert [verb for verb in cli.VERBS if f"\n  {verb} " in said] == list(convert_checkpoint.VERBS)
    assert convert_checkpoint.main(["inspect", "/nowhere"]) == 2
    ours = capsys.readouterr().err
    assert refused(capsys, "inspect", "/nowhere") == ours.replace(
        "convert_checkpoint.py", "megatron-tst"
    )
    assert convert_checkpoint.main(["plot"]) == 2
    assert capsys.readouterr().err.startswith("convert_checkpoint.py: error: the verb: expected")


NOT_IN_THE_WHEEL = re.compile(r"\b(tools|examples|docs|benchmarks|tests)/\w|\w+_checkpoint\.py")


def texts(path):
    """Strings of a module that a user may see: all but docstrings; of verbs these too."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    unseen = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and node.body and "cli" not in path.parts:
            unseen |= {id(node.body[0].value)} if isinstance(node.body[0], ast.Expr) else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in unseen:
                yield node.lineno, node.value


def test_no_message_names_a_file_of_the_checkout():
    """A wheel has neither tools nor examples nor docs: messages name the command."""
    found = [
        (str(path.relative_to(ROOT)), line, text)
        for path in sorted((ROOT / "megatron_tst").rglob("*.py"))
        for line, text in texts(path)
        if NOT_IN_THE_WHEEL.search(text)
    ]
    assert not found, found
    for path in (ROOT / "csrc").iterdir():
        assert not NOT_IN_THE_WHEEL.search(path.read_text()), path
