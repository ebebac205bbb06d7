"""Error rates of the judge: alarms on right results, and which errors of which size it sees.

Right results come from plain torch that rounds where a kernel rounds, for volume, and from the real
kernels. Wrong ones come from the same torch code with one fault each.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .compare import compare
from .expected import Expected
from .inputs import DTYPES, Inputs
from .models import Arithmetic
from .references import Groups
from .routings import RoutingKind
from .run import Problem, guarded_run
from .spec import KernelSpec
from .specs.gradients import LORA_WEIGHT_GRAD
from .specs.linear import LORA_FORWARD, LORA_INPUT_GRAD
from .specs.projection import EXPERT_LINEAR

CPU = torch.device("cpu")
_TILE = 64
_KINDS = (
    *("uniform", "zipf", "holes:30", "alternating", "boundary:32:0", "sentinels:20"),
    *("repeated", "last"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is wrong with a simulated kernel; the defaults are a right one.

    lost_base, lost_lora: last elements of K that are left out. lora_factor, base_factor: factors of
    a term. stray_base, stray_lora: rows of each expert that use the next one's weight or adapter.
    narrow: sums rounded to the operands' type every 64 elements of K. truncated: result cut, not
    rounded. lost_rank: ranks left out. bias, gates: whether they are applied. element: relative
    error of one element of each expert's first row.
    """

    lost_base: int = 0
    lost_lora: int = 0
    base_factor: float = 1.0
    lora_factor: float = 1.0
    stray_base: int = 0
    stray_lora: int = 0
    narrow: bool = False
    truncated: bool = False
    lost_rank: int = 0
    bias: bool = True
    gates: bool = True
    element: float = 0.0


RIGHT = Fault()
FAULTS: Mapping[str, Fault] = {
    "last element of K missed, base": Fault(lost_base=1),
    "last element of K missed, LoRA only": Fault(lost_lora=1),
    "last 32 of K missed, LoRA only": Fault(lost_lora=32),
    "wrong expert for one row of each expert": Fault(stray_base=1),
    "wrong adapter for one row of each expert": Fault(stray_lora=1),
    "wrong adapter for all rows": Fault(stray_lora=10**6),
    "scaling not applied": Fault(lora_factor=1 / 1.7),
    "scaling 5% off": Fault(lora_factor=1.05),
    "scaling 1% off": Fault(lora_factor=1.01),
    "LoRA term lost": Fault(lora_factor=0.0),
    "one rank lost": Fault(lost_rank=1),
    "base term 1% off": Fault(base_factor=1.01),
    "base term 0.2% off": Fault(base_factor=1.002),
    "bias lost": Fault(bias=False),
    "gates lost": Fault(gates=False),
    "sums in the operands' type": Fault(narrow=True),
    "result truncated": Fault(truncated=True),
    "one element per expert 20% off": Fault(element=0.2),
    "one element per expert 2% off": Fault(element=0.02),
}


