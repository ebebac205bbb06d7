"""Whether a revision is slower than another, decided from paired samples of fresh processes.

In one process the two revisions take turns on the same data; what counts is the median over blocks
of two rounds (first, second; second, first) of the logarithm of their ratio, so that neither a
drift of the GPU's clock nor the place in a round counts. Processes differ more than rounds do, so
the statistic of a benchmark is the median over processes.

Every process measures a copy of the second revision as well. What the two copies differ by is
noise; its scale sets the limit of a benchmark, never below `Rule.limit`. A benchmark that is near
its limit, whose processes disagree, or whose noise hides the slowdown that must be found, asks for
more processes, up to the last of `Rule.stages`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

import numpy as np

REGRESSION, IMPROVEMENT, SAME = "regression", "improvement", "same"
AMBIGUOUS, UNMEASURED = "ambiguous", "unmeasured"
DECISIONS = (REGRESSION, IMPROVEMENT, SAME, AMBIGUOUS, UNMEASURED)

_MEDIAN_OF_SIZE = NormalDist().inv_cdf(0.75)
"""Median of the size of a standard normal variable."""

_OUTLIER = 3.0

_MEDIAN_EFFICIENCY = math.sqrt(math.pi / 2)
"""Standard error of a median over that of a mean, for many normal values; fewer have less."""

_PRIOR = 3
"""The noise common to all benchmarks counts as much as so many processes of one benchmark."""


_ENOUGH = 5
"""The spread of fewer values than this says little of their noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What must be found and how often the gate may err.

    detect: slowdown that must be found, with probability `power`. limit: smallest change that is
    ever called one. spread: by how much processes may differ. false_alarms: probability that any
    benchmark of an unchanged suite is called slower. stages: processes before each decision.
    """

    detect: float = 0.05
    limit: float = 0.025
    spread: float = 0.015
    false_alarms: float = 0.01
    power: float = 0.99
    stages: tuple[int, ...] = (3, 5, 9)

    def __post_init__(self) -> None:
        if not 0 < self.limit < self.detect:
            raise ValueError(f"a limit of {self.limit} cannot find a slowdown of {self.detect}")
        if not self.stages or self.stages[0] < 1 or list(self.stages) != sorted(set(self.stages)):
            raise ValueError(f"stages {self.stages} are not counts of processes that grow")

    def surely_above(self, benchmarks: int) -> float:
        """Standard errors above zero that no benchmark of an unchanged suite reaches by chance."""
        looks = max(benchmarks, 1) * len(self.stages)
        return NormalDist().inv_cdf(1 - self.false_alarms / looks)

    @property
    def surely_found(self) -> float:
        """Standard errors above the limit from which on a slowdown is found."""
        return NormalDist().inv_cdf(self.power)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is said of one benchmark.

    ratio: time of the second revision over that of the first. limit: ratio above which it is
    slower. sees: smallest ratio that this many processes find. wants: processes to go on with, 0
    when it is decided or nothing more would help.
    """

    verdict: str
    ratio: float
    limit: float
    sees: float
    processes: int
    wants: int
    reason: str


def blocks(base: Sequence[float], head: Sequence[float]) -> np.ndarray:
    """log(head / base) of each block of two rounds; of the single round where there is only one.

    Raises:
        ValueError: the numbers of samples differ or are zero, or a sample is not positive.
    """
    if len(base) != len(head) or not base:
        raise ValueError(f"{len(base)} samples of one revision and {len(head)} of the other")
    if min(*base, *head) <= 0:
        raise ValueError(f"a sample took {min(*base, *head)} ms")
    size = min(2, len(base))
    whole = len(base) // size * size
    sums = [np.asarray(item[:whole], dtype=float).reshape(-1, size).sum(1) for item in (base, head)]
    return np.log(sums[1] / sums[0])


def log_ratio(base: Sequence[float], head: Sequence[float]) -> float:
    """The logarithm of how much longer the second took, of interleaved samples of one process.

    Raises:
        ValueError: as `blocks`.
    """
    return float(np.median(blocks(base, head)))


def log_ratio_error(base: Sequence[float], head: Sequence[float]) -> float:
    """Standard error of `log_ratio`, from the quartiles of the blocks.

    Raises:
        ValueError: as `blocks`.
    """
    found = blocks(base, head)
    low, high = np.quantile(found, (0.25, 0.75))
    deviation = float(high - low) / (2 * _MEDIAN_OF_SIZE)
    return deviation * _MEDIAN_EFFICIENCY / math.sqrt(len(found))


