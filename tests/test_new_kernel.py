"""The README's five steps, followed for a toy kernel in a copy of the tree: nothing else need be
edited for it to be checked, fuzzed, broken on purpose, compiled ahead and timed.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = ("tests/test_kernels.py", "tests/test_architecture.py")
COPIED = ("scattermoe_lora", "verify", "conftest.py", "pyproject.toml", *TESTS)

KERNEL = '''"""Every element times itself: Y = X * X, in fp32, rounded once."""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from .._launch import Launch
from .._sizes import ceil_div
from ._tile import matrix

_BLOCK = 128


def square(x: Tensor) -> Tensor:
    """x [rows, K] -> [rows, K] in its dtype."""
    if x.dim() != 2:
        raise ValueError(f"x must be [rows, K], got shape {list(x.shape)}")
    out = x.new_empty(x.shape)
    if out.numel():
        rows, width = x.shape
        _square(width, x.dtype, x.stride())(
            (rows, ceil_div(width, _BLOCK), 1),
            x.device,
            (matrix(x), matrix(out), width),
            x.data_ptr() | out.data_ptr(),
        )
    return out


@lru_cache(maxsize=4096)
def _square(*form: object) -> Launch:
    del form
    return Launch(square_kernel, warps=4, BLOCK_N=_BLOCK)


@triton.jit
def square_kernel(x, out, N, BLOCK_N: tl.constexpr):
    """BLOCK_N columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    value = tl.load(x.ptr + row * x.row + n * x.col, mask=n < N, other=0.0).to(tl.float32)
    result = (value * value).to(out.ptr.dtype.element_ty)
    tl.store(out.ptr + row * out.row + n * out.col, result, mask=n < N)
'''

TRUTH = '''

def square(x: Tensor) -> Tensor:
    """Every element times itself."""
    return x.double() ** 2
'''

SPEC = '''"""The square of rows."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..cases import EDGES, SMOKE, Case
from ..expected import Expected
from ..inputs import Inputs
from ..models import Arithmetic
from ..numerics import Uncertain
from ..references import square
from ..spec import KernelSpec, Mutant
from .bad_inputs import refused
from .common import bytes_of, only_default, ops


def _run(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    del plan
    return {"y": ops(lib).square(inputs["x"])}


def _reference(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    del how
    model = Uncertain.exact(square(inputs["x"])).rounded(inputs.dtype)
    owner = torch.zeros(inputs["x"].shape[0], dtype=torch.int64, device=inputs.device)
    expected = Expected(
        value=model.value,
        model=model,
        dtype=inputs.dtype,
        expert=owner,
        sources=torch.full_like(owner, inputs.case.k_in),
        zero=torch.zeros_like(owner, dtype=torch.bool),
        terms={"square": model.value},
    )
    return {"y": expected}


def _cost(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    elements = case.tokens * case.k_in
    return float(elements), bytes_of(dtype, elements, elements)


SQUARE = KernelSpec(
    name="square",
    run=_run,
    reference=_reference,
    cases=(*SMOKE, *(case for case in EDGES[::5] if not case.extreme)),
    plans=only_default,
    cost=_cost,
    modes=("balanced", "exact"),
    source="ops/square.py",
    ops=("square",),
    mutants=(
        Mutant(
            id="square-sum",
            what="the sum in place of the product",
            file="ops/square.py",
            old="value * value",
            new="value + value",
        ),
    ),
    bad_inputs=(refused(_run, "x flat", lambda i: {"x": i["x"].reshape(-1)}, ValueError, "K"),),
)
'''


def steps() -> list[str]:
    """What the README says is to be done, step by step."""
    text = (ROOT / "README.md").read_text().split("### Adding a kernel in five steps")[1]
    found = re.split(r"^\d\. ", text.split("\n## ")[0], flags=re.MULTILINE)
    return [" ".join(step.split()) for step in found[1:]]


def replaced(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, (file, old)
    file.write_text(text.replace(old, new))


@contextmanager
def changed(file: Path, old: str, new: str) -> Iterator[None]:
    """Within it, the file has the one text in place of the other."""
    whole = file.read_text()
    try:
        replaced(file, old, new)
        yield
    finally:
        file.write_text(whole)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the tree in which the first four steps were taken."""
    tree = tmp_path_factory.mktemp("tree")
    (tree / "tests").mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "records")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tree / name)
    operations, specs = tree / "scattermoe_lora" / "ops", tree / "verify" / "specs"
    (operations / "square.py").write_text(KERNEL)
    listing = operations / "__init__.py"
    replaced(listing, "from .weight_grad", "from .square import square\nfrom .weight_grad")
    replaced(listing, '    "shrink",\n', '    "shrink",\n    "square",\n')
    with (tree / "verify" / "references.py").open("a") as file:
        file.write(TRUTH)
    (specs / "square.py").write_text(SPEC)
    replaced(specs / "__init__.py", "\n\nKERNELS", "\nfrom .square import SQUARE\n\nKERNELS")
    replaced(specs / "__init__.py", "    GROUP,\n", "    GROUP,\n    SQUARE,\n")
    return tree


