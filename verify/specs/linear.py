"""scatter2scatter, shrink and the LoRA products: forward and input gradient."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..cases import CASES, Case
from ..expected import Expected
from ..inputs import Inputs
from ..models import Arithmetic, Linear
from ..references import expert_linear, row_gradients
from ..routings import RoutingKind
from ..spec import KernelSpec, NamedPlan
from .bad_inputs import ROUTING, adapter_operand, row_operand, weight_operand, wrong_path
from .common import (
    TERMS,
    active_experts,
    adapter,
    arithmetic,
    bytes_of,
    groups_of,
    of_rows,
    ops,
    order,
    product_plans,
    routing,
    row_expected,
    submodule,
)
from .projection import over_choices


def _case(name: str, k_in: int, n_out: int, kind: str, **changes: Any) -> Case:
    sizes = {"tokens": 13, "experts": 5, "top_k": 2, "k_in": k_in, "n_out": n_out, "rank": 4}
    words = kind.split(":")
    routing = RoutingKind(words[0], tuple(int(word) for word in words[1:]))
    return Case(name=name, routing=routing, tags=frozenset({"edge"}), **{**sizes, **changes})


IN_BLOCKS = (
    _case("blocks", 40, 34, "sentinels:30", bias=True),
    _case("blocks-mapped", 48, 40, "uniform", source="EXPERT", target="SLOT"),
    _case("blocks-stored-nk", 48, 40, "uniform", source="EXPERT", target="SLOT"),
)
"""Cases whose weight comes two experts at a time, besides those that all operations share; of the
last it is stored [experts, N, K].
"""
_AT_ONCE = 2
_TAKING_BLOCKS = ("tiles", "epilogue", "split")
SUMMED = (
    _case("summed", 40, 34, "sentinels:30"),
    _case("summed-in-halves", 512, 16, "uniform", tokens=5, gradient="TOKEN", gated=True),
)
"""Cases of the input gradient that is summed over the choices of a token."""
GATHERED = (
    _case("gathered", 40, 34, "sentinels:30", gated=True),
    _case("gathered-slots", 48, 40, "uniform", source="SLOT", target="SLOT"),
    _case("gathered-already", 24, 16, "uniform", source="EXPERT"),
)
"""Cases whose rows are copied into expert order too, as plans for wide products do on a GPU."""


def _weight(lib: ModuleType, inputs: Inputs, plan: Any) -> Any:
    weight = inputs["weight"]
    if inputs.case not in IN_BLOCKS or plan.path.value not in _TAKING_BLOCKS:
        return weight
    quant = submodule(lib, "quant")
    transposed = inputs.case == IN_BLOCKS[-1]
    return quant.StoredWeight(
        stored=quant.Dense(data=weight.mT.contiguous() if transposed else weight),
        transposed=transposed,
        budget_bytes=_AT_ONCE * weight[0].numel() * weight.itemsize,
        ids=torch.arange(len(weight), device=weight.device),
    )


def _plans(
    lib: ModuleType, operation: str, x: Tensor, weight: Tensor, inputs: Inputs, rank: int = 0
) -> tuple[NamedPlan, ...]:
    plans = product_plans(lib, operation, x, weight, inputs, rank)
    if inputs.case not in GATHERED:
        return plans
    gathering = [
        replace(plan, plan=replace(plan.plan, gather=True))
        for plan in plans
        if plan.quick and plan.path in ("tiles", "epilogue")
    ]
    return (*plans, *gathering)


@contextmanager
def _halved(lib: ModuleType) -> Iterator[None]:
    """Sums of any size are made in halves, where their width allows it."""
    module = submodule(lib, "ops.lora")
    kept = module.HALVED_BYTES
    module.HALVED_BYTES = 0
    try:
        yield
    finally:
        module.HALVED_BYTES = kept


def _run_scatter2scatter(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    case = inputs.case
    y = ops(lib).scatter2scatter(
        inputs["x"],
        _weight(lib, inputs, plan),
        routing(lib, inputs),
        source=order(lib, case.source),
        target=order(lib, case.target),
        bias=inputs.get("bias"),
        row_scale=inputs.get("gates"),
        plan=plan,
    )
    return {"y": y}


def _run_shrink(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    t = ops(lib).shrink(
        inputs["x"],
        inputs["lora_a"].to(inputs.dtype),
        routing(lib, inputs),
        scaling=inputs.scaling,
        source=order(lib, inputs.case.source),
        plan=plan,
    )
    return {"t": t}


def _run_forward(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    case = inputs.case
    y, t = ops(lib).lora_forward(
        inputs["x"],
        _weight(lib, inputs, plan),
        adapter(lib, inputs),
        routing(lib, inputs),
        source=order(lib, case.source),
        target=order(lib, case.target),
        bias=inputs.get("bias"),
        row_scale=inputs.get("gates"),
        plan=plan,
    )
    return {"y": y, "t": t}


def _run_input_grad(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    case = inputs.case
    summed = case in SUMMED
    with _halved(lib) if summed else nullcontext():
        dx, yb = ops(lib).lora_input_grad(
            inputs["dy"],
            _weight(lib, inputs, plan),
            adapter(lib, inputs),
            routing(lib, inputs),
            source=order(lib, case.dy_order),
            target=order(lib, "TOKEN" if summed else case.dx_order),
            row_scale=inputs.get("gates"),
            plan=plan,
        )
    return {"dx": dx, "yb": yb}


def _forward_terms(inputs: Inputs, *parts: str) -> dict[str, Tensor]:
    groups, case = groups_of(inputs), inputs.case
    present = [part for part in parts if part != "bias" or inputs.get("bias") is not None]
    return {
        part: expert_linear(
            inputs.tensors,
            groups,
            scaling=inputs.scaling,
            source=case.source,
            target=case.target,
            parts=(part,),
        )
        for part in present
    }


def _total(terms: Mapping[str, Tensor]) -> Tensor:
    return (
        torch.stack(list(terms.values())).sum(0) if len(terms) > 1 else next(iter(terms.values()))
    )


def _low_rank(inputs: Inputs, model: Linear, truth: Tensor | None) -> Expected:
    return row_expected(
        inputs, model.groups, model.low_rank(), "EXPERT", truth=truth, sources=inputs.case.k_in
    )


def _reference_scatter2scatter(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    groups, terms = groups_of(inputs), _forward_terms(inputs, "base", "bias")
    model = Linear.forward(inputs, groups, how).without_adapter().output()
    truth = None if how.tf32 else _total(terms)
    case = inputs.case
    y = row_expected(inputs, groups, model, case.target, truth=truth, terms=terms)
    return {"y": of_rows(y, groups, case.source, case.target)}


def _reference_shrink(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    model = Linear.forward(inputs, groups_of(inputs), how)
    return {"t": _low_rank(inputs, model, None)}


def _reference_forward(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    groups, terms, case = groups_of(inputs), _forward_terms(inputs, *TERMS), inputs.case
    model = Linear.forward(inputs, groups, how)
    truth = None if how.tf32 else _total(terms)
    y = row_expected(
        inputs,
        groups,
        model.output(),
        case.target,
        truth=truth,
        terms=terms,
        freedom=model.freedom(),
    )
    y = of_rows(y, groups, case.source, case.target)
    return {"y": y, "t": _low_rank(inputs, model, None)}


def _reference_input_grad(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    groups, case = groups_of(inputs), inputs.case
    terms = {
        part: row_gradients(
            inputs.tensors,
            groups,
            scaling=inputs.scaling,
            dy_order=case.dy_order,
            order=case.dx_order,
            parts=(part,),
        )
        for part in ("base", "lora")
    }
    model = Linear.input_grad(inputs, groups, how)
    truth = None if how.tf32 else _total(terms)
    yb = _low_rank(inputs, model, None)
    if case in SUMMED:
        rows = model.output()
        slots = groups.spread(rows.value, "SLOT") if truth is None else truth
        total = slots.view(case.tokens, case.top_k, -1).sum(1)
        return {"dx": over_choices(inputs, groups, rows, total, inputs.dtype), "yb": yb}
    dx = row_expected(
        inputs,
        groups,
        model.output(),
        case.dx_order,
        truth=truth,
        terms=terms,
        freedom=model.freedom(),
    )
    return {"dx": of_rows(dx, groups, case.dy_order, case.dx_order), "yb": yb}


def _plans_forward(lib: ModuleType, inputs: Inputs) -> tuple[NamedPlan, ...]:
    x, weight, rank = inputs["x"], inputs["weight"], inputs.case.rank
    return _plans(lib, "lora_forward", x, weight, inputs, rank)


def _plans_input_grad(lib: ModuleType, inputs: Inputs) -> tuple[NamedPlan, ...]:
    dy, weight, rank = inputs["dy"], inputs["weight"].mT, inputs.case.rank
    return _plans(lib, "lora_input_grad", dy, weight, inputs, rank)


def _plans_scatter2scatter(lib: ModuleType, inputs: Inputs) -> tuple[NamedPlan, ...]:
    return _plans(lib, "scatter2scatter", inputs["x"], inputs["weight"], inputs)


def _plans_shrink(lib: ModuleType, inputs: Inputs) -> tuple[NamedPlan, ...]:
    factor = inputs["lora_a"].to(inputs.dtype).mT
    return product_plans(lib, "shrink", inputs["x"], factor, inputs)


def _base_cost(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    flops = 2.0 * case.rows * case.k_in * case.n_out
    x_rows = case.tokens if case.source == "TOKEN" else case.rows
    weight = active_experts(case) * case.k_in * case.n_out
    return flops, bytes_of(dtype, x_rows * case.k_in, weight, case.rows * case.n_out)


def _shrink_cost(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    flops = 2.0 * case.rows * case.k_in * case.rank
    x_rows = case.tokens if case.source == "TOKEN" else case.rows
    factor = active_experts(case) * case.k_in * case.rank
    return flops, bytes_of(dtype, x_rows * case.k_in, factor, case.rows * case.rank)


def _lora_cost(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    base_flops, base_bytes = _base_cost(case, dtype)
    wide = case.k_in + case.n_out
    flops = base_flops + 2.0 * case.rows * case.rank * wide
    factors = active_experts(case) * case.rank * wide
    return flops, base_bytes + bytes_of(dtype, factors, case.rows * case.rank)


SCATTER2SCATTER = KernelSpec(
    name="scatter2scatter",
    run=_run_scatter2scatter,
    reference=_reference_scatter2scatter,
    arithmetic=arithmetic,
    prepare=routing,
    cases=(*CASES, *IN_BLOCKS, *GATHERED),
    plans=_plans_scatter2scatter,
    cost=_base_cost,
    modes=("balanced", "exact"),
    source="ops/scatter2scatter.py",
    ops=("scatter2scatter",),
    bad_inputs=(
        *row_operand(_run_scatter2scatter, "x"),
        *weight_operand(_run_scatter2scatter),
        *wrong_path(_run_scatter2scatter, _plans_scatter2scatter),
        *ROUTING,
    ),
)
SHRINK = KernelSpec(
    name="shrink",
    run=_run_shrink,
    reference=_reference_shrink,
    arithmetic=arithmetic,
    prepare=routing,
    cases=CASES,
    plans=_plans_shrink,
    cost=_shrink_cost,
    modes=("balanced", "exact"),
    source="ops/scatter2scatter.py",
    ops=("shrink",),
    bad_inputs=row_operand(_run_shrink, "x"),
)
LORA_FORWARD = KernelSpec(
    name="lora_forward",
    run=_run_forward,
    reference=_reference_forward,
    arithmetic=arithmetic,
    prepare=routing,
    cases=(*CASES, *IN_BLOCKS, *GATHERED),
    plans=_plans_forward,
    cost=_lora_cost,
    source="ops/lora.py",
    ops=("lora_forward",),
    bad_inputs=(
        *row_operand(_run_forward, "x"),
        *weight_operand(_run_forward),
        *adapter_operand(_run_forward),
        *wrong_path(_run_forward, _plans_forward),
    ),
)
LORA_INPUT_GRAD = KernelSpec(
    name="lora_input_grad",
    run=_run_input_grad,
    reference=_reference_input_grad,
    arithmetic=arithmetic,
    prepare=routing,
    cases=(*CASES, *IN_BLOCKS, *SUMMED, *GATHERED),
    plans=_plans_input_grad,
    cost=_lora_cost,
    source="ops/lora.py",
    ops=("lora_input_grad",),
    bad_inputs=(
        *row_operand(_run_input_grad, "dy", "80"),
        *weight_operand(_run_input_grad)[:3],
        *adapter_operand(_run_input_grad),
        *wrong_path(_run_input_grad, _plans_input_grad),
    ),
)
