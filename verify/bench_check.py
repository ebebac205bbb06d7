"""Whether the results that are about to be timed are right.

The truth is the reference in fp64; the yardstick is plain torch, expert by expert, in the dtype of
the case. A result may err at most twice as much as plain torch, by norm, besides what one fp32 sum
over the longest dimension may: libraries sum in parts where K is long, kernels need not. In tf32
plain torch is given operands whose low bits are cut off, as Triton leaves it to the tensor cores;
cuBLAS rounds them. What only moves or decodes must be equal. A peer may err `PEER` times as much:
peers round more often, W + BA for one. A kernel that is timed by its entry is judged as the entry
says.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import references
from .bench_arms import LAYER_LEAVES, Arm, leaf, orders
from .bench_cases import BenchCase
from .bench_inputs import SCALING, Drawn, decoded
from .compare import compare
from .entries import BY_ENTRY, plan_of, prepared
from .expected import Expected
from .numerics import accumulation_epsilon, truncated_to_tf32
from .references import GatedActivation, Groups

OURS, PEER = 2.0, 6.0
_SILU = GatedActivation()

Results = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """What the results of a case should be: the truth, and the error of plain torch, by name.

    summing: relative error of an fp32 sum of as many products as the longest dimension has.
    """

    truth: Mapping[str, Tensor]
    errors: Mapping[str, float]
    summing: float = 0.0

    @classmethod
    def of(cls, case: BenchCase, drawn: Drawn) -> "Judge":
        """Compute both for a case."""
        if case.kind == "dequant":
            stack = drawn.stored[case.projection]
            return cls(truth={"dense": decoded(case, stack, case.projection)}, errors={})
        if case.by_entry:
            return _entry_judge(case, drawn)
        groups = Groups.of(drawn["top_k_index"], case.shape.experts)
        results = _results_of(case, drawn, groups)
        truth = results(_reference)
        if case.kind == "kernel" and case.what in ("sort", "group"):
            return cls(truth=truth, errors={})
        plain = results(partial(_plain, read=_as_tf32) if case.dtype == "tf32" else _plain)
        errors = {name: distance(plain[name], value) for name, value in truth.items()}
        shape = case.shape
        longest = max(shape.hidden, 2 * shape.intermediate, *groups.counts.tolist())
        return cls(truth=truth, errors=errors, summing=accumulation_epsilon(longest))

    def problem(self, arm: Arm, *, slack: float = OURS) -> str:
        """What is wrong with the results of an arm, or nothing. It is run once."""
        return self.problem_of(arm.results(), slack=slack)

    def problem_of(self, results: Mapping[str, Tensor], *, slack: float = OURS) -> str:
        """What is wrong with results of which all that have a truth are judged."""
        judged = [name for name in results if name in self.truth]
        if not judged:
            return f"none of {', '.join(results)} can be judged"
        for name in judged:
            error = distance(results[name], self.truth[name])
            eps = torch.finfo(results[name].dtype).eps if self.errors else 0.0
            limit = slack * self.errors.get(name, 0.0) + eps + self.summing
            if not error <= limit:
                return f"{name} errs by {error:.3g} of its norm, {limit:.3g} is allowed"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryJudge(Judge):
    """What the entry of a kernel expects of its results."""

    expected: Mapping[str, Expected]

    def problem_of(self, results: Mapping[str, Tensor], *, slack: float = OURS) -> str:
        """What is wrong with the results, by the limits of the entry."""
        del slack
        if set(results) != set(self.expected):
            return f"results {sorted(results)}, expected {sorted(self.expected)}"
        found = [compare(name, results[name], want) for name, want in self.expected.items()]
        worst = max(found, key=lambda item: item.ratio)
        return "" if worst.ok else str(worst)


def _entry_judge(case: BenchCase, drawn: Drawn) -> EntryJudge:
    assert drawn.inputs is not None, "a kernel that is timed by its entry has inputs"
    lib, spec = importlib.import_module("scattermoe_lora"), BY_ENTRY[case.what]
    inputs = prepared(spec, lib, drawn.inputs)
    how = spec.arithmetic(lib, inputs, plan_of(spec, lib, inputs))
    with torch.enable_grad():
        expected = spec.reference(inputs, how)
    return EntryJudge(truth={}, errors={}, expected=expected)


def distance(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; infinity where shapes differ."""
    if got.shape != want.shape:
        return float("inf")
    if not want.dtype.is_floating_point:
        return 0.0 if torch.equal(got, want.to(got.dtype)) else float("inf")
    # By parts: a difference in fp64 of a whole stack would not fit beside its operands.
    parts = zip(got.flatten().split(2**26), want.flatten().split(2**26), strict=True)
    sums = [((a.double() - b.double()).square().sum(), b.double().square().sum()) for a, b in parts]
    error, norm = (float(sum(part)) for part in zip(*sums, strict=True))
    return (error / norm) ** 0.5 if norm else float(error > 0)


Linear = Callable[..., Tensor]


def _reference(tensors: Mapping[str, Tensor], groups: Groups, **facts: object) -> Tensor:
    return references.expert_linear(tensors, groups, **facts)  # type: ignore[arg-type]


