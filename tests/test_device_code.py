"""What no device code does, as written: laws that one run of a kernel could not show."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import scattermoe_lora

pytestmark = pytest.mark.correctness

PACKAGE = Path(scattermoe_lora.__path__[0])
GOOD = """
@triton.jit
def kernel(x, rows, N, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    value = tl.load(x + n, mask=n < N, other=0.0) + tl.load(rows)
    tl.store(x + n, value, mask=n < N)
"""


def kernels(source: str) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            words = [ast.unparse(decorator) for decorator in node.decorator_list]
            if any("triton." in word for word in words):
                yield node


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    """(Name of the kernel, call) of every call in device code."""
    for kernel in kernels(source):
        for node in ast.walk(kernel):
            if isinstance(node, ast.Call):
                yield kernel.name, node


def undefined_values(source: str) -> list[str]:
    """Masked loads that do not say what they give where they do not read."""
    return [
        f"{name}: {ast.unparse(call)}"
        for name, call in calls(source)
        if ast.unparse(call.func) == "tl.load"
        and len(call.args) < 3
        and (len(call.args) > 1 or any(word.arg == "mask" for word in call.keywords))
        and not any(word.arg == "other" for word in call.keywords)
    ]


def atomics(source: str) -> list[str]:
    """Additions whose order is that of the programs."""
    return [
        f"{name}: {ast.unparse(call.func)}"
        for name, call in calls(source)
        if "atomic" in ast.unparse(call.func)
    ]


def searches(source: str) -> list[str]:
    """Kernels that are tuned when they are first launched."""
    return [
        f"{kernel.name}: {ast.unparse(decorator)}"
        for kernel in kernels(source)
        for decorator in kernel.decorator_list
        if not ast.unparse(decorator).startswith("triton.jit")
    ]


LAWS = (undefined_values, atomics, searches)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_device_code_keeps_the_law(law):
    sources = {path.name: path.read_text() for path in PACKAGE.rglob("*.py")}
    assert sum(1 for text in sources.values() for _ in kernels(text)) > 20
    assert {name: found for name, text in sources.items() if (found := law(text))} == {}


@pytest.mark.parametrize(
    ("law", "old", "new"),
    [
        (undefined_values, ", other=0.0", ""),
        (undefined_values, "mask=n < N, other=0.0", "n < N"),
        (atomics, "tl.store", "tl.atomic_add"),
        (searches, "@triton.jit", "@triton.autotune(configs=[], key=[])\n@triton.jit"),
        (searches, "@triton.jit", "@triton.heuristics({})\n@triton.jit"),
    ],
)
def test_code_that_breaks_a_law_is_seen(law, old, new):
    assert law(GOOD) == []
    (wrong,) = law(GOOD.replace(old, new))
    assert wrong.startswith("kernel: ")
