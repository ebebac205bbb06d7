"""One worker process: loads mutants and runs the checks of their kernel until one fails.

What does not depend on the mutant (inputs, references, routings) is kept from one mutant to the
next. A failed check counts if the unchanged package passes it in the same process, so that damage
which an earlier mutant did to the memory of the process kills nobody.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import torch

from . import revision
from .commands.common import package, source_directory
from .compare import WORST
from .expected import Expected
from .far import FarBench
from .inputs import Inputs
from .models import Arithmetic
from .run import Outcome, Prepared, Problem, Workbench, dtype_name
from .spec import KernelSpec, NamedPlan
from .specs import KERNELS
from .specs.quant import DEQUANTIZE_FOUR_BIT, DEQUANTIZE_SCALED
from .specs.routing import ROUTING

SPECS: Mapping[str, KernelSpec] = {
    spec.name: spec for spec in (ROUTING, DEQUANTIZE_FOUR_BIT, DEQUANTIZE_SCALED, *KERNELS)
}
"""Every operation that mutants are checked by."""
MUTANT = "mutant_of_scattermoe_lora"
SPOILED = "spoiled"
"""No verdict: the memory of the process is damaged, by this mutant or by an earlier one."""
_LIKELY = (
    "tails",
    "scattered",
    "gated-sentinels",
    "gated-shared-gradient",
    "one-takes-all",
    "holes",
    "columns",
    "long-rows",
    "boundary-wide",
    "sentinels-slot",
    "strided",
    "plain",
)
_HOPELESS = 5
"""Checks that raise, of a mutant that computed nothing yet, before it counts as invalid."""
_RAISES = 12
"""Checks that raise before a mutant counts as invalid, whatever others compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A mutant to try: new text of one file, and the checks that may see it.

    routes: it builds its own routing. far: operands more than 2^31 elements apart come first.
    limit: checks at most, 0 for all.
    """

    id: str
    file: str
    source: str
    checks: tuple[str, ...]
    routes: bool = False
    far: bool = False
    limit: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of a mutant.

    status: killed, survived, or invalid (nothing was computed). killed_by: the check, in words.
    checks: how many ran.
    """

    id: str
    status: str
    killed_by: Mapping[str, Any] | None = None
    reason: str = ""
    checks: int = 0
    seconds: float = 0.0


Key = tuple[str, str, torch.dtype, str]


