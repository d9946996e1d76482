"""What a reader of the package's public functions can count on: types, docstrings, errors, examples
that are true.
"""

import ast
import doctest
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from support.runs import ROOT

from megatron_tst.ops import torch_kernel

PACKAGE = ROOT / "megatron_tst"
MODULES = sorted(PACKAGE.rglob("*.py"))


def public_functions(body: list[ast.stmt], prefix: str = ""):
    """(name, node) of functions and methods without a leading underscore, classes' __init__ with
    its class.
    """
    for node in body:
        if not hasattr(node, "name") or node.name.startswith("_"):
            continue
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield prefix + node.name, node
            yield from public_functions(node.body, f"{prefix}{node.name}.")


def signature(node) -> list[ast.FunctionDef]:
    """The functions whose types a caller sees: of a class, its __init__."""
    if isinstance(node, ast.FunctionDef):
        return [node]
    return [
        child
        for child in node.body
        if isinstance(child, ast.FunctionDef) and child.name == "__init__"
    ]


def without_types(function: ast.FunctionDef) -> list[str]:
    spec = function.args
    every = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
    found = [arg.arg for arg in every if arg is not None and arg.annotation is None]
    if function.returns is None and function.name != "__init__":
        found.append("return")
    return [name for name in found if name not in ("self", "cls", "ctx")]


def refuses(function: ast.FunctionDef) -> bool:
    """Whether an error is raised in its own lines, not in those of a function within."""
    waiting = list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            return True
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "refuse":
            return True
        waiting += ast.iter_child_nodes(node)
    return False


def faults(path: Path) -> list[str]:
    found = []
    for name, node in public_functions(ast.parse(path.read_text()).body):
        text = ast.get_docstring(node)
        if not text:
            found.append(f"{name}: no docstring")
        for function in signature(node):
            if missing := without_types(function):
                found.append(f"{name}: no types of {', '.join(missing)}")
            if refuses(function) and "Raises:" not in (text or ""):
                found.append(f"{name}: its docstring does not say what it raises")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_say_what_they_take_and_raise(path):
    assert not faults(path)


@pytest.mark.parametrize(
    "name",
    ["schedule", "config", "data.bags", "loop.switch", "export.architectures"],
)
def test_worked_examples_are_true(name):
    done = doctest.testmod(import_module(f"megatron_tst.{name}"))
    assert done.attempted and not done.failed


@pytest.mark.parametrize("alt", [False, True])
def test_the_worked_example_of_the_gradient(alt):
    """torch_kernel._write_gradient's: the bag names column 3 twice and column 1 once."""
    logits, labels = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log(), torch.tensor([[3, 3, 1]])
    weights, upstream = torch.ones(3), torch.ones(1)
    statistics = torch_kernel.statistics(logits, labels, weights, 0, 4, alt)
    _, saved = torch_kernel.loss(statistics.unsqueeze(0), labels, weights, alt)
    got = torch_kernel.gradient(logits, labels, weights, saved, upstream, 0, alt)
    assert got.tolist()[0] == pytest.approx([0.1, 0.2 - 1 / 3, 0.3, 0.4 - 2 / 3], abs=1e-6)


WITHOUT_TRAINING = """
import sys
sys.modules["megatron.training"] = None  # importing it is a ModuleNotFoundError
import torch
from megatron_tst import PhasedDataset, Schedule, TSTConfig, bag_view, target_weights
from megatron_tst import multi_hot_cross_entropy

plan = Schedule.of(4, iters=2, train_samples=6, seq_length=8, global_batch_size=2)
long = torch.arange(plan.long_sample_length)
text = [dict(tokens=long, labels=long + 1, loss_mask=torch.ones(len(long)))] * plan.long_samples
data = PhasedDataset(text, plan, TSTConfig(bag_size=4, iters=2))
assert data[0]["tokens"].shape == (8, 4) and data[5]["tokens"].shape == (8,)
assert target_weights("power-law", 4).tolist() == [1.0, 0.5, 1 / torch.tensor(3.0), 0.25]
tokens, labels = bag_view(torch.arange(33).unsqueeze(0), 8, 4)
assert multi_hot_cross_entropy(torch.zeros(1, 8, 40), labels).shape == (1, 8)
"""


def test_the_library_door_needs_no_megatron_training():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRAINING],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_public_name_is_there_and_no_other():
    import megatron_tst

    assert sorted(megatron_tst.__all__) == dir(megatron_tst)
    for name in megatron_tst.__all__:
        assert getattr(megatron_tst, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        megatron_tst.aply  # noqa: B018
    assert (PACKAGE / "py.typed").is_file()
