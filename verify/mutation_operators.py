"""Mutants of source text: one small change of one node of a function's syntax tree each.

An operator maps a node to (node that is replaced, replacement, what is wrong). A replacement of
None deletes a statement. Only the text of the replaced node changes, so a diff is short.
"""

import ast
import copy
import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Change = tuple[ast.AST, ast.AST | None, str]
Operator = Callable[[ast.AST], Iterator[Change]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """Bytes start .. stop of `file` (UTF-8), in `function`, become `text`.

    `id` names the edit by what it changes, so that it stays the same when other lines move.
    """

    id: str
    file: str
    function: str
    operator: str
    what: str
    line: int
    start: int
    stop: int
    text: str

    def apply(self, source: str) -> str:
        """The mutated source."""
        data = source.encode()
        return (data[: self.start] + self.text.encode() + data[self.stop :]).decode()


def unified_diff(file: str, old: str, new: str) -> str:
    """A change of a file as a unified diff with one line of context."""
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), f"a/{file}", f"b/{file}", n=1, lineterm=""
    )
    return "\n".join(lines)


def edits(
    file: str, source: str, function: ast.FunctionDef, operators: Sequence[tuple[str, Operator]]
) -> Iterator[Edit]:
    """Every edit that the operators make in the body of a function, each text once."""
    data = source.encode()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    seen: set[str] = set()
    count: dict[str, int] = {}
    for node in _body_nodes(function):
        for operator, changes in operators:
            for target, replacement, what in changes(node):
                start, stop = _span(target, starts)
                old = data[start:stop].decode()
                new = _text(replacement, parents.get(target))
                mutated = data[:start] + new.encode() + data[stop:]
                if mutated.decode() in seen or _same(old, new):
                    continue
                seen.add(mutated.decode())
                key = f"{file}:{function.name}:{operator}:{_one_line(old)} -> {_one_line(new)}"
                count[key] = count.get(key, 0) + 1
                yield Edit(
                    id=key if count[key] == 1 else f"{key} #{count[key]}",
                    file=file,
                    function=function.name,
                    operator=operator,
                    what=what,
                    line=getattr(target, "lineno", 0),
                    start=start,
                    stop=stop,
                    text=new,
                )


def _body_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Nodes in the order of the text, without docstring, annotations and what raises."""
    waiting: list[ast.AST] = list(reversed(function.body))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Raise | ast.Assert) or _is_text(node):
            continue
        yield node
        waiting.extend(reversed(list(ast.iter_child_nodes(node))))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _span(node: ast.AST, starts: Sequence[int]) -> tuple[int, int]:
    assert isinstance(node, ast.expr | ast.stmt)
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return (
        starts[node.lineno - 1] + node.col_offset,
        starts[node.end_lineno - 1] + node.end_col_offset,
    )


def _text(replacement: ast.AST | None, parent: ast.AST | None) -> str:
    if replacement is None:
        return "pass"
    text = ast.unparse(replacement)
    compound = ast.BinOp | ast.BoolOp | ast.Compare | ast.IfExp | ast.UnaryOp
    if isinstance(replacement, compound) and isinstance(
        parent, ast.BinOp | ast.UnaryOp | ast.Compare | ast.Attribute | ast.Subscript | ast.BoolOp
    ):
        return f"({text})"
    return text


def _same(old: str, new: str) -> bool:
    try:
        return ast.dump(ast.parse(old)) == ast.dump(ast.parse(new))
    except SyntaxError:
        return old == new


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 90 else f"{line[:60]}...{line[-27:]}"


def _called(node: ast.AST, *names: str) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in names
    )


def _in_tl(node: ast.AST, *names: str) -> bool:
    return (
        _called(node, *names)
        and isinstance(node.func, ast.Attribute)  # type: ignore[attr-defined]
        and isinstance(node.func.value, ast.Name)  # type: ignore[attr-defined]
        and node.func.value.id == "tl"  # type: ignore[attr-defined]
    )


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _binary(left: ast.expr, operator: ast.operator, right: ast.expr) -> ast.BinOp:
    return ast.BinOp(left=left, op=operator, right=right)


def _plus(node: ast.expr, value: int) -> ast.BinOp:
    operator = ast.Add() if value > 0 else ast.Sub()
    return _binary(node, operator, ast.Constant(abs(value)))


def _without(call: ast.Call, *keywords: str) -> ast.Call:
    new = copy.copy(call)
    new.keywords = [word for word in call.keywords if word.arg not in keywords]
    return new


def _with(call: ast.Call, keyword: str, value: ast.expr) -> ast.Call:
    new = copy.copy(call)
    new.keywords = [
        ast.keyword(arg=word.arg, value=value) if word.arg == keyword else word
        for word in call.keywords
    ]
    return new


def _keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((word.value for word in call.keywords if word.arg == name), None)


_COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}


def comparison(node: ast.AST) -> Iterator[Change]:
    """< to <=, == to !=."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        flipped = _COMPARED.get(type(node.ops[0]))
        if flipped is not None:
            new = copy.copy(node)
            new.ops = [flipped()]
            yield node, new, "comparison changed"


