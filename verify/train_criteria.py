"""What a training run must show, each a number beside its limit.

The noise. Two eager runs a and b differ in the order of their sums alone, so their curves differ by
what rounding makes of that. Where a third run o is as good as they are, all three are one curve
plus errors of one size v, and at every step o - (a + b) / 2 has variance 3/2 v, a - b 2 v. Both
sizes are taken as medians over the steps of a phase: where rounding sends a token to another
expert, single steps stand out. The median of n absolute values is as certain as a mean square of
0.37 n (F. R. Hampel, 1974), n being the steps over 1 + 2 sum of autocorrelations of a - b. Half the
logarithm of a ratio of two mean squares of m values each is normal with variance 1 / m (R. A.
Fisher, 1924), hence

    median |o - (a + b) / 2|  <=  sqrt(3/4) exp(SIGMAS / sqrt(0.37 n)) median |a - b|.

Phases are judged apart, because the noise grows while training goes on.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FALL = 0.3
"""Share of its first value that the loss must lose; switching the adapter off must cost as much."""
PHASES = 3
SIGMAS = 5.0
_TENTH = 10
_EPS = 2.0**-24
_MEDIAN = 0.37


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One criterion. text: a sentence with both numbers. margin: value over limit, or its inverse,
    so that at most 1 is good.
    """

    criterion: str
    value: float
    limit: float
    margin: float
    text: str

    @property
    def passed(self) -> bool:
        """Whether the criterion holds; never for a number that is none."""
        return self.margin <= 1.0


def fall(name: str, curve: Sequence[float]) -> Finding:
    """The loss falls by FALL: the mean of the last tenth of the steps against the first step."""
    first, last = curve[0], mean(curve[-max(1, len(curve) // _TENTH) :])
    share = 1.0 - last / first
    return Finding(
        criterion=f"{name}: fall",
        value=share,
        limit=FALL,
        margin=FALL / share if share > 0 else math.inf if share == share else math.nan,
        text=f"{name}: the loss fell from {first:.4f} to {last:.4f}, by {share:.1%}, and should "
        f"fall by at least {FALL:.0%}",
    )


def switched_off(name: str, *, on: float, off: float) -> Finding:
    """Without the adapter, the loss on the batch of the last step is worse by FALL."""
    limit = (1.0 - FALL) * off
    return Finding(
        criterion=f"{name}: off",
        value=on,
        limit=limit,
        margin=on / limit,
        text=f"{name}: the loss on the last batch is {on:.4f} with the adapter and {off:.4f} "
        f"without, and should be at most {limit:.4f} with it",
    )


def within_noise(
    name: str, ours: Sequence[float], eager: Sequence[float], other: Sequence[float]
) -> list[Finding]:
    """One finding per phase: how far our curve is from the middle of the eager ones."""
    steps = len(ours)
    bounds = [steps * phase // PHASES for phase in range(PHASES + 1)]
    return [
        _phase(name, range(low, high), ours, eager, other)
        for low, high in itertools.pairwise(bounds)
        if high > low
    ]


def _phase(
    name: str,
    steps: range,
    ours: Sequence[float],
    eager: Sequence[float],
    other: Sequence[float],
) -> Finding:
    apart = [eager[step] - other[step] for step in steps]
    off = [ours[step] - (eager[step] + other[step]) / 2 for step in steps]
    rounding = max(abs(eager[step]) for step in steps) * _EPS
    noise = math.hypot(size(apart), rounding)
    count = independent(apart)
    factor = math.sqrt(0.75) * math.exp(SIGMAS / math.sqrt(_MEDIAN * count))
    value, limit = size(off), factor * noise
    return Finding(
        criterion=f"{name}: noise, steps {steps.start} to {steps.stop - 1}",
        value=value,
        limit=limit,
        margin=value / limit,
        text=f"{name}: in steps {steps.start} to {steps.stop - 1} our losses are {value:.2e} from "
        f"the eager ones (median) and should be within {limit:.2e}: {factor:.1f} times the "
        f"{noise:.2e} between two eager runs, in {count:.1f} independent steps",
    )


def independent(values: Sequence[float]) -> float:
    """Independent values among correlated ones of mean zero: n / (1 + 2 sum of autocorrelations),
    summed while they are positive; at least 1.
    """
    count = len(values)
    power = sum(value * value for value in values)
    if power == 0.0:
        return 1.0
    total = 1.0
    for lag in range(1, count):
        product = sum(values[step] * values[step + lag] for step in range(count - lag))
        if product <= 0.0:
            break
        total += 2.0 * product / power
    return max(1.0, count / total)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def size(values: Sequence[float]) -> float:
    """The median of the absolute values; NaN where any is."""
    sizes = [abs(value) for value in values]
    return math.nan if any(math.isnan(value) for value in sizes) else statistics.median(sizes)


def findings(
    name: str, curves: Mapping[str, Sequence[float]], *, on: float, off: float
) -> list[Finding]:
    """All criteria of an arm. curves: ours, eager, other. on, off: our loss with the adapter and
    without.
    """
    return [
        fall(name, curves["ours"]),
        switched_off(name, on=on, off=off),
        *within_noise(name, curves["ours"], curves["eager"], curves["other"]),
    ]
