"""Mutation score: wrong kernels, and which of them the judge sees.

They are made by hand and from the kernels' syntax trees. Worker processes try them; one that hangs,
dies or is damaged under a mutant is replaced, and the mutant counts as killed by that if it does it
twice.

killed      a check fails that the unchanged package passes
survived    no check fails
equivalent  a reason is on record why no check could
invalid     it does not compile, or raises before it computes anything: it counts nowhere
"""

import ast
import multiprocessing
import random
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection as connections
from pathlib import Path
from typing import Any

from .broken import BY_HAND
from .mutation_host import OPERATORS as HOST_OPERATORS
from .mutation_operators import KERNEL_OPERATORS, edits, unified_diff
from .mutation_reasons import EQUIVALENT
from .mutation_targets import (
    CHECKS,
    FUNCTION_CHECKS,
    GPU_PATH,
    HOST_FUNCTIONS,
    NOT_SEEN,
    ROUTING_FILES,
    SKIPPED_FUNCTIONS,
    VARIANTS,
)
from .mutation_trials import SPOILED, Task, Verdict, serve
from .spec import KernelSpec

STATUSES = ("killed", "survived", "equivalent", "invalid")
SAME_CODE = "the code compiled for sm_90 is that of the original"
"""Why a mutant is equivalent that has no written reason."""
_TASKS_PER_WORKER = 200
_FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A wrong version of one file. kernel: the function, or the spec of one made by hand."""

    id: str
    kernel: str
    what: str
    file: str
    source: str
    diff: str
    checks: tuple[str, ...]
    line: int = 0
    by_hand: bool = False
    equivalent: str = ""

    def task(self, limit: int) -> Task:
        """What a worker is sent."""
        return Task(
            id=self.id,
            file=self.file,
            source=self.source,
            checks=self.checks,
            routes=self.file in ROUTING_FILES,
            far="int64" in self.what,
            limit=limit,
        )


def by_hand(package: Path, kernels: Iterable[KernelSpec], device: str) -> Iterator[Candidate]:
    """The mutants that the specs list; those that are stale are left out. device: cpu or cuda."""
    for spec in kernels:
        for mutant in (*spec.mutants, *BY_HAND.get(spec.name, ())):
            old = (package / mutant.file).read_text()
            if old.count(mutant.old) != 1:
                continue
            new = old.replace(mutant.old, mutant.new)
            yield Candidate(
                id=mutant.id,
                kernel=spec.name,
                what=mutant.what,
                file=mutant.file,
                source=new,
                diff=unified_diff(mutant.file, old, new),
                checks=(spec.name,),
                by_hand=True,
                equivalent=mutant.equivalent or (mutant.unseen_on_gpu if device == "cuda" else ""),
            )


def stale(package: Path, kernels: Iterable[KernelSpec]) -> list[str]:
    """Mutants made by hand whose text is not in its file exactly once, in words."""
    found = []
    for spec in kernels:
        for mutant in (*spec.mutants, *BY_HAND.get(spec.name, ())):
            count = (package / mutant.file).read_text().count(mutant.old)
            if count != 1:
                found.append(f"{mutant.id}: {mutant.old!r} is {count} times in {mutant.file}")
    return found


def generated(package: Path, kernels: Sequence[KernelSpec]) -> Iterator[Candidate]:
    """Mutants of every device function of the package and of the launchers' arithmetic."""
    for path in sorted(package.rglob("*.py")):
        file, source = path.relative_to(package).as_posix(), path.read_text()
        for function in ast.parse(source).body:
            if not isinstance(function, ast.FunctionDef) or function.name in SKIPPED_FUNCTIONS:
                continue
            on_device = any("jit" in ast.unparse(item) for item in function.decorator_list)
            if not on_device and function.name not in HOST_FUNCTIONS.get(file, ()):
                continue
            operators = KERNEL_OPERATORS if on_device else HOST_OPERATORS
            seen = _without_variants(function) if on_device else _without_unseen(function)
            for edit in edits(file, source, seen, operators):
                new = edit.apply(source)
                yield Candidate(
                    id=edit.id,
                    kernel=function.name,
                    what=f"{edit.operator}: {edit.what}",
                    file=file,
                    source=new,
                    diff=unified_diff(file, source, new),
                    checks=checks_for(file, function.name, kernels),
                    line=edit.line,
                    equivalent=EQUIVALENT.get(edit.id, ""),
                )