def mask(node: ast.AST) -> Iterator[Change]:
    """A load or store without its mask."""
    if _in_tl(node, "load", "store"):
        assert isinstance(node, ast.Call)
        if _keyword(node, "mask") is not None:
            yield node, _without(node, "mask", "other"), "mask dropped"


def other(node: ast.AST) -> Iterator[Change]:
    """Another fill value for what is masked."""
    if _in_tl(node, "load"):
        assert isinstance(node, ast.Call)
        value = _keyword(node, "other")
        if isinstance(value, ast.Constant):
            real = isinstance(value.value, float)
            new = _expression('float("nan")') if real else _expression("1")
            yield node, _with(node, "other", new), "masked elements filled with another value"


def offset(node: ast.AST) -> Iterator[Change]:
    """An address or a range off by one."""
    if _in_tl(node, "load", "store"):
        assert isinstance(node, ast.Call)
        yield node.args[0], _plus(node.args[0], 1), "address off by one"
    elif _in_tl(node, "arange"):
        assert isinstance(node, ast.Call)
        yield node, _plus(node, 1), "range off by one"
    elif _called(node, "load") and isinstance(node, ast.Call):
        for part in node.args:
            for element in part.elts if isinstance(part, ast.List) else ():
                yield element, _plus(element, 1), "place in the tensor map off by one"


_STRIDES = {"row": "col", "col": "row", "expert": "row"}


def stride(node: ast.AST) -> Iterator[Change]:
    """The stride of another dimension."""
    if isinstance(node, ast.Attribute) and node.attr in _STRIDES:
        new = ast.Attribute(value=node.value, attr=_STRIDES[node.attr])
        yield node, new, f"stride of the {_STRIDES[node.attr]} for that of the {node.attr}"


_SWAPPED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.FloorDiv: ast.Mod,
    ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_COMMUTING = ast.Mult | ast.BitAnd | ast.BitOr


def arithmetic(node: ast.AST) -> Iterator[Change]:
    """Another operation, or an operand lost: a scale, a stride, one condition of a mask."""
    if not isinstance(node, ast.BinOp):
        return
    swapped = _SWAPPED.get(type(node.op))
    if swapped is not None:
        new = _binary(node.left, swapped(), node.right)
        yield node, new, f"{swapped.__name__} for {type(node.op).__name__}"
    yield node, node.left, f"{_one_line(ast.unparse(node.right))} lost"
    if isinstance(node.op, _COMMUTING):
        yield node, node.right, f"{_one_line(ast.unparse(node.left))} lost"


def augmented(node: ast.AST) -> Iterator[Change]:
    """+= as = or -=, or left out."""
    if not isinstance(node, ast.AugAssign):
        return
    yield node, ast.Assign(targets=[node.target], value=node.value, lineno=0), "overwritten"
    yield node, None, "left out"
    if isinstance(node.op, ast.Add):
        new = ast.AugAssign(target=node.target, op=ast.Sub(), value=node.value)
        yield node, new, "subtracted"


def accumulator(node: ast.AST) -> Iterator[Change]:
    """Sums kept in 16 bits, or lost from step to step."""
    if isinstance(node, ast.Assign) and _in_tl(node.value, "dot"):
        call = node.value
        assert isinstance(call, ast.Call)
        kind = _expression(f"({ast.unparse(call.args[0])}).dtype")
        yield call, _rounded(call, kind), "sum rounded to the dtype of the operands in every step"
        lost = copy.copy(call)
        lost.args = call.args[:2]
        yield call, lost, "earlier steps lost"
    if isinstance(node, ast.AugAssign) and getattr(node.target, "id", "") in ("acc", "dot"):
        assert isinstance(node.target, ast.Name)
        total = _binary(node.target, node.op, node.value)
        new = _rounded(total, _expression("tl.bfloat16"))
        assign = ast.Assign(targets=[node.target], value=new, lineno=0)
        yield node, assign, "sum kept in 16 bits"


def _rounded(value: ast.expr, kind: ast.expr) -> ast.expr:
    def cast(inner: ast.expr, to: ast.expr) -> ast.Call:
        return ast.Call(func=ast.Attribute(value=inner, attr="to"), args=[to], keywords=[])

    return cast(cast(value, kind), _expression("tl.float32"))


def cast(node: ast.AST) -> Iterator[Change]:
    """A conversion left out."""
    if _called(node, "to"):
        assert isinstance(node, ast.Call)
        assert isinstance(node.func, ast.Attribute)
        yield node, node.func.value, f"conversion to {ast.unparse(node.args[0])} left out"


def branch(node: ast.AST) -> Iterator[Change]:
    """A branch always or never taken."""
    if isinstance(node, ast.If):
        yield node.test, _expression("False"), "branch never taken"
        yield node.test, _expression("True"), "branch always taken"


def loop(node: ast.AST) -> Iterator[Change]:
    """A loop without its first or last step."""
    if not isinstance(node, ast.For) or not isinstance(node.iter, ast.Call):
        return
    call = node.iter
    if len(call.args) == 3:
        first, stop, step = call.args
        yield stop, _binary(stop, ast.Sub(), step), "last step left out"
        yield first, _binary(first, ast.Add(), step), "first step left out"
    elif len(call.args) == 1:
        yield call.args[0], _plus(call.args[0], -1), "last step left out"
        new = copy.copy(call)
        new.args = [ast.Constant(1), call.args[0]]
        yield call, new, "first step left out"


