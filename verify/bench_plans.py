"""Which plans the package chooses for a benchmark, in words, for its record."""

import importlib
from types import ModuleType
from typing import Any

import torch

from .bench_arms import four_bit_of
from .bench_cases import PROJECTIONS, BenchCase
from .bench_inputs import Drawn
from .spec import describe

_OPERATIONS = {
    "base": "scatter2scatter",
    "shrink": "shrink",
    "forward": "lora_forward",
    "input-grad": "lora_input_grad",
    "weight-grad": "lora_weight_grad",
}
_STEP = ("forward", "input-grad", "weight-grad")


def plans_of(lib: ModuleType, case: BenchCase, drawn: Drawn) -> dict[str, Any]:
    """Part -> plan of every product of a benchmark; empty where the package takes no plan."""
    if case.projection and case.kind != "dequant":
        whats = _STEP if case.what == "step" else (case.what,)
        return {what: _plan(lib, case, drawn, case.projection, what) for what in whats}
    if case.kind in ("layer", "qlora-layer"):
        whats = ("forward",) if case.what == "forward" else _STEP
        return {
            f"{projection} {what}": _plan(lib, case, drawn, projection, what)
            for projection in PROJECTIONS
            for what in whats
        }
    return {}


def _plan(lib: ModuleType, case: BenchCase, drawn: Drawn, projection: str, what: str) -> Any:
    k, n = case.shape.widths(projection)
    if what == "input-grad":
        k, n = n, k
    plan, table, sizes = (
        importlib.import_module(f"{lib.__name__}.{name}")
        for name in ("plan", "plan_table", "_sizes")
    )
    return table.plan_for(
        lib.Operation(_OPERATIONS[what]),
        sizes.next_power_of_two(case.rows // case.shape.experts),
        case.shape.experts,
        k,
        case.rank if what == "shrink" else n,
        0 if what == "base" else case.rank,
        case.torch_dtype,
        plan.current_precision(case.torch_dtype),
        _layout(lib, case, drawn, projection, what),
        drawn["top_k_index"].device,
    )


def _layout(lib: ModuleType, case: BenchCase, drawn: Drawn, projection: str, what: str) -> str:
    if what == "weight-grad":
        return ""
    if case.kind == "qlora-layer":
        weight: Any = importlib.import_module(f"{lib.__name__}.quant").StoredWeight(
            stored=four_bit_of(lib, drawn, projection), transposed=True
        )
        return str((weight.mT if what == "input-grad" else weight).map)
    name = "weight" if case.projection else f"weight_{projection}"
    stack: torch.Tensor = drawn["lora_a"].mT if what == "shrink" else drawn[name]
    checks = importlib.import_module(f"{lib.__name__}.ops._check")
    return str(checks.w_map(stack.mT if what == "input-grad" else stack))


def in_words(plans: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The paths taken, each once, and the plans by part."""
    paths = dict.fromkeys(str(plan.path.value) for plan in plans.values())
    return "+".join(paths) or "default", {part: describe(plan) for part, plan in plans.items()}