def checks_for(file: str, function: str, kernels: Sequence[KernelSpec]) -> tuple[str, ...]:
    """The checks that may see a mutant of a function."""
    own = tuple(spec.name for spec in kernels if spec.source == file)
    found = FUNCTION_CHECKS.get(function) or CHECKS.get(file) or own
    known = {spec.name for spec in kernels}
    found = tuple(check for check in found if check.partition(":")[0] in known)
    return found or tuple(spec.name for spec in kernels)


def _without_unseen(function: ast.FunctionDef) -> ast.FunctionDef:
    """The function without what only chooses a compiled variant, and without the path that a GPU
    alone takes.
    """

    class Cut(ast.NodeTransformer):
        def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
            names = {name.id for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)}
            return None if names & set(NOT_SEEN) else self.generic_visit(node)

        def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST | None:
            unseen = isinstance(node.target, ast.Name) and node.target.id in NOT_SEEN
            return None if unseen else self.generic_visit(node)

        def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
            unseen = isinstance(node.target, ast.Name) and node.target.id in NOT_SEEN
            return None if unseen else self.generic_visit(node)

        def visit_keyword(self, node: ast.keyword) -> ast.AST | None:
            return None if node.arg in NOT_SEEN else self.generic_visit(node)

        def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
            addresses = isinstance(node.op, ast.BitOr) and "data_ptr()" in ast.unparse(node)
            return self.visit(node.left) if addresses else self.generic_visit(node)

        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt] | None:
            self.generic_visit(node)
            if GPU_PATH in ast.unparse(node.test):
                return node.orelse
            return node if node.body else None

        def visit_match_case(self, node: ast.match_case) -> ast.AST | None:
            return None if GPU_PATH in ast.unparse(node.pattern) else self.generic_visit(node)

    return Cut().visit(function)


def _without_variants(function: ast.FunctionDef) -> ast.FunctionDef:
    """The device function without the conditions that choose between variants of equal results."""

    class Cut(ast.NodeTransformer):
        def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
            chosen = isinstance(node.target, ast.Name) and node.target.id in VARIANTS
            return None if chosen else self.generic_visit(node)

        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            self.generic_visit(node)
            names = {name.id for name in ast.walk(node.test) if isinstance(name, ast.Name)}
            return [*node.body, *node.orelse] if names & set(VARIANTS) else node

    return Cut().visit(function)


def sample(candidates: Sequence[Candidate], *, per_kernel: int, seed: int) -> list[Candidate]:
    """All made by hand, and `per_kernel` others of each function, drawn with a seed."""
    chosen = [candidate for candidate in candidates if candidate.by_hand]
    kernels = dict.fromkeys(item.kernel for item in candidates if not item.by_hand)
    for kernel in kernels:
        own = [c for c in candidates if c.kernel == kernel and not c.by_hand and not c.equivalent]
        own = random.Random(f"{seed} {kernel}").sample(own, min(per_kernel, len(own)))
        chosen.extend(own)
    return chosen


