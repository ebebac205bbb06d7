"""A campaign: workers run draws, findings are shrunk and written, and whatever a kernel does, it
goes on.

The journals of its directory are the campaign: from them it is resumed, and nothing else need be
saved.
"""

import contextlib
import random
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import findings as found
from .coverage import Coverage, missing_paths
from .drawing import ROOM, Drawing, form_of, limits_of, memory_needed
from .draws import Draw
from .findings import Finding
from .journal import Journal, read, unfinished
from .shrink import Shrinking
from .spec import KernelSpec
from .workers import Process, Start, listen

_ENOUGH = 3
"""Crashes or hangs of one kernel, path and plan after which it is drawn no more."""
_KEPT = 4000
_COMPILING_SHARE = 0.5
_STARTING = 300.0
_SHORT = 10.0
"""Least patience, in seconds, with smaller launches of one that hung."""
_STILLBORN = 5
"""Workers that may end before any launch came to an end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a campaign is, as resumed ones take it from its directory.

    devices: one per group of workers. patience: seconds that one launch may take, and compiling one
    of its kernels.
    tree: directory of another copy of the package, or empty. memory: bytes of each GPU for all that
    is launched at a time; 0: what is free when a run begins.
    """

    devices: tuple[str, ...]
    workers: int = 1
    seed: int = 0
    kernels: tuple[str, ...] = ()
    tree: str = ""
    patience: float = 30.0
    shrink_seconds: float = 60.0
    memory: int = 0

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter."""
        return self.devices[0] == "cpu"


@dataclass(slots=True, kw_only=True)
class Counts:
    """What a campaign did so far."""

    status: Counter[str] = field(default_factory=Counter)
    kernels: dict[str, Counter[str]] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    seconds: float = 0.0

    @property
    def launches(self) -> int:
        """Launches that came to an end, whatever end."""
        return self.status.total()

    def add(self, draw: Draw, status: str) -> None:
        """Count one launch."""
        self.status[status] += 1
        self.kernels.setdefault(draw.kernel, Counter())[status] += 1


class Campaign:
    """Run with `for _ in campaign.run(seconds)`: it yields now and then, so that progress can be
    shown.
    """

    def __init__(
        self, directory: Path, settings: Settings, kernels: Mapping[str, KernelSpec]
    ) -> None:
        self.directory, self.settings = directory, settings
        self.coverage, self.counts = Coverage(), Counts()
        self.findings: dict[str, Finding] = {}
        self.environment: dict[str, Any] = {}
        self.pools: dict[str, list[dict[str, Any]]] = {}
        self.fixed: frozenset[str] = frozenset()
        self._kernels = kernels
        self._memory = 0
        self._kept: list[Draw] = []
        self._forms: dict[tuple[Any, ...], Draw] = {}
        self._again: list[Draw] = []
        self._held: Draw | None = None
        self._deaths: Counter[tuple[str, str, str]] = Counter()
        self._shrinking: dict[int, Shrinking] = {}
        self._slow = [0.0, 0.0]  # seconds in new forms, and in all
        self._number = 0
        self._processes: list[Process] = []
        self._generation = 0
        directory.mkdir(parents=True, exist_ok=True)
        self._restore()
        runs = len(list(directory.glob("journal-*.jsonl")))
        self._random = random.Random(f"{settings.seed} {runs} {self._number}")
        self._run = runs

    @property
    def pending(self) -> tuple[Draw, ...]:
        """Launches of which an earlier run left no end: they are run first."""
        return tuple(self._again)

    @property
    def kept(self) -> tuple[Draw, ...]:
        """Launches that reached something new."""
        return tuple(self._kept)

    def _restore(self) -> None:
        """Read what earlier runs of this campaign left."""
        for path in sorted((self.directory / "findings").glob("*.json")):
            finding = found.read(path)
            self.findings[finding.signature] = finding
        spans = []
        for path in sorted(self.directory.glob("journal-*.jsonl")):
            lines = list(read(path))
            draws = {line["launch"]: line["draw"] for line in lines if "launch" in line}
            for line in lines:
                if "done" in line:
                    self._number = max(self._number, line["done"])
                    self._counted(draws.get(line["done"]), line)
            self._again += [Draw.from_json(values) for values in unfinished(lines)]
            times = [line["at"] for line in lines if "at" in line]
            spans += [(min(times), max(times))] if times else []
        self.counts.seconds = _covered(spans)

    def _counted(self, values: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> bool:
        """Count an end; whether it reached something new."""
        if values is None:
            self.counts.refused[str(facts["outcome"]["reason"])[:200]] += 1
            return False
        draw = Draw.from_json(values)
        status = facts["kind"] or facts["outcome"]["status"]
        self.counts.add(draw, status)
        self._forms.setdefault(form_of(draw), draw)
        new = self.coverage.add(facts["features"])
        if new:
            self._kept = [*self._kept[-_KEPT:], draw]
        return new

    def run(self, seconds: float, *, enough: int = 0) -> Generator[None]:
        """Go on for so many seconds, then until running launches and shrinking end.

        enough: findings after which it stops sooner, 0 for any number.

        Raises:
            RuntimeError: no worker could be started.
        """
        start, before = time.monotonic(), self.counts.seconds
        end = start + seconds
        try:
            self._start_all()
            while True:
                self.counts.seconds = before + time.monotonic() - start
                going = time.monotonic() < end and not 0 < enough <= len(self.findings)
                for process in self._processes:
                    if process.idle:
                        self._assign(process, going=going)
                if not going and not any(p.draw for p in self._processes) and not self._shrinking:
                    return
                for process in listen(self._processes, 0.2):
                    self._hear(process)
                for process in list(self._processes):
                    if process.ended or process.late:
                        self._bury(process)
                yield
        finally:
            for process in self._processes:
                process.kill()
            self._processes = []

    def _start_all(self) -> None:
        """Start the first worker, learn the plans from it, then start the others."""
        first = self._started(self.settings.devices[0], pools=True)
        while not first.ready:
            for process in listen([first], 1.0):
                self._hear(process)
            if first.ended or first.late:
                ending = "it did not answer" if first.late else first.how_it_ended()
                raise RuntimeError(f"no worker could be started: {ending}")
        for device in self.settings.devices:
            others = self.settings.workers - (device == self.settings.devices[0])
            for _ in range(others):
                self._started(device)
        self._drawing = Drawing(
            kernels={name: self._kernels[name] for name in self.pools if self._runnable(name)},
            pools=self.pools,
            fixed=self.fixed,
            limits=limits_of(self._memory),
            random=self._random,
        )

    def _runnable(self, name: str) -> bool:
        return any(not plan["unavailable"] for plan in self.pools[name])

    def _started(self, device: str, *, pools: bool = False) -> Process:
        self._generation += 1
        word = f"{self._run:03d}-{self._generation:04d}"
        start = Start(
            device=device,
            journal=self.directory / f"journal-{word}.jsonl",
            log=self.directory / "logs" / f"worker-{word}.log",
            tree=self.settings.tree,
            kernels=self.settings.kernels,
            pools=pools,
        )
        process = Process.launch(start, patience=_STARTING)
        self._processes.append(process)
        return process

    def _assign(self, process: Process, *, going: bool) -> None:
        """Hand an idle worker its next draw, if there is one."""
        job, patience = self._shrinking.get(id(process)), self.settings.patience
        if job is not None and job.candidate is not None:
            hangs = job.finding.kind == "hang"
            if self._fits(process, job.candidate):
                self._tell(process, job.candidate, self._hung() if hangs else patience)
            return
        if not going:
            return
        if self._held is None:
            self._held = self._again.pop() if self._again else self._next()
        draw = self._held
        if draw is not None and self._fits(process, draw):
            self._held = None
            self._tell(process, draw, patience * (4 if draw.stretch else 1))

    def _fits(self, process: Process, draw: Draw) -> bool:
        others = (p for p in self._processes if p.start.device == process.start.device)
        return has_room(draw, [p.draw for p in others if p.draw], self._memory)

    def _hung(self) -> float:
        """Patience with smaller launches of one that hung."""
        return min(self.settings.patience, max(self.settings.patience / 3, _SHORT))

    def _tell(self, process: Process, draw: Draw, patience: float) -> None:
        self._number += 1
        process.tell(self._number, draw, patience=patience)

    def _next(self) -> Draw | None:
        for _ in range(50):
            draw = self._proposed()
            key = (draw.kernel, draw.path, draw.label)
            if self._deaths[key] < _ENOUGH:
                return draw
        return None

    def _proposed(self) -> Draw:
        chance = self._random.random()
        if not self.settings.interpreted:
            if chance < 0.002 and (draw := self._drawing.beyond()) is not None:
                return draw
            if self._forms and not self._may_compile():
                return self._drawing.resized(self._random.choice(list(self._forms.values())))
        if self._kept and chance > 0.4:
            return self._drawing.varied(self._random.choice(self._kept))
        return self._drawing.fresh(missing_paths(self.pools, self.coverage.paths))

    def _may_compile(self) -> bool:
        """Whether a form that is not compiled yet may be tried: some workers always run compiled
        ones.
        """
        trying = sum(
            process.draw is not None and form_of(process.draw) not in self._forms
            for process in self._processes
        )
        if len(self._processes) > 1:
            return trying < len(self._processes) - 1
        return self._slow[0] <= _COMPILING_SHARE * self._slow[1]

    def _hear(self, process: Process) -> None:
        for message in process.read():
            if "hello" in message:
                process.ready, process.deadline = True, float("inf")
                self._learn(message["hello"])
            elif message["id"] == process.number and not process.progressed(message):
                self._done(process, message["done"])

    def _learn(self, hello: Mapping[str, Any]) -> None:
        self.environment = hello["environment"]
        if "pools" in hello:
            self._memory = self.settings.memory or hello["memory"]
            self.pools, self.fixed = hello["pools"], frozenset(hello["fixed"])

    def _done(self, process: Process, facts: Mapping[str, Any]) -> None:
        """A draw came to an end, and its worker lives, or says that it cannot go on."""
        asked, draw = process.draw, process.launched
        process.draw, process.deadline = None, float("inf")
        if draw is not None:
            self._slow[0] += facts["seconds"] * (form_of(draw) not in self._forms)
            self._slow[1] += facts["seconds"]
        if facts["fatal"]:
            process.ready, process.deadline = False, time.monotonic() + 10
        self._counted(None if draw is None else draw.as_json(), facts)
        kind = "" if draw is None or (facts["kind"] == "memory" and draw.stretch) else facts["kind"]
        launched = draw or asked
        assert launched is not None
        if kind == "memory" and any(p.draw and p.draw.stretch for p in self._processes):
            self._again.append(launched)
            kind = ""
        self._judged(process, launched, kind, facts["outcome"], facts["seconds"])

    def _bury(self, process: Process) -> None:
        """A worker died or is late: record what it was doing, and start another."""
        draw, job = process.launched or process.draw, self._shrinking.pop(id(process), None)
        busy, late = process.draw is not None, process.late and not process.ended
        if late:
            process.kill()
            reason = process.how_late()
        else:
            reason = process.how_it_ended()
        self._processes.remove(process)
        self.counts.restarts += 1
        if self.counts.restarts > _STILLBORN and not self.counts.launches:
            raise RuntimeError(f"workers keep ending: {reason}")
        heir = self._started(process.start.device)
        if job is not None:
            self._shrinking[id(heir)] = job
        if not busy or draw is None:
            return
        kind = "hang" if late else "crash"
        outcome: dict[str, Any] = {
            "status": "error",
            "reason": reason,
            "where": {},
            "measure": "",
            "ratio": None,
        }
        facts: dict[str, Any] = {"kind": kind, "outcome": outcome, "features": [], "launched": True}
        with contextlib.closing(Journal(process.start.journal)) as journal:
            if process.launched is None:
                journal.write(launch=process.number, draw=draw.as_json(), at=time.time())
            journal.write(done=process.number, **facts)
        self._counted(draw.as_json(), facts)
        self._deaths[draw.kernel, draw.path, draw.label] += job is None
        self._judged(heir, draw, kind, outcome, self.settings.patience if late else 0.0)

    def _judged(
        self,
        process: Process,
        draw: Draw,
        kind: str,
        outcome: Mapping[str, Any],
        seconds: float,
    ) -> None:
        """Feed a running shrink, or open a finding."""
        job = self._shrinking.get(id(process))
        if job is not None:
            job.report(kind, draw, outcome)
            self._keep(job.finding)
            if job.candidate is None:
                del self._shrinking[id(process)]
            return
        if not kind:
            return
        facts = {"tree": self.settings.tree, "environment": self.environment}
        finding = Finding.met(kind, draw, outcome, seconds=seconds, **facts)
        known = self.findings.get(finding.signature)
        if known is not None:
            self._keep(replace(known, times=known.times + 1))
            return
        self._keep(finding)
        self._shrinking[id(process)] = Shrinking(
            finding, seconds=self.settings.shrink_seconds, fixed=draw.kernel in self.fixed
        )

    def _keep(self, finding: Finding) -> None:
        """Write a finding at once; how often it was met is counted while it is shrunk, too."""
        known = self.findings.get(finding.signature)
        times = max(finding.times, known.times if known is not None else 1)
        self.findings[finding.signature] = replace(finding, times=times)
        found.write(self.directory / "findings", self.findings[finding.signature])


def has_room(draw: Draw, beside: Sequence[Draw], memory: float) -> bool:
    """Whether a draw can be launched beside others on a GPU with so many bytes (0: no GPU, and any
    number of bytes). Alone it always can: it is drawn to fit.
    """
    needed = sum(memory_needed(item.kernel, item.case, item.dtype) for item in (draw, *beside))
    return not (beside and memory) or needed <= ROOM * memory


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds within at least one of the spans: workers run side by side, and runs do not."""
    covered, reached = 0.0, -float("inf")
    for first, last in sorted(spans):
        covered += max(0.0, last - max(first, reached))
        reached = max(reached, last)
    return covered
