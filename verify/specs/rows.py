"""Operations on rows: routing itself, group, combine and the gradient of the gates."""

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..cases import CASES, Case
from ..expected import Expected
from ..inputs import Inputs, laid_out, make_inputs
from ..models import Arithmetic
from ..numerics import Uncertain, rounding_variance, summed
from ..spec import KernelSpec
from ..values import valued
from .common import bytes_of, groups_of, only_default, ops, order, routing, row_expected


def _gathered_cases() -> tuple[Case, ...]:
    return tuple(case for case in CASES if case.source != "EXPERT")


def _slot_inputs(
    case: Case, dtype: torch.dtype, mode: str, device: torch.device, *, seed: int = 0
) -> Inputs:
    """y [rows, N] in slot order, dout [T, N] and gates, drawn like the operands of a product."""
    inputs = make_inputs(case, dtype, mode, device, seed=seed)
    generator = torch.Generator(device=device).manual_seed(case.seed + 7919 * seed + 2)

    def drawn(*shape: int) -> Tensor:
        if mode == "exact":
            return torch.randint(-9, 10, shape, generator=generator, device=device).to(dtype)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    gates = laid_out(drawn(case.tokens, case.top_k).float(), case.x_layout)
    rows = {"x": drawn(case.rows, case.n_out), "dy": drawn(case.tokens, case.n_out)}
    if mode != "exact" and case.values in ("tiny-x", "tiny-dy", "not-finite"):
        nothing = torch.zeros(1, device=device)
        rows = valued({**rows, "bias": nothing}, case, dtype, inputs["top_k_index"])
    return inputs.having(y=rows["x"].to(dtype), dout=rows["dy"].to(dtype), gates=gates)


def _run_group(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    del plan
    source = order(lib, inputs.case.source)
    gates = inputs.get("gates")
    return {
        "rows": ops(lib).group(inputs["x"], routing(lib, inputs), source=source, row_scale=gates)
    }


def _run_combine(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    del plan
    gates = inputs["gates"] if inputs.case.rank % 2 == 0 else None
    return {"out": ops(lib).combine(inputs["y"], routing(lib, inputs), gates=gates)}


def _run_combine_grad(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    del plan
    return {"dgates": ops(lib).combine_grad(inputs["y"], inputs["dout"], routing(lib, inputs))}


def _rounded_products(products: Uncertain, dtype: torch.dtype) -> Uncertain:
    """Products of numbers that are known, rounded once.

    The products of one factor with numbers of few bits may all lie about midway between numbers of
    the dtype, or all as far above one: what each errs by is known, and its line shares what exceeds
    the variance of a rounding.
    """
    value = products.value
    local = rounding_variance(value, dtype)
    excess = (value.to(dtype).double() - value).square_().sub_(local).clamp_min_(0)
    return replace(products, local=products.local + local, shared=products.shared + excess)


def _reference_group(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    del how
    groups = groups_of(inputs)
    rows = Uncertain.exact(inputs["x"][groups.places(inputs.case.source)].double())
    gates = inputs.get("gates")
    if gates is not None:
        rows = rows.scaled(gates.reshape(-1)[groups.slots].double()[:, None])
        rows = _rounded_products(rows, inputs.dtype)
    return {"rows": row_expected(inputs, groups, rows, "EXPERT", sources=inputs.case.k_in)}


def _token_expected(inputs: Inputs, model: Uncertain, dtype: torch.dtype) -> Expected:
    """An output with one vector per token, which belongs to no expert."""
    owner = torch.zeros(inputs.case.tokens, dtype=torch.int64, device=inputs.device)
    sources = torch.full_like(owner, inputs.case.n_out)
    return Expected(
        value=model.value,
        model=model,
        dtype=dtype,
        expert=owner,
        sources=sources,
        freedom=sources.double(),
        zero=torch.zeros_like(owner, dtype=torch.bool),
        terms={"sum": model.value},
    )


def _reference_combine(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    del how
    case = inputs.case
    y = Uncertain.exact(inputs["y"].double().view(case.tokens, case.top_k, case.n_out))
    if case.rank % 2 == 0:
        y = y.scaled(inputs["gates"].double()[..., None])
    out = summed(y, 1)
    out = _rounded_products(out, inputs.dtype) if case.top_k == 1 else out.rounded(inputs.dtype)
    return {"out": _token_expected(inputs, out, inputs.dtype)}


def _reference_combine_grad(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    del how
    case = inputs.case
    y = inputs["y"].double().view(case.tokens, case.top_k, case.n_out)
    products = Uncertain.exact(y * inputs["dout"].double()[:, None])
    model = summed(products, 2).rounded(torch.float32)
    return {"dgates": _token_expected(inputs, model, torch.float32)}


def _group_cost(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    read = case.tokens if case.source == "TOKEN" else case.rows
    return 0.0, bytes_of(dtype, read * case.k_in, case.rows * case.k_in)


def _combine_cost(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    elements = case.rows * case.n_out
    return 2.0 * elements, bytes_of(dtype, elements, case.tokens * case.n_out)


GROUP = KernelSpec(
    name="group",
    run=_run_group,
    reference=_reference_group,
    prepare=routing,
    cases=_gathered_cases(),
    plans=only_default,
    cost=_group_cost,
    modes=("balanced",),
    source="ops/rows.py",
    ops=("group",),
)
COMBINE = KernelSpec(
    name="combine",
    run=_run_combine,
    reference=_reference_combine,
    prepare=routing,
    inputs=_slot_inputs,
    cases=CASES,
    plans=only_default,
    cost=_combine_cost,
    modes=("balanced", "exact"),
    source="ops/rows.py",
    ops=("combine",),
)
COMBINE_GRAD = KernelSpec(
    name="combine_grad",
    run=_run_combine_grad,
    reference=_reference_combine_grad,
    prepare=routing,
    inputs=_slot_inputs,
    cases=CASES,
    plans=only_default,
    cost=_combine_cost,
    modes=("balanced", "exact"),
    source="ops/rows.py",
    ops=("combine_grad",),
    timed_at="down",
)
