"""Searching plans: every candidate of a problem is checked against the chosen plan's result, then
timed.

A candidate whose result differs from that of the heuristic's plan by more than two roundings of the
output is rejected and reported; the fastest of the others wins, the heuristic's own plan where
nothing is
faster by more than the spread between two timings of it.
"""

import importlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .bench_cases import Shape, shape_of
from .children import pool
from .environment import prepare_interpreter
from .numerics import accumulation_epsilon
from .timing import Clock, EventClock, HostClock

SCALING = 1.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One operation of one projection of a model."""

    operation: str
    model: str
    projection: str
    tokens: int
    rank: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The target in one word."""
        return f"{self.operation}.{self.model}.{self.projection}.t{self.tokens}.r{self.rank}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The winner of one bucket, its time and the heuristic's, in milliseconds.

    times: those of every plan that may win, in parts of no rows.
    """

    target: Target
    bucket: str
    plan: Any
    ms: float
    heuristic_ms: float
    tried: int
    wrong: tuple[str, ...]
    times: Mapping[Any, float]


DENSE_ONLY = ("fused", "grouped_mm")
"""Paths that never win a bucket: it is shared with experts that are decoded block by block."""
SETTLING = 1.03
"""What one plan for all row counts may cost in each, as a ratio to the best there."""

OPERATIONS = ("lora_forward", "lora_input_grad", "lora_weight_grad")
PROJECTIONS = ("gate_up", "down")


def targets(
    models: Sequence[str],
    tokens: Sequence[int],
    ranks: Sequence[int],
    dtypes: Sequence[torch.dtype],
) -> list[Target]:
    """Every operation of both projections of the models."""
    return [
        Target(
            operation=operation, model=model, projection=projection, tokens=t, rank=r, dtype=dtype
        )
        for model in models
        for t in tokens
        for r in ranks
        for dtype in dtypes
        for projection in PROJECTIONS
        for operation in OPERATIONS
    ]


class Trial:
    """The operands of a target on a device, and its candidates."""

    def __init__(
        self, lib: ModuleType, target: Target, device: torch.device, *, small: bool = False
    ) -> None:
        """small: with as few experts as a token chooses, and as many rows per expert: the same
        compiled kernels, in little memory.
        """
        self.lib, self.target = lib, target
        self.ops = importlib.import_module(f"{lib.__name__}.ops")
        self.table = importlib.import_module(f"{lib.__name__}.plan_table")
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(*shape, device=device, generator=generator) * scale
            return drawn.to(target.dtype)

        shape: Shape = shape_of(target.model)
        k, n = shape.hidden, 2 * shape.intermediate
        order = lib.RowOrder
        self.x_order, self.y_order = order.TOKEN, order.EXPERT
        if target.projection == "down":
            k, n = shape.intermediate, shape.hidden
            self.x_order, self.y_order = order.EXPERT, order.TOKEN
        experts = shape.top_k if small else shape.experts
        tokens = max(target.tokens * experts // shape.experts, 1)
        scores = torch.randn(tokens, experts, device=device, generator=generator)
        index = scores.topk(shape.top_k, dim=1).indices
        self.routing = lib.Routing.from_top_k(index, experts)
        self.weight = normal(experts, n, k, scale=k**-0.5).mT
        a = normal(experts, target.rank, k, scale=k**-0.5)
        b = normal(experts, n, target.rank, scale=target.rank**-0.5)
        self.lora = lib.LoRAWeights(a=a, b=b, scaling=SCALING)
        self.x = normal(self.routing.row_count(self.x_order), k)
        self.dy = normal(self.routing.row_count(self.y_order), n)
        self.xa = self.ops.shrink(self.x, a, self.routing, scaling=SCALING, source=self.x_order)
        self.yb = self.ops.shrink(self.dy, b.mT, self.routing, scaling=SCALING, source=self.y_order)
        layout = "nk" if target.operation != "lora_input_grad" else "kn"
        if target.operation == "lora_input_grad":
            k, n = n, k
        self.problem = lib.Problem(
            lib.Operation(target.operation),
            self.routing.rows,
            experts,
            k,
            n,
            target.rank,
            target.dtype,
            lib.Precision.IEEE,
            "" if target.operation == "lora_weight_grad" else layout,
        )
        self.facts = lib.Device.of(device)
        self.length = max(k, n, self.routing.rows)

    @property
    def plans(self) -> tuple[Any, ...]:
        """The heuristic's plan first, then the other candidates."""
        return tuple(self.lib.candidates(self.problem, self.facts))

    def run(self, plan: Any) -> tuple[Tensor, ...]:
        """The results of the target under a plan."""
        orders = self.lib.RowOrder
        common = (self.lora, self.routing)
        if self.target.operation == "lora_forward":
            target = orders.SLOT if self.x_order is orders.EXPERT else orders.EXPERT
            return self.ops.lora_forward(
                self.x, self.weight, *common, source=self.x_order, target=target, plan=plan
            )
        if self.target.operation == "lora_input_grad":
            target = orders.EXPERT if self.x_order is orders.EXPERT else orders.SLOT
            return self.ops.lora_input_grad(
                self.dy, self.weight, *common, source=self.y_order, target=target, plan=plan
            )
        return self.ops.lora_weight_grad(
            self.x, self.dy, self.xa, self.yb, *common,
            x_order=self.x_order, dy_order=self.y_order, plan=plan,
        )  # fmt: skip