def run(tree: Path, words: str, **variables: str) -> subprocess.CompletedProcess:
    """A command line in the copy; Python is the one that runs this."""
    program, *rest = shlex.split(words)
    assert program in ("python", "pytest")
    command = [sys.executable, *(["-m", "pytest"] if program == "pytest" else []), *rest]
    around = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    around |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    return subprocess.run(
        command, cwd=tree, env=around, capture_output=True, text=True, check=False
    )


@pytest.mark.correctness
def test_the_steps_name_the_files_that_are_edited_here():
    places = ("ops/<op>.py", "ops/__init__.py", "references.py", "verify/specs/", "--kernels <op>")
    for step, place in zip(steps(), places, strict=True):
        assert place in step
    assert "KERNELS" in steps()[3]


@pytest.mark.correctness
def test_the_commands_of_the_last_step_pass(tree):
    check, tests = re.findall(r"`([^`]+)`", steps()[4])
    checked = run(tree, check.replace("<op>", "square") + " --device cpu --json check.json")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    outcomes = json.loads((tree / "check.json").read_text())["outcomes"]
    assert {item["kernel"] for item in outcomes} == {"square"}
    assert {item["dtype"] for item in outcomes} == {"float32", "float16", "bfloat16"}
    assert {item["status"] for item in outcomes} == {"passed"}
    # Of all tests those of this kernel, and those of the shape of the code.
    some = f"{' '.join(TESTS)} -n 0 -q -p no:cacheprovider"
    tested = run(tree, f"{tests} {some} -k 'square or architecture'")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "x flat" in run(tree, f"{tests} {some} -k square --collect-only").stdout


def test_it_is_fuzzed_and_its_mutant_is_killed(tree):
    fuzz = run(
        tree,
        "python -m verify fuzz --kernels square --device cpu --seconds 15 --directory campaign",
    )
    assert fuzz.returncode == 0, fuzz.stdout + fuzz.stderr
    summary = json.loads((tree / "campaign" / "fuzz.json").read_text())["summary"]
    assert summary["cases"] > 0
    mutants = run(
        tree,
        "python -m verify mutants --kernels square --per-kernel 0 --fast --device cpu "
        "--json mutants.json",
    )
    assert mutants.returncode == 0, mutants.stdout + mutants.stderr
    assert json.loads((tree / "mutants.json").read_text())["summary"]["killed"] == 1


def test_it_is_compiled_ahead_and_timed(tree):
    compiled = run(
        tree,
        "python -m verify compile --arch 80 90 --operations square --no-baseline --jobs 1 "
        "--json compile.json",
        TRITON_INTERPRET="0",
    )
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr
    outcomes = json.loads((tree / "compile.json").read_text())["outcomes"]
    kernels = [kernel["kernel"] for item in outcomes for kernel in item["kernels"]]
    assert kernels == ["square_kernel"] * 2
    timed = run(
        tree,
        "python -m verify bench --device cpu --models tiny --kinds kernel --names *.square.* "
        "--no-peers --quick --json bench.json",
    )
    assert timed.returncode == 0, timed.stdout + timed.stderr
    (entry,) = json.loads((tree / "bench.json").read_text())["benchmarks"]
    assert entry["name"] == "kernel.square.tiny.t24.balanced"
    assert entry["floor_ms"] > 0


def test_it_is_not_timed_where_it_is_wrong(tree):
    file = tree / "scattermoe_lora" / "ops" / "square.py"
    with changed(file, "value * value", "value * value * 1.02"):
        ran = run(
            tree,
            "python -m verify bench --device cpu --models tiny --kinds kernel --names *.square.* "
            "--no-peers --quick --json wrong.json",
        )
    record = json.loads((tree / "wrong.json").read_text())
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert record["benchmarks"] == []
    assert [item["status"] for item in record["failures"]] == ["failed"]


def test_a_kernel_of_one_dtype_is_compiled_and_timed_in_it(tree):
    spec = tree / "verify" / "specs" / "square.py"
    with changed(spec, '    source="ops', '    dtypes=(torch.float32,),\n    source="ops'):
        words = "--device cpu --models tiny --names *.square.* --dtypes float32"
        timed = run(tree, f"python -m verify bench {words} --no-peers --quick --json float32.json")
        counted = run(
            tree,
            "python -m verify compile --arch 80 --parts footprint --jobs 1 --json counted.json",
            TRITON_INTERPRET="0",
        )
    assert timed.returncode == 0, timed.stdout + timed.stderr
    (entry,) = json.loads((tree / "float32.json").read_text())["benchmarks"]
    assert entry["name"] == "kernel.square.tiny.t24.balanced.float32"
    outcomes = json.loads((tree / "counted.json").read_text())["outcomes"]
    assert [item["status"] for item in outcomes if "square" in item["job"]] == ["failed"]
    assert all("square" in item["job"] for item in outcomes if item["status"] != "passed")
    assert "is not in the baseline" in counted.stdout


@pytest.mark.correctness
def test_a_step_that_is_left_out_is_told(tree):
    file = tree / "verify" / "specs" / "__init__.py"
    with changed(file, "    SQUARE,\n", ""):
        words = "-n 0 -q -p no:cacheprovider"
        ran = run(tree, f"pytest -m correctness tests/test_architecture.py {words} -k has_a_spec")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "'square'" in ran.stdout
