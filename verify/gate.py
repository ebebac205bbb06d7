"""The regression gate: visits benchmarks in fresh processes until each is decided.

A process measures every benchmark that still wants one; `statistics.decide` says after each stage
which ones want more. Memory and launches are compared exactly, in the first process alone: they do
not vary.
"""

import math
import statistics as descriptive
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .bench_cases import BenchCase
from .gate_measure import BASE, HEAD, TWIN, Visit
from .statistics import (
    AMBIGUOUS,
    DECISIONS,
    IMPROVEMENT,
    REGRESSION,
    SAME,
    UNMEASURED,
    Decision,
    Rule,
    decide,
    log_ratio,
    pooled,
    scales,
)

Visits = Callable[[Sequence[BenchCase], int, float | None], Iterator[Visit]]
"""(cases, process, seconds left) -> visits, of one fresh process."""

EXACT: Mapping[str, str] = {"peak_bytes": "bytes at most", "launches": "launches"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the gate says of one benchmark.

    ms: medians of the two revisions in milliseconds. noise: standard deviation of the logarithmic
    ratio between processes. exact: what is compared exactly -> (first revision, second). bits:
    results that differ to the bit, and those that two copies of the second revision differ in.
    """

    name: str
    decision: str
    reason: str
    processes: int = 0
    ratio: float | None = None
    limit: float | None = None
    sees: float | None = None
    noise: float | None = None
    ms: tuple[float, float] | None = None
    exact: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)
    bits: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values for a record."""
        numbers = {
            key: None if value is None else round(value, 5)
            for key, value in (
                ("ratio", self.ratio),
                ("limit", self.limit),
                ("sees", self.sees),
                ("noise", self.noise),
            )
        }
        return {
            "name": self.name,
            "decision": self.decision,
            "reason": self.reason,
            "processes": self.processes,
            **numbers,
            "ms": None if self.ms is None else [round(value, 5) for value in self.ms],
            **{key: list(self.exact.get(key, (None, None))) for key in EXACT},
            "bits": {key: list(names) for key, names in self.bits.items()},
        }


@dataclass(slots=True, kw_only=True)
class Gate:
    """Visits and decides.

    visit: makes a fresh process. history: benchmark -> logarithmic ratios of equal revisions that
    were measured before on such a GPU. accept: what of `EXACT` may grow. found: visits so far.
    """

    cases: Sequence[BenchCase]
    visit: Visits
    rule: Rule = field(default_factory=Rule)
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)
    accept: Sequence[str] = ()
    seconds: float | None = None
    found: list[Visit] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float | None:
        """Seconds until the time is over; None where there is no limit."""
        return None if self.seconds is None else self.seconds - (time.monotonic() - self.start)

    def run(self) -> Iterator[Visit]:
        """Visit until all is decided or time is over; yields visits as they are made."""
        for stage in self.rule.stages:
            wanted = self._undecided(stage)
            for process in range(stage):
                done = {visit.name for visit in self.found if visit.process == process}
                failed = {visit.name for visit in self.found if visit.reason}
                waiting = [
                    case
                    for case in self.cases
                    if case.name in wanted and case.name not in done | failed
                ]
                if not waiting:
                    continue
                if self.left is not None and self.left <= 0:
                    return
                for visit in self.visit(waiting, process, self.left):
                    self.found.append(visit)
                    yield visit

    def _undecided(self, stage: int) -> set[str]:
        """Benchmarks that want as many processes."""
        if stage == self.rule.stages[0]:
            return {case.name for case in self.cases}
        return {name for name, decision in self.decisions().items() if decision.wants >= stage}

    def by_name(self) -> dict[str, list[Visit]]:
        """The visits of every benchmark that has samples."""
        made: dict[str, list[Visit]] = {}
        for visit in self.found:
            if visit.samples:
                made.setdefault(visit.name, []).append(visit)
        return made

    def noise(self) -> dict[str, float]:
        """Standard deviation of the logarithmic ratio of one process, of every benchmark."""
        mine = nulls_of(self.found)
        return scales(pooled(mine, self.history, names=mine))

    def decisions(self) -> dict[str, Decision]:
        """What the samples so far say."""
        noise = self.noise()
        return {
            name: decide(
                [log_ratio(visit.samples[BASE], visit.samples[HEAD]) for visit in visits],
                noise[name],
                self.rule,
                benchmarks=len(self.cases),
            )
            for name, visits in self.by_name().items()
        }

    def results(self) -> list[Result]:
        """What is said of every benchmark, in the order of the suite."""
        decisions, noise, made = self.decisions(), self.noise(), self.by_name()
        failures = {visit.name: visit.reason for visit in self.found if visit.reason}
        found = []
        for case in self.cases:
            name = case.name
            if name in failures or name not in decisions:
                reason = failures.get(name, "no process has measured it")
                found.append(Result(name=name, decision=UNMEASURED, reason=reason))
                continue
            found.append(self._result(decisions[name], noise[name], made[name]))
        return found

    def _result(self, decision: Decision, noise: float, visits: Sequence[Visit]) -> Result:
        facts = next((visit.facts for visit in visits if "launches" in visit.facts), {})
        exact = {key: (facts[key][0], facts[key][1]) for key in EXACT if key in facts}
        verdict, reasons = decision.verdict, [decision.reason]
        grown = [
            f"{EXACT[key]}: {before} before, {now} now"
            for key, (before, now) in exact.items()
            if key not in self.accept and before is not None and now is not None and now > before
        ]
        if grown:
            verdict, reasons = REGRESSION, [*grown, f"time: {decision.verdict}"]
        medians = [
            descriptive.median(value for visit in visits for value in visit.samples[arm])
            for arm in (BASE, HEAD)
        ]
        return Result(
            name=visits[0].name,
            decision=verdict,
            reason="; ".join(reasons),
            processes=decision.processes,
            ratio=decision.ratio,
            limit=decision.limit,
            sees=decision.sees,
            noise=noise,
            ms=(medians[0], medians[1]),
            exact=exact,
            bits={key: names for key, names in facts.get("bits", {}).items() if names},
        )

    def invalid(self) -> list[str]:
        """Peers that were slower than their figure on this GPU."""
        return [text for visit in self.found for text in visit.facts.get("invalid", ())]


