"""Kernels under compute-sanitizer: many launches per process, without judge, guards or caching
allocator.

torch's caching allocator hides most wild accesses, and guard bands hide near ones: here every
tensor is
an allocation of its own. A batch in which the tool reports something is split until single launches
are left, so that each report belongs to one.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch

from .cases import Case
from .draws import Draw
from .run import Outcome
from .spec import KernelSpec

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
EVERY_PLAN = "memcheck"
"""The tool that sees every plan; the others see one per kernel, path and kind of load."""

NOT_OURS = {
    ("initcheck", "grouped_mm"): "torch._grouped_mm reads uninitialised memory by itself (2.11)",
}
"""Tool and path -> why what it reports there says nothing of this package."""
_POLL = 0.1
"""Seconds between looks at a process."""
_SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+)")
_BANNER = re.compile(r"=+ (COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY|Target application)")
_PLACES = ("PATH", "CUDA_HOME", "CUDA_PATH")
_USUAL = Path("/usr/local/cuda")


def tool_path(variables: dict[str, str] | None = None) -> Path | None:
    """compute-sanitizer on PATH, in CUDA_HOME or where CUDA is usually installed."""
    variables = dict(os.environ) if variables is None else variables
    on_path = shutil.which("compute-sanitizer", path=variables.get("PATH", ""))
    if on_path:
        return Path(on_path)
    homes = [Path(variables[name]) for name in _PLACES[1:] if variables.get(name)]
    for home in (*homes, _USUAL):
        for folder in ("bin", "compute-sanitizer"):
            found = home / folder / "compute-sanitizer"
            if found.is_file():
                return found
    return None


def unavailable(device: torch.device, tool: Path | None) -> str:
    """Why nothing can be run here, or empty."""
    if device.type != "cuda":
        return "compute-sanitizer watches a GPU, and there is none"
    if tool is None:
        return (
            "compute-sanitizer is neither on PATH nor in CUDA_HOME; it comes with the CUDA toolkit "
            "(package cuda-sanitizer)"
        )
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One launch under one tool."""

    tool: str
    draw: Draw

    def outcome(self, status: str, reason: str = "") -> Outcome:
        """An outcome of this job; its mode is the tool."""
        draw = self.draw
        return Outcome(
            kernel=draw.kernel,
            path=draw.path,
            plan=draw.label,
            case=draw.case.name,
            dtype=draw.dtype,
            mode=self.tool,
            status=status,
            reason=reason,
        )

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from others in a record."""
        return self.outcome("passed").key


def jobs_of(
    kernels: Iterable[KernelSpec],
    pools: dict[str, list[dict[str, object]]],
    fixed: Iterable[str],
    tools: Sequence[str] = TOOLS,
) -> tuple[Job, ...]:
    """Everything to be run: `pools` are the plans of each kernel, as the worker of a campaign
    tells them.
    """
    found = []
    for spec in kernels:
        plans = [plan for plan in pools[spec.name] if not plan["unavailable"]]
        chosen = {str(_kind_of_load(plan)): plan for plan in reversed(plans)}
        for tool in tools:
            for plan in plans if tool == EVERY_PLAN else chosen.values():
                for case in cases_of(spec, fixed=spec.name in fixed):
                    draw = Draw(
                        kernel=spec.name,
                        case=case,
                        dtype=str(plan["dtype"]),
                        mode="balanced",
                        path=str(plan["path"]) if plan["plan"] is not None else "",
                        plan=plan["plan"],
                        label=str(plan["label"]) if plan["plan"] is not None else "",
                    )
                    found.append(Job(tool=tool, draw=draw))
    return tuple({job.key: job for job in found}.values())


def _kind_of_load(plan: dict[str, object]) -> tuple[object, ...]:
    """What of a plan decides how memory is read: its path, and the flags of its fields."""
    flags: list[object] = []

    def walk(value: object, name: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, key)
        elif isinstance(value, bool):
            flags.append((name, value))

    walk(plan["plan"], "")
    return (plan["path"], *flags)


def cases_of(spec: KernelSpec, *, fixed: bool) -> tuple[Case, ...]:
    """One case with tails everywhere, and one that tensor maps can address."""
    if fixed:
        return spec.cases[:2]
    names = {case.name: case for case in spec.cases}
    wanted = [names[name] for name in ("tails", "holes") if name in names]
    return tuple(wanted) or spec.cases[:2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the tool said of one process."""

    errors: int
    first: str = ""
    finished: bool = True


