"""Mutants whose compiled code is that of the original: no input can tell them apart.

This process compiles and does not interpret: `python -m verify.mutation_proof IN OUT` reads
[{id, file, source, function, line}] and writes {id: "same", "differs" or "does not compile"}.
A mutant is the same if every launch that compiles the changed statement gives the same PTX. Which
launches do is found by putting an assertion that fails before the statement.
"""

import ast
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from . import revision
from .ahead import ARCHITECTURES, compiling
from .compile_check import PACKAGE, PLAIN, QWEN3, Job, call

_NAME = "proved_scattermoe_lora"
_SMALL = replace(QWEN3, k=256, n=128, experts=16, top_k=2, tokens=512)
_PATHS = (
    ("scatter2scatter", "tiles"),
    ("lora_forward", "epilogue"),
    ("lora_forward", "fused"),
    ("lora_input_grad", "epilogue"),
    ("lora_input_grad", "fused"),
    ("lora_weight_grad", "gram"),
    ("lora_weight_grad", "recompute"),
    ("expert_weight_grad", "gram"),
)
_FAILS = "tl.static_assert(False)"


def prove(mutants: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What a compiling process finds of mutants, from one that interprets."""
    wanted = list(mutants)
    if not wanted:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "in.json", Path(folder) / "out.json"
        given.write_text(json.dumps(wanted))
        command = [sys.executable, "-W", "ignore", "-m", __name__, str(given), str(found)]
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        subprocess.run(command, check=True, env=environment)
        return json.loads(found.read_text())


def _launches() -> list[tuple[Job, bool]]:
    shapes = (_SMALL, replace(_SMALL, dtype="float32"))
    planned = [
        (Job(architecture=90, operation=operation, path=path, shape=shape), rich)
        for (operation, path), shape, rich in itertools.product(_PATHS, shapes, (False, True))
    ]
    plain = [
        (Job(architecture=90, operation=operation, path="default", shape=shape), False)
        for operation, shape in itertools.product(PLAIN, shapes)
    ]
    return planned + plain


def _code(lib: ModuleType, job: Job, *, rich: bool) -> list[str]:
    """The PTX of every kernel that a job launches."""
    importlib.import_module(f"{lib.__name__}.quant")
    hopper = ARCHITECTURES[job.architecture]
    with compiling(lib, hopper) as found:
        call(lib, job, hopper, rich=rich)
    return [item.ptx for item in found]


def _code_or_nothing(lib: ModuleType, job: Job, *, rich: bool) -> list[str]:
    try:
        return _code(lib, job, rich=rich)
    except Exception:  # noqa: BLE001 - whatever a mutant raises, it does not compile
        return []


@contextmanager
def _loaded(directory: Path, file: str, source: str, name: str) -> Iterator[ModuleType]:
    try:
        yield revision.edited(directory, {file: source}, name)
    finally:
        revision.unload(name)


def reached(source: str, line: int) -> str:
    """The source with an assertion that fails before the statement at a line; "" if none fits."""
    statements = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    for inner in sorted(statements, key=lambda node: -node.col_offset):
        lines = source.splitlines(keepends=True)
        lines.insert(inner.lineno - 1, f"{' ' * inner.col_offset}{_FAILS}\n")
        changed = "".join(lines)
        if not isinstance(inner, ast.FunctionDef) and _parses(changed):
            return changed
    return ""


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def judge(directory: Path, mutant: Mapping[str, Any], known: dict[int, list[str]]) -> str:
    """same, differs, or does not compile."""
    lib, file = importlib.import_module(PACKAGE), mutant["file"]
    marked = reached((directory / file).read_text(), mutant["line"])
    if not marked:
        return "differs"
    try:
        with (
            _loaded(directory, file, marked, f"{_NAME}_marked") as asserting,
            _loaded(directory, file, mutant["source"], _NAME) as changed,
        ):
            return _compared(lib, asserting, changed, known)
    except Exception:  # noqa: BLE001 - a mutant that cannot be loaded
        return "does not compile"


def _compared(
    lib: ModuleType, asserting: ModuleType, changed: ModuleType, known: dict[int, list[str]]
) -> str:
    compared = failed = 0
    for index, (job, rich) in enumerate(_launches()):
        if _code_or_nothing(asserting, job, rich=rich):
            continue
        if index not in known:
            known[index] = _code(lib, job, rich=rich)
        found = _code_or_nothing(changed, job, rich=rich)
        failed += not found
        compared += 1
        if found and found != known[index]:
            return "differs"
    if failed:
        return "does not compile"
    return "same" if compared else "differs"


def main(given: str, found: str) -> None:
    """Judge the mutants of a file."""
    directory = Path(importlib.import_module(PACKAGE).__path__[0])
    known: dict[int, list[str]] = {}
    answers = {}
    for mutant in json.loads(Path(given).read_text()):
        answers[mutant["id"]] = judge(directory, mutant, known)
    Path(found).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
