"""A device that takes the time it is told to take: its clock moves only with what runs on it."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from verify.bench_arms import Arm
from verify.bench_cases import SHAPES, BenchCase
from verify.benchmark_plugin import Measured
from verify.gate import Gate
from verify.gate_measure import ARMS, BASE, HEAD, Pairs, Visit
from verify.statistics import Rule
from verify.timing import Effort, VirtualClock

H100 = "NVIDIA H100 80GB HBM3"
CPU = torch.device("cpu")
DEQUANT = BenchCase(
    kind="dequant",
    what="nf4",
    shape=SHAPES["tiny"],
    projection="down",
    tokens=1,
    rank=0,
    dtype="float32",
)
"""A benchmark that runs on a CPU in no time."""
FEW = Effort(budget_ms=1e9, least=4, most=20)


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Milliseconds of a call. slower: name -> factor of the second revision and
    its copy; every: of the others.
    between, within: relative standard deviations of processes and of rounds.
    """

    ms: float = 0.5
    slower: Mapping[str, float] = field(default_factory=dict)
    every: float = 1.0
    between: float = 0.002
    within: float = 0.003
    seed: int = 0
    raises: Mapping[str, str] = field(default_factory=dict)
    value: Callable[[str, str], float] = lambda arm, name: 1.0

    def visits(
        self, cases: Sequence[BenchCase], process: int, seconds: float | None = None
    ) -> Sequence[Visit]:
        """What one process measures, by the code that measures on a GPU."""
        clock = VirtualClock()
        dice = random.Random(f"{self.seed} {process} {cases[0].name}")

        def arm_of(lib: ModuleType, case: BenchCase, drawn: Any) -> Arm:
            arm = lib.__name__
            factor = self.slower.get(case.name, self.every) if arm != BASE else 1.0
            ms = self.ms * factor * (1 + self.between * dice.gauss(0, 1))

            def call() -> Sequence[torch.Tensor]:
                if self.raises.get(case.name) == arm:
                    raise RuntimeError("no kernel image")
                clock.spend(ms * (1 + self.within * dice.gauss(0, 1)))
                return (torch.tensor([self.value(arm, case.name)]),)

            return Arm(call=call, outputs=("y",))

        pairs = Pairs(
            libs={arm: ModuleType(arm) for arm in ARMS},
            device=CPU,
            clock=clock,
            effort=FEW,
            exact=process == 0,
            arms=arm_of,
            draws=lambda case, device, seed: SimpleNamespace(case=case.inputs_key),
        )
        return list(pairs.visits(cases, process))


def cases(count: int) -> list[BenchCase]:
    """So many benchmarks of the gate."""
    from verify.gate_cases import suite

    return list(suite()[:count])


@dataclass(kw_only=True)
class VirtualDevice:
    """A stand-in for `verify.benchmark_device.ThisMachine`; remembers what it was asked."""

    package: Path
    gpu: str = H100
    speeds: Speeds = field(default_factory=Speeds)
    problems: Mapping[str, str] = field(default_factory=dict)
    revisions: Mapping[str, Path] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def facts(self) -> Mapping[str, Any]:
        return {"torch": torch.__version__}

    def sources(self) -> Path:
        return self.package

    def tree(self, against: str, destination: Path) -> Path:
        if against not in self.revisions:
            raise ValueError(f"git has no revision {against!r}")
        return self.revisions[against]

    def measure(self, case: BenchCase) -> Measured:
        if case.name in self.problems:
            return Measured(problem=self.problems[case.name])
        (visit,) = replace(self.speeds, raises={}).visits([case], 0)
        return Measured(samples=visit.samples[HEAD], info={"name": case.name, "launches": 3})

    def compare(
        self,
        base: Path,
        cases: Sequence[BenchCase],
        *,
        seconds: float,
        say: Callable[[str], None],
    ) -> Any:
        self.asked = [case.name for case in cases]
        gate = Gate(cases=cases, visit=self.speeds.visits, rule=Rule(), seconds=seconds)
        for visit in gate.run():
            say(visit.name)
        return gate.results(), gate.invalid()


__all__ = ["BASE", "H100", "HEAD", "Speeds", "VirtualDevice", "cases"]