def parsed(text: str, *, status: int) -> Report:
    """Read the output of compute-sanitizer; status: exit status of the process."""
    counts = [int(count) for count in _SUMMARY.findall(text)]
    first = ""
    for line in text.splitlines():
        if line.startswith("=========") and not _BANNER.match(line):
            words = line.strip("= \n")
            if words and words != "for more information":
                first = words
                break
    if not counts:
        return Report(errors=0, first=_ending(text, status), finished=False)
    if status and not sum(counts):
        first = _ending(text[: text.rindex("=========")], status)
    return Report(errors=sum(counts), first=first, finished=status == 0)


def _ending(text: str, status: int) -> str:
    """How a process ended that the tool has nothing to say about."""
    return f"it ended with status {status}: {' '.join(text.split())[-300:]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sanitizer:
    """Runs jobs under the tool at `path`.

    tree: another copy of the package, or empty. batch: jobs of a process. processes: at once.
    """

    path: Path
    device: str
    tree: str = ""
    seconds: float = 1200.0
    batch: int = 100
    processes: int = 1

    def run(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """One outcome per job, in batches of one tool, as they end; whoever stops asking stops the
        processes.
        """
        stop = Event()
        others = [job for job in jobs if (job.tool, job.draw.path) in NOT_OURS]
        yield from (job.outcome("unavailable", NOT_OURS[job.tool, job.draw.path]) for job in others)
        jobs = [job for job in jobs if job not in others]
        with ThreadPoolExecutor(self.processes) as pool:
            batches = []
            for tool in dict.fromkeys(job.tool for job in jobs):
                mine = [job for job in jobs if job.tool == tool]
                for start in range(0, len(mine), self.batch):
                    part = mine[start : start + self.batch]
                    batches.append(pool.submit(self._outcomes, tool, part, stop))
            try:
                for batch in as_completed(batches):
                    yield from batch.result()
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _outcomes(self, tool: str, jobs: Sequence[Job], stop: Event) -> list[Outcome]:
        return list(self._split(tool, jobs, stop))

    def _split(self, tool: str, jobs: Sequence[Job], stop: Event) -> Iterator[Outcome]:
        report = self._watched(tool, [job.draw for job in jobs], stop)
        if stop.is_set():
            return
        if report.finished and not report.errors:
            yield from (job.outcome("passed") for job in jobs)
        elif len(jobs) == 1:
            if report.errors:
                reason = f"{report.errors} errors, the first: {report.first}"
                yield jobs[0].outcome("failed", reason)
            else:
                yield jobs[0].outcome("error", report.first)
        else:
            middle = len(jobs) // 2
            yield from self._split(tool, jobs[:middle], stop)
            yield from self._split(tool, jobs[middle:], stop)

    def _watched(self, tool: str, draws: Sequence[Draw], stop: Event) -> Report:
        """Run draws in one process under the tool, until `stop` is set."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "draws.json"
            file.write_text(json.dumps([draw.as_json() for draw in draws]))
            command = [str(self.path), "--tool", tool, "--print-limit", "10"]
            command += [sys.executable, "-m", "verify.sanitize_worker", str(file), self.device]
            variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            search = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
            variables["PYTHONPATH"] = os.pathsep.join(word for word in search if word)
            output, end = Path(scratch) / "output", time.monotonic() + self.seconds
            with output.open("wb") as written:
                process = subprocess.Popen(
                    [*command, *([self.tree] if self.tree else [])],
                    env=variables,
                    stdout=written,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                while process.poll() is None:
                    if stop.wait(_POLL) or time.monotonic() > end:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()
                        words = f"no end within {self.seconds:g} s"
                        return Report(errors=0, first=words, finished=False)
            return parsed(output.read_text(errors="replace"), status=process.returncode)


def open_jobs(jobs: Iterable[Job], known: Iterable[Outcome]) -> tuple[Job, ...]:
    """The jobs of which no outcome is known."""
    done = {outcome.key for outcome in known}
    return tuple(job for job in jobs if job.key not in done)
