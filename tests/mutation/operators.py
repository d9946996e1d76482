"""Faults that cosmic-ray's own operators do not make: something left out.

A statement that does something (a call, an assignment to an attribute or an item, `+=`, a raise), a
keyword argument, what a function returns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from cosmic_ray.operators.operator import Example, Operator
from parso.python.tree import Keyword, Leaf, Name, PythonNode

Position = tuple[tuple[int, int], tuple[int, int]]


def _keyword(value: str, instead_of: Leaf | PythonNode) -> Keyword:
    keyword = Keyword(value, instead_of.start_pos, instead_of.get_first_leaf().prefix)
    keyword.parent = instead_of.parent
    return keyword


class _Replaced(Operator):
    """Replaces a node of the syntax tree by a keyword."""

    keyword: str

    @abstractmethod
    def found(self, node: PythonNode) -> bool:
        """Whether this node is replaced."""

    def mutation_positions(self, node: PythonNode) -> Iterator[Position]:
        if node.parent is not None and self.found(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node: PythonNode, index: int) -> Keyword:
        return _keyword(self.keyword, node)


class LeaveOutStatement(_Replaced):
    """`do(it)`, `a.b = c`, `a[i] = c`, `a += b` and `raise e` become `pass`."""

    keyword = "pass"

    def found(self, node):
        if node.parent.type != "simple_stmt":
            return False
        if node.type == "raise_stmt":
            return True
        if node.type == "expr_stmt":  # a plain name's assignment left out is a NameError later
            target, operator = node.children[:2]
            return target.type in ("power", "atom_expr") or (
                operator.type == "operator"
                and (operator.value != "=" and operator.value.endswith("="))
            )
        return node.type in ("power", "atom_expr", "yield_expr", "await")

    @classmethod
    def examples(cls):
        return (
            Example("do(it)\n", "pass\n"),
            Example("a.b = 1\n", "pass\n"),
            Example("raise ValueError(a)\n", "pass\n"),
        )


class ReturnNothing(_Replaced):
    """`return x` becomes `return None`."""

    keyword = "None"

    def found(self, node):
        is_value = node.parent.type == "return_stmt" and node is node.parent.children[1]
        return is_value and node.get_code().strip() != "None"

    def mutate(self, node, index):
        keyword = super().mutate(node, index)
        keyword.prefix = " "
        return keyword

    @classmethod
    def examples(cls):
        return (Example("def f():\n    return x\n", "def f():\n    return None\n"),)


class LeaveOutArgument(Operator):
    """`f(a, b=c)` becomes `f(a)`, where f has a default of b or goes on without."""

    def mutation_positions(self, node):
        if _is_keyword_argument(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        return Name("**{}", node.start_pos, node.get_first_leaf().prefix)

    @classmethod
    def examples(cls):
        return (Example("f(a, b=c)", "f(a, **{})"),)


def _is_keyword_argument(node):
    if node.type != "argument" or getattr(node.children[1], "value", None) != "=":
        return False
    return node.parent is not None and node.parent.type in ("arglist", "trailer")


class Provider:
    """cosmic-ray's interface to a set of operators."""

    _operators = {cls.__name__: cls for cls in (LeaveOutStatement, ReturnNothing, LeaveOutArgument)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._operators)

    def __getitem__(self, name: str) -> type[Operator]:
        return self._operators[name]
