"""Runs kernels against their references: one `Outcome` per kernel, plan, case, dtype and mode.

An outcome is data. Whatever a kernel does, short of KeyboardInterrupt, becomes one.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .captured import Unavailable
from .cases import Case
from .compare import WORST, Comparison, compare
from .expected import Expected
from .guards import Guards, shelter
from .inputs import DTYPES, Inputs
from .models import Arithmetic
from .reads import Reads
from .routings import describe_counts
from .spec import KernelSpec, NamedPlan

LEAST_SHARE = 0.3
"""A term that carries less of the output's norm than this could hide its own loss."""

_DRAWS = 8
_KEPT = 2**22
"""Elements of a reference up to which it is kept beside a launch, and not made again."""


ProblemName = tuple[str, str, str, str]
"""Kernel, case, dtype and mode of one problem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one check.

    status: passed, failed, error or unavailable. ratio: worst error over its limit. measure: whole,
    expert, row, lora, slope, exact or guard. where: output, expert, row, column, got, want. reason:
    in words, unless passed. ratios: the worst ratio of each measure.
    """

    kernel: str
    path: str
    plan: str
    case: str
    dtype: str
    mode: str
    status: str
    ratio: float | None = None
    measure: str = ""
    where: Mapping[str, object] = field(default_factory=dict)
    reason: str = ""
    ratios: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing needs attention."""
        return self.status in ("passed", "unavailable")

    @property
    def key(self) -> tuple[str, ...]:
        """What was checked, without what came of it."""
        return (self.kernel, self.path, self.plan, self.case, self.dtype, self.mode)

    @property
    def problem(self) -> ProblemName:
        """The problem that this is an outcome of."""
        return (self.kernel, self.case, self.dtype, self.mode)

    def as_json(self) -> dict[str, Any]:
        """Plain values for a record."""
        return asdict(self)

    def __str__(self) -> str:
        head = f"{self.status}: {self.kernel} [{self.path}] {self.case} {self.dtype} {self.mode}"
        return f"{head}: {self.reason}" if self.reason else head


class Workbench:
    """What problems of one run share: routings are built once per case, under guards, and must
    not change.
    """

    def __init__(self) -> None:
        self._prepared: dict[tuple[Any, ...], Prepared] = {}

    def prepare(self, lib: ModuleType, spec: KernelSpec, inputs: Inputs) -> "Prepared | None":
        """What `spec.prepare` builds from these inputs, now or earlier."""
        if spec.prepare is None:
            return None
        index = inputs["top_k_index"]
        case = inputs.case
        key: tuple[Any, ...] = (
            lib.__name__,
            spec.prepare,
            case.experts,
            case.drops,
            inputs.device,
            index.shape,
        )
        key = (*key, bytes(index.cpu().numpy()))
        if key not in self._prepared:
            sheltered = shelter(inputs.only("top_k_index"))
            with Guards() as guards:
                value = spec.prepare(lib, sheltered.inputs)
            self._prepared[key] = Prepared(value=value, guards=guards, copies=_copies(value))
        return self._prepared[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A value that kernels read, its guards, and copies of its tensors."""

    value: Any
    guards: Guards
    copies: Mapping[str, Tensor]

    def problems(self) -> tuple[str, ...]:
        """What a kernel wrote into it, or around it."""
        changed = [
            f"changed {name} of the routing"
            for name, copy in _copies(self.value).items()
            if not torch.equal(copy, self.copies[name])
        ]
        return (*self.guards.problems(), *changed)