def nulls_of(visits: Sequence[Visit]) -> dict[str, list[float]]:
    """Benchmark -> logarithmic ratios of the two copies of one revision, one per process."""
    found: dict[str, list[float]] = {}
    for visit in visits:
        if visit.samples:
            ratio = log_ratio(visit.samples[TWIN], visit.samples[HEAD])
            found.setdefault(visit.name, []).append(ratio)
    return found


def summary_of(results: Sequence[Result], invalid: Sequence[str]) -> dict[str, Any]:
    """Counts of the decisions, the worst ratio, and whether every benchmark was measured."""
    counts = {name: sum(item.decision == name for item in results) for name in DECISIONS}
    ratios = [item.ratio for item in results if item.ratio is not None]
    return {
        **counts,
        "benchmarks": len(results),
        "other_bits": sum(BASE in item.bits for item in results),
        "not_reproducible": sum(TWIN in item.bits for item in results),
        "complete": bool(results) and not counts[UNMEASURED],
        "worst_ratio": round(max(ratios), 5) if ratios else None,
        "mean_ratio": round(math.exp(descriptive.fmean(map(math.log, ratios))), 5)
        if ratios
        else None,
        "invalid": list(invalid),
    }


def exit_status(summary: Mapping[str, Any]) -> int:
    """0: every benchmark was measured and none is slower. 1: one is. 2: something is not known."""
    if summary[REGRESSION]:
        return 1
    sure = summary[SAME] + summary[IMPROVEMENT]
    unsure = summary[AMBIGUOUS] + summary[UNMEASURED] + len(summary["invalid"])
    return 0 if sure and not unsure else 2
