"""Fresh processes for the gate, and the revisions that they compare."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .bench_cases import BenchCase
from .gate_measure import Visit, case_to_text
from .revision import checkout

_ROOT = Path(__file__).resolve().parent.parent
_TAIL = 400
_PATIENCE = 90.0
"""Seconds for which a process may overrun its time before it is ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trees:
    """The directories of the two revisions of the package; `plant` slows the second, in percent."""

    base: Path
    head: Path
    device: str
    seed: int = 0
    plant: float = 0.0

    def visit(
        self, cases: Sequence[BenchCase], process: int, seconds: float | None
    ) -> Iterator[Visit]:
        """Measure cases in a fresh process; another one follows where it dies."""
        waiting = list(cases)
        while waiting:
            stopped = True
            for visit in self._one(waiting, process, seconds):
                waiting = [case for case in waiting if case.name != visit.name]
                stopped = not visit.reason.startswith(_DIED)
                yield visit
            if stopped:
                return

    def _one(
        self, cases: Sequence[BenchCase], process: int, seconds: float | None
    ) -> Iterator[Visit]:
        words = [sys.executable, "-m", "verify.gate_worker", "--base", str(self.base)]
        words += ["--head", str(self.head), "--device", self.device, "--process", str(process)]
        words += ["--seed", str(self.seed), "--plant", str(self.plant)]
        words += [] if seconds is None else ["--seconds", str(max(seconds, 0.0))]
        search = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(word for word in search if word)}
        started = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=variables,
            text=True,
        )
        assert started.stdin is not None
        assert started.stdout is not None
        errors: list[str] = []
        listener = threading.Thread(target=_listen, args=(started, errors), daemon=True)
        listener.start()
        end = threading.Timer(_PATIENCE + (seconds or 3600.0), started.kill)
        end.daemon = True
        end.start()
        reported = 0
        try:
            # A worker that died already is reported below.
            with contextlib.suppress(BrokenPipeError):
                started.stdin.write("".join(f"{case_to_text(case)}\n" for case in cases))
                started.stdin.close()
            for line in started.stdout:
                if line.startswith("{"):
                    reported += 1
                    yield Visit.from_json(json.loads(line))
            status = started.wait()
            listener.join()
        finally:
            end.cancel()
            if started.poll() is None:
                started.kill()
                started.wait()
        if status and reported < len(cases):
            tail = " ".join("".join(errors).split())[-_TAIL:]
            text = f"{_DIED} with status {status}: {tail}"
            yield Visit(name=cases[reported].name, process=process, reason=text)


_DIED = "the process ended"


def _listen(started: "subprocess.Popen[str]", errors: list[str]) -> None:
    assert started.stderr is not None
    errors.extend(started.stderr)


def tree_of(against: str, repository: Path, destination: Path, *, package: str) -> Path:
    """The package's directory of a revision, or in a directory, copied below `destination`.

    Raises:
        ValueError: it is neither a directory with the package nor a revision that git knows.
    """
    directory = Path(against)
    for found in (directory / package, directory):
        if (found / "__init__.py").is_file():
            target = destination / package
            shutil.copytree(found, target, ignore=shutil.ignore_patterns("__pycache__"))
            return target
    return checkout(against, repository, destination, package=package)


def digest(tree: Path) -> str:
    """Hash of all files of a package that make its behaviour."""
    found = hashlib.sha256()
    for path in sorted(tree.rglob("*")):
        if path.suffix in (".py", ".json"):
            found.update(f"{path.relative_to(tree).as_posix()}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:16]
