"""Gradients of the weights: adapter, base and bias."""

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from ..cases import CASES, Case
from ..expected import Expected
from ..inputs import Inputs
from ..models import (
    Arithmetic,
    Linear,
    expert_bias_gradient,
    expert_weight_gradient,
    weight_gradients,
)
from ..references import linear_gradients
from ..spec import KernelSpec, NamedPlan
from .common import (
    active_experts,
    adapter,
    arithmetic,
    bytes_of,
    expert_expected,
    gradient_plans,
    groups_of,
    only_default,
    ops,
    order,
    routing,
)

_SMALL = tuple(case for case in CASES if "model" not in case.tags)
_DENSE = tuple(
    case for case in CASES if case.name in ("qwen3-down-t2048-r16", "mixtral-down-t2048-r16")
)
_FEW_ROWS = 100
"""Rows of which 4 sqrt(rows) times 2^122 is finite in fp32 and in bf16."""


def _orders(lib: ModuleType, case: Case) -> dict[str, Any]:
    return {"x_order": order(lib, case.source), "dy_order": order(lib, case.dy_order)}


def _run_lora_weight_grad(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    da, db = ops(lib).lora_weight_grad(
        inputs["x"],
        inputs["dy"],
        inputs["xa"],
        inputs["yb"],
        adapter(lib, inputs),
        routing(lib, inputs),
        row_scale=inputs.get("gates"),
        plan=plan,
        **_orders(lib, inputs.case),
    )
    return {"da": da, "db": db}


def _run_expert_weight_grad(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    dw = ops(lib).expert_weight_grad(
        inputs["x"],
        inputs["dy"],
        routing(lib, inputs),
        row_scale=inputs.get("gates"),
        plan=plan,
        **_orders(lib, inputs.case),
    )
    return {"dw": dw}


def _sums_are_finite(case: Case) -> bool:
    """Huge gradients are drawn for the sum over many rows only where the case has a bias."""
    return case.bias or case.values != "huge-dy" or case.rows <= _FEW_ROWS


def _run_expert_bias_grad(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    del plan
    db = ops(lib).expert_bias_grad(
        inputs["dy"],
        routing(lib, inputs),
        dy_order=order(lib, inputs.case.dy_order),
        row_scale=inputs.get("gates"),
    )
    return {"dbias": db}


def _how(lib: ModuleType, inputs: Inputs, plan: Any) -> Arithmetic:
    """How a plan of the adapter's gradient computes; only the recompute path makes xa and yb."""
    saved = str(plan.path.value) != "recompute"
    return replace(arithmetic(lib, inputs, plan), saved=saved)


def _saved(
    case: Case, dtype: torch.dtype, mode: str, device: torch.device, *, seed: int = 0
) -> Inputs:
    """Inputs with xa = s x A^T and yb = s dy B as a right forward and backward product would have
    stored them.

    Dropped rows of both are NaN: nothing may read them.
    """
    from ..inputs import make_inputs

    inputs = make_inputs(case, dtype, mode, device, seed=seed)
    groups = groups_of(inputs)
    nothing = torch.full((case.rows - groups.slots.numel(), case.rank), float("nan"), device=device)
    saved = {}
    for name, model in (("xa", Linear.forward), ("yb", Linear.input_grad)):
        low = model(inputs, groups, Arithmetic()).low_rank().value.double()
        saved[name] = torch.cat([low.to(dtype), nothing.to(dtype)])
    return inputs.having(**saved)


def _truth(inputs: Inputs, *names: str) -> dict[str, Tensor]:
    case = inputs.case
    tensors = dict(inputs.tensors)
    if "bias" in names:
        tensors["bias"] = tensors.get(
            "bias", torch.zeros(case.experts, case.n_out, device=inputs.device)
        )
    return linear_gradients(
        tensors,
        groups_of(inputs),
        names,
        scaling=inputs.scaling,
        source=case.source,
        target=case.target,
        dy_order=case.dy_order,
    )


def _coupled(inputs: Inputs) -> Literal["vector", "expert"]:
    """A gate multiplies all that its row holds, and where it lies near a power of two most of the
    products are rounded the same way, in every vector that the row adds to.
    """
    return "expert" if "gates" in inputs.tensors else "vector"


def _reference_lora_weight_grad(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    groups = groups_of(inputs)
    truth: dict[str, Tensor] = {} if how.tf32 else _truth(inputs, "lora_a", "lora_b")
    expected = {}
    for name, (model, freedom, sources) in weight_gradients(inputs, groups, how).items():
        value = truth.get(f"lora_{name[1]}", model.value)
        expected[name] = expert_expected(
            groups,
            model,
            inputs.lora_dtype,
            truth=value,
            terms={"lora": value},
            vector_dim=-1 if name == "da" else -2,
            freedom=freedom,
            sources=sources,
        )
    return {name: replace(found, coupled=_coupled(inputs)) for name, found in expected.items()}


def _reference_expert_weight_grad(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    groups = groups_of(inputs)
    model = expert_weight_gradient(inputs, groups, how)
    truth = model.value if how.tf32 else _truth(inputs, "weight")["weight"]
    expected = expert_expected(groups, model, inputs.dtype, truth=truth, terms={"base": truth})
    return {"dw": replace(expected, coupled=_coupled(inputs))}


def _reference_expert_bias_grad(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    del how
    groups = groups_of(inputs)
    model = expert_bias_gradient(inputs, groups)
    truth = _truth(inputs, "bias")["bias"]
    expected = expert_expected(groups, model, torch.float32, truth=truth, terms={"bias": truth})
    return {"dbias": expected}


def _plans_lora(lib: ModuleType, inputs: Inputs) -> tuple[NamedPlan, ...]:
    return gradient_plans(lib, inputs, inputs.case.rank)


def _plans_base(lib: ModuleType, inputs: Inputs) -> tuple[NamedPlan, ...]:
    return gradient_plans(lib, inputs, 0)


def _operand_rows(case: Case) -> tuple[int, int]:
    x = case.tokens if case.source == "TOKEN" else case.rows
    return x, case.tokens if case.dy_order == "TOKEN" else case.rows


def _lora_cost(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    wide = case.k_in + case.n_out
    x_rows, dy_rows = _operand_rows(case)
    factors = case.experts * case.rank * wide
    rows = x_rows * case.k_in + dy_rows * case.n_out + 2 * case.rows * case.rank
    return 2.0 * case.rows * case.rank * wide, bytes_of(dtype, rows, factors)


def _dense_cost(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    x_rows, dy_rows = _operand_rows(case)
    rows = x_rows * case.k_in + dy_rows * case.n_out
    return (
        2.0 * case.rows * case.k_in * case.n_out,
        bytes_of(dtype, rows, case.experts * case.k_in * case.n_out),
    )


def _bias_cost(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    rows = _operand_rows(case)[1] * case.n_out
    written = bytes_of(torch.float32, active_experts(case) * case.n_out)
    return float(case.rows * case.n_out), bytes_of(dtype, rows) + written


LORA_WEIGHT_GRAD = KernelSpec(
    name="lora_weight_grad",
    run=_run_lora_weight_grad,
    reference=_reference_lora_weight_grad,
    arithmetic=_how,
    prepare=routing,
    inputs=_saved,
    cases=CASES,
    plans=_plans_lora,
    cost=_lora_cost,
    modes=("balanced", "exact"),
    source="ops/weight_grad.py",
    ops=("lora_weight_grad",),
)
EXPERT_WEIGHT_GRAD = KernelSpec(
    name="expert_weight_grad",
    run=_run_expert_weight_grad,
    reference=_reference_expert_weight_grad,
    arithmetic=arithmetic,
    prepare=routing,
    cases=(*_SMALL, *_DENSE),
    plans=_plans_base,
    cost=_dense_cost,
    modes=("balanced", "exact"),
    source="ops/weight_grad.py",
    ops=("expert_weight_grad",),
)
EXPERT_BIAS_GRAD = KernelSpec(
    name="expert_bias_grad",
    run=_run_expert_bias_grad,
    reference=_reference_expert_bias_grad,
    prepare=routing,
    cases=CASES,
    plans=only_default,
    cost=_bias_cost,
    modes=("balanced", "exact"),
    source="ops/weight_grad.py",
    ops=("expert_bias_grad",),
    admits=_sums_are_finite,
)