@dataclass(slots=True)
class Known:
    """What the mutants of a process share. `alive` is called whenever a mutant is about to run."""

    alive: Callable[[], None]
    inputs: dict[Key, Inputs] = field(default_factory=dict)
    expected: dict[tuple[Key, Arithmetic], Mapping[str, Expected]] = field(default_factory=dict)
    routings: Workbench = field(default_factory=Workbench)
    far: FarBench | None = None
    far_ratios: dict[str, dict[tuple[str, str], float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial(Problem):
    """A problem whose inputs and references are computed once per process."""

    known: Known

    @property
    def key(self) -> Key:
        """What inputs and references depend on."""
        return (self.spec.name, self.case.name, self.dtype, self.mode)

    def draw(self) -> Inputs:
        """The inputs, drawn once."""
        if self.key not in self.known.inputs:
            self.known.inputs[self.key] = Problem.draw(self)
        self.known.alive()
        return self.known.inputs[self.key]

    def _reference(self, inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
        key = (self.key, how)
        if key not in self.known.expected:
            with torch.enable_grad():
                self.known.expected[key] = self.spec.reference(inputs, how)
        self.known.alive()
        return self.known.expected[key]


class RightRoutings(Workbench):
    """Gives a mutant the routing that the unchanged package built, in the mutant's own class."""

    def __init__(self, lib: ModuleType, known: Known) -> None:
        super().__init__()
        self._lib = lib
        self._known = known

    def prepare(self, lib: ModuleType, spec: KernelSpec, inputs: Inputs) -> Prepared | None:
        """What `spec.prepare` builds from these inputs with the unchanged package."""
        right = self._known.routings.prepare(self._lib, spec, inputs)
        if right is not None and right.problems():
            self._known.routings = Workbench()
            right = self._known.routings.prepare(self._lib, spec, inputs)
        if right is None:
            return None
        kind = getattr(lib, type(right.value).__name__)
        given = {part.name: getattr(right.value, part.name) for part in fields(kind) if part.init}
        return Prepared(value=kind(**given), guards=right.guards, copies=right.copies)


class SpoiledError(Exception):
    """The unchanged package fails a check too: a mutant has written into what a process keeps."""


class Bench:
    """Tries mutants on one device."""

    def __init__(self, device: torch.device, alive: Callable[[], None]) -> None:
        self._device = device
        self._right = package()
        self._known = Known(alive=alive)

    def judge(self, task: Task) -> Verdict:
        """Load the mutant and look for a check that it fails."""
        start = time.monotonic()
        try:
            lib = revision.edited(source_directory(), {task.file: task.source}, MUTANT)
        except Exception as error:  # noqa: BLE001 - a mutant may do anything
            revision.unload(MUTANT)
            return Verdict(id=task.id, status="invalid", reason=f"{type(error).__name__}: {error}")
        try:
            verdict = self._judged(lib, task)
        finally:
            revision.unload(MUTANT)
        return Verdict(**{**_as_dict(verdict), "seconds": round(time.monotonic() - start, 3)})

    def _judged(self, lib: ModuleType, task: Task) -> Verdict:
        """The verdict; found again with nothing kept where what was kept is spoiled, and none
        where the process itself is.
        """
        try:
            return self._search(lib, task)
        except SpoiledError:
            self._known = Known(alive=self._known.alive)
        try:
            return self._search(lib, task)
        except SpoiledError as error:
            return Verdict(id=task.id, status=SPOILED, reason=str(error))

    def _search(self, lib: ModuleType, task: Task) -> Verdict:
        shared = Workbench() if task.routes else RightRoutings(self._right, self._known)
        far = self._device.type == "cpu"
        if task.far and far:
            far, killed_by = False, self._far(lib, task, shared)
            if killed_by:
                return Verdict(id=task.id, status="killed", killed_by=killed_by, checks=1)
        checks, raised, reason = 0, 0, ""
        for spec, paths, case, dtype, mode in trials(task.checks):
            trial = self._trial(lib, spec, case, dtype, mode, shared)
            for outcome in trial.check(_wanting(paths)):
                checks += outcome.status != "unavailable"
                if outcome.status == "failed":
                    if not self._right_passes(trial, outcome):
                        raise SpoiledError(f"the unchanged package fails too: {outcome}")
                    return Verdict(
                        id=task.id, status="killed", killed_by=in_words(outcome), checks=checks
                    )
                if outcome.status == "error":
                    raised, reason = raised + 1, outcome.reason
            if raised >= _RAISES or (raised == checks and raised >= _HOPELESS):
                break
            if task.limit and checks >= task.limit:
                break
        killed_by = self._far(lib, task, shared) if far and not raised else None
        if killed_by:
            return Verdict(id=task.id, status="killed", killed_by=killed_by, checks=checks + 1)
        status = "invalid" if raised else "survived"
        return Verdict(id=task.id, status=status, reason=reason, checks=checks)

    def _far(self, lib: ModuleType, task: Task, shared: Workbench) -> dict[str, Any] | None:
        """The first run on operands far apart that the mutant gets wrong and the package right."""

        def prepare(of: ModuleType, spec: KernelSpec, inputs: Inputs) -> Any:
            bench = self._known.routings if of is self._right else shared
            prepared = bench.prepare(of, spec, inputs)
            return None if prepared is None else prepared.value

        if self._known.far is None:
            self._known.far = FarBench(prepare)
        self._known.far.prepare = prepare
        for name, paths in paths_of(task.checks).items():
            spec = SPECS[name]
            known = self._known.far
            try:
                if name not in self._known.far_ratios:
                    right = known.ratios(self._right, spec, ())
                    self._known.far_ratios[name] = {(path, case): r for path, case, r in right}
                right_ratios = self._known.far_ratios[name]
                self._known.alive()
                for path, case, ratio in known.ratios(lib, spec, paths):
                    if not ratio <= 1 and right_ratios.get((path, case), 2.0) <= 1:
                        return {
                            "kernel": name,
                            "path": path,
                            "case": case,
                            "measure": "exact",
                            "ratio": min(ratio, WORST),
                        }
            except Exception:  # noqa: BLE001 - whatever a mutant raises is no verdict
                continue
        return None

    def _trial(
        self,
        lib: ModuleType,
        spec: KernelSpec,
        case: Any,
        dtype: torch.dtype,
        mode: str,
        bench: Workbench,
    ) -> Trial:
        return Trial(
            lib=lib,
            spec=spec,
            case=case,
            dtype=dtype,
            mode=mode,
            device=self._device,
            bench=bench,
            known=self._known,
        )

    def _right_passes(self, trial: Trial, outcome: Outcome) -> bool:
        right = self._trial(
            self._right, trial.spec, trial.case, trial.dtype, trial.mode, self._known.routings
        )
        found = right.check(lambda plan: (plan.path, plan.label) == (outcome.path, outcome.plan))
        return all(again.status == "passed" for again in found)


def _as_dict(verdict: Verdict) -> dict[str, Any]:
    return {part.name: getattr(verdict, part.name) for part in fields(verdict)}


def _wanting(paths: tuple[str, ...]) -> Callable[[NamedPlan], bool]:
    return lambda plan: plan.quick and (not paths or plan.path in paths)


def in_words(outcome: Outcome) -> dict[str, Any]:
    """The check that killed a mutant."""
    return {
        "kernel": outcome.kernel,
        "path": outcome.path,
        "case": outcome.case,
        "dtype": outcome.dtype,
        "mode": outcome.mode,
        "measure": outcome.measure,
        "ratio": outcome.ratio,
    }


def trials(
    checks: tuple[str, ...],
) -> Iterator[tuple[KernelSpec, tuple[str, ...], Any, torch.dtype, str]]:
    """Every quick run of the named checks, and one of each case without; likely ones first."""
    paths = paths_of(checks)
    found = []
    for place, (name, wanted) in enumerate(paths.items()):
        spec = SPECS[name]
        for case in spec.cases:
            if "model" in case.tags:
                continue
            likely = _LIKELY.index(case.name) if case.name in _LIKELY else len(_LIKELY)
            size = case.rows * case.k_in * case.n_out
            # Of pipelines the quick selection takes only some cases; here each has one run.
            runs = spec.quick_runs(case) or spec.runs(case)[:1]
            for turn, (dtype, mode) in enumerate(runs):
                later = likely == len(_LIKELY)
                order = (turn + 2 * later, likely, place, size, case.name, dtype_name(dtype), mode)
                found.append((order, (spec, wanted, case, dtype, mode)))
    yield from (trial for _, trial in sorted(found, key=lambda item: item[0]))


def paths_of(checks: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Spec -> the paths that the checks name; none means all."""
    paths: dict[str, tuple[str, ...]] = {}
    for check in checks:
        name, _, path = check.partition(":")
        paths[name] = (*paths.get(name, ()), path) if path else ()
    return paths


def serve(connection: Connection, device: str) -> None:
    """The body of a worker: answers a Task with a Verdict, and sends "alive" before each run."""
    warnings.simplefilter("ignore", RuntimeWarning)
    transformers_logging = logging.getLogger("transformers")
    transformers_logging.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    bench = Bench(torch.device(device), lambda: connection.send("alive"))
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(bench.judge(task))
