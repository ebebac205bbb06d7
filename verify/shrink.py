"""Smaller launches that fail alike."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from typing import Any

from .cases import Case
from .draws import Draw
from .findings import Finding
from .routings import RoutingKind

_PLAIN: Mapping[str, Any] = {
    "weight_layout": "contiguous",
    "x_layout": "contiguous",
    "gradient": "",
    "bias": False,
    "gated": False,
    "lora_dtype": "same",
    "values": "normal",
    "source": "TOKEN",
    "target": "EXPERT",
    "scaling": 1.0,
    "seed": 0,
}
_ANY_TOP_K = "all-sentinels"
"""The kind of routing whose top_k may exceed the experts; the package refuses it of the others, and
those that drop some slots draw different experts.
"""


def possible(case: Case) -> bool:
    """Whether the routing of a case can be drawn, and is one that the package takes."""
    return case.top_k <= case.experts or case.routing.name == _ANY_TOP_K


def simpler(case: Case) -> Iterator[Case]:
    """Cases a step simpler than this one, the boldest steps first."""
    for name, floor in (("tokens", 0), ("experts", 1), ("k_in", 1), ("n_out", 1), ("rank", 1)):
        value = getattr(case, name)
        for smaller in _steps(value, floor):
            changes: dict[str, Any] = {name: smaller}
            changed = replace(case, **changes)
            if name == "experts":
                changed = replace(changed, top_k=min(case.top_k, smaller))
            yield changed
    if case.top_k > 1:
        yield replace(case, top_k=1)
        yield replace(case, top_k=case.top_k - 1)
    if case.routing.name != "uniform":
        yield replace(case, routing=RoutingKind("uniform"))
    for name, plain in _PLAIN.items():
        if getattr(case, name) != plain:
            yield replace(case, **{name: plain})


def _steps(value: int, floor: int) -> Iterator[int]:
    """Values between floor and value: the floor, powers of two from below, then one less."""
    power, seen = 1, {value}
    candidates = [floor, 1]
    while power < value:
        power *= 2
        if power >= 16:
            candidates.append(power)
    for candidate in (*candidates, value // 2, value - value % 16, value - 1):
        if floor <= candidate < value and candidate not in seen:
            seen.add(candidate)
            yield candidate


def shrink(
    draw: Draw,
    *,
    attempts: int,
    seconds: float,
    fixed: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Generator[Draw, bool, Draw]:
    """Yields smaller draws and is sent whether each failed alike; returns the smallest that did.

    A step that succeeds is followed by the steps from there; it ends where no step succeeds, or
    after so many
    attempts or seconds. fixed: the case must stay as it is, only the seed may change.
    """
    end = clock() + seconds
    best, left, progress = replace(draw, stretch=False), attempts, True
    tried = {best.case}
    if best.seed:
        left -= 1
        if (yield replace(best, seed=0)):
            best = replace(best, seed=0)
    while progress and not fixed:
        progress = False
        for case in simpler(best.case):
            if left <= 0 or clock() > end:
                return best
            if case in tried or not possible(case):
                continue
            tried.add(case)
            left -= 1
            candidate = replace(best.of_any_path(), case=case)
            if (yield candidate):
                best, progress = candidate, True
                break
    return best


class Shrinking:
    """A finding on its way to a smaller one: run `candidate`, `report` what came of it, until it
    is None.
    """

    def __init__(
        self, finding: Finding, *, attempts: int = 150, seconds: float = 60.0, fixed: bool = False
    ) -> None:
        self.finding = finding
        self._steps = self._all_steps(attempts, seconds, fixed=fixed)
        self.candidate: Draw | None = next(self._steps)

    def _all_steps(
        self, attempts: int, seconds: float, *, fixed: bool
    ) -> Generator[Draw, bool, None]:
        repeated = yield self.finding.first
        self.finding = replace(self.finding, reproduced=repeated)
        if repeated:
            yield from shrink(self.finding.draw, attempts=attempts, seconds=seconds, fixed=fixed)

    def report(self, kind: str, draw: Draw, outcome: Mapping[str, Any]) -> None:
        """What came of the candidate: its kind of finding if any, the launch as it was made."""
        alike = kind == self.finding.kind
        changes: dict[str, Any] = {"shrunk": self.finding.shrunk + 1}
        if alike:
            changes |= {"draw": draw, "outcome": dict(outcome)}
        self.finding = replace(self.finding, **changes)
        try:
            self.candidate = self._steps.send(alike)
        except StopIteration:
            self.candidate = None