def drawn_case(seed: int, *, deep: bool = False) -> Case:
    """A random case; `deep` has K of at least sixteen tiles of 64 and a bias and gates."""
    chance = random.Random(seed)
    experts, tokens = chance.choice((1, 2, 5, 8, 16)), chance.randint(2, 200)
    words = chance.choice(_KINDS).split(":")
    gated = deep or chance.random() < 0.3
    narrow = not deep and chance.random() < 0.2
    return Case(
        name=f"drawn-{seed}",
        tokens=max(tokens, 48) if deep else tokens,
        experts=experts,
        top_k=min(chance.randint(1, 4), experts),
        k_in=chance.randint(1024, 1280) if deep else chance.randint(33, 512),
        n_out=chance.randint(64, 160) if deep else chance.randint(1 if narrow else 32, 256),
        rank=chance.randint(4, 33) if deep else chance.randint(1, 33),
        routing=RoutingKind(words[0], tuple(int(word) for word in words[1:])),
        source=chance.choice(("TOKEN", "SLOT", "EXPERT")),
        target="SLOT" if gated else chance.choice(("SLOT", "EXPERT")),
        gradient="TOKEN" if gated else "",
        bias=deep or chance.random() < 0.5,
        gated=gated,
        values="normal" if deep else chance.choice(("normal", "normal", "offset")),
        lora_dtype=chance.choice(("same", "same", "float32")),
        seed=seed,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operands:
    """One LoRA product as a kernel sees it: factors [E, K, R] and [E, R, N] in the rows' type."""

    x: Tensor
    weight: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor | None
    gates: Tensor | None
    scaling: float


def _forward_operands(inputs: Inputs, groups: Groups) -> _Operands:
    gates = inputs.get("gates")
    return _Operands(
        x=inputs["x"][groups.places(inputs.case.source)],
        weight=inputs["weight"],
        down=inputs["lora_a"].to(inputs.dtype).mT,
        up=inputs["lora_b"].to(inputs.dtype).mT,
        bias=inputs.get("bias"),
        gates=None if gates is None else gates.reshape(-1)[groups.slots],
        scaling=inputs.scaling,
    )


def _backward_operands(inputs: Inputs, groups: Groups) -> _Operands:
    forward = _forward_operands(inputs, groups)
    return replace(
        forward,
        x=inputs["dy"][groups.places(inputs.case.dy_order)],
        weight=forward.weight.mT,
        down=forward.up.mT,
        up=forward.down.mT,
        bias=None,
    )


def _rounded(value: Tensor, dtype: torch.dtype, fault: Fault) -> Tensor:
    if not fault.truncated or dtype == torch.float32:
        return value.to(dtype)
    bits = {torch.bfloat16: 16, torch.float16: 13}[dtype]
    return ((value.view(torch.int32) >> bits) << bits).view(torch.float32).to(dtype)


def _product(x: Tensor, weight: Tensor, fault: Fault) -> Tensor:
    """x W in fp32, or in the operands' type from tile to tile."""
    if not fault.narrow:
        return x.float() @ weight.float()
    total = torch.zeros(x.shape[0], weight.shape[1])
    for start in range(0, x.shape[1], _TILE):
        part = slice(start, start + _TILE)
        total = (total + x[:, part].float() @ weight[part].float()).to(x.dtype).float()
    return total


def _simulated(
    operands: _Operands, groups: Groups, dtype: torch.dtype, fault: Fault
) -> tuple[Tensor, Tensor]:
    """The product and s x D of the kept rows, in `dtype`, as a kernel would compute them."""
    y = torch.zeros(operands.x.shape[0], operands.weight.shape[2], dtype=dtype)
    low = torch.zeros(operands.x.shape[0], operands.down.shape[2], dtype=dtype)
    for expert, rows in enumerate(groups.slices):
        for part, base, lora in _owners(rows, expert, groups.experts, fault):
            x = operands.x[part]
            kept = operands.x.shape[1] - fault.lost_lora
            thin = _product(x[:, :kept], operands.down[lora][:kept], fault)
            thin = (thin * operands.scaling).to(dtype)
            low[part] = thin
            kept = operands.x.shape[1] - fault.lost_base
            total = _product(x[:, :kept], operands.weight[base][:kept], fault) * fault.base_factor
            ranks = thin.shape[1] - fault.lost_rank
            term = thin[:, :ranks].float() @ operands.up[lora][:ranks].float()
            total += fault.lora_factor * term
            if operands.bias is not None and fault.bias:
                total += operands.bias[expert].float()
            if operands.gates is not None and fault.gates:
                total *= operands.gates[part, None].float()
            y[part] = _rounded(total, dtype, fault)
        if fault.element and rows.stop > rows.start:
            y[rows.start, 0] *= 1 + fault.element
    return y, low


def _owners(
    rows: slice, expert: int, experts: int, fault: Fault
) -> Iterator[tuple[slice, int, int]]:
    """(rows, expert of the weight, expert of the adapter)."""
    following = (expert + 1) % experts
    cuts = sorted({min(fault.stray_base, rows.stop - rows.start), rows.stop - rows.start})
    cuts = sorted({*cuts, min(fault.stray_lora, rows.stop - rows.start)} - {0})
    start = 0
    for stop in cuts:
        base = following if start < fault.stray_base else expert
        lora = following if start < fault.stray_lora else expert
        yield slice(rows.start + start, rows.start + stop), base, lora
        start = stop


def _spread_low(low: Tensor, groups: Groups) -> Tensor:
    return groups.spread(low, "EXPERT")


def forward(inputs: Inputs, fault: Fault = RIGHT) -> dict[str, Tensor]:
    """lora_forward as a kernel with a fault computes it."""
    groups = Groups.of(inputs["top_k_index"], inputs.case.experts)
    y, low = _simulated(_forward_operands(inputs, groups), groups, inputs.dtype, fault)
    return {"y": groups.spread(y, inputs.case.target), "t": _spread_low(low, groups)}


def input_grad(inputs: Inputs, fault: Fault = RIGHT) -> dict[str, Tensor]:
    """lora_input_grad as a kernel with a fault computes it."""
    groups = Groups.of(inputs["top_k_index"], inputs.case.experts)
    y, low = _simulated(_backward_operands(inputs, groups), groups, inputs.dtype, fault)
    return {"dx": groups.spread(y, inputs.case.dx_order), "yb": _spread_low(low, groups)}


def weight_grad(inputs: Inputs, fault: Fault = RIGHT) -> dict[str, Tensor]:
    """lora_weight_grad over saved operands; of the faults it has no use for any."""
    del fault
    groups = Groups.of(inputs["top_k_index"], inputs.case.experts)
    return _factor_gradients(inputs, groups, inputs["xa"], inputs["yb"])


def _factor_gradients(inputs: Inputs, groups: Groups, xa: Tensor, yb: Tensor) -> dict[str, Tensor]:
    """da and db of the kept rows of xa = s x A^T and yb = s dy B."""
    operands = _forward_operands(inputs, groups)
    dy = inputs["dy"][groups.places(inputs.case.dy_order)]
    da, db = torch.zeros_like(inputs["lora_a"]), torch.zeros_like(inputs["lora_b"])
    for expert, rows in groups.live:
        t, u = (_gated(low, operands.gates, rows) for low in (xa, yb))
        da[expert] = (u.T @ operands.x[rows].float()).to(da.dtype)
        db[expert] = (dy[rows].float().T @ t).to(db.dtype)
    return {"da": da, "db": db}


def _gated(values: Tensor, gates: Tensor | None, rows: slice) -> Tensor:
    """Some rows in fp32 as a product reads them: times their gates, in their own type."""
    mine = values[rows].float()
    return mine if gates is None else (mine * gates[rows, None].float()).to(values.dtype).float()


def linear(inputs: Inputs, fault: Fault = RIGHT) -> dict[str, Tensor]:
    """expert_linear and its gradients, with a fault in the two products with the weight."""
    case, dtype = inputs.case, inputs.dtype
    groups = Groups.of(inputs["top_k_index"], case.experts)
    ahead = replace(_forward_operands(inputs, groups), gates=None)
    back = _backward_operands(inputs, groups)
    y, xa = _simulated(ahead, groups, dtype, fault)
    dx, yb = _simulated(back, groups, dtype, fault)

    def choices(rows: Tensor) -> Tensor:
        slots = groups.spread(rows.float(), "SLOT")
        return slots.view(case.tokens, case.top_k, rows.shape[1])

    outputs = _factor_gradients(inputs, groups, xa, yb)
    outputs["dx"] = groups.spread(dx, case.source)
    if case.source == "TOKEN":
        outputs["dx"] = choices(dx).sum(1).to(dtype)
    outputs["y"] = groups.spread(y, case.target)
    if case.gated:
        outputs["y"] = (choices(y) * inputs["gates"].float()[..., None]).sum(1).to(dtype)
        outputs["dgates"] = choices((y.float() * back.x.float()).sum(1, keepdim=True))[..., 0]
    outputs["dweight"] = torch.zeros(inputs["weight"].shape, dtype=dtype)
    sums = torch.zeros(case.experts, case.n_out)
    for expert, rows in groups.live:
        dy = _gated(back.x, back.gates, rows)
        outputs["dweight"][expert] = (ahead.x[rows].float().T @ dy).to(dtype)
        scale = 1.0 if back.gates is None else back.gates[rows, None].float()
        sums[expert] = (back.x[rows].float() * scale).sum(0)
    return {**outputs, "dbias": sums.to(dtype)} if case.bias else outputs


PIPELINES: tuple[tuple[KernelSpec, Callable[..., dict[str, Tensor]]], ...] = (
    (LORA_FORWARD, forward),
    (LORA_INPUT_GRAD, input_grad),
    (LORA_WEIGHT_GRAD, weight_grad),
    (EXPERT_LINEAR, linear),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Right results that were judged: groups, the largest ratio, and what raised an alarm."""

    groups: int
    worst: float
    alarms: tuple[str, ...]


def _groups_of(expected: Expected) -> int:
    """Vectors, experts, the whole, and the factor of each term."""
    labels = expected.expert.reshape(-1)
    return labels.numel() + int(labels.unique().numel()) + 1 + len(expected.terms)


def simulated_tally(seed: int) -> Tally:
    """Every pipeline, right, on one drawn case in one dtype."""
    case = drawn_case(seed)
    dtype = list(DTYPES.values())[seed % len(DTYPES)]
    groups, worst, alarms = 0, 0.0, []
    for spec, pipeline in PIPELINES:
        inputs = spec.inputs(case, dtype, "balanced", CPU)
        with torch.enable_grad():
            expected = spec.reference(inputs, Arithmetic())
        outputs = pipeline(inputs)
        for name, value in expected.items():
            found = compare(name, outputs[name], value)
            groups += _groups_of(value)
            worst = max(worst, found.ratio)
            if not found.ok:
                alarms.append(f"{spec.name} {case.shape} {dtype} seed {seed}: {found}")
    return Tally(groups=groups, worst=worst, alarms=tuple(alarms))


def kernel_tally(lib: ModuleType, problem: Problem) -> Tally:
    """The quick plans of a real kernel on one problem."""
    spec, groups, worst, alarms = problem.spec, 0, 0.0, []
    inputs = problem.draw()
    prepared = problem.bench.prepare(lib, spec, inputs)
    inputs = replace(inputs, prepared=prepared.value if prepared else None)
    for plan in spec.plans(lib, inputs):
        if plan.unavailable or not plan.quick:
            continue
        with torch.enable_grad():
            expected = spec.reference(inputs, spec.arithmetic(lib, inputs, plan.plan))
        outputs, problems = guarded_run(lib, spec, inputs, plan.plan)
        alarms += [f"{spec.name} {plan.path} {problem.case.name}: {text}" for text in problems]
        for name, value in expected.items():
            found = compare(name, outputs[name], value, exact=problem.mode == "exact")
            groups += _groups_of(value)
            worst = max(worst, found.ratio)
            if not found.ok:
                alarms.append(f"{spec.name} {plan.path} {problem.case.name} {found}")
    return Tally(groups=groups, worst=worst, alarms=tuple(alarms))


def detected(name: str, seed: int) -> dict[str, Any]:
    """One fault in the forward product of one drawn case: how large it is and whether it was seen.

    effect: norm of the change over that of the right result, of the whole output. ratio: worst
    error over its limit.
    """
    case = drawn_case(10**6 + seed, deep=True)
    if FAULTS[name].stray_base or FAULTS[name].stray_lora:
        case = replace(case, experts=max(case.experts, 2))
    dtype = (torch.bfloat16, torch.float16)[seed % 2]
    inputs = LORA_FORWARD.inputs(case, dtype, "balanced", CPU)
    with torch.enable_grad():
        expected = LORA_FORWARD.reference(inputs, Arithmetic())
    right, wrong = forward(inputs)["y"].double(), forward(inputs, FAULTS[name])
    judged = [compare(key, wrong[key], value) for key, value in expected.items()]
    worst = max(judged, key=lambda item: item.ratio)
    norm = torch.linalg.vector_norm
    return {
        "fault": name,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "effect": float(norm(wrong["y"].double() - right) / norm(right)),
        "ratio": worst.ratio,
        "measure": worst.measure,
        "seen": not worst.ok,
    }