def scales(nulls: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Standard deviation of the logarithmic ratio of one process, per benchmark.

    nulls: benchmark -> ratios of two copies of one revision. The scale of a benchmark is drawn
    towards the median of all, which counts as `_PRIOR` of its processes.

    Raises:
        ValueError: a benchmark has no such ratio.
    """
    if empty := [name for name, values in nulls.items() if not values]:
        raise ValueError(f"{empty[0]} has no ratio of two equal revisions")
    if not nulls:
        return {}
    common = _robust([value for values in nulls.values() for value in values])
    found = {}
    for name, values in nulls.items():
        # A single disturbed process does not move a median of processes; here it counts as three
        # deviations, not as its square.
        most = _OUTLIER * max(_robust(values), common)
        total = sum(min(abs(value), most) ** 2 for value in values)
        found[name] = math.sqrt((total + _PRIOR * common**2) / (len(values) + _PRIOR))
    return found


def _robust(values: Sequence[float]) -> float:
    """Standard deviation about zero of normal values, from the median of their sizes."""
    return median(abs(value) for value in values) / _MEDIAN_OF_SIZE


def spread(values: Sequence[float]) -> float:
    """The range of values without the outer quarter on each side; of all where they are few."""
    cut = (len(values) - 1) // 4
    inner = sorted(values)[cut : len(values) - cut]
    return inner[-1] - inner[0]


def mean_spread(count: int) -> float:
    """The mean `spread` of so many standard normal values, by Blom's approximation of their order
    statistics (within 3% from three values on).
    """
    cut = (count - 1) // 4
    return 2 * NormalDist().inv_cdf((count - cut - 0.375) / (count + 0.25))


def decide(values: Sequence[float], scale: float, rule: Rule, *, benchmarks: int) -> Decision:
    """Decide one benchmark of a suite.

    values: logarithmic ratios, one per process. scale: from `scales`. benchmarks: how many are
    decided at once.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a benchmark without a process cannot be decided")
    count, middle = len(values), median(values)
    if count >= max(rule.stages[-1], _ENOUGH):
        # Nothing more is coming: what the processes differ by counts as noise.
        scale = max(scale, spread(values) / mean_spread(count))
    error = scale * _MEDIAN_EFFICIENCY / math.sqrt(count)
    limit = max(math.log1p(rule.limit), rule.surely_above(benchmarks) * error)
    slack = rule.surely_found * error
    doubts = _doubts(values, limit, slack, rule)
    agreed = min(values) > limit + slack or max(values) < -limit - slack
    wants = 0
    if count < rule.stages[0]:
        doubts, agreed = [f"{count} of {rule.stages[0]} processes"], False
    if agreed or not doubts:
        verdict = REGRESSION if middle > limit else IMPROVEMENT if middle < -limit else SAME
        reason = f"{count} processes"
    else:
        verdict, reason = AMBIGUOUS, "; ".join(doubts)
        wants = next((stage for stage in rule.stages if stage > count), 0)
    return Decision(
        verdict=verdict,
        ratio=math.exp(middle),
        limit=math.exp(limit),
        sees=math.exp(limit + slack),
        processes=count,
        wants=wants,
        reason=reason,
    )


def _doubts(values: Sequence[float], limit: float, slack: float, rule: Rule) -> list[str]:
    """Why these values do not decide, in words."""
    found, middle = [], median(values)
    if limit + slack > math.log1p(rule.detect):
        found.append(
            f"only a slowdown of {math.expm1(limit + slack):.1%} would be found, "
            f"{rule.detect:.0%} must be"
        )
    last = len(values) >= rule.stages[-1]
    if not last and spread(values) > math.log1p(rule.spread):
        found.append(
            f"processes differ by {math.expm1(spread(values)):.1%}, {rule.spread:.1%} is allowed"
        )
    if not last and abs(abs(middle) - limit) < slack:
        found.append(
            f"{math.expm1(middle):+.1%} is within {math.expm1(slack):.1%} of the limit of "
            f"{math.expm1(limit):.1%}"
        )
    return found


def pooled(*parts: Mapping[str, Iterable[float]], names: Iterable[str]) -> dict[str, list[float]]:
    """The values that several sources have of each name."""
    return {name: [value for part in parts for value in part.get(name, ())] for name in names}
