"""The expert MLP `layers.experts_mlp`: its value and every gradient in one run.

A case is read as hidden width k_in and intermediate width n_out // 2; gate_up is [E, k_in, n_out],
down is [E, n_out // 2, k_in].
"""

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..cases import CASES, Case
from ..expected import Expected
from ..inputs import Inputs, captured, make_inputs
from ..models import Arithmetic, Linear, gradients_of
from ..numerics import Uncertain, column_sums, routed_product, summed
from ..references import GatedActivation, Groups, experts_mlp
from ..spec import KernelSpec
from .common import bytes_of, expert_expected, groups_of, only_default, routing, submodule
from .glu import activation_of, glu_gradient, of_package, stored
from .projection import over_choices, per_slot

_PROJECTIONS = ("up", "down")
_VALUES = ("normal", "offset", "scales", "tiny-dy", "not-finite")
"""Kinds of values whose products stay finite, and above zero, through two projections."""


_STEP = 2.0**-12
"""Relative step of the derivatives of the truth, which is computed in fp64."""


def _admits(case: Case) -> bool:
    """gate_up has two columns for each of the activation."""
    return case.n_out % 2 == 0


def _cases() -> tuple[Case, ...]:
    small = [case for case in CASES if "model" not in case.tags and _admits(case)]
    return tuple(
        replace(case, source="TOKEN", target="SLOT", gradient="TOKEN", gated=True)
        for case in small
        if case.x_layout in ("contiguous", "transposed")
        and case.lora_dtype == "same"
        and case.tokens
        if case.values in _VALUES
    )


def _inputs(
    case: Case, dtype: torch.dtype, mode: str, device: torch.device, *, seed: int = 0
) -> Inputs:
    """x, gates and dout of a layer, and weight, lora_a, lora_b (and bias) of each projection."""
    first = replace(case, values="normal") if case.values == "scales" else case
    up = make_inputs(first, dtype, mode, device, seed=seed)
    narrow = replace(case, k_in=case.n_out // 2, n_out=case.k_in, seed=case.seed + 17, family="")
    down = make_inputs(narrow, dtype, mode, device, seed=seed)
    if case.family:
        real = captured(case, case.seed + 7919 * seed)
        down = down.having(weight=real.down.mT.to(device, dtype))
        up = up.having(gates=real.top_k_weights.to(device))
    parts = ("weight", "lora_a", "lora_b", "bias")
    tensors = {
        f"{part}_{name}": inputs[part]
        for name, inputs in zip(_PROJECTIONS, (up, down), strict=True)
        for part in parts
        if part in inputs.tensors
    }
    return up.only("x", "gates", "top_k_index").having(dout=down["dy"], **tensors)


def _projection(inputs: Inputs, name: str, **rows: Tensor) -> Inputs:
    """One projection of a layer as a linear problem; `rows` are its x and dy in their own
    orders.
    """
    suffix = f"_{name}"
    own = {k.removesuffix(suffix): v for k, v in inputs.tensors.items() if k.endswith(suffix)}
    kept = {"top_k_index": inputs["top_k_index"], **own, **rows}
    return replace(inputs, tensors=kept)


def _leaves(inputs: Inputs) -> dict[str, Tensor]:
    return {
        name: value.detach().requires_grad_()
        for name, value in inputs.tensors.items()
        if name not in ("top_k_index", "dout")
    }


def _run(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    del plan
    leaves, layers = _leaves(inputs), submodule(lib, "layers")

    def projection(name: str) -> Any:
        lora = lib.LoRAWeights(
            a=leaves[f"lora_a_{name}"], b=leaves[f"lora_b_{name}"], scaling=inputs.scaling
        )
        return layers.Projection(
            weight=leaves[f"weight_{name}"], lora=lora, bias=leaves.get(f"bias_{name}")
        )

    out = layers.experts_mlp(
        leaves["x"],
        leaves["gates"],
        routing(lib, inputs),
        gate_up=projection("up"),
        down=projection("down"),
        activation=of_package(lib, activation_of(inputs.case)),
    )
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs["dout"])
    named = {f"d{name}": value for name, value in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), **named}


def _truth(inputs: Inputs, groups: Groups) -> dict[str, Tensor]:
    leaves = {
        name: value.detach().double().requires_grad_() for name, value in _leaves(inputs).items()
    }
    out = experts_mlp(leaves, groups, activation_of(inputs.case), scaling=inputs.scaling)
    gradients = torch.autograd.grad(
        out, list(leaves.values()), inputs["dout"].double(), allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
    named = {f"d{name}": value for name, value in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), **named}


