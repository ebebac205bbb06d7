"""The routed LoRA projection as one differentiable function.

    y[i] = x[i] W[e] + s (x[i] A[e]^T) B[e]^T + b[e]          rows y, or with gates
    out[t] = sum over j of g[t, j] y[t k + j]

Gradients are computed only where they are required: never a dense dW for a frozen base.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._arguments import check_dtype, check_type
from .ops import combine, combine_grad, expert_bias_grad, expert_weight_grad, shrink
from .ops._check import (
    check_bias,
    check_gates,
    check_lora,
    check_rows,
    check_stack,
    check_target,
    check_tensor,
    check_weight,
)
from .ops.lora import as_operand, lora_rows
from .ops.product import Rows, product_rows
from .ops.weight_grad import lora_grads
from .plan import PATHS, Operation, Plan
from .routing import Routing, RowOrder
from .weights import BlockedWeight, LoRAWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Plans:
    """Plans of one projection; None lets `choose` decide.

    Raises:
        TypeError: one is no plan.
    """

    forward: Plan | None = None
    input_grad: Plan | None = None
    weight_grad: Plan | None = None

    def __post_init__(self) -> None:
        for name in ("forward", "input_grad", "weight_grad"):
            plan = getattr(self, name)
            if plan is not None:
                check_type(f"the plan of {name}", plan, Plan)

    def check_paths(self, *, adapted: bool) -> None:
        """Refuse a plan whose path the projection, with an adapter or without, does not have."""
        if adapted:
            operations = (Operation.LORA_FORWARD, Operation.LORA_INPUT_GRAD)
        else:
            operations = (Operation.SCATTER2SCATTER, Operation.SCATTER2SCATTER)
        stated = (self.forward, self.input_grad, self.weight_grad)
        for plan, operation in zip(stated, (*operations, Operation.LORA_WEIGHT_GRAD), strict=True):
            if plan is not None and plan.path not in PATHS[operation]:
                known = ", ".join(path.value for path in PATHS[operation])
                raise ValueError(
                    f"{operation.value} has no path {plan.path.value!r}; it has {known}"
                )


CHOSEN = Plans()


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a projection is told and does not differentiate.

    blocks: the weight, where it is not a tensor but decoded block by block.
    """

    routing: Routing
    source: RowOrder
    target: RowOrder
    scaling: float
    plans: Plans
    blocks: BlockedWeight | None = None

    @classmethod
    def of(
        cls,
        weight: Tensor | BlockedWeight,
        lora: LoRAWeights | None,
        routing: Routing,
        source: RowOrder,
        target: RowOrder,
        plans: Plans,
    ) -> "Call":
        """The call of a projection, whose weight it keeps where that comes in blocks.

        Raises:
            ValueError: a stated plan has a path that the projection does not have.
        """
        if plans is not CHOSEN:
            plans.check_paths(adapted=lora is not None)
        return cls(
            routing=routing,
            source=source,
            target=target,
            scaling=1.0 if lora is None else lora.scaling,
            plans=plans,
            blocks=None if isinstance(weight, Tensor) else weight,
        )


class Saved(NamedTuple):
    """What the backward of a projection finds: the operands and what the forward made.

    weight is absent where it comes in blocks; x, where neither weight nor adapter is trained. xa is
    s x A^T in expert order; y, the rows before gating, is there where gates are trained.
    """

    x: Tensor | None
    weight: Tensor | None
    a: Tensor | None
    b: Tensor | None
    bias: Tensor | None
    gates: Tensor | None
    xa: Tensor | None
    y: Tensor | None


def expert_linear(
    x: Tensor,
    weight: Tensor | BlockedWeight,
    routing: Routing,
    *,
    source: RowOrder,
    target: RowOrder,
    lora: LoRAWeights | None = None,
    bias: Tensor | None = None,
    gates: Tensor | None = None,
    plans: Plans = CHOSEN,
) -> Tensor:
    """The routed projection of x, differentiable in x, weight, lora.a, lora.b, bias and gates.

    Args:
        x: [routing.row_count(source), K], fp32, fp16 or bf16.
        weight: [experts, K, N] in the dtype of x, any strides (stored [experts, N, K]: pass its
            mT); or stored experts that are decoded block by block, in forward and again in
            backward.
        lora: factors in the dtype of x or fp32; their gradients come in their own dtype.
        bias: [experts, N]. gates: [tokens, top_k]; then target must be SLOT and the choices are
            summed.

    Returns:
        [rows, N] in `target` order, or [tokens, N] when gates are given. Dropped rows are zero.
        Under autocast x and weight are cast to the autocast dtype first. torch.compile traces
        dense weights without stated plans; others break the graph.

    Raises:
        TypeError, ValueError: an operand does not fit; the message names it and both numbers.
    """
    check_tensor("x", x)
    check_stack("weight", weight)
    check_type("plans", plans, Plans)
    check_target(target)
    check_gates(gates, routing)
    if gates is not None and target is not RowOrder.SLOT:
        raise ValueError(f"gates sum over slots, so target must be SLOT, got {target.name}")
    if lora is not None:
        check_type("lora", lora, LoRAWeights)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = autocast_to(dtype, "x", x)
        if isinstance(weight, Tensor):
            weight = autocast_to(dtype, "weight", weight)
        lora = autocast_factors(dtype, "lora", lora)
    compiling = torch.compiler.is_compiling()
    if compiling and isinstance(weight, Tensor) and plans == CHOSEN:
        return compiled_linear(x, weight, lora, bias, gates, routing, source, target)
    check_projection(x, weight, lora, bias, routing, source)
    call = Call.of(weight, lora, routing, source, target, plans)
    a, b = (None, None) if lora is None else (lora.a, lora.b)
    dense = weight if isinstance(weight, Tensor) else None
    run = untraced_linear if compiling else run_linear
    return run(x, dense, a, b, bias, gates, call)


