"""How often the gate errs, computed from stored raw samples of equal revisions.

Whole suites are drawn by bootstrap: processes with replacement, the same ones for all benchmarks,
and within each the blocks of its rounds with replacement. Each suite is decided by the rule itself,
stage by stage; a slowdown is planted by multiplying the samples of one revision. Tails are those of
the processes that were measured: another machine, or a rarer disturbance, is not in them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .gate_measure import BASE, HEAD, TWIN, Visit
from .statistics import AMBIGUOUS, REGRESSION, Rule, blocks, decide, scales

LEAST = 10
"""Processes below which nothing is published."""

_COPIES = 50
"""Bootstrap copies of each process from which suites are drawn."""

Samples = Mapping[str, Mapping[int, np.ndarray]]
"""Benchmark -> process -> (base against head, twin against head) of each copy, [2, copies]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was computed. draws: suites. false_alarms: unchanged suites in which some benchmark was
    called slower. at_most: upper end of the 95% interval of their rate. undecided: unchanged suites
    that ended ambiguous. power: probability that a slowdown is found, of the benchmark where that
    is lowest. extended: mean share of benchmarks that wanted more than the first stage.
    """

    processes: int
    benchmarks: int
    draws: int
    false_alarms: int
    undecided: int
    extended: float
    slowdown: float
    power: float
    weakest: str
    mean_power: float

    @property
    def rate(self) -> float:
        """Share of unchanged suites with a false alarm."""
        return self.false_alarms / self.draws

    @property
    def at_most(self) -> float:
        """Upper end of the one-sided 95% interval of `rate` (Wilson; 3 / draws where it is 0)."""
        if not self.false_alarms:
            return min(3.0 / self.draws, 1.0)
        z, n, p = 1.645, self.draws, self.rate
        root = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (p + z * z / (2 * n) + root) / (1 + z * z / n)

    def as_json(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {
            "processes": self.processes,
            "benchmarks": self.benchmarks,
            "draws": self.draws,
            "false_alarms": self.false_alarms,
            "false_alarm_rate": round(self.rate, 6),
            "false_alarm_rate_at_most": round(self.at_most, 6),
            "undecided_suites": self.undecided,
            "extended": round(self.extended, 4),
            "slowdown": self.slowdown,
            "power": round(self.power, 5),
            "weakest": self.weakest,
            "mean_power": round(self.mean_power, 5),
            "how": "bootstrap over stored raw samples of equal revisions; processes and blocks of "
            "rounds drawn with replacement",
        }


def prove(
    visits: Sequence[Visit],
    rule: Rule | None = None,
    *,
    slowdown: float | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Proof:
    """False alarms and power of a rule on samples of equal revisions.

    slowdown: 0.05 for 5%; what the rule must detect unless stated. Benchmarks that some process did
    not measure are left out.

    Raises:
        ValueError: there are fewer processes than `LEAST`, or no benchmark that all measured.
    """
    rule = rule or Rule()
    effect = rule.detect if slowdown is None else slowdown
    generator = np.random.default_rng(seed)
    samples, processes = _copies(visits, generator)
    names = list(samples)
    counts = dict.fromkeys(names, 0)
    alarms = undecided = extended = 0
    for _ in range(draws):
        chosen = generator.choice(processes, size=rule.stages[-1])
        copies = generator.integers(_COPIES, size=(len(names), rule.stages[-1]))
        drawn = {
            name: np.array([samples[name][p][:, c] for p, c in zip(chosen, row, strict=True)])
            for name, row in zip(names, copies, strict=True)
        }
        verdicts, more = _suite(drawn, rule)
        alarms += REGRESSION in verdicts.values()
        undecided += AMBIGUOUS in verdicts.values()
        extended += more
        shift = np.array([math.log1p(effect), 0.0])
        slower = {name: pairs + shift for name, pairs in drawn.items()}
        for name, verdict in _suite(slower, rule)[0].items():
            counts[name] += verdict == REGRESSION
    weakest = min(counts, key=lambda name: counts[name])
    return Proof(
        processes=len(processes),
        benchmarks=len(names),
        draws=draws,
        false_alarms=alarms,
        undecided=undecided,
        extended=extended / draws / len(names),
        slowdown=effect,
        power=counts[weakest] / draws,
        weakest=weakest,
        mean_power=sum(counts.values()) / draws / len(names),
    )


def _copies(visits: Sequence[Visit], generator: np.random.Generator) -> tuple[Samples, list[int]]:
    """Bootstrap copies of the ratios of every process, and the processes."""
    processes = sorted({visit.process for visit in visits if visit.samples})
    if len(processes) < LEAST:
        raise ValueError(f"{len(processes)} processes were measured, {LEAST} are needed")
    found: dict[str, dict[int, np.ndarray]] = {}
    for visit in visits:
        if not visit.samples:
            continue
        base, head, twin = (visit.samples[arm] for arm in (BASE, HEAD, TWIN))
        pairs = np.stack([blocks(base, head), blocks(twin, head)])
        picks = generator.integers(pairs.shape[1], size=(_COPIES, pairs.shape[1]))
        found.setdefault(visit.name, {})[visit.process] = np.median(pairs[:, picks], axis=2)
    whole = {name: made for name, made in found.items() if len(made) == len(processes)}
    if not whole:
        raise ValueError(f"no benchmark was measured by all of {len(processes)} processes")
    return whole, processes


def _suite(drawn: Mapping[str, np.ndarray], rule: Rule) -> tuple[dict[str, str], int]:
    """The verdict of every benchmark, and how many wanted more than the first stage."""
    verdicts: dict[str, str] = {}
    taken = dict.fromkeys(drawn, rule.stages[0])
    more = 0
    for stage in rule.stages:
        open_ones = [name for name in drawn if name not in verdicts and taken[name] == stage]
        noise = scales({name: drawn[name][: taken[name], 1].tolist() for name in drawn})
        for name in open_ones:
            values = drawn[name][:stage, 0].tolist()
            decision = decide(values, noise[name], rule, benchmarks=len(drawn))
            if decision.wants:
                taken[name] = decision.wants
                more += stage == rule.stages[0]
            else:
                verdicts[name] = decision.verdict
    return verdicts, more


def kept(proof: Proof, rule: Rule) -> bool:
    """Whether the rates are those that the rule promises."""
    return proof.at_most <= rule.false_alarms and proof.power >= rule.power
