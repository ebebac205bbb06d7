"""The differentiable projection `autograd.expert_linear`: its value and every gradient in one
run.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..cases import CASES, Case
from ..expected import Expected
from ..inputs import Inputs
from ..models import (
    Arithmetic,
    Linear,
    alike,
    expert_bias_gradient,
    expert_weight_gradient,
    weight_gradients,
)
from ..numerics import Uncertain, summed
from ..references import Groups, expert_linear, row_gradients
from ..spec import KernelSpec
from .common import (
    TERMS,
    bytes_of,
    expert_expected,
    groups_of,
    of_rows,
    only_default,
    order,
    routing,
    row_expected,
    submodule,
)


def _admits(case: Case) -> bool:
    """Gates sum over the choices of a token: the target is SLOT and the gradient comes per
    token. Without them it comes in the order of the target.
    """
    return (case.target, case.gradient) == ("SLOT", "TOKEN") if case.gated else not case.gradient


def _cases() -> tuple[Case, ...]:
    small = [case for case in CASES if "model" not in case.tags]
    gated = [replace(case, target="SLOT", gradient="TOKEN") for case in small if case.gated]
    return tuple([replace(case, gradient="") for case in small if not case.gated] + gated)


def _leaves(inputs: Inputs) -> dict[str, Tensor]:
    names = ("x", "weight", "lora_a", "lora_b", "bias", "gates")
    return {
        name: inputs[name].detach().requires_grad_() for name in names if name in inputs.tensors
    }


_OUTPUTS = {
    "x": "dx",
    "weight": "dweight",
    "lora_a": "da",
    "lora_b": "db",
    "bias": "dbias",
    "gates": "dgates",
}


def _run(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    del plan
    case, leaves = inputs.case, _leaves(inputs)
    y = submodule(lib, "autograd").expert_linear(
        leaves["x"],
        leaves["weight"],
        routing(lib, inputs),
        lora=lib.LoRAWeights(a=leaves["lora_a"], b=leaves["lora_b"], scaling=inputs.scaling),
        bias=leaves.get("bias"),
        gates=leaves.get("gates"),
        source=order(lib, case.source),
        target=order(lib, case.target),
    )
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs["dy"])
    named = {_OUTPUTS[name]: value for name, value in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), **named}


def _truth(inputs: Inputs, groups: Groups) -> dict[str, Tensor]:
    case = inputs.case
    leaves = {
        name: value.detach().double().requires_grad_() for name, value in _leaves(inputs).items()
    }
    y = expert_linear(
        leaves, groups, scaling=inputs.scaling, source=case.source, target=case.target
    )
    if "gates" in leaves:
        y = y.view(case.tokens, case.top_k, case.n_out).sum(1)
    gradients = torch.autograd.grad(
        y, list(leaves.values()), inputs["dy"].double(), allow_unused=True, materialize_grads=True
    )
    named = {_OUTPUTS[name]: value for name, value in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), **named}


def _reference(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    groups, case = groups_of(inputs), inputs.case
    truth = _truth(inputs, groups)
    rows = replace(Linear.forward(inputs, groups, how), gates=None)
    y = rows.output()
    backward = Linear.input_grad(inputs, groups, how)
    dx = backward.output()
    expected: dict[str, Expected] = {}
    if case.gated:
        weighted = y.scaled(inputs["gates"].double().reshape(-1)[groups.slots][:, None])
        expected["y"] = over_choices(inputs, groups, weighted, truth["y"], inputs.dtype)
        dout = inputs["dy"].double()[groups.places("TOKEN")]
        products = summed(y.times(Uncertain.exact(dout)), 1).rounded(torch.float32)
        expected["dgates"] = per_slot(inputs, groups, products, truth["dgates"])
    else:
        found = row_expected(
            inputs, groups, y, case.target, truth=truth["y"], freedom=rows.freedom()
        )
        expected["y"] = of_rows(found, groups, case.source, case.target)
    if case.source == "TOKEN":
        expected["dx"] = over_choices(inputs, groups, dx, truth["dx"], inputs.dtype)
    else:
        found = row_expected(
            inputs, groups, dx, case.source, truth=truth["dx"], freedom=backward.freedom()
        )
        expected["dx"] = of_rows(found, groups, case.dy_order, case.source)
    for name, (model, freedom, sources) in weight_gradients(inputs, groups, how).items():
        expected[name] = expert_expected(
            groups,
            model,
            inputs.lora_dtype,
            truth=truth[name],
            vector_dim=-1 if name == "da" else -2,
            freedom=freedom,
            sources=sources,
        )
    dweight = expert_weight_gradient(inputs, groups, how)
    found = expert_expected(groups, dweight, inputs.dtype, truth=truth["dweight"])
    # One rounded element of a row reaches every line of its expert's gradient.
    expected["dweight"] = replace(found, coupled="expert")
    if case.bias:
        dbias = expert_bias_gradient(inputs, groups).rounded(inputs.dtype)
        expected["dbias"] = expert_expected(groups, dbias, inputs.dtype, truth=truth["dbias"])
    lines = _directions(inputs, groups)
    return {
        name: replace(item, directions=lines.get(name, {"the whole": item.value}))
        for name, item in expected.items()
    }


def _directions(inputs: Inputs, groups: Groups) -> dict[str, dict[str, Tensor]]:
    """The terms of y and of dx: what would be left over if one of them were scaled wrongly."""
    case, tensors = inputs.case, inputs.tensors

    def choices(rows: Tensor) -> Tensor:
        return rows.view(case.tokens, case.top_k, rows.shape[1]).sum(1)

    y, dx = {}, {}
    for part in TERMS if case.bias else TERMS[:2]:
        y[part] = expert_linear(
            tensors, groups, scaling=inputs.scaling, source=case.source, target=case.target,
            parts=(part,),
        )  # fmt: skip
        y[part] = choices(y[part]) if case.gated else y[part]
    for part in ("base", "lora"):
        dx[part] = row_gradients(
            tensors, groups, scaling=inputs.scaling, dy_order=case.dy_order, order=case.dx_order,
            parts=(part,),
        )  # fmt: skip
        dx[part] = choices(dx[part]) if case.source == "TOKEN" else dx[part]
    return {"y": y, "dx": dx}


def over_choices(
    inputs: Inputs, groups: Groups, rows: Uncertain, truth: Tensor, dtype: torch.dtype
) -> Expected:
    """An output per token, summed over the rows [kept, width] of its choices and rounded."""
    case = inputs.case
    rows = rows.alike(alike(case, groups)[:, None])
    slots = rows.rearranged(lambda part: groups.spread(part, "SLOT"))
    width = rows.value.shape[1]
    slots = slots.rearranged(lambda part: part.view(case.tokens, case.top_k, width))
    model = summed(slots, 1).rounded(dtype)
    owner = torch.zeros(case.tokens, dtype=torch.int64, device=inputs.device)
    # How parallel the roundings of the operands of top_k rows are is not followed here.
    sources = torch.full_like(owner, case.k_in * case.top_k)
    return Expected(
        value=truth,
        model=model,
        dtype=dtype,
        expert=owner,
        sources=sources,
        freedom=torch.ones_like(sources, dtype=torch.float64),
        zero=torch.zeros_like(owner, dtype=torch.bool),
        coupled="expert" if inputs.narrowed else "vector",
    )


def per_slot(inputs: Inputs, groups: Groups, rows: Uncertain, truth: Tensor) -> Expected:
    """An fp32 output [tokens, top_k] with one element per routed row [kept]."""
    case = inputs.case
    model = rows.rearranged(lambda part: groups.spread(part, "SLOT"))
    model = model.rearranged(lambda part: part.view(case.tokens, case.top_k))
    owner = torch.zeros(case.tokens, dtype=torch.int64, device=inputs.device)
    return Expected(
        value=truth,
        model=model,
        dtype=torch.float32,
        expert=owner,
        sources=torch.full_like(owner, case.n_out),
        freedom=torch.ones_like(owner, dtype=torch.float64),
        zero=torch.zeros_like(owner, dtype=torch.bool),
    )


def _cost(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    wide = case.k_in + case.n_out
    flops = 6.0 * case.rows * (case.k_in * case.n_out + case.rank * wide)
    weight = 3 * case.experts * case.k_in * case.n_out
    return flops, bytes_of(dtype, 3 * case.rows * wide, weight)


EXPERT_LINEAR = KernelSpec(
    name="expert_linear",
    run=_run,
    reference=_reference,
    prepare=routing,
    cases=_cases(),
    admits=_admits,
    plans=only_default,
    cost=_cost,
    modes=("balanced", "exact"),
    thrift=3,
    source="autograd.py",
    ops=("expert_linear",),
)
