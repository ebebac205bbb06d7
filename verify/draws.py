"""One launch as data: kernel, case, dtype, mode, seed and plan, as plain JSON values and back.

A plan is written out by its fields, so that it can be rebuilt by any revision of the package that
has
classes of these names, wherever the launch was drawn.
"""

import enum
import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from types import ModuleType
from typing import Any

import torch

from .cases import Case
from .inputs import DTYPES, Inputs
from .routings import RoutingKind
from .run import Outcome, Problem, Workbench
from .spec import KernelSpec, NamedPlan

LISTED_ONLY = frozenset({"model", "bench", "real"})
"""Tags of cases that are run as they are listed, never varied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One launch. path, plan: as written by `encoded`; where plan is None, the plan of that path
    and label.

    stretch: whether it may run out of memory.
    """

    kernel: str
    case: Case
    dtype: str
    mode: str
    seed: int = 0
    path: str = ""
    plan: Any = None
    label: str = ""
    stretch: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "kernel": self.kernel,
            "case": case_as_json(self.case),
            "dtype": self.dtype,
            "mode": self.mode,
            "seed": self.seed,
            "path": self.path,
            "plan": self.plan,
            "label": self.label,
            "stretch": self.stretch,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Draw":
        """The draw that `as_json` wrote.

        Raises:
            ValueError: a field is missing, unknown or no such case can be.
        """
        try:
            return cls(**{**values, "case": case_from_json(values["case"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the description of a launch: {error}") from error

    def of_any_path(self) -> "Draw":
        """For another case: an operation that takes no plan chooses its path by the case."""
        return self if self.plan is not None else replace(self, path="", label="")

    def __str__(self) -> str:
        words = [self.kernel, f"[{self.path}]", self.case.shape, self.dtype, self.mode]
        return " ".join(word for word in words if word != "[]")


def case_as_json(case: Case) -> dict[str, Any]:
    """A case as plain values."""
    values = asdict(case)
    values["routing"] = [case.routing.name, *case.routing.parameters]
    values["tags"] = sorted(case.tags)
    return values


def case_from_json(values: Mapping[str, Any]) -> Case:
    """The case that `case_as_json` wrote."""
    name, *parameters = values["routing"]
    kind = RoutingKind(name, tuple(parameters))
    return Case(**{**values, "routing": kind, "tags": frozenset(values["tags"])})


def encoded(lib: ModuleType, value: Any) -> Any:
    """A plan as plain values; classes by module and name within the package."""
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, enum.Enum):
        return {"type": _type_name(lib, value), "value": value.value}
    if is_dataclass(value):
        items = {item.name: encoded(lib, getattr(value, item.name)) for item in fields(value)}
        return {"type": _type_name(lib, value), "fields": items}
    if isinstance(value, tuple):
        return {"tuple": [encoded(lib, item) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a plan holds a {type(value).__name__}, which has no form in JSON")


def decoded(lib: ModuleType, value: Any) -> Any:
    """The plan that `encoded` wrote, of the classes of `lib`."""
    if not isinstance(value, Mapping):
        return value
    if "dtype" in value:
        return getattr(torch, value["dtype"])
    if "tuple" in value:
        return tuple(decoded(lib, item) for item in value["tuple"])
    module, _, name = value["type"].rpartition(".")
    kind = getattr(importlib.import_module(f"{lib.__name__}.{module}"), name)
    if "value" in value:
        return kind(value["value"])
    return kind(**{field: decoded(lib, item) for field, item in value["fields"].items()})


def _type_name(lib: ModuleType, value: Any) -> str:
    kind = type(value)
    return f"{kind.__module__.removeprefix(lib.__name__ + '.')}.{kind.__qualname__}"


def plan_of(lib: ModuleType, spec: KernelSpec, inputs: Inputs, draw: Draw) -> NamedPlan:
    """The plan to run a draw with: its own, fitted to what these operands allow.

    Raises:
        ValueError: the draw names a path or plan that the kernel does not offer here.
    """
    offered = spec.plans(lib, inputs)
    on_path = [plan for plan in offered if draw.path in ("", plan.path)]
    if not on_path:
        raise ValueError(f"{spec.name} has no path {draw.path!r} for {draw.case.name}")
    if draw.plan is not None:
        plan = _fitted(decoded(lib, draw.plan), [item.plan for item in on_path])
        return NamedPlan(path=draw.path, plan=plan, unavailable=on_path[0].unavailable)
    if not draw.label:
        return on_path[0]
    for plan in on_path:
        if plan.label == draw.label:
            return plan
    raise ValueError(f"{spec.name} does not offer the plan {draw.label} for {draw.case.name}")


def _fitted(plan: Any, offered: list[Any]) -> Any:
    """Tensor maps only where a plan offered for these operands uses them, and without one of W no
    tile taller than those offered; a precision that is offered.
    """
    changes: dict[str, Any] = {}
    tile = getattr(plan, "tile", None)
    for flag in ("descriptor", "x_descriptor"):
        if getattr(tile, flag, False) and not any(getattr(p.tile, flag) for p in offered):
            tile = replace(tile, **{flag: False})  # type: ignore[type-var]
    if tile is not None:
        heights = [p.tile.block_m for p in offered if not p.tile.descriptor]
        if heights and not tile.descriptor:
            tile = replace(tile, block_m=min(tile.block_m, max(heights)))
        changes["tile"] = tile
    if hasattr(plan, "precision") and plan.precision not in {p.precision for p in offered}:
        changes["precision"] = offered[0].precision
    return replace(plan, **changes) if changes else plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What was launched for a draw: with the plan in full, and the routing that was drawn."""

    draw: Draw
    plan: NamedPlan
    inputs: Inputs


def run_draw(
    lib: ModuleType,
    spec: KernelSpec,
    draw: Draw,
    device: torch.device,
    *,
    announce: Callable[[Launch], None],
    returned: Callable[[], None] = lambda: None,
    bench: Workbench | None = None,
) -> Outcome:
    """Check one draw; `announce` is called before its launch, with everything that is needed to
    repeat it, and `returned` when the device has done it.
    """
    chosen: list[NamedPlan] = []

    def plans(lib: ModuleType, inputs: Inputs) -> tuple[NamedPlan, ...]:
        chosen[:] = [plan_of(lib, spec, inputs, draw)]
        return tuple(chosen)

    def run(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, torch.Tensor]:
        full = replace(draw, path=chosen[0].path, plan=encoded(lib, plan), label=chosen[0].label)
        announce(Launch(draw=full, plan=chosen[0], inputs=inputs))
        outputs = spec.run(lib, inputs, plan)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        returned()
        return outputs

    problem = Problem(
        lib=lib,
        spec=replace(spec, plans=plans, run=run),
        case=draw.case,
        dtype=DTYPES[draw.dtype],
        mode=draw.mode,
        device=device,
        seed=draw.seed,
        bench=bench or Workbench(),
    )
    (outcome,) = problem.check()
    return outcome
