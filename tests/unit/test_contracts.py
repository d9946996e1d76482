"""What import-linter cannot hold: only loop/patch.py and cpu.py assign into megatron.* (its
contracts are in pyproject.toml, docs/design.md describes them).
"""

import ast

import pytest
from support.runs import ROOT

ALLOWED = {"loop/patch.py", "cpu.py"}


def root_of(node):
    """The name that an expression a.b[c].d begins with, or None."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def assignments_into_megatron(source):
    """Lines of `source` that assign to, or call setattr on, what is imported from Megatron."""
    tree = ast.parse(source)
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [name for name in node.names if name.name.split(".")[0] == "megatron"]
            imported |= {name.asname or "megatron" for name in names}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            imported |= {name.asname or name.name for name in node.names}
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr"):
            targets = [ast.Attribute(node.args[0], "any")]
        for target in targets:
            if not isinstance(target, ast.Name) and root_of(target) in imported:
                yield node.lineno


def test_nothing_else_assigns_into_megatron():
    package = ROOT / "megatron_tst"
    found = {
        name: lines
        for path in package.rglob("*.py")
        if (name := str(path.relative_to(package))) not in ALLOWED
        and (lines := list(assignments_into_megatron(path.read_text())))
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import megatron.training\nmegatron.training.pretrain = ours",
        "from megatron.training import training as loop\nloop.train_step = ours",
        "def f():\n    from megatron.core import mpu\n    setattr(mpu.Group, 'size', 2)",
        "import megatron.core.utils as utils\nutils.__dict__['name'] = ours",
    ],
)
def test_an_assignment_is_found(source):
    assert list(assignments_into_megatron(source))
    assert not list(assignments_into_megatron(source.replace("megatron", "elsewhere")))
