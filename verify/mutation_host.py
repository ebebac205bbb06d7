"""Mutants of launchers and of code around them: operands exchanged, conversions and options lost.

An operator maps a node to (node that is replaced, replacement, what is wrong).
"""

import ast
import copy
from collections.abc import Iterator

from .mutation_operators import HOST_OPERATORS as ARITHMETIC
from .mutation_operators import Change, Operator

_SYMMETRIC = frozenset({"min", "max", "zip", "isinstance", "getattr", "hasattr"})
_REFUSALS = frozenset({"require_supported"})
"""Calls that compute nothing and refuse what no check asks for."""
_NO_TENSORS = frozenset({"activation", "call", "down", "gate_up", "operation", "plan", "routing"})
_NO_TENSORS |= {"dy_order", "rows", "scaling"}
_CONVERSIONS = frozenset({"contiguous", "to", "float", "long", "reshape", "clamp", "_replace"})
_OPTIONS = frozenset({"bias", "row_scale", "gates", "scale", "low_rank"})
_OTHERS = {
    "TOKEN": "SLOT",
    "SLOT": "EXPERT",
    "EXPERT": "SLOT",
    "source": "target",
    "target": "source",
    "float32": "float16",
    "mT": "",
}


def exchanged(node: ast.AST) -> Iterator[Change]:
    """Two operands that stand side by side, in each other's place."""
    if not isinstance(node, ast.Call) or _name(node.func) in _SYMMETRIC | _REFUSALS:
        return
    for place, (left, right) in enumerate(zip(node.args, node.args[1:], strict=False)):
        if not (_tensor(left) and _tensor(right)) or ast.dump(left) == ast.dump(right):
            continue
        new = copy.copy(node)
        new.args = list(node.args)
        new.args[place : place + 2] = [right, left]
        yield node, new, f"{ast.unparse(left)} and {ast.unparse(right)} exchanged"


def conversion(node: ast.AST) -> Iterator[Change]:
    """A conversion of an operand left out."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return
    if node.func.attr in _CONVERSIONS:
        yield node, node.func.value, f".{node.func.attr}() left out"


def option(node: ast.AST) -> Iterator[Change]:
    """An operand that may be absent, absent."""
    if isinstance(node, ast.Call):
        for word in node.keywords:
            if word.arg in _OPTIONS and not _is_none(word.value):
                yield word.value, ast.Constant(None), f"{word.arg} not passed on"


def attribute(node: ast.AST) -> Iterator[Change]:
    """Another order of rows, the other end of a product, another dtype."""
    if isinstance(node, ast.Attribute) and _OTHERS.get(node.attr):
        new = ast.Attribute(value=node.value, attr=_OTHERS[node.attr], ctx=ast.Load())
        yield node, new, f"{_OTHERS[node.attr]} for {node.attr}"


def reassignment(node: ast.AST) -> Iterator[Change]:
    """A value left as it was."""
    if not (isinstance(node, ast.Assign) and len(node.targets) == 1):
        return
    target = node.targets[0]
    names = {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}
    if isinstance(target, ast.Name) and target.id in names:
        yield node, None, f"{target.id} left as it was"


def _tensor(node: ast.expr) -> bool:
    """What may be a tensor or an order of rows: exchanged with other things, calls only raise.

    What only tells remembered launches apart, a dtype or the form of an operand, is none either:
    their order in a key is free.
    """
    named = isinstance(node, ast.Name | ast.Attribute)
    name = _name(node)
    return named and name not in _NO_TENSORS and name != "dtype" and not name.endswith("_form")


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


OPERATORS: tuple[tuple[str, Operator], ...] = (
    *ARITHMETIC,
    ("exchanged", exchanged),
    ("conversion", conversion),
    ("option", option),
    ("attribute", attribute),
    ("reassignment", reassignment),
)