def _copies(value: Any) -> dict[str, Tensor]:
    found = {item.name: getattr(value, item.name) for item in fields(value)}
    return {name: item.clone() for name, item in found.items() if isinstance(item, Tensor)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One kernel on one case, dtype and mode: what its plans share."""

    lib: ModuleType
    spec: KernelSpec
    case: Case
    dtype: torch.dtype
    mode: str
    device: torch.device
    seed: int = 0
    bench: Workbench = field(default_factory=Workbench)

    @property
    def name(self) -> ProblemName:
        """What tells it from the others of a selection."""
        return (self.spec.name, self.case.name, dtype_name(self.dtype), self.mode)

    def draw(self) -> Inputs:
        """Inputs whose terms all matter; redrawn, within reason, until they do.

        Raises:
            ValueError: no draw was balanced.
        """
        return self._drawn()[0]

    def _drawn(self) -> tuple[Inputs, dict[Arithmetic, Mapping[str, Expected]]]:
        """Inputs, and the reference that showed that they are balanced, unless it is large."""
        share, term = 0.0, ""
        for attempt in range(_DRAWS):
            inputs = self.spec.inputs(
                self.case, self.dtype, self.mode, self.device, seed=self.seed + 1000 * attempt
            )
            if self.mode != "balanced":
                return inputs, {}
            expected = self._reference(inputs, Arithmetic())
            found = [each.weakest_share() for each in expected.values()]
            term, share = min(found, key=lambda item: item[1], default=("", 1.0))
            if share >= LEAST_SHARE:
                large = sum(each.value.numel() for each in expected.values()) > _KEPT
                return inputs, {} if large else {Arithmetic(): expected}
        raise ValueError(
            f"the {term} term carries {share:.0%} of the output, less than {LEAST_SHARE:.0%}: "
            "this case could not see it lost"
        )

    def _reference(self, inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
        with torch.enable_grad():
            return self.spec.reference(inputs, how)

    def outcome(self, plan: NamedPlan, **facts: Any) -> Outcome:
        """An outcome of this problem."""
        return Outcome(
            kernel=self.spec.name,
            path=plan.path,
            plan=plan.label,
            case=self.case.name,
            dtype=dtype_name(self.dtype),
            mode=self.mode,
            **facts,
        )

    def check(self, wanted: Callable[[NamedPlan], bool] = lambda plan: True) -> Iterator[Outcome]:
        """Check every plan that is wanted; references are computed once per kind of arithmetic."""
        nobody = NamedPlan(path="", plan=None)
        try:
            inputs, known = self._drawn()
            plans = [plan for plan in self.spec.plans(self.lib, inputs) if wanted(plan)]
            prepared = self.bench.prepare(self.lib, self.spec, inputs) if plans else None
            inputs = replace(inputs, prepared=prepared.value if prepared else None)
        except Unavailable as error:
            yield self.outcome(nobody, status="unavailable", reason=str(error))
            return
        except Exception as error:  # noqa: BLE001 - becomes an outcome
            yield self.outcome(nobody, status="error", reason=in_words(error))
            return
        for plan in plans:
            if plan.unavailable:
                yield self.outcome(plan, status="unavailable", reason=plan.unavailable)
                continue
            try:
                how = self.spec.arithmetic(self.lib, inputs, plan.plan)
                # The guarded copies are let go before a reference is made.
                outputs, problems = guarded_run(
                    self.lib,
                    self.spec,
                    inputs,
                    plan.plan,
                    known=prepared.guards if prepared else None,
                )
                problems += prepared.problems() if prepared else ()
                if how not in known:
                    # The last reference is let go before another one is made.
                    known = {}
                    known = {how: self._reference(inputs, how)}
                yield self._judged(plan, inputs, known[how], outputs, problems)
            except Exception as error:  # noqa: BLE001 - becomes an outcome
                yield self.outcome(plan, status="error", reason=in_words(error))

    def _judged(
        self,
        plan: NamedPlan,
        inputs: Inputs,
        expected: Mapping[str, Expected],
        outputs: Mapping[str, Tensor],
        problems: tuple[str, ...],
    ) -> Outcome:
        if problems:
            reason = self._told(inputs, *problems)
            return self.outcome(plan, status="failed", ratio=WORST, measure="guard", reason=reason)
        if set(outputs) != set(expected):
            reason = f"outputs {sorted(outputs)}, expected {sorted(expected)}"
            return self.outcome(plan, status="error", reason=reason)
        exact = self.mode == "exact"
        comparisons = [
            compare(name, outputs[name], expected[name], exact=exact) for name in expected
        ]
        worst = max(comparisons, key=lambda item: item.ratio)
        return self.outcome(
            plan,
            status="passed" if worst.ok else "failed",
            ratio=worst.ratio,
            measure=measure_name(worst, self.mode),
            where={"output": worst.output, **worst.where},
            reason="" if worst.ok else self._told(inputs, str(worst)),
            ratios=_merged(comparisons),
        )

    def _told(self, inputs: Inputs, *problems: str) -> str:
        """What is wrong, and the rows of each expert."""
        return "; ".join((*problems, describe_counts(inputs["top_k_index"], self.case.experts)))


def guarded_run(
    lib: ModuleType, spec: KernelSpec, inputs: Inputs, plan: Any, *, known: Guards | None = None
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """Outputs of a kernel on sheltered inputs and poisoned buffers, and what it damaged.

    known: guards of what was prepared for it; in the interpreter, reads outside are seen too.
    """
    sheltered = shelter(inputs)
    guards = Guards()
    watched = (guards, known) if known is not None else (guards,)
    reads = Reads(watched, sheltered.regions) if inputs.device.type == "cpu" else None
    # Infinities and NaN are given on purpose; a GPU has nothing to say of them.
    with guards, reads or nullcontext(), np.errstate(over="ignore", invalid="ignore"):
        outputs = spec.run(lib, sheltered.inputs, plan)
    if inputs.device.type == "cuda":
        torch.cuda.synchronize(inputs.device)
    seen = reads.problems() if reads is not None else ()
    return outputs, (*guards.problems(), *sheltered.problems(), *seen)


def check_one(
    lib: ModuleType,
    spec: KernelSpec,
    case: Case,
    dtype: torch.dtype,
    plan: NamedPlan,
    mode: str,
    device: torch.device,
    *,
    seed: int = 0,
) -> Outcome:
    """Check one plan of one kernel on one case."""
    problem = Problem(
        lib=lib, spec=spec, case=case, dtype=dtype, mode=mode, device=device, seed=seed
    )
    for outcome in problem.check(lambda found: found.plan == plan.plan):
        return outcome
    return problem.outcome(
        plan, status="error", reason=f"{spec.name} does not offer this plan for {case.name}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What to check; an empty tuple means everything. quick: the quick plans and small cases
    only.
    """

    kernels: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    quick: bool = True
    seed: int = 0

    def problems(
        self, lib: ModuleType, kernels: tuple[KernelSpec, ...], device: torch.device
    ) -> tuple[Problem, ...]:
        """Every problem of the selection, in a fixed order. Cases are names or tags."""
        bench = Workbench()
        return tuple(
            Problem(
                lib=lib,
                spec=spec,
                case=case,
                dtype=dtype,
                mode=mode,
                device=device,
                seed=self.seed,
                bench=bench,
            )
            for spec in kernels
            if not self.kernels or spec.name in self.kernels
            for case in spec.cases
            if self._takes(case, device)
            for dtype, mode in (spec.quick_runs(case) if self.quick else spec.runs(case))
            if not self.dtypes or dtype_name(dtype) in self.dtypes
            if not self.modes or mode in self.modes
        )

    def _takes(self, case: Case, device: torch.device) -> bool:
        if self.cases:
            return case.name in self.cases or bool(case.tags & set(self.cases))
        return "model" not in case.tags or (device.type == "cuda" and not self.quick)

    def wants(self, plan: NamedPlan) -> bool:
        """Whether a plan belongs to the selection."""
        if self.paths and plan.path not in self.paths:
            return False
        return plan.quick or not self.quick


def dtype_name(dtype: torch.dtype) -> str:
    """float32, float16 or bfloat16."""
    return next((name for name, value in DTYPES.items() if value == dtype), str(dtype))


def measure_name(comparison: Comparison, mode: str) -> str:
    """What a comparison measured; with nothing but LoRA in the output, every error is one of
    LoRA.
    """
    if mode == "lora-only" and comparison.measure in ("whole", "expert", "row"):
        return "lora"
    return comparison.measure


def in_words(error: Exception) -> str:
    """An exception as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


def _merged(comparisons: list[Comparison]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for comparison in comparisons:
        for measure, ratio in comparison.ratios.items():
            merged[measure] = max(merged.get(measure, 0.0), ratio)
    return merged