def autocast_factors(dtype: torch.dtype, name: str, lora: LoRAWeights | None) -> LoRAWeights | None:
    """An adapter in the dtype of autocast, or in fp32 where it is that.

    Raises:
        TypeError: as `autocast_to`.
    """
    if lora is None or lora.a.dtype == torch.float32:
        return lora
    a, b = autocast_to(dtype, f"{name}.a", lora.a), autocast_to(dtype, f"{name}.b", lora.b)
    return LoRAWeights(a=a, b=b, scaling=lora.scaling)


def run_linear(*operands: Any) -> Tensor:
    """`ExpertLinear.apply`, but for stored experts whose gradient would be lost."""
    refuse_trained(operands[-1])
    return ExpertLinear.apply(*operands)


def autocast_to(dtype: torch.dtype, name: str, operand: Tensor) -> Tensor:
    """The operand in the dtype of autocast.

    Raises:
        TypeError: it holds codes or other numbers that a cast would take at face value.
    """
    check_dtype(name, operand.dtype)
    return operand.to(dtype)


@torch.compiler.disable(reason="torch.compile traces dense weights without stated plans")
def untraced_linear(*operands: Any) -> Tensor:
    """`run_linear`, which breaks a graph instead of being traced down to the launches."""
    return run_linear(*operands)


def refuse_trained(*calls: Call) -> None:
    """Stored experts have no gradient, so none may be asked for.

    Raises:
        ValueError: a storage requires one.
    """
    stored = [call.blocks for call in calls if call.blocks is not None]
    if stored and torch.is_grad_enabled() and any(blocks.trains for blocks in stored):
        raise ValueError(
            "the stored experts require a gradient, which does not reach a storage: pass the "
            "tensor itself as the weight, or a storage of it detached"
        )


def refuse_changed(versions: tuple[int, ...], *calls: Call) -> None:
    """What saved tensors do for dense weights: a gradient is that of the weights of the forward.

    Raises:
        RuntimeError: a storage was changed in place since it had these versions.
    """
    now = versions_of(*calls)
    if now != versions:
        raise RuntimeError(
            "stored experts that the gradient needs were changed in place after the forward: their "
            f"tensors are at versions {list(now)}, expected {list(versions)}"
        )


def versions_of(*calls: Call) -> tuple[int, ...]:
    """How often the storages of the weights that come in blocks were changed in place."""
    stored = [call.blocks for call in calls if call.blocks is not None]
    return tuple(version for blocks in stored for version in blocks.versions)


def compiled_linear(
    x: Tensor,
    weight: Tensor,
    lora: LoRAWeights | None,
    bias: Tensor | None,
    gates: Tensor | None,
    routing: Routing,
    source: RowOrder,
    target: RowOrder,
) -> Tensor:
    """`expert_linear` through the registered operator, which torch.compile can trace."""
    a, b, scaling = (None, None, 1.0) if lora is None else (lora.a, lora.b, lora.scaling)
    operator = getattr(torch.ops, __name__.partition(".")[0]).expert_linear
    orders = (source.value, target.value)
    return operator(x, weight, a, b, bias, gates, *routing.parts, scaling, *orders)[0]


class ExpertLinear(torch.autograd.Function):
    """Forward and backward of `expert_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        bias: Tensor | None,
        gates: Tensor | None,
        call: Call,
    ) -> Tensor:
        """x, weight, a, b, bias, gates as in `expert_linear`; a and b together or neither."""
        out, xa, y = linear_forward(x, weight, a, b, bias, gates, call)
        wants_gates = gates is not None and ctx.needs_input_grad[5]
        wants_x = any(ctx.needs_input_grad[index] for index in (1, 2, 3))
        ctx.call, ctx.versions = call, versions_of(call) if any(ctx.needs_input_grad) else ()
        ctx.save_for_backward(
            x if wants_x else None, weight, a, b, bias, gates, xa, y if wants_gates else None
        )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the inputs, None where none is required."""
        saved = Saved(*ctx.saved_tensors)
        refuse_changed(ctx.versions, ctx.call)
        return (*linear_backward(dout, saved, ctx.call, ctx.needs_input_grad), None)


