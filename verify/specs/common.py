"""What the specs share: building the package's values from inputs, plans, groups of outputs,
costs.
"""

import importlib
from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..cases import Case
from ..expected import Expected
from ..inputs import Inputs
from ..models import Arithmetic, Rounds, equal_rows
from ..numerics import Uncertain
from ..references import Groups
from ..spec import NamedPlan

TERMS = ("base", "lora", "bias")
_NOT_NATIVE = "torch._grouped_mm is native for bf16 on CUDA with 16-byte strides only"


def ops(lib: ModuleType) -> Any:
    """The operations of the package under test."""
    return importlib.import_module(f"{lib.__name__}.ops")


def submodule(lib: ModuleType, name: str) -> Any:
    """A module of the package under test."""
    return importlib.import_module(f"{lib.__name__}.{name}")


def routing(lib: ModuleType, inputs: Inputs) -> Any:
    """The package's Routing of a case, the prepared one if there is one."""
    case = inputs.case
    if inputs.prepared is not None:
        return inputs.prepared
    return lib.Routing.from_top_k(inputs["top_k_index"], case.experts, sentinels=case.drops)


def adapter(lib: ModuleType, inputs: Inputs) -> Any:
    """The package's LoRAWeights of a case."""
    return lib.LoRAWeights(a=inputs["lora_a"], b=inputs["lora_b"], scaling=inputs.scaling)


def order(lib: ModuleType, name: str) -> Any:
    """A row order of the package by name."""
    return lib.RowOrder[name]


def groups_of(inputs: Inputs) -> Groups:
    """The judge's own grouping of a case."""
    return Groups.of(inputs["top_k_index"], inputs.case.experts)


def arithmetic(lib: ModuleType, inputs: Inputs, plan: Any) -> Arithmetic:
    """How a plan of a routed product computes."""
    del lib
    rounds = {"split": Rounds.PER_TERM, "grouped_mm": Rounds.PER_STEP}
    return Arithmetic(
        rounds=rounds.get(str(plan.path.value), Rounds.ONCE),
        tf32=plan.precision.value == "tf32" and inputs.dtype == torch.float32,
    )


def plans_of(
    lib: ModuleType, problem: Any, device: torch.device, *, grouped_mm: bool
) -> tuple[NamedPlan, ...]:
    """Every path of an operation with the heuristic's tiles, then every candidate plan.

    On a GPU fp32 problems run with IEEE and with tf32 products. grouped_mm: whether the operands
    fit
    torch._grouped_mm; where they do not, its plans are named and not run.
    """
    module = submodule(lib, "plan")
    facts = lib.Device.of(device)
    base = lib.choose(problem, facts)
    precisions = [base.precision]
    if problem.dtype == torch.float32 and device.type == "cuda":
        precisions = list(lib.Precision)
    plans = {
        replace(module.with_path(base, path, problem, facts), precision=precision): True
        for path in module.PATHS[problem.operation]
        for precision in precisions
    }
    for plan in lib.candidates(problem, facts):
        plans.setdefault(plan, False)
    return tuple(
        NamedPlan(
            path=plan.path.value,
            plan=plan,
            quick=quick,
            unavailable="" if grouped_mm or plan.path.value != "grouped_mm" else _NOT_NATIVE,
        )
        for plan, quick in plans.items()
    )


def product_plans(
    lib: ModuleType, operation: str, x: Tensor, weight: Tensor, inputs: Inputs, rank: int = 0
) -> tuple[NamedPlan, ...]:
    """Plans of a routed product of x [., K] with weight [E, K, N]; rank is that of the adapter,
    if any.
    """
    checks = submodule(lib, "ops._check")
    problem = lib.Problem(
        operation=lib.Operation(operation),
        rows=inputs.case.rows,
        experts=inputs.case.experts,
        k=weight.shape[1],
        n=weight.shape[2],
        rank=weight.shape[2] if operation == "shrink" else rank,
        dtype=inputs.dtype,
        precision=lib.Precision.IEEE,
        w_map=checks.w_map(weight),
    )
    # The rows of the adapter's factors are 16-byte strides too.
    widths = (*weight.shape[1:], rank) if rank else (rank,)
    fits = checks.fits_grouped_mm(x, weight) and all(width % 8 == 0 for width in widths)
    return plans_of(lib, problem, inputs.device, grouped_mm=fits)


