"""The shape of the code: who imports whom, how long files are, what every operation owes.

Each check takes the root of a tree and returns what is wrong there, one sentence each, so that it
can be shown to see a violation planted in a small tree.
"""

import ast
import importlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.correctness

ROOT = Path(__file__).parent.parent
PACKAGE, JUDGE = "scattermoe_lora", "verify"
MAX_LINES = 500

# A component imports those before it. Modules with a leading underscore at the top serve them all.
COMPONENTS = (
    "routing",
    "weights",
    "plan",
    "plan_candidates",
    "plan_table",
    "ops",
    "quant",
    "autograd",
    "layers",
    "library",
    "integrations",
    "compat_selective",
    "compat",
)
# Judge: what imports only what stands before it; other modules of verify serve all or use all.
JUDGE_COMPONENTS = ("cases", "strategies", "references", "specs", "run", "records", "report")


def modules(root: Path, package: str) -> dict[str, Path]:
    """Dotted name -> file of every module of a package."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[int, int, str]]:
    """(line, level, absolute dotted name) of every import in a module, nested ones too."""
    parents = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = [] if node.level == 0 else parents[: len(parents) - node.level + 1]
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{source}.{alias.name}"
                yield node.lineno, node.level, target if target in known else source


def component(name: str) -> str:
    """The second part of a dotted name; "" for the package itself."""
    return name.split(".")[1] if "." in name else ""


def backward_imports(root: Path) -> list[str]:
    """Imports of the package against the arrow of its components."""
    known = modules(root, PACKAGE)
    rank = {name: position for position, name in enumerate(COMPONENTS, start=1)}
    wrong = []
    for name, path in known.items():
        here = component(name)
        if here and not here.startswith("_") and here not in rank:
            wrong.append(f"{name} is no component; state its place in COMPONENTS")
        if not here:
            continue
        for line, _, target in imports(name, path, known):
            there = component(target)
            if target.partition(".")[0] != PACKAGE or there == here or there.startswith("_"):
                continue
            if rank.get(there, len(rank) + 1) >= rank.get(here, 0):
                wrong.append(f"{name}:{line} imports {target}, which comes after it")
    return wrong


def misplaced_imports(root: Path) -> list[str]:
    """Imports of the package by its own absolute name, or of the judge."""
    known = modules(root, PACKAGE)
    wrong = []
    for name, path in known.items():
        for line, level, target in imports(name, path, known):
            top = target.partition(".")[0]
            if top == JUDGE:
                wrong.append(f"{name}:{line} imports {JUDGE}")
            if top == PACKAGE and level == 0:
                wrong.append(f"{name}:{line} imports {PACKAGE} by its absolute name")
    return wrong


def backward_imports_of_judge(root: Path) -> list[str]:
    """Imports of the judge against the direction of its data."""
    known = modules(root, JUDGE)
    rank = {name: position for position, name in enumerate(JUDGE_COMPONENTS)}
    return [
        f"{name}:{line} imports {target}, which comes after it"
        for name, path in known.items()
        for line, _, target in imports(name, path, known)
        if component(name) in rank
        and target.partition(".")[0] == JUDGE
        and rank.get(component(target), -1) > rank[component(name)]
    ]


def impure_references(root: Path) -> list[str]:
    """What `verify.references` reaches, directly or not, that it must share no code with."""
    known = modules(root, JUDGE)
    start = f"{JUDGE}.references"
    waiting = [name for name in known if name == start or name.startswith(f"{start}.")]
    seen, wrong = set(waiting), []
    while waiting:
        name = waiting.pop()
        for line, _, target in imports(name, known[name], known):
            if target.partition(".")[0] in ("triton", PACKAGE):
                wrong.append(f"{name}:{line} imports {target}, and the references reach it")
            if target in known and target not in seen:
                seen.add(target)
                waiting.append(target)
    return wrong


def environment_reads(root: Path) -> list[str]:
    """Environment variables in the package: choices there are arguments."""
    return [
        f"{name}:{node.lineno} uses the environment"
        for name, path in modules(root, PACKAGE).items()
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"))
        or (isinstance(node, ast.alias) and node.name in ("environ", "getenv", "putenv"))
    ]


def tracked(root: Path) -> list[Path]:
    """The files that git tracks; in an unpacked archive, which has no history, every file."""
    if not (root / ".git").exists():
        found = (path for path in root.rglob("*") if path.is_file())
        return sorted(path for path in found if not made_here(path.relative_to(root)))
    listed = subprocess.run(["git", "-C", root, "ls-files", "-z"], capture_output=True, check=True)
    paths = (root / name.decode() for name in listed.stdout.split(b"\0") if name)
    return [path for path in paths if path.is_file()]


def made_here(path: Path) -> bool:
    """Whether a tool or the import system wrote a file, or a directory that it is in."""
    return any(
        part.startswith(".") or part.endswith(".egg-info") or part in ("__pycache__", "build")
        for part in path.parts
    )


def long_files(root: Path) -> list[str]:
    """Tracked Python files past the limit."""
    counts = {path: len(path.read_text().splitlines()) for path in tracked(root) if is_python(path)}
    return [
        f"{path.relative_to(root)} has {count} lines, more than {MAX_LINES}"
        for path, count in counts.items()
        if count > MAX_LINES
    ]


def is_python(path: Path) -> bool:
    return path.suffix == ".py"


# Home directories and top-level work directories, written so as not to match this line.
MACHINE_PATH = re.compile(r"(?<![\w.~\-/])/(?:w[o]rk|r[o]ot|h[o]me|t[m]p)/[\w.]|[.]l[i]brary/")


def machine_paths(root: Path) -> list[str]:
    """Tracked text that names a directory of one machine."""
    wrong = []
    for path in tracked(root):
        if path.suffix in (".json", ".png", ".html"):
            continue
        for line, text in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            if MACHINE_PATH.search(text):
                wrong.append(f"{path.relative_to(root)}:{line} names a path of a machine")
    return wrong


CHECKS = (
    backward_imports,
    misplaced_imports,
    backward_imports_of_judge,
    impure_references,
    environment_reads,
    long_files,
    machine_paths,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_tree_keeps_its_architecture(check):
    assert check(ROOT) == []


@pytest.mark.parametrize(
    ("check", "path", "source", "words"),
    [
        (backward_imports, "scattermoe_lora/routing.py", "from .ops import scale", "after it"),
        (backward_imports, "scattermoe_lora/ops/scale.py", "from .. import autograd", "after it"),
        (backward_imports, "scattermoe_lora/_base.py", "from .routing import Routing", "after it"),
        (backward_imports, "scattermoe_lora/ops/scale.py", "from .. import Routing", "after it"),
        (backward_imports, "scattermoe_lora/misc.py", "", "no component"),
        (backward_imports, "scattermoe_lora/plan.py", "def f():\n    from . import ops", "after"),
        (misplaced_imports, "scattermoe_lora/plan.py", "import verify.cases", "imports verify"),
        (misplaced_imports, "scattermoe_lora/plan.py", "from scattermoe_lora import ops", "abs"),
        (backward_imports_of_judge, "verify/cases.py", "from .run import run", "after it"),
        (backward_imports_of_judge, "verify/specs/a.py", "from verify import records", "after it"),
        (impure_references, "verify/references.py", "import triton.language as tl", "reach it"),
        (impure_references, "verify/cases.py", "from scattermoe_lora import ops", "reach it"),
        (environment_reads, "scattermoe_lora/plan.py", "import os\nos.environ['A']", "environment"),
        (environment_reads, "scattermoe_lora/plan.py", "from os import getenv", "environment"),
        (long_files, "tests/test_long.py", "\n" * (MAX_LINES + 1), "has 501 lines"),
        (machine_paths, "README.md", "see /" + "work/main/notes", "names a path"),
    ],
)
def test_a_planted_violation_is_seen(tmp_path, check, path, source, words):
    good_tree(tmp_path)
    assert check(tmp_path) == []
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)
    (wrong,) = check(tmp_path)
    assert words in wrong


@pytest.mark.parametrize(
    ("check", "path", "source"),
    [
        (long_files, "tests/test_long.py", "\n" * (MAX_LINES + 1)),
        (machine_paths, "README.md", "see /" + "work/main/notes"),
    ],
)
def test_a_planted_violation_is_seen_in_an_unpacked_archive(tmp_path, check, path, source):
    good_tree(tmp_path)
    shutil.rmtree(tmp_path / ".git")
    for place in (".cache", "tests/__pycache__", "."):
        assert check(tmp_path) == []
        file = tmp_path / place / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    (wrong,) = check(tmp_path)
    assert wrong.startswith(path)


def good_tree(root: Path) -> None:
    sources = {
        "scattermoe_lora/__init__.py": "from .autograd import f\nfrom .routing import Routing\n",
        "scattermoe_lora/_base.py": "import torch\n",
        "scattermoe_lora/routing.py": "from ._base import torch\n",
        "scattermoe_lora/plan.py": "from . import routing\n",
        "scattermoe_lora/ops/__init__.py": "from .scale import scale\n",
        "scattermoe_lora/ops/scale.py": "from ..plan import Plan\nfrom ._tile import tile\n",
        "scattermoe_lora/ops/_tile.py": "import triton\n",
        "scattermoe_lora/autograd.py": "from .ops.scale import scale\n",
        "verify/__init__.py": "",
        "verify/cases.py": "import torch\n",
        "verify/references.py": "from .cases import Case\n",
        "verify/specs/__init__.py": "import scattermoe_lora\nfrom ..references import truth\n",
        "verify/run.py": "from verify.specs import KERNELS\n",
        "verify/records.py": "from .run import run\n",
    }
    for path, source in sources.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(source)
    shutil.rmtree(root / ".git", ignore_errors=True)
    subprocess.run(["git", "init", "-q", root], check=True)
    subprocess.run(["git", "-C", root, "add", "."], check=True)


def without_spec(public: list[str], launched: list[str]) -> list[str]:
    """Public operations that no spec launches."""
    return sorted(set(public) - set(launched))


def test_every_public_operation_has_a_spec():
    ops = importlib.import_module(f"{PACKAGE}.ops")
    specs = importlib.import_module(f"{JUDGE}.specs")
    public = [name for name in ops.__all__ if not isinstance(getattr(ops, name), type)]
    covered = [name for spec in specs.KERNELS for name in spec.ops]
    assert public
    assert without_spec(public, covered) == []


def test_an_operation_without_a_spec_is_seen():
    assert without_spec(["combine", "group"], ["group"]) == ["combine"]
