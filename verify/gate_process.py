"""Fresh processes for the gate, and the revisions that they compare."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .bench_cases import BenchCase
from .gate_measure import Visit, case_to_text
from .revision import checkout

READY = "ready"
"""The line of a process that is about to measure its first case."""

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

    def different(self) -> tuple[Path, ...]:
        """The directories whose kernels are to be compiled."""
        return tuple({digest(tree): tree for tree in (self.base, self.head)}.values())

    def visit(
        self, cases: Sequence[BenchCase], process: int, seconds: float | None
    ) -> Iterator[Visit]:
        """Measure cases in a fresh process; another one follows where it dies over a case.

        seconds: for all processes together.
        """
        waiting = list(cases)
        end = None if seconds is None else time.monotonic() + seconds
        while waiting:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0 and len(waiting) < len(cases):
                return
            seen: set[str] = set()
            died = yield from self._one(waiting, process, left, seen)
            waiting = [case for case in waiting if case.name not in seen]
            if not died:
                return

    def _one(
        self, cases: Sequence[BenchCase], process: int, seconds: float | None, seen: set[str]
    ) -> Generator[Visit, None, bool]:
        """One process; whether it died. seen: is told the names of the visits."""
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
        end = threading.Timer(
            _PATIENCE + (3600.0 if seconds is None else max(seconds, 0.0)), started.kill
        )
        end.daemon = True
        end.start()
        ready, failed = False, ""
        try:
            # A worker that died already is reported below.
            with contextlib.suppress(BrokenPipeError):
                started.stdin.write("".join(f"{case_to_text(case)}\n" for case in cases))
                started.stdin.close()
            for line in started.stdout:
                ready = ready or line.strip() == READY
                if line.startswith("{"):
                    visit = Visit.from_json(json.loads(line))
                    seen.add(visit.name)
                    failed = visit.reason
                    yield visit
            status = started.wait()
            listener.join()
        finally:
            end.cancel()
            if started.poll() is None:
                started.kill()
                started.wait()
        missing = [case for case in cases if case.name not in seen]
        if not status or not missing:
            return False
        tail = " ".join("".join(errors).split())[-_TAIL:]
        # Before the first case it is the fault of none; after one that failed, of that one.
        for case in missing if not ready else [] if failed else missing[:1]:
            seen.add(case.name)
            yield Visit(
                name=case.name,
                process=process,
                reason=f"the process ended with status {status}: {tail}",
            )
        return True


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
