"""One process of the gate: two revisions and a copy of the second take turns on equal tensors."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import peer_figures
from .bench_arms import Arm, arm_of
from .bench_cases import BenchCase, Shape
from .bench_check import Judge
from .bench_inputs import Drawn, draw
from .gate_cases import WITNESSES
from .gate_plant import Plant
from .peers import PEERS
from .statistics import log_ratio_error
from .timing import Call, Clock, Effort, launches, peak_bytes

BASE, HEAD, TWIN = "base", "head", "twin"
ARMS = (BASE, HEAD, TWIN)
"""The first revision, the second, and a copy of the second."""

EFFORTS: Mapping[str, Effort] = {
    "cuda": Effort(budget_ms=250.0, least=20, most=60),
    "cpu": Effort(budget_ms=100.0, least=2, most=8),
}
WARM_UP: Mapping[str, float] = {"cuda": 1000.0, "cpu": 0.0}
"""Milliseconds of calls before the first sample of a process: a GPU's clock rises after idling."""

PRECISIONS: Mapping[str, float | None] = {"cuda": 0.005, "cpu": None}
"""Standard error of a logarithmic ratio for which a process takes more rounds."""
_MORE = 8
"""Times as many rounds as its effort says, at most."""

_UNIT = 1e-5
"""Samples are kept to this many milliseconds; GPU events resolve 3e-5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What one process found of one benchmark.

    samples: arm -> milliseconds, one per round. facts: what is compared exactly, where this process
    looked. reason: why there are no samples, in words.
    """

    name: str
    process: int
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values; the samples of an arm as one text."""
        samples = {
            arm: " ".join(f"{value / _UNIT:.0f}" for value in values)
            for arm, values in self.samples.items()
        }
        return {
            "name": self.name,
            "process": self.process,
            "samples": samples,
            "facts": dict(self.facts),
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Visit":
        """The visit that `as_json` wrote."""
        samples = {
            arm: tuple(int(word) * _UNIT for word in text.split())
            for arm, text in values["samples"].items()
        }
        return cls(
            name=values["name"],
            process=values["process"],
            samples=samples,
            facts=values["facts"],
            reason=values["reason"],
        )


def case_to_text(case: BenchCase) -> str:
    """A case as JSON."""
    return json.dumps(asdict(case))


def case_of_text(text: str) -> BenchCase:
    """The case that `case_to_text` wrote."""
    values = json.loads(text)
    return BenchCase(**{**values, "shape": Shape(**values["shape"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """How pairs are measured.

    libs: arm -> imported package, of `ARMS`. exact: compare results, memory and launches too.
    precision: standard error of a ratio above which more rounds are taken; None takes no more.
    plant: slows the second revision and its copy. arms, draws: what makes the calls and tensors of
    a case.
    """

    libs: Mapping[str, ModuleType]
    device: torch.device
    clock: Clock
    effort: Effort = field(default_factory=Effort)
    precision: float | None = None
    seed: int = 0
    exact: bool = True
    plant: Plant | None = None
    warm_up: float = 0.0
    arms: Callable[[ModuleType, BenchCase, Drawn], Arm] = arm_of
    draws: Callable[..., Drawn] = draw

    def visits(self, cases: Iterable[BenchCase], process: int) -> Iterator[Visit]:
        """Measure cases in order; the tensors of neighbours with equal inputs are drawn once.

        Raises:
            RuntimeError: the device does not answer any more.
        """
        drawn: Drawn | None = None
        warm = False
        for case in cases:
            try:
                if drawn is None or drawn.case != case.inputs_key:
                    drawn = None
                    drawn = self.draws(case, self.device, seed=self.seed)
                yield self._one(case, drawn, process, warm=warm)
                warm = True
            except Exception as error:  # noqa: BLE001 - becomes a result
                text = " ".join(str(error).split())[:300]
                yield Visit(
                    name=case.name, process=process, reason=f"{type(error).__name__}: {text}"
                )
                drawn = None
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                    torch.cuda.empty_cache()

    def _one(self, case: BenchCase, drawn: Drawn, process: int, *, warm: bool) -> Visit:
        arms, results = {}, {}
        for name in ARMS:
            arms[name], results[name] = self._first(name, case, drawn)
        facts: dict[str, Any] = {}
        if self.exact:
            facts["bits"] = {arm: differing(results[HEAD], results[arm]) for arm in (BASE, TWIN)}
            if facts["bits"][BASE]:
                problem = Judge.of(case, drawn).problem_of(results[HEAD])
                if problem:
                    raise _WrongError(problem)
        results.clear()
        # Outer places in a round are alike; base and twin swap them from process to process.
        order = ARMS if process % 2 == 0 else ARMS[::-1]
        calls: dict[str, Call] = {name: arms[name].call for name in order}
        if not warm:
            _warm_up(self.clock, calls[HEAD], self.warm_up)
        if self.plant is not None:
            calls |= self.plant.slowed(self.clock, calls[BASE], {n: calls[n] for n in (HEAD, TWIN)})
        samples, facts["host_ms"] = self._samples(calls)
        if self.exact:
            facts["peak_bytes"] = [peak_bytes(arms[n].call, self.device) for n in (BASE, HEAD)]
            facts["launches"] = [launches(arms[n].call, self.device) for n in (BASE, HEAD)]
            if 0 in facts["launches"]:
                raise _UncountedError("the profiler saw no kernel: launches cannot be compared")
            facts["invalid"] = self._too_slow(case, drawn)
        return Visit(name=case.name, process=process, samples=samples, facts=facts)

    def _first(self, name: str, case: BenchCase, drawn: Drawn) -> tuple[Arm, dict[str, Tensor]]:
        """An arm, and the results of its first call."""
        try:
            arm = self.arms(self.libs[name], case, drawn)
            return arm, arm.results()
        except Exception as error:
            raise _ArmError(f"{name} raises {type(error).__name__}: {error}") from error

    def _samples(self, calls: Mapping[str, Call]) -> tuple[dict[str, tuple[float, ...]], float]:
        """Interleaved samples of each call, and the host time of the slowest, in milliseconds."""
        wall, host = {}, {}
        for name, call in calls.items():
            self.clock.back_to_back(call, 2)
            wall[name] = self.clock.back_to_back(call, 3)
            host[name] = self.clock.enqueue(call, 5)
        rounds = self.effort.rounds([wall[name] + host[name] for name in calls])
        # Blocks are of two rounds.
        rounds += rounds % 2
        slowest = max(host.values())
        found = self.clock.samples(list(calls.values()), rounds, [slowest] * len(calls))
        if more := more_rounds(found, self.precision):
            added = self.clock.samples(list(calls.values()), more, [slowest] * len(calls))
            found = [[*some, *others] for some, others in zip(found, added, strict=True)]
        samples = {
            name: tuple(round(value / _UNIT) * _UNIT for value in values)
            for name, values in zip(calls, found, strict=True)
        }
        return samples, round(slowest, 4)

    def _too_slow(self, case: BenchCase, drawn: Drawn) -> list[str]:
        """Peers that were slower than their figure on this GPU, of the witnesses."""
        if case.name not in WITNESSES or self.device.type != "cuda":
            return []
        gpu = torch.cuda.get_device_name(self.device)
        known = peer_figures.FIGURES.get(gpu, {}).get(case.name, {})
        arms = {name: PEERS[name](case, drawn) for name in known}
        calls = {name: arm.call for name, arm in arms.items() if arm is not None}
        if not calls:
            return []
        samples, _ = self._samples(calls)
        medians = {name: float(torch.tensor(found).median()) for name, found in samples.items()}
        return peer_figures.too_slow(gpu, case.name, medians)


def more_rounds(samples: Sequence[Sequence[float]], precision: float | None) -> int:
    """How many rounds more, an even number, bring the standard error of every ratio to the first
    arm down to `precision`. Only what rounds differ by counts, not by how much one arm is slower.
    """
    if precision is None or len(samples) < 2:
        return 0
    rounds = len(samples[0])
    error = max(log_ratio_error(samples[0], other) for other in samples[1:])
    wanted = min(math.ceil(rounds * (error / precision) ** 2), _MORE * rounds)
    more = max(wanted - rounds, 0)
    return more + more % 2


class _WrongError(Exception):
    """The results that were to be timed are wrong."""


class _UncountedError(Exception):
    """What is to be compared exactly was not counted."""


class _ArmError(Exception):
    """A revision cannot run the benchmark."""


def _warm_up(clock: Clock, call: Call, milliseconds: float) -> None:
    spent = 0.0
    for _ in range(10_000):
        spent += clock.once(call)
        if spent >= milliseconds:
            return


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """The names of results that are not equal to the bit, or that only one side has."""
    names = dict.fromkeys([*one, *other])
    return [
        name
        for name in names
        if name not in one or name not in other or not _equal(one[name], other[name])
    ]


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = [value.contiguous().flatten().view(torch.uint8) for value in (a, b)]
    return torch.equal(flat[0], flat[1])
