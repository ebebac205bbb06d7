"""The gated activation and its gradient."""

import math
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
from ..numerics import Uncertain, by_rows, elementwise, summed
from ..references import GatedActivation
from ..spec import KernelSpec, NamedPlan
from .common import bytes_of, groups_of, ops, routing, submodule

ACTIVATIONS: Mapping[str, GatedActivation] = {
    "silu": GatedActivation(),
    "gelu": GatedActivation(tanh=True),
    "gpt-oss": GatedActivation(alpha=1.702, shift=1.0, limit=7.0, interleaved=True),
    "clamped": GatedActivation(limit=2.5),
    "gelu-interleaved": GatedActivation(tanh=True, interleaved=True),
}


UNGATED = Case(
    name="ungated", tokens=9, experts=3, top_k=2, k_in=16, n_out=40, tags=frozenset({"edge"})
)
"""The case without gates, besides those that all operations share."""
_NEAR = 6.0
"""Standard deviations within which a value may lie on either side of a limit."""


def of_package(lib: ModuleType, activation: GatedActivation) -> Any:
    """The package's Activation of the same formula."""
    module = submodule(lib, "ops")
    return module.Activation(
        gate=module.Gate.TANH if activation.tanh else module.Gate.SIGMOID,
        alpha=activation.alpha,
        shift=activation.shift,
        limit=activation.limit,
        interleaved=activation.interleaved,
    )


def activation_of(case: Case) -> GatedActivation:
    """The activation that a case is run with: they go round by its seed, sizes and routing."""
    if case.family:
        return ACTIVATIONS["silu"]
    kinds = list(ACTIVATIONS)
    turn = case.seed + case.tokens + case.k_in + case.rank + len(case.name)
    return ACTIVATIONS[kinds[turn % len(kinds)]]


