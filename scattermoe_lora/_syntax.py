"""Source code as text that changes only with what it does: for fingerprints of kernels."""

import ast


def syntax(source: str) -> str:
    """The syntax tree of a module in words, without docstrings and comments.

    The same for every version of Python: `ast.dump` writes empty fields, of which versions have
    different ones.
    """
    return _words(_bare(ast.parse(source)))


def device_code(source: str) -> str:
    """`syntax` of the functions of a module that Triton compiles."""
    return "".join(
        _words(_bare(node))
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    )


def _bare(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [item for item in body if not _is_docstring(item)]
            node.body = kept  # type: ignore[attr-defined]
    return tree


def _words(node: object) -> str:
    if isinstance(node, ast.AST):
        fields = [
            f"{name}={_words(value)}"
            for name, value in ast.iter_fields(node)
            if value is not None and value != []
        ]
        return f"{type(node).__name__}({', '.join(fields)})"
    if isinstance(node, list):
        return f"[{', '.join(_words(item) for item in node)}]"
    return repr(node)


def _is_docstring(node: ast.AST) -> bool:
    value = getattr(node, "value", None)
    return (
        isinstance(node, ast.Expr)
        and isinstance(value, ast.Constant)
        and isinstance(value.value, str)
    )