_NEIGHBOURS = (
    "expert",
    "program",
    "chunk",
    "group",
    "slot",
    "token",
    "begin",
    "end",
    "first",
    "row",
)


def neighbour(node: ast.AST) -> Iterator[Change]:
    """The next expert, slot, token, or row."""
    if isinstance(node, ast.BinOp):
        for name in (node.left, node.right):
            if isinstance(name, ast.Name) and name.id in _NEIGHBOURS:
                yield name, _plus(name, 1), f"the {name.id} after the right one"
    for argument in getattr(node, "args", ()) if isinstance(node, ast.Call) else ():
        if isinstance(argument, ast.Name) and argument.id in _NEIGHBOURS:
            yield argument, _plus(argument, 1), f"the {argument.id} after the right one"


_PAIRS = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min"}


def extremum(node: ast.AST) -> Iterator[Change]:
    """min for max."""
    if isinstance(node, ast.Call):
        func = node.func
        name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
        if name in _PAIRS:
            new = copy.copy(node)
            new.func = copy.copy(func)
            setattr(new.func, "attr" if isinstance(func, ast.Attribute) else "id", _PAIRS[name])
            yield node, new, f"{_PAIRS[name]} for {name}"


def selection(node: ast.AST) -> Iterator[Change]:
    """The branches of a where or of an expression swapped."""
    if _in_tl(node, "where"):
        assert isinstance(node, ast.Call)
        new = copy.copy(node)
        new.args = [node.args[0], node.args[2], node.args[1]]
        yield node, new, "choices swapped"
    if isinstance(node, ast.IfExp):
        new_expression = copy.copy(node)
        new_expression.body, new_expression.orelse = node.orelse, node.body
        yield node, new_expression, "choices swapped"


def negation(node: ast.AST) -> Iterator[Change]:
    """A negation left out; True for False."""
    negated = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert | ast.USub)
    if negated and not isinstance(node.operand, ast.Constant):  # type: ignore[attr-defined]
        yield node, node.operand, "negation left out"  # type: ignore[attr-defined]
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, ast.Constant(not node.value), f"{not node.value} for {node.value}"


def transposition(node: ast.AST) -> Iterator[Change]:
    """A transposition left out."""
    if isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
        yield node, node.value, "transposition left out"


def statement(node: ast.AST) -> Iterator[Change]:
    """A store or a call left out."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield node, None, "left out"


def constant(node: ast.AST) -> Iterator[Change]:
    """Another number, in arithmetic, comparisons, assignments and plain arguments."""
    places: list[ast.expr] = []
    if isinstance(node, ast.BinOp):
        places = [node.left, node.right]
    elif isinstance(node, ast.Compare):
        places = [node.left, *node.comparators]
    elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        places = [node.value]
    elif isinstance(node, ast.Call) and not _in_tl(node, "arange", "zeros", "range", "load"):
        reductions = _in_tl(node, "gather", "sum", "cumsum", "reshape")
        named = isinstance(node.func, ast.Name) and node.func.id == "range"
        places = [] if reductions or named else list(node.args)
    for place in places:
        value = getattr(place, "value", None)
        if isinstance(place, ast.Constant) and not isinstance(value, bool | str | bytes):
            if isinstance(value, int):
                yield place, ast.Constant(value + 1), f"{value + 1} for {value}"
            elif isinstance(value, float):
                yield place, ast.Constant(2 * value or 1.0), f"{2 * value or 1.0} for {value}"


KERNEL_OPERATORS: tuple[tuple[str, Operator], ...] = (
    ("comparison", comparison),
    ("mask", mask),
    ("other", other),
    ("offset", offset),
    ("stride", stride),
    ("arithmetic", arithmetic),
    ("augmented", augmented),
    ("accumulator", accumulator),
    ("cast", cast),
    ("branch", branch),
    ("loop", loop),
    ("neighbour", neighbour),
    ("extremum", extremum),
    ("selection", selection),
    ("negation", negation),
    ("transposition", transposition),
    ("statement", statement),
    ("constant", constant),
)


def scaling(node: ast.AST) -> Iterator[Change]:
    """A scale of one, a fan-out of one."""
    if isinstance(node, ast.Call):
        func = node.func
        if isinstance(func, ast.Name) and func.id == "float":
            yield node, ast.Constant(1.0), f"{ast.unparse(node.args[0])} lost"
        if isinstance(func, ast.Attribute) and func.attr == "fan_out":
            yield node, ast.Constant(1), "fan_out ignored"


HOST_OPERATORS: tuple[tuple[str, Operator], ...] = (
    ("comparison", comparison),
    ("arithmetic", arithmetic),
    ("extremum", extremum),
    ("selection", selection),
    ("negation", negation),
    ("transposition", transposition),
    ("scaling", scaling),
    ("constant", constant),
)
