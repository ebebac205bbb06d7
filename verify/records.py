"""Records: what a command found, on which machine, of which sources, as one JSON file.

Keys common to all: schema, command, environment, seed, started, seconds, fingerprint, summary. A
record is
written whole each time, through a temporary file, so that an interrupted run leaves a readable
one with
summary.complete false.
"""

import ast
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scattermoe_lora._syntax import syntax

from .run import Outcome, Selection
from .spec import KernelSpec

SCHEMA = 1
_INTERVAL = 10.0


class Recorder:
    """Collects what a command finds and keeps its file up to date; `path` None keeps it in
    memory. judge: see `judges`. selection: what was asked for, where the command takes one.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        command: str,
        environment: dict[str, Any],
        seed: int,
        fingerprint: dict[str, str],
        judge: Mapping[str, str] | None = None,
        selection: Mapping[str, Any] | None = None,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.path = path
        self._start = self._written = time.monotonic()
        self._earlier = 0.0
        self._head = {
            "schema": SCHEMA,
            "command": command,
            "environment": environment,
            "seed": seed,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "fingerprint": fingerprint,
            **({} if judge is None else {"judge": dict(judge)}),
            **({} if selection is None else {"selection": dict(selection)}),
        }

    def resume(self, outcomes: Iterable[Outcome], seconds: float) -> None:
        """Take over what an earlier run found in so many seconds."""
        self.outcomes += outcomes
        self._earlier += seconds

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome; writes the file now and then."""
        self.outcomes.append(outcome)
        if time.monotonic() - self._written > _INTERVAL:
            self.write(complete=False)

    def record(self, *, complete: bool) -> dict[str, Any]:
        """The record as plain JSON values."""
        seconds = round(self._earlier + time.monotonic() - self._start, 3)
        summary = {**summary_of(self.outcomes), "seconds": seconds, "complete": complete}
        outcomes = [outcome.as_json() for outcome in self.outcomes]
        return {**self._head, "seconds": seconds, "summary": summary, "outcomes": outcomes}

    def write(self, *, complete: bool) -> None:
        """Write the file, if there is one."""
        self._written = time.monotonic()
        if self.path is not None:
            write_json(self.path, self.record(complete=complete))


def selection_of(selection: Selection) -> dict[str, Any]:
    """A selection as plain JSON values, without its seed, which every record has."""
    values: dict[str, Any] = plain(asdict(selection))
    del values["seed"]
    return values


def summary_of(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many outcomes of each status."""
    counts = Counter(outcome.status for outcome in outcomes)
    return {
        "passed": counts["passed"],
        "failed": counts["failed"],
        "errors": counts["error"],
        "unavailable": counts["unavailable"],
        "total": counts.total(),
    }


def plain(value: Any) -> Any:
    """JSON values with the floats that JSON has not as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def write_json(path: Path, value: object) -> None:
    """Write JSON through a temporary file beside `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(plain(value), indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def fingerprints(package: Path, kernels: Iterable[KernelSpec]) -> dict[str, str]:
    """Kernel -> hash of the code that it runs: its module and all that this imports from the
    package.

    Comments, docstrings and formatting do not count.
    """
    read = _Modules(package)
    return {spec.name: _fingerprint(read, spec.source) for spec in kernels}


def judges(kernels: Iterable[KernelSpec]) -> dict[str, str]:
    """Kernel -> hash of what judges it: comparing and running, its entry, and what these import."""
    name, _, _ = __name__.rpartition(".")
    read = _Modules(Path(__file__).parent)
    common = _fingerprint(read, "run.py")
    found = {}
    for spec in kernels:
        module = spec.reference.__module__.removeprefix(f"{name}.").replace(".", "/")
        entry = _fingerprint(read, f"{module}.py")
        found[spec.name] = hashlib.sha256(f"{common} {entry}".encode()).hexdigest()[:16]
    return found


def fingerprint(package: Path, source: str) -> str:
    """Hash of one module of the package (path relative to it) and its imports."""
    return _fingerprint(_Modules(package), source)


class _Modules:
    """Digest and imports of modules, each read once."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self._known: dict[Path, tuple[str, tuple[Path, ...]]] = {}

    def __getitem__(self, path: Path) -> tuple[str, tuple[Path, ...]]:
        if path not in self._known:
            source = path.read_text()
            imports = tuple(_imports(self.package, path, ast.parse(source)))
            digest = hashlib.sha256(syntax(source).encode()).hexdigest()
            self._known[path] = (digest, imports)
        return self._known[path]


def _fingerprint(modules: _Modules, source: str) -> str:
    waiting, digests = [modules.package / source], {}
    while waiting:
        path = waiting.pop()
        name = path.relative_to(modules.package).as_posix()
        if name in digests:
            continue
        digests[name], imports = modules[path]
        waiting.extend(imports)
    joined = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256(joined.encode()).hexdigest()[:16]


def _imports(package: Path, path: Path, tree: ast.Module) -> Iterable[Path]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = path.parent
        for _ in range(node.level - 1):
            base = base.parent
        module = base.joinpath(*(node.module or "").split(".")) if node.module else base
        for found in (module, *(module / alias.name for alias in node.names)):
            for file in (found.with_suffix(".py"), found / "__init__.py"):
                if (
                    file.is_file()
                    and file.is_relative_to(package)
                    and file.parent != package.parent
                ):
                    yield file