def linear_forward(
    x: Tensor,
    weight: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    gates: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The result, s x A^T, and the rows before the sum over choices (the result itself without)."""
    y, xa = product(x, weight, a, b, bias, call)
    out = y if gates is None else combine(y, call.routing, gates=gates)
    return out, xa, y


def linear_backward(
    dout: Tensor, saved: Saved, call: Call, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, a, b, bias and gates, None where `needs` says that none is wanted."""
    x, weight, a, b, bias, gates, xa, y = saved
    routing = call.routing
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    dy_order = call.target if gates is None else RowOrder.TOKEN
    dx = dweight = da = db = dbias = dgates = yb = None
    if needs[0]:
        dx, yb = input_grad(dout, weight, a, b, gates, dy_order, call)
    if a is not None and b is not None and (needs[2] or needs[3]):
        assert x is not None, "the input of a trained adapter is saved"
        if yb is None:
            yb = gradient_shrink(dout, b, dy_order, call)
        plan = call.plans.weight_grad
        da, db = lora_grads(
            x, dout, xa, yb, a, b, call.scaling, routing, call.source, dy_order, gates, plan
        )
    if needs[1]:
        assert x is not None, "the input of a trained weight is saved"
        dweight = expert_weight_grad(
            x, dout, routing, x_order=call.source, dy_order=dy_order, row_scale=gates
        )
    if bias is not None and needs[4]:
        dbias = expert_bias_grad(dout, routing, dy_order=dy_order, row_scale=gates)
        dbias = dbias.to(bias.dtype)
    if gates is not None and needs[5]:
        assert y is not None, "the rows of trained gates are saved"
        dgates = combine_grad(y, dout, routing).to(gates.dtype)
    return dx, dweight, da, db, dbias, dgates


def check_projection(
    x: Tensor,
    weight: Tensor | BlockedWeight,
    lora: LoRAWeights | None,
    bias: Tensor | None,
    routing: Routing,
    source: RowOrder,
) -> None:
    """Everything that a projection and its gradients demand of their operands.

    Raises:
        TypeError, ValueError: an operand does not fit.
    """
    check_rows("x", x, routing, source)
    check_stack_of(x, weight, lora, bias, routing, x.shape[1], part="", x_name="x")


def check_stack_of(
    x: Tensor,
    weight: Tensor | BlockedWeight,
    lora: LoRAWeights | None,
    bias: Tensor | None,
    routing: Routing,
    width: int,
    *,
    part: str,
    x_name: str,
    k_name: str = "",
) -> None:
    """What rows [rows, width] demand of weight, adapter and bias, of the dtype and device of x.

    part: what stands before the names of these in a refusal. k_name: what the rows are called
    there, unless they are x.
    """
    check_weight(
        f"{part}weight", weight, routing,
        width=width, dtype=x.dtype, device=x.device, x_name=x_name, k_name=k_name,
    )  # fmt: skip
    if lora is not None:
        check_lora(
            lora, routing, width, weight.shape[2], x,
            name=f"{part}lora", x_name=x_name, k_name=k_name,
        )  # fmt: skip
    check_bias(bias, routing, weight.shape[2], x.device, name=f"{part}bias", x_name=x_name)


def product(
    x: Tensor,
    weight: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor | None]:
    """The rows of a projection and, with an adapter, s x A^T; no weight means that of the call."""
    stack = _stack(weight, call)
    rows = Rows(call.source, call.target, bias)
    plan = call.plans.forward
    if a is None or b is None:
        return product_rows(x, stack, call.routing, rows, plan), None
    operation = Operation.LORA_FORWARD
    return lora_rows(x, stack, a, b, call.scaling, call.routing, operation, rows, plan)


def input_grad(
    dout: Tensor,
    weight: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    gates: Tensor | None,
    dy_order: RowOrder,
    call: Call,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of x, summed over the choices where tokens share a row, and s dy B."""
    routing = call.routing
    plan = call.plans.input_grad
    stack = _stack(weight, call).mT
    rows = Rows(dy_order, call.source, None, gates)
    if a is not None and b is not None:
        operation = Operation.LORA_INPUT_GRAD
        return lora_rows(dout, stack, b.mT, a.mT, call.scaling, routing, operation, rows, plan)
    if call.source is not RowOrder.TOKEN:
        return product_rows(dout, stack, routing, rows, plan), None
    rows = rows._replace(target=RowOrder.SLOT)
    return combine(product_rows(dout, stack, routing, rows, plan), routing), None


def gradient_shrink(dout: Tensor, b: Tensor, dy_order: RowOrder, call: Call) -> Tensor:
    """s dy B [rows, R] in expert order, where x needs no gradient that would bring it along."""
    down = as_operand(b, dout.dtype).mT
    return shrink(dout, down, call.routing, scaling=call.scaling, source=dy_order)


def _stack(weight: Tensor | None, call: Call) -> Tensor | BlockedWeight:
    stack = call.blocks if weight is None else weight
    assert stack is not None, "a projection has a weight, as a tensor or in blocks"
    return stack
