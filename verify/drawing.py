"""Which launch to try next: new ones at random, and variations of those that reached something
new.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .cases import LAYOUTS, ORDERS, VALUES, Case
from .draws import LISTED_ONLY, Draw
from .inputs import DTYPES
from .parallel import footprint
from .routings import DROPPING, TILE_HEIGHTS, RoutingKind
from .shrink import possible
from .spec import KernelSpec

_EDGES = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 129, 255, 256, 257)
_RANKS = (1, 2, 3, 4, 5, 8, 12, 16, 17, 24, 32, 33, 64, 100, 128, 256)
_SCALINGS = (1.7, -1.3, 0.25, 2.0, 16.0)
_PARAMETERS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "power": ((1, 4),),
    "one": ((0, 7),),
    "only": ((0, 7),),
    "holes": ((10, 90),),
    "sentinels": ((5, 95),),
}
_KINDS: tuple[str, ...] = (
    *("uniform", "zipf", "power", "one", "last", "first-empty", "last-empty", "only", "holes"),
    *("boundary", "alternating", "all", "repeated", "sentinels", "all-sentinels"),
)
_RESPECTS = (
    *("tokens", "tokens", "experts", "top_k", "k_in", "n_out", "rank", "routing", "routing"),
    *("weight_layout", "x_layout", "orders", "extras", "scaling", "values"),
)
_CHOICES = (
    *("source", "target", "gradient", "weight_layout", "x_layout"),
    *("bias", "gated", "lora_dtype", "values"),
)
_BEYOND = 2**31
"""Elements from which a 32-bit offset overflows."""


ROOM = 0.7
"""Share of a GPU's memory for all that is launched at a time; the contexts of the workers and what
torch keeps for them take some of the rest.
"""
_SHARES = 4
"""Of the largest launches, so many have room at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How large a draw may be. memory: bytes. beyond: bytes for launches that pass 2^31 elements.
    work: K N (rows + experts), which the truth costs
    in fp64.
    """

    tokens: int
    width: int
    experts: int
    rank: int
    memory: float
    work: float
    beyond: float = 0.0

    def allow(self, kernel: str, case: Case, dtype: str = "float32") -> bool:
        """Whether a case is small enough."""
        work = case.k_in * case.n_out * (case.rows + case.experts)
        return work <= self.work and memory_needed(kernel, case, dtype) <= self.memory


INTERPRETER = Limits(tokens=60, width=130, experts=8, rank=40, memory=2**30, work=2e6)


def limits_of(memory: int) -> Limits:
    """Limits on a GPU with so many bytes; 0 bytes: the interpreter."""
    if not memory:
        return INTERPRETER
    return Limits(
        tokens=8192,
        width=4096,
        experts=1024,
        rank=256,
        memory=ROOM * memory / _SHARES,
        work=4e10,
        beyond=ROOM * memory,
    )


def memory_needed(kernel: str, case: Case, dtype: str) -> float:
    """Bytes that launching a case and judging it may take at a time."""
    return max(_operands(case, DTYPES[dtype].itemsize), footprint(kernel, case))


def _operands(case: Case, itemsize: int) -> float:
    """Bytes of the operands of a case with their guards and copies, generously."""
    weight = case.experts * case.k_in * case.n_out * (4.0 + 4 * itemsize)
    rows = case.rows * (case.k_in + 8.0 * case.n_out) * 8
    adapter = case.experts * case.rank * (case.k_in + case.n_out) * (4.0 + 4 * itemsize)
    return 1.3 * (weight + rows + adapter) + 2.0**26


def form_of(draw: Draw) -> tuple[Any, ...]:
    """All that a compiled kernel depends on; sizes count by what they are divisible by."""
    case = draw.case
    widths = tuple(_divisor(size) for size in (case.k_in, case.n_out, case.rank))
    layout = (case.weight_layout, case.x_layout, case.source, case.target, case.gradient)
    flags = (case.bias, case.gated, case.lora_dtype, case.drops, case.top_k == 1)
    rank = max(16, 1 << (case.rank - 1).bit_length())
    return (draw.kernel, draw.path, draw.label, draw.dtype, *widths, rank, *layout, *flags)


def _divisor(size: int) -> int:
    return next(unit for unit in (128, 16, 1) if size % unit == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Draws launches of `kernels` from `pools`: kernel -> plans. fixed: kernels whose cases
    cannot vary.
    """

    kernels: Mapping[str, KernelSpec]
    pools: Mapping[str, Sequence[Mapping[str, Any]]]
    fixed: frozenset[str]
    limits: Limits
    random: random.Random

    def fresh(self, unreached: Sequence[str] = ()) -> Draw:
        """A launch drawn at random; half of them of a path in `unreached`, "kernel [path]"."""
        if unreached and self.random.random() < 0.5:
            kernel, _, path = self.random.choice(unreached).rstrip("]").partition(" [")
            spec = self.kernels[kernel]
            return self._with_plan(spec, self._case(spec), path)
        spec = self.kernels[self.random.choice(sorted(self.kernels))]
        return self._with_plan(spec, self._case(spec))

    def varied(self, draw: Draw) -> Draw:
        """A launch that differs from `draw` in one to three respects."""
        spec = self.kernels[draw.kernel]
        seed = self.random.randrange(2**16)
        if spec.name in self.fixed:
            return replace(self._with_plan(spec, draw.case), seed=seed)
        case = draw.case
        for _ in range(self.random.randint(1, 3)):
            case = self._changed(spec, case)
        if self.random.random() < 0.3:
            return self._with_plan(spec, case)
        return replace(draw.of_any_path(), case=case, seed=seed, stretch=False)

    def resized(self, draw: Draw) -> Draw:
        """A launch of the same form, with other sizes, routing and values: nothing is compiled
        for it.
        """
        if draw.kernel in self.fixed:
            return replace(draw, seed=self.random.randrange(2**16))
        case, limits = draw.case, self.limits

        def like(size: int, limit: int) -> int:
            unit = _divisor(size)
            found = unit * self._spread(1, max(limit // unit, 1))
            return found if _divisor(found) == unit else size

        top_k = 1 if case.top_k == 1 else self.random.randint(2, 12)
        experts = self._spread(top_k, max(limits.experts, top_k))
        changed = replace(
            case,
            tokens=self._tokens(experts),
            top_k=top_k,
            experts=experts,
            k_in=like(case.k_in, limits.width),
            n_out=like(case.n_out, limits.width),
            routing=self._routing(drops=case.drops),
            scaling=self.random.choice(_SCALINGS),
        )
        seed = self.random.randrange(2**16)
        return replace(
            draw.of_any_path(),
            case=self._sized(self.kernels[draw.kernel], changed, case),
            seed=seed,
        )

    def beyond(self) -> Draw | None:
        """A launch whose weight or input has more than 2^31 elements; None if it would not fit."""
        names = sorted(set(self.kernels) - self.fixed)
        if not names:
            return None
        draw = self._with_plan(self.kernels[self.random.choice(names)], None)
        wide = replace(draw.case, k_in=4096, n_out=4352, experts=_BEYOND // (4096 * 4352) + 2)
        case = replace(wide, tokens=self._spread(16, 256), top_k=2, rank=16, experts=wide.experts)
        if self.random.random() < 0.3:
            sizes: dict[str, Any] = {
                "k_in": 8192,
                "n_out": 16,
                "experts": 4,
                "top_k": 1,
                "rank": 16,
            }
            case = replace(draw.case, tokens=_BEYOND // 8192 + 77, **sizes)
        case = replace(case, name="beyond", routing=RoutingKind("uniform"))
        if draw.dtype == "float32":
            return None
        if memory_needed(draw.kernel, case, draw.dtype) > self.limits.beyond:
            return None
        return replace(draw, case=case, mode="balanced", stretch=True)

    def _with_plan(self, spec: KernelSpec, case: Case | None, path: str = "") -> Draw:
        case = case if case is not None else self._case(spec)
        offered = [plan for plan in self.pools[spec.name] if not plan["unavailable"]]
        plan = self.random.choice([p for p in offered if path in ("", p["path"])])
        modes = [mode for mode in spec.modes if mode != "exact" or case.k_in <= 2048]
        mode = "balanced" if self.random.random() < 0.6 else self.random.choice(modes)
        return Draw(
            kernel=spec.name,
            case=case,
            dtype=plan["dtype"],
            mode=mode,
            seed=self.random.randrange(2**16),
            path=plan["path"] if plan["plan"] is not None else "",
            plan=plan["plan"],
            label=plan["label"] if plan["plan"] is not None else "",
        )

    def _case(self, spec: KernelSpec) -> Case:
        small = [case for case in spec.cases if not case.tags & LISTED_ONLY]
        case = self.random.choice(small or list(spec.cases))
        if spec.name in self.fixed:
            return case
        drawn = replace(case, name="drawn", tags=frozenset(), seed=0)
        for _ in range(self.random.randint(1, 8)):
            drawn = self._changed(spec, drawn)
        return drawn

    def _changed(self, spec: KernelSpec, case: Case) -> Case:
        """One respect changed; a choice that no listed case of the kernel makes is none of its."""
        pick, limits = self.random.choice, self.limits
        name = pick(_RESPECTS)
        changes: dict[str, Any] = {}
        if name == "tokens":
            changes["tokens"] = self._tokens(case.experts)
        elif name == "experts":
            changes["experts"] = self._spread(1, limits.experts)
        elif name == "top_k":
            changes["top_k"] = self.random.randint(1, 12)
        elif name in ("k_in", "n_out"):
            changes[name] = self._width()
        elif name == "rank":
            changes["rank"] = pick([rank for rank in _RANKS if rank <= limits.rank])
        elif name == "routing":
            changes["routing"] = self._routing()
        elif name == "orders":
            changes = {"source": pick(ORDERS), "target": pick(ORDERS[1:]), "gradient": ""}
        elif name == "extras":
            changes = {"bias": pick((True, False)), "gated": pick((True, False))}
            changes["lora_dtype"] = pick(("same", "same", "float32"))
        else:
            changes[name] = pick({"scaling": _SCALINGS, "values": VALUES}.get(name, LAYOUTS))
        return self._sized(spec, replace(case, **_offered(spec, changes)), case)

    def _sized(self, spec: KernelSpec, case: Case, otherwise: Case) -> Case:
        """Within the limits, with a routing that can be drawn, and what the kernel is defined for;
        the other case where there is no such one.
        """
        if not possible(case):
            case = replace(case, top_k=min(case.top_k, case.experts))
        while case.tokens > 1 and not self.limits.allow(spec.name, case):
            case = replace(case, tokens=case.tokens // 2)
        while case.experts > case.top_k and not self.limits.allow(spec.name, case):
            case = replace(case, experts=max(case.experts // 2, case.top_k))
        return case if self.limits.allow(spec.name, case) and spec.admits(case) else otherwise

    def _routing(self, *, drops: bool | None = None) -> RoutingKind:
        kinds = _KINDS
        if drops is not None:
            kinds = tuple(kind for kind in kinds if ("sentinels" in kind) == drops)
        name = self.random.choice(kinds)
        if name == "boundary":
            parameters = (self.random.choice(TILE_HEIGHTS), self.random.randrange(3))
            return RoutingKind(name, parameters)
        ranges = _PARAMETERS.get(name, ())
        return RoutingKind(name, tuple(self.random.randint(*bounds) for bounds in ranges))

    def _width(self) -> int:
        small = [edge for edge in _EDGES if edge <= self.limits.width]
        kind = self.random.random()
        if kind < 0.5:
            return self.random.choice(small)
        if kind < 0.75:
            return 16 * self._spread(1, max(self.limits.width // 16, 1))
        return self._spread(1, self.limits.width)

    def _tokens(self, experts: int) -> int:
        kind = self.random.random()
        if kind < 0.05:
            return self.random.choice((0, 1))
        if kind < 0.4:
            height = self.random.choice(TILE_HEIGHTS)
            return min(
                max(height * experts // 2 + self.random.randint(-1, 1), 0), self.limits.tokens
            )
        return self._spread(1, self.limits.tokens)

    def _spread(self, low: int, high: int) -> int:
        """An integer of low .. high, every power of two as likely."""
        return min(high, int(math.exp(self.random.uniform(math.log(low), math.log(high + 1)))))


def _offered(spec: KernelSpec, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the changes that lead to a choice which some listed case of the kernel makes."""
    drops = any(case.drops for case in spec.cases)
    return {
        name: value
        for name, value in changes.items()
        if (name not in _CHOICES or value in {getattr(case, name) for case in spec.cases})
        and (name != "routing" or drops or value.name not in DROPPING)
    }