def _reference(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    groups, dtype = groups_of(inputs), inputs.dtype
    truth, activation = _truth(inputs, groups), activation_of(inputs.case)
    gates = inputs["gates"].double().reshape(-1)[groups.slots]
    rows = {"x": inputs["x"], "dy": inputs["dout"]}
    up_inputs, down_inputs = (_projection(inputs, name, **rows) for name in _PROJECTIONS)

    up = Linear.forward(up_inputs, groups, how)
    h = up.output()
    act = stored(h, activation, dtype)
    down = replace(Linear.forward(down_inputs, groups, how), x=act)
    y = down.output()
    dout = Uncertain.exact(inputs["dout"][groups.places("TOKEN")])
    back_down = replace(Linear.input_grad(down_inputs, groups, how), x=dout)
    dact = back_down.output()
    dh = glu_gradient(h, dact, gates, activation).rounded(dtype)
    back_up = replace(Linear.input_grad(up_inputs, groups, how), x=dh)

    weighted = y.scaled(gates[:, None])
    products = _gate_products(up, back_down, h, dact, activation)
    if down.bias is not None:
        labels = torch.repeat_interleave(groups.counts)
        products = products + summed(dout.times(Uncertain.exact(down.bias[labels])), 1)
    products = products.rounded(torch.float32)
    expected = {
        "out": over_choices(inputs, groups, weighted, truth["out"], dtype),
        "dx": over_choices(inputs, groups, back_up.output(), truth["dx"], dtype),
        "dgates": per_slot(inputs, groups, products, truth["dgates"]),
    }
    gated = dout.scaled(gates[:, None])
    chains = {"up": (up, back_up, dh, None), "down": (down, back_down, gated, gates)}
    for name, (forward, backward, dy, scale) in chains.items():
        found = {k: v.rounded(dtype) for k, v in gradients_of(forward, backward, scale).items()}
        weight_dy = dy.rounded(dtype)
        found["weight"] = forward.gram(forward.x, weight_dy).rounded(dtype)
        if forward.bias is not None:
            sums = column_sums(dy.alike(forward.repeats[:, None]), groups.slices)
            found["bias"] = sums.rounded(torch.float32).rounded(dtype)
        for part, model in found.items():
            expected[f"d{part}_{name}"] = expert_expected(
                groups,
                model,
                dtype,
                truth=truth[f"d{part}_{name}"],
                vector_dim=-2 if part == "lora_b" else -1,
                freedom=torch.ones_like(model.value).amax(-2 if part == "lora_b" else -1),
                sources=inputs.case.k_in,
            )
            # One rounded element of a row reaches every line of its expert's gradient.
            expected[f"d{part}_{name}"] = replace(expected[f"d{part}_{name}"], coupled="expert")
    lines = _directions(inputs, groups, truth)
    return {name: replace(item, directions=lines[name]) for name, item in expected.items()}


def _gate_products(
    up: Linear, back_down: Linear, h: Uncertain, dact: Uncertain, activation: GatedActivation
) -> Uncertain:
    """<act, dact> of each row: [kept].

    What the rounding of one element of a rank-R intermediate does to h or dact is a whole line,
    and its effect on the sum may be larger than the root of the sum of its squares: it is summed
    first.
    """
    nothing = dact.value.new_zeros(())
    act = stored(replace(h, shared=nothing), activation, up.dtype)
    found = summed(act.times(replace(dact, shared=nothing)), 1)
    ones = dact.value.new_ones(dact.value.shape[0])
    slope = glu_gradient(h, dact, ones, activation).value
    for line, linear in ((slope, up), (act.value, back_down)):
        if linear.up is not None:
            effect = routed_product(Uncertain.exact(line), linear.up.mT, up.groups.slices).value
            variance = (linear.low_rank().local * effect.square()).sum(1)
            found = replace(found, shared=found.shared + variance)
    return found


def _directions(
    inputs: Inputs, groups: Groups, truth: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """How every output changes, per unit, with its own scale and with each part of a projection."""
    lines = {name: {"the whole": value} for name, value in truth.items()}
    for part in ("weight", "lora_b"):
        for name in _PROJECTIONS:
            key = f"{part}_{name}"
            more, less = (
                _truth(inputs.having(**{key: inputs[key].double() * (1 + step)}), groups)
                for step in (_STEP, -_STEP)
            )
            for output, found in lines.items():
                found[key] = (more[output] - less[output]) / (2 * _STEP)
    return lines


def _cost(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    hidden, wide = case.k_in, case.n_out
    products = hidden * wide + hidden * wide // 2
    lora = case.rank * (hidden + wide + wide // 2 + hidden)
    weight = 2 * case.experts * products
    rows = 4 * case.tokens * hidden + 6 * case.rows * wide
    return 4.0 * case.rows * (products + 1.5 * lora), bytes_of(dtype, weight, rows)


EXPERTS_MLP = KernelSpec(
    name="experts_mlp",
    run=_run,
    reference=_reference,
    prepare=routing,
    inputs=_inputs,
    cases=_cases(),
    admits=_admits,
    plans=only_default,
    cost=_cost,
    modes=("balanced",),
    thrift=6,
    source="layers/experts_mlp.py",
    ops=("experts_mlp",),
)