def _inputs(
    case: Case, dtype: torch.dtype, mode: str, device: torch.device, *, seed: int = 0
) -> Inputs:
    """h [rows, 2 I] and dact [rows, I] in expert order with I = n_out, and gates."""
    inputs = make_inputs(case, dtype, mode, device, seed=seed).only("top_k_index")
    generator = torch.Generator(device=device).manual_seed(case.seed + 7919 * seed + 3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    h = 2 * drawn(case.rows, 2 * case.n_out)
    inputs = inputs.having(h=h.to(dtype), dact=drawn(case.rows, case.n_out).to(dtype))
    if case == UNGATED:
        return inputs
    return inputs.having(gates=laid_out(drawn(case.tokens, case.top_k), case.x_layout))


def _run_forward(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    del plan
    activation = of_package(lib, activation_of(inputs.case))
    return {"act": ops(lib).glu_forward(inputs["h"], activation)}


def _run_backward(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    del plan
    dh, act, dgates = ops(lib).glu_backward(
        inputs["h"],
        inputs["dact"],
        routing(lib, inputs),
        of_package(lib, activation_of(inputs.case)),
        gates=inputs.get("gates"),
    )
    return {"dh": dh, "act": act, "dgates": dgates}


def _rows_expected(inputs: Inputs, model: Uncertain, dtype: torch.dtype) -> Expected:
    labels = groups_of(inputs).labels("EXPERT")[: model.value.shape[0]]
    return Expected(
        value=model.value,
        model=model,
        dtype=dtype,
        expert=labels,
        sources=torch.full_like(labels, model.value.shape[-1]),
        zero=torch.zeros_like(labels, dtype=torch.bool),
    )


def glu(h: Uncertain, activation: GatedActivation) -> Uncertain:
    """act [., I] of h [., 2 I], not yet rounded."""

    def of_rows(h: Uncertain) -> Uncertain:
        gate, up = _halves(h, activation)
        return elementwise(activation, gate, up, scale=_sizes(activation, gate, up)[0])

    return by_rows(of_rows, h.value.shape[-1] // 2, h)


def stored(h: Uncertain, activation: GatedActivation, dtype: torch.dtype) -> Uncertain:
    """act [., I] of h [., 2 I], stored in `dtype`, as products take it.

    Where gate and up are beyond the limit act is one of two numbers, in whatever row. Its rounding
    r, which is known, is not averaged away by a sum over rows: it counts as drift too. Drift is
    summed as the mean size of errors, which for normal ones is sqrt(2 / pi) of the root of their
    mean square, hence the factor.
    """
    found = glu(h, activation).rounded(dtype)
    if math.isinf(activation.limit):
        return found
    gate, up = _halves(h, activation)
    beyond = (gate.value >= activation.limit) & (up.value.abs() >= activation.limit)
    beyond &= ~_near_limit(activation, gate, up)
    rounding = found.value.to(dtype).double() - found.value
    known = torch.where(beyond, math.pi / 2 * rounding.square(), 0.0)
    return replace(found, drift=found.drift + known)


def _halves(h: Uncertain, activation: GatedActivation) -> tuple[Uncertain, Uncertain]:
    return (
        h.rearranged(lambda part: activation.halves(part)[0]),
        h.rearranged(lambda part: activation.halves(part)[1]),
    )


def _sizes(
    activation: GatedActivation, gate: Uncertain, up: Uncertain
) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes of the value and of its derivatives by gate and up, without the cancellation in
    them.
    """
    a = gate.value.double().clamp(max=activation.limit).abs()
    u = up.value.double().clamp(-activation.limit, activation.limit).abs() + activation.shift
    return a * (1 + a) * u, (1 + a).square() * u, a * (1 + a)


def glu_gradient(
    h: Uncertain, dact: Uncertain, gates: Tensor, activation: GatedActivation
) -> Uncertain:
    """dh [., 2 I] of h [., 2 I] and dact [., I], rows times gates [.], not yet rounded."""

    def of_rows(h: Uncertain, dact: Uncertain, gates: Tensor) -> Uncertain:
        return _gradient_of_rows(h, dact, gates, activation)

    return by_rows(of_rows, h.value.shape[-1], h, dact, gates)


def _gradient_of_rows(
    h: Uncertain, dact: Uncertain, gates: Tensor, activation: GatedActivation
) -> Uncertain:
    def partial(index: int) -> Uncertain:
        def function(gate: Tensor, up: Tensor, d: Tensor) -> Tensor:
            value = activation(gate, up)
            (slope,) = torch.autograd.grad(value.sum(), (gate, up)[index], create_graph=True)
            return gates[:, None] * d * slope

        halves = _halves(h, activation)
        size = _sizes(activation, *halves)[1 + index]
        factor = (gates[:, None] * dact.value.double()).abs()
        found = elementwise(function, *halves, dact, scale=size * factor)
        jumps = factor * size * _near_limit(activation, *halves)
        return replace(found, local=found.local + jumps.square())

    return _joined(partial(0), partial(1), activation)


def _near_limit(activation: GatedActivation, gate: Uncertain, up: Uncertain) -> Tensor:
    """Where gate or up may be on the other side of the limit: there the derivative jumps.

    At the limit itself the derivative is that inside, as torch.clamp has it; a value that is exact
    has no other side.
    """

    def near(x: Uncertain, bound: float) -> Tensor:
        distance = (x.value.double() - bound).abs()
        return (distance.square() <= _NEAR**2 * x.variance) & (x.variance > 0)

    limit = activation.limit
    return near(gate, limit) | near(up, limit) | near(up, -limit)


def _joined(gate: Uncertain, up: Uncertain, activation: GatedActivation) -> Uncertain:
    def join(a: Tensor, b: Tensor) -> Tensor:
        if a.ndim == b.ndim == 0:
            return a + b
        a, b = a.expand(gate.value.shape), b.expand(gate.value.shape)
        if activation.interleaved:
            return torch.stack((a, b), dim=-1).flatten(-2)
        return torch.cat((a, b), dim=-1)

    return Uncertain(
        join(gate.value, up.value),
        join(gate.local, up.local),
        join(gate.shared, up.shared),
        join(gate.drift, up.drift),
    )


def _lean(found: Uncertain) -> Uncertain:
    """Without the parts that are zero throughout."""
    nothing = found.value.new_zeros(())
    local, shared = (part if bool(part.any()) else nothing for part in (found.local, found.shared))
    return replace(found, local=local, shared=shared)


def _reference_forward(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    del how
    model = _lean(glu(Uncertain.exact(inputs["h"]), activation_of(inputs.case)))
    return {"act": _rows_expected(inputs, model.rounded(inputs.dtype), inputs.dtype)}


def _reference_backward(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    del how
    case, dtype, activation = inputs.case, inputs.dtype, activation_of(inputs.case)
    h, dact = (Uncertain.exact(inputs[name]) for name in ("h", "dact"))
    slots = _slots(inputs)
    gates = inputs.get("gates")
    gates = slots.new_ones(()).expand_as(slots) if gates is None else gates.reshape(-1)[slots]
    act = _lean(glu(h, activation))
    dgates = summed(act.times(dact.rearranged(Tensor.double)), 1).rounded(torch.float32)
    dh = _lean(glu_gradient(h, dact, gates.double(), activation)).rounded(dtype)
    placed = dgates.rearranged(lambda part: torch.empty_like(part).index_copy(0, slots, part))
    placed = placed.rearranged(lambda part: part.view(case.tokens, case.top_k))
    owner = torch.zeros(case.tokens, dtype=torch.int64, device=inputs.device)
    return {
        "dh": _rows_expected(inputs, dh, dtype),
        "act": _rows_expected(inputs, act.rounded(dtype), dtype),
        "dgates": Expected(
            value=placed.value,
            model=placed,
            dtype=torch.float32,
            expert=owner,
            sources=torch.full_like(owner, case.n_out),
            zero=torch.zeros_like(owner, dtype=torch.bool),
        ),
    }


def _slots(inputs: Inputs) -> Tensor:
    """Slot of every row in expert order, dropped rows last in slot order: int64 [rows]."""
    groups = groups_of(inputs)
    dropped = torch.ones(groups.rows, dtype=torch.bool, device=inputs.device)
    dropped[groups.slots] = False
    return torch.cat([groups.slots, dropped.nonzero().reshape(-1)])


def _plans(lib: ModuleType, inputs: Inputs) -> tuple[NamedPlan, ...]:
    del lib
    kind = activation_of(inputs.case)
    return (NamedPlan(path="interleaved" if kind.interleaved else "halves", plan=None),)


def _cost(case: Case, dtype: torch.dtype, *, streams: int) -> tuple[float, float]:
    elements = case.rows * case.n_out
    return 10.0 * elements, bytes_of(dtype, streams * elements)


GLU_FORWARD = KernelSpec(
    name="glu_forward",
    run=_run_forward,
    reference=_reference_forward,
    inputs=_inputs,
    cases=CASES,
    plans=_plans,
    cost=lambda case, dtype: _cost(case, dtype, streams=3),
    modes=("balanced",),
    source="ops/glu.py",
    ops=("glu_forward",),
)
GLU_BACKWARD = KernelSpec(
    name="glu_backward",
    run=_run_backward,
    reference=_reference_backward,
    prepare=routing,
    inputs=_inputs,
    cases=(*CASES, UNGATED),
    plans=_plans,
    cost=lambda case, dtype: _cost(case, dtype, streams=6),
    modes=("balanced",),
    source="ops/glu.py",
    ops=("glu_backward",),
)