def _plain(
    tensors: Mapping[str, Tensor],
    groups: Groups,
    *,
    source: str,
    target: str,
    scaling: float,
    parts: tuple[str, ...] = ("base", "lora"),
    read: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """`references.expert_linear` in the dtype of the operands. read: how a product reads them."""
    rows, outputs = groups.places(source), []
    for expert, slice_ in enumerate(groups.slices):
        mine = read(tensors["x"][rows[slice_]])
        y = mine.new_zeros((mine.shape[0], tensors["weight"].shape[2]))
        if "base" in parts:
            y = mine @ read(tensors["weight"][expert])
        if "lora" in parts and "lora_a" in tensors:
            low = mine @ read(tensors["lora_a"][expert].mT) * scaling
            y = y + read(low) @ read(tensors["lora_b"][expert].mT)
        outputs.append(y)
    return groups.spread(torch.cat(outputs), target)


def _as_tf32(value: Tensor) -> Tensor:
    """What a tensor core makes of an fp32 operand; gradients pass."""
    return value + (truncated_to_tf32(value.detach()).float() - value.detach())


def _results_of(case: BenchCase, drawn: Drawn, groups: Groups) -> Callable[[Linear], Results]:
    """A function from the way to compute a projection to the results of the case."""
    if case.kind == "kernel" and not case.projection:
        return lambda linear: _kernel(case, drawn, groups, exact=linear is _reference)
    if case.projection:
        return lambda linear: _projection(case, drawn, groups, linear)
    return lambda linear: _layer(case, drawn, groups, linear)


def _projection(case: BenchCase, drawn: Drawn, groups: Groups, linear: Linear) -> Results:
    source, target, dx_order = orders(case.projection)
    facts = {"source": source, "target": target, "scaling": SCALING}
    tensors = {name: drawn[name] for name in ("x", "weight", "lora_a", "lora_b")}
    if case.what == "base":
        return {"base": linear(tensors, groups, **{**facts, "parts": ("base",)})}
    if case.what == "forward":
        return {"y": linear(tensors, groups, **facts)}
    if case.what == "shrink":
        down = {"x": drawn["x"], "weight": drawn["lora_a"].mT}
        y = linear(down, groups, **{**facts, "target": "EXPERT", "parts": ("base",)})
        return {"xa": y * SCALING}
    wide = torch.float64 if linear is _reference else case.torch_dtype
    dy = drawn["dy"].to(wide)
    if case.what == "input-grad":
        turned = {
            "x": drawn["dy"],
            "weight": drawn["weight"].mT,
            "lora_a": drawn["lora_b"].mT,
            "lora_b": drawn["lora_a"].mT,
        }
        return {"dx_rows": linear(turned, groups, source=target, target=dx_order, scaling=SCALING)}
    names = ("lora_a", "lora_b") if case.what == "weight-grad" else ("x", "lora_a", "lora_b")
    leaves = {name: leaf(drawn[name].to(wide)) for name in names}
    with torch.enable_grad():
        y = linear({**tensors, **leaves}, groups, **facts)
    found = torch.autograd.grad(y, list(leaves.values()), dy)
    gradients = {
        {"x": "dx", "lora_a": "da", "lora_b": "db"}[name]: gradient
        for name, gradient in zip(leaves, found, strict=True)
    }
    return gradients if case.what == "weight-grad" else {"y": y.detach(), **gradients}


def _layer(case: BenchCase, drawn: Drawn, groups: Groups, linear: Linear) -> Results:
    wide = torch.float64 if linear is _reference else case.torch_dtype
    leaves = {name: leaf(drawn[name].to(wide)) for name in LAYER_LEAVES if name in drawn.tensors}

    def projection(name: str, x: Tensor) -> Tensor:
        end = f"_{name}"
        own = {k.removesuffix(end): v for k, v in leaves.items() if k.endswith(end)}
        source, target, _ = orders(name)
        facts = {"source": source, "target": target, "scaling": SCALING}
        return linear({"x": x, "weight": drawn[f"weight_{name}"], **own}, groups, **facts)

    with torch.enable_grad():
        h = projection("gate_up", leaves["x"])
        y = projection("down", _SILU(*_SILU.halves(h)))
        y = y.view(groups.tokens, groups.top_k, -1) * leaves["gates"][..., None]
        out = y.sum(1)
    if case.what == "forward":
        return {"out": out.detach()}
    found = torch.autograd.grad(out, list(leaves.values()), drawn["dout"].to(wide))
    named = {f"d{name}": value for name, value in zip(leaves, found, strict=True)}
    return {"out": out.detach(), **named}


def _kernel(case: BenchCase, drawn: Drawn, groups: Groups, *, exact: bool) -> Results:
    wide = torch.float64 if exact else case.torch_dtype
    tokens, top_k = groups.tokens, groups.top_k
    match case.what:
        case "sort":
            bounds = torch.tensor(groups.bounds, device=drawn["x"].device)
            return {
                "slots": groups.slots,
                "expert_of_row": groups.labels("EXPERT"),
                "offsets": bounds,
            }
        case "group":
            return {"grouped": drawn["x"][groups.places("TOKEN")]}
        case "combine":
            y = drawn["y"].to(wide).view(tokens, top_k, -1) * drawn["gates"].to(wide)[..., None]
            return {"combined": y.sum(1)}
    h = leaf(drawn["h"].to(wide))
    with torch.enable_grad():
        act = _SILU(*_SILU.halves(h))
    if case.what == "glu":
        return {"act": act.detach()}
    gates = drawn["gates"].to(wide).reshape(-1)[groups.slots]
    dact = drawn["dact"].to(wide)
    (dh,) = torch.autograd.grad(act, h, dact * gates[:, None])
    dgates = groups.spread((act.detach() * dact).sum(1), "SLOT").view(tokens, top_k)
    return {"dh": dh, "act": act.detach(), "dgates": dgates}