def differs(got: tuple[Tensor, ...], want: tuple[Tensor, ...], length: int) -> bool:
    """Whether two right results could not be so far apart; length: terms of the longest sum."""
    for left, right in zip(got, want, strict=True):
        limit = 2 * (torch.finfo(right.dtype).eps + accumulation_epsilon(length))
        error = (left.double() - right.double()).norm()
        if not error <= limit * right.double().norm():
            return True
    return False


def search(trial: Trial, clock: Clock, rounds: int) -> Finding:
    """Check and time every candidate of a target."""
    plans = trial.plans
    want = trial.run(plans[0])
    wrong, calls, kept = [], [], []
    for plan in plans:
        try:
            right = not differs(trial.run(plan), want, trial.length)
        except ValueError:
            continue
        except RuntimeError as error:
            wrong.append(f"{plan}: {type(error).__name__}: {str(error)[:120]}")
            continue
        if right:
            kept.append(plan)
            calls.append(_bound(trial, plan))
        else:
            wrong.append(f"{plan}: result differs")
    host = [clock.enqueue(call, 3) for call in calls]
    samples = clock.samples([*calls, calls[0]], rounds, [*host, host[0]])
    times = [median(values) for values in samples]
    first, again = times[0], times.pop()
    spread = abs(first - again)
    general = [index for index, plan in enumerate(kept) if plan.path.value not in DENSE_ONLY]
    best = min(general, key=times.__getitem__)
    if times[best] >= min(first, again) - spread:
        best = 0
    return Finding(
        target=trial.target,
        bucket=trial.table.bucket(trial.problem),
        plan=kept[best],
        ms=times[best],
        heuristic_ms=first,
        tried=len(kept),
        wrong=tuple(wrong),
        times={replace(kept[index], part_rows=0): times[index] for index in general},
    )


def settle(findings: Sequence[Finding]) -> list[Finding]:
    """One plan for all row counts of a product, where they have one that costs little in each.

    A model's first step with another number of tokens then compiles nothing: what it would wait for
    takes seconds, and what it would gain microseconds.
    """
    same = defaultdict(list)
    for finding in findings:
        same[re.sub(r" m\d+ ", " ", finding.bucket)].append(finding)
    settled = {}
    for group in same.values():
        plan = _shared(group) if len(group) > 1 else None
        for finding in group:
            settled[finding.target] = (
                finding if plan is None else replace(finding, plan=plan, ms=finding.times[plan])
            )
    return [settled[finding.target] for finding in findings]


def _shared(findings: Sequence[Finding]) -> Any | None:
    """The plan that costs least in the geometric mean of all, if it costs little in each."""
    ratios = {}
    for plan in findings[0].times:
        found = [f.times.get(plan, math.inf) / min(f.times.values()) for f in findings]
        if max(found) <= SETTLING:
            ratios[plan] = math.prod(found)
    return min(ratios, key=ratios.__getitem__, default=None)


def _bound(trial: Trial, plan: Any) -> Callable[[], object]:
    return lambda: trial.run(plan)


def clock_for(device: torch.device) -> Clock:
    """Events on a GPU, the host's clock elsewhere."""
    return EventClock(device) if device.type == "cuda" else HostClock()


def compile_ahead(wanted: Iterable[Target], device: torch.device, jobs: int) -> Iterator[str]:
    """Compile every candidate in parallel processes, with few experts; yields what failed."""
    small = list(dict.fromkeys(wanted))
    with pool(jobs, prepare_interpreter, str(device)) as executor:
        for failures in executor.map(_compile, small, [str(device)] * len(small)):
            yield from failures


def _compile(target: Target, device: str) -> list[str]:
    lib = importlib.import_module("scattermoe_lora")
    trial = Trial(lib, target, torch.device(device), small=True)
    failures = []
    for plan in trial.plans:
        try:
            trial.run(plan)
        except ValueError:
            continue
        except RuntimeError as error:
            failures.append(f"{target.name} {plan}: {str(error)[:120]}")
    return failures