def gradient_plans(lib: ModuleType, inputs: Inputs, rank: int) -> tuple[NamedPlan, ...]:
    """Plans of a weight gradient [k_in, n_out]; rank 0 is that of the base.

    Besides those of `plans_of` one whose parts are half of an even share, so that small cases have
    experts that are cut and experts that are not.
    """
    case = inputs.case
    widths = (case.k_in, case.n_out, rank)
    problem = lib.Problem(
        operation=lib.Operation("lora_weight_grad" if rank else "expert_weight_grad"),
        rows=case.rows,
        experts=case.experts,
        k=case.k_in,
        n=case.n_out,
        rank=rank,
        dtype=inputs.dtype,
        precision=lib.Precision.IEEE,
    )
    fits = submodule(lib, "ops._check").fits_grouped_mm(inputs["x"])
    fits = fits and all(width % 8 == 0 for width in widths)
    base = lib.choose(problem, lib.Device.of(inputs.device))
    cut = replace(base, part_rows=max(16, case.rows // case.experts // 2))
    plans = plans_of(lib, problem, inputs.device, grouped_mm=fits)
    return (*plans, NamedPlan(path=cut.path.value, plan=cut))


def only_default(lib: ModuleType, inputs: Inputs) -> tuple[NamedPlan, ...]:
    """For operations that take no plan."""
    del lib, inputs
    return (NamedPlan(path="default", plan=None),)


def row_expected(
    inputs: Inputs,
    groups: Groups,
    model: Uncertain,
    target: str,
    *,
    truth: Tensor | None = None,
    terms: Mapping[str, Tensor] | None = None,
    sources: int | None = None,
    freedom: Tensor | None = None,
) -> Expected:
    """An output with one row per routed row, of which `model` holds the kept ones in expert order.

    truth, terms: [rows, .] in `target` order; without a truth the value is the model's (tf32
    operands).
    sources: rounded operand elements behind one row, the rank unless stated; where factors are
    rounded too, each brings a row and a column of them. freedom: [kept], of their effect on a row;
    as many as sources unless stated.
    """
    placed = model.rearranged(lambda part: groups.spread(part, target))
    labels = groups.labels(target)
    count = torch.full_like(labels, inputs.case.rank if sources is None else sources)
    roundings = count * (1 + inputs.case.k_in + inputs.case.n_out) if inputs.narrowed else count
    return Expected(
        value=placed.value if truth is None else truth,
        model=placed,
        dtype=inputs.dtype,
        expert=labels,
        sources=roundings,
        freedom=count.double() if freedom is None else groups.spread(freedom, target),
        zero=labels == groups.experts,
        terms=terms or {},
        coupled="expert" if inputs.narrowed else "vector",
    )


def of_rows(found: Expected, groups: Groups, source: str, target: str) -> Expected:
    """`row_expected` of products of rows in `source` order: the rows of one token that chose one
    expert are equal, and err alike.
    """
    return replace(found, repeats=groups.spread(equal_rows(groups, source), target))


def expert_expected(
    groups: Groups,
    model: Uncertain,
    dtype: torch.dtype,
    *,
    truth: Tensor | None = None,
    vector_dim: int = -1,
    terms: Mapping[str, Tensor] | None = None,
    freedom: Tensor | None = None,
    sources: int = 1,
) -> Expected:
    """A gradient [experts, ...] whose vectors are summed over the rows of their expert.

    sources: roundings behind one row's operand element. freedom: per vector; the rows unless
    stated.
    """
    value = model.value if truth is None else truth
    vectors = value.numel() // max(value.shape[vector_dim], 1) // max(groups.experts, 1)
    experts = torch.arange(groups.experts, device=value.device).repeat_interleave(vectors)
    counts = groups.counts.repeat_interleave(vectors)
    return Expected(
        value=value,
        model=model,
        dtype=dtype,
        expert=experts,
        sources=counts * sources,
        freedom=counts.double() if freedom is None else freedom.reshape(-1),
        zero=counts == 0,
        vector_dim=vector_dim,
        terms=terms or {},
    )


def bytes_of(dtype: torch.dtype, *elements: float) -> float:
    """Bytes of that many elements."""
    return float(sum(elements)) * dtype.itemsize


def active_experts(case: Case) -> int:
    """At most this many experts have rows."""
    return min(case.experts, case.rows)