@dataclass(slots=True)
class _Worker:
    process: Any
    connection: Any
    device: str
    deadline: float = 0.0
    task: Task | None = None
    done: int = 0

    @classmethod
    def start(cls, context: Any, body: Callable[[Any, str], None], device: str) -> "_Worker":
        ours, theirs = context.Pipe()
        process = context.Process(target=body, args=(theirs, device), daemon=True)
        process.start()
        theirs.close()
        return cls(process=process, connection=ours, device=device)

    def give(self, task: Task, limit: float) -> None:
        self.task, self.done = task, self.done + 1
        self.deadline = time.monotonic() + limit
        self.connection.send(task)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def try_all(
    tasks: Iterable[Task],
    *,
    jobs: int,
    device: str,
    seconds: float,
    found: Callable[[Verdict], None],
    body: Callable[[Any, str], None] = serve,
) -> None:
    """Try every task in `jobs` processes; `found` gets each verdict.

    seconds: silence after which a mutant counts as hanging. body: what a process runs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["verify.mutation_trials"])
    waiting, again, spoiled = deque(tasks), set[str](), set[int]()
    workers = [_Worker.start(context, body, device) for _ in range(min(jobs, len(waiting)))]
    try:
        while waiting or any(worker.task for worker in workers):
            for place, worker in enumerate(workers):
                if worker.task is None and waiting:
                    if worker.done >= _TASKS_PER_WORKER:
                        worker.stop()
                        workers[place] = worker = _Worker.start(context, body, device)
                    # Loading a mutant, and what is drawn for its first check, take their time.
                    worker.give(waiting.popleft(), 4 * seconds)
            busy = {worker.connection: place for place, worker in enumerate(workers) if worker.task}
            for ready in connections.wait(list(busy), timeout=1.0):
                place = busy[ready]
                verdict = _heard(workers[place], seconds)
                if verdict is not None and verdict.status != SPOILED:
                    workers[place].task = None
                    found(verdict)
                elif verdict is not None:
                    spoiled.add(place)
            for place, worker in enumerate(workers):
                late = worker.task is not None and time.monotonic() > worker.deadline
                if place in spoiled or (
                    worker.task is not None and (late or not worker.process.is_alive())
                ):
                    assert worker.task is not None, "a process is spoiled under a mutant"
                    how = "timeout" if late else "damage" if place in spoiled else _crash(worker)
                    spoiled.discard(place)
                    if worker.task.id in again:
                        found(_died(worker.task, how, seconds))
                    else:
                        again.add(worker.task.id)
                        waiting.append(worker.task)
                    worker.stop()
                    workers[place] = _Worker.start(context, body, device)
    finally:
        for worker in workers:
            worker.stop()


def _crash(worker: _Worker) -> str:
    """A mutant that writes anywhere ends in a fault; whatever else ends a worker is not its doing.

    Raises:
        RuntimeError: the worker was ended from outside, or by an error of its own.
    """
    code = worker.process.exitcode
    if code is not None and -code in _FAULTS:
        return "crash"
    task = worker.task.id if worker.task else "nothing"
    raise RuntimeError(f"a worker ended with exit code {code} while it tried {task}")


def _heard(worker: _Worker, seconds: float) -> Verdict | None:
    try:
        message = worker.connection.recv()
    except (EOFError, ConnectionError):
        worker.process.join(5)
        return None
    if isinstance(message, Verdict):
        return message
    worker.deadline = time.monotonic() + seconds
    return None


def _died(task: Task, how: str, seconds: float) -> Verdict:
    """The unchanged package passes every check without hanging, dying or damaging its process: this
    mutant does not, in two processes.
    """
    return Verdict(
        id=task.id, status="killed", killed_by={"measure": how}, checks=1, seconds=seconds
    )


def as_json(candidate: Candidate, verdict: Verdict | None) -> dict[str, Any]:
    """One entry of the record."""
    status = "equivalent" if candidate.equivalent else verdict.status if verdict else "survived"
    return {
        "id": candidate.id,
        "kernel": candidate.kernel,
        "what": candidate.what,
        "file": candidate.file,
        "by_hand": candidate.by_hand,
        "diff": candidate.diff,
        "status": status,
        "killed_by": verdict.killed_by if verdict else None,
        "reason": candidate.equivalent or (verdict.reason if verdict else ""),
        "checks": verdict.checks if verdict else 0,
        "seconds": verdict.seconds if verdict else 0.0,
    }


def scores(entries: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Kernel -> killed, total (killed and survived), equivalent, invalid."""
    counted: dict[str, Counter[str]] = {}
    for entry in entries:
        counted.setdefault(entry["kernel"], Counter())[entry["status"]] += 1
    return {
        kernel: {
            "killed": counts["killed"],
            "total": counts["killed"] + counts["survived"],
            "equivalent": counts["equivalent"],
            "invalid": counts["invalid"],
        }
        for kernel, counts in counted.items()
    }


def known_verdicts(
    entries: Iterable[Mapping[str, Any]], candidates: Iterable[Candidate]
) -> dict[str, Verdict]:
    """Verdicts of an earlier record that still hold: same mutant, same change.

    Written reasons are today's; what compiles to the same code needs none.
    """
    diffs = {candidate.id: candidate.diff for candidate in candidates}
    names = ("id", "status", "killed_by", "reason", "checks", "seconds")
    return {
        entry["id"]: Verdict(**{name: entry[name] for name in names})
        for entry in entries
        if (entry["status"] in ("killed", "survived", "invalid") or entry["reason"] == SAME_CODE)
        and diffs.get(entry["id"]) == entry["diff"]
    }


def with_reason(candidate: Candidate, reason: str) -> Candidate:
    """The candidate as one that no check can see."""
    return replace(candidate, equivalent=reason)
