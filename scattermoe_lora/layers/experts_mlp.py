"""A gated expert MLP: gate_up, activation, down and the gated sum over the choices of a token.

    h   = x W1 + s1 (x A1^T) B1^T + b1        [rows, 2 I], expert order
    act = f(h)                                [rows, I]
    y   = act W2 + s2 (act A2^T) B2^T + b2    [rows, H], slot order
    out = sum over j of g[t, j] y[t k + j]    [tokens, H]

Saved for backward: x, h, the [rows, R] intermediates, and no copy of y: with d = dout W2^T + ..
taken before gating, the gradient of a gate is <act, d> + <b2, dout>, and gating is a factor on d.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._arguments import check_type
from ..autograd import (
    CHOSEN,
    Call,
    Plans,
    autocast_factors,
    autocast_to,
    check_stack_of,
    gradient_shrink,
    input_grad,
    product,
    refuse_changed,
    refuse_trained,
    versions_of,
)
from ..ops import (
    Activation,
    combine,
    expert_bias_grad,
    expert_weight_grad,
    glu_backward,
    glu_forward,
)
from ..ops._check import (
    check_gates,
    check_rows,
    check_stack,
    check_tensor,
)
from ..ops.weight_grad import lora_grads
from ..routing import Routing, RowOrder
from ..weights import BlockedWeight, LoRAWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """One projection of the layer: weight, adapter and bias [experts, N] or None.

    weight: [experts, K, N], or stored experts that are decoded block by block.
    """

    weight: Tensor | BlockedWeight
    lora: LoRAWeights | None = None
    bias: Tensor | None = None
    plans: Plans | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCall:
    """What the layer is told and does not differentiate."""

    gate_up: Call
    down: Call
    activation: Activation


class Operands(NamedTuple):
    """The tensors of the layer; 1 is gate_up and 2 is down, whose weight may come in blocks."""

    x: Tensor
    gates: Tensor
    w1: Tensor | None
    a1: Tensor | None
    b1: Tensor | None
    bias1: Tensor | None
    w2: Tensor | None
    a2: Tensor | None
    b2: Tensor | None
    bias2: Tensor | None


class Intermediates(NamedTuple):
    """What the forward makes and the backward reads: h, s1 x A1^T and s2 act A2^T."""

    h: Tensor
    xa1: Tensor | None
    xa2: Tensor | None


def experts_mlp(
    hidden: Tensor,
    gates: Tensor,
    routing: Routing,
    *,
    gate_up: Projection,
    down: Projection,
    activation: Activation,
) -> Tensor:
    """out[t] = sum over j of gates[t, j] MLP_e(hidden[t]), e the j-th choice of token t.

    Args:
        hidden: [tokens, H], fp32, fp16 or bf16.
        gates: [tokens, top_k], any floating dtype; used in fp32.
        gate_up: weight [experts, H, 2 I], in the dtype of hidden.
        down: weight [experts, I, H], in the dtype of hidden. Either, both or neither projection
            may carry a bias or an adapter; adapters are in the dtype of hidden or fp32.

    Returns:
        [tokens, H] in the dtype of hidden; differentiable in hidden, gates and every weight that
        asks. Under autocast hidden and the weights are cast to the autocast dtype first.
        torch.compile traces dense weights without stated plans; others break the graph.

    Raises:
        TypeError, ValueError: an operand does not fit; the message names it and both numbers.
    """
    _check_widths(hidden, gates, routing, gate_up, down)
    check_type("activation", activation, Activation)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden = autocast_to(dtype, "hidden", hidden)
        gate_up = _cast("gate_up", gate_up, dtype)
        down = _cast("down", down, dtype)
    compiling = torch.compiler.is_compiling()
    if compiling and _traceable(gate_up) and _traceable(down):
        return compiled_mlp(hidden, gates, routing, gate_up, down, activation)
    check_layer(hidden, gate_up, down, routing)
    call = LayerCall(
        gate_up=_call(gate_up, routing, RowOrder.TOKEN, RowOrder.EXPERT),
        down=_call(down, routing, RowOrder.EXPERT, RowOrder.SLOT),
        activation=activation,
    )
    run = untraced_mlp if compiling else run_mlp
    return run(hidden, gates, *_tensors(gate_up), *_tensors(down), call)


def run_mlp(*operands: Any) -> Tensor:
    """`ExpertsMLP.apply`, but for stored experts whose gradient would be lost."""
    call = operands[-1]
    refuse_trained(call.gate_up, call.down)
    return ExpertsMLP.apply(*operands)


@torch.compiler.disable(reason="torch.compile traces dense weights without stated plans")
def untraced_mlp(*operands: Any) -> Tensor:
    """`run_mlp`, which breaks a graph instead of being traced down to the launches."""
    return run_mlp(*operands)


def compiled_mlp(
    hidden: Tensor,
    gates: Tensor,
    routing: Routing,
    gate_up: Projection,
    down: Projection,
    activation: Activation,
) -> Tensor:
    """`experts_mlp` through the registered operator, which torch.compile can trace."""
    operator = getattr(torch.ops, __name__.partition(".")[0]).experts_mlp
    scalings = [1.0 if part.lora is None else part.lora.scaling for part in (gate_up, down)]
    tensors = (hidden, gates, *_tensors(gate_up), *_tensors(down))
    return operator(*tensors, *routing.parts, *scalings, *activation.parts)[0]


class ExpertsMLP(torch.autograd.Function):
    """Forward and backward of `experts_mlp`."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        """x, gates, then weight, a, b, bias of gate_up and of down, then the call."""
        *tensors, call = operands
        out, made = mlp_forward(Operands(*tensors), call)
        trained = any(ctx.needs_input_grad)
        ctx.call, ctx.versions = call, versions_of(call.gate_up, call.down) if trained else ()
        ctx.save_for_backward(*tensors, *made)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the inputs, None where none is required."""
        tensors = ctx.saved_tensors
        refuse_changed(ctx.versions, ctx.call.gate_up, ctx.call.down)
        operands, made = Operands(*tensors[:10]), Intermediates(*tensors[10:])
        return (*mlp_backward(dout, operands, made, ctx.call, ctx.needs_input_grad), None)


def mlp_forward(operands: Operands, call: LayerCall) -> tuple[Tensor, Intermediates]:
    """The result [tokens, H], and what the backward needs besides the operands."""
    x, gates, w1, a1, b1, bias1, w2, a2, b2, bias2 = operands
    h, xa1 = product(x, w1, a1, b1, bias1, call.gate_up)
    act = glu_forward(h, call.activation)
    y, xa2 = product(act, w2, a2, b2, bias2, call.down)
    return combine(y, call.gate_up.routing, gates=gates), Intermediates(h, xa1, xa2)


def mlp_backward(
    dout: Tensor, operands: Operands, made: Intermediates, call: LayerCall, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of the operands in their order, None where `needs` says that none is wanted."""
    x, gates, w1, a1, b1, bias1, w2, a2, b2, bias2 = operands
    h, xa1, xa2 = made
    routing = call.gate_up.routing
    grads: list[Tensor | None] = [None] * 10
    if dout.stride(-1) != 1:
        dout = dout.contiguous()

    dact, yb2 = input_grad(dout, w2, a2, b2, None, RowOrder.TOKEN, call.down)
    dh, act, dgates = glu_backward(h, dact, routing, call.activation, gates=gates)
    del dact
    if needs[1]:
        grads[1] = _gate_grad(dgates, dout, bias2, routing).to(gates.dtype)
    if a2 is not None and b2 is not None and (needs[7] or needs[8]):
        plan = call.down.plans.weight_grad
        grads[7:9] = lora_grads(
            act, dout, xa2, yb2, a2, b2, call.down.scaling, routing,
            RowOrder.EXPERT, RowOrder.TOKEN, gates, plan,
        )  # fmt: skip
    if needs[6]:
        grads[6] = expert_weight_grad(
            act, dout, routing, x_order=RowOrder.EXPERT, dy_order=RowOrder.TOKEN, row_scale=gates
        )
    if bias2 is not None and needs[9]:
        dbias = expert_bias_grad(dout, routing, dy_order=RowOrder.TOKEN, row_scale=gates)
        grads[9] = dbias.to(bias2.dtype)
    del act

    yb1 = None
    if needs[0]:
        grads[0], yb1 = input_grad(dh, w1, a1, b1, None, RowOrder.EXPERT, call.gate_up)
    if a1 is not None and b1 is not None and (needs[3] or needs[4]):
        if yb1 is None:
            yb1 = gradient_shrink(dh, b1, RowOrder.EXPERT, call.gate_up)
        plan = call.gate_up.plans.weight_grad
        grads[3:5] = lora_grads(
            x, dh, xa1, yb1, a1, b1, call.gate_up.scaling, routing,
            RowOrder.TOKEN, RowOrder.EXPERT, None, plan,
        )  # fmt: skip
    if needs[2]:
        grads[2] = expert_weight_grad(
            x, dh, routing, x_order=RowOrder.TOKEN, dy_order=RowOrder.EXPERT
        )
    if bias1 is not None and needs[5]:
        grads[5] = expert_bias_grad(dh, routing, dy_order=RowOrder.EXPERT).to(bias1.dtype)
    return tuple(grads)


def _gate_grad(dgates: Tensor, dout: Tensor, bias: Tensor | None, routing: Routing) -> Tensor:
    """<act, d> plus the bias's part <b2[e], dout[t]>, which never passed through d."""
    if bias is None:
        return dgates
    expert_of_slot = torch.empty_like(routing.expert_of_row)
    expert_of_slot.scatter_(0, routing.slots, routing.expert_of_row)
    expert_of_slot = expert_of_slot.view(routing.tokens, routing.top_k).long()
    with torch.autocast(dout.device.type, enabled=False):
        per_expert = dout.float() @ bias.float().mT
    part = per_expert.gather(1, expert_of_slot.clamp(max=routing.experts - 1))
    # Not a product: what a bias holds that nobody uses may be no number.
    return torch.where(expert_of_slot < routing.experts, dgates + part, dgates)


def _call(projection: Projection, routing: Routing, source: RowOrder, target: RowOrder) -> Call:
    plans = projection.plans or CHOSEN
    return Call.of(projection.weight, projection.lora, routing, source, target, plans)


def _traceable(projection: Projection) -> bool:
    """Whether the registered operator takes it: it knows neither blocks nor plans."""
    return isinstance(projection.weight, Tensor) and projection.plans in (None, CHOSEN)


def _tensors(projection: Projection) -> tuple[Tensor | None, ...]:
    lora = projection.lora
    a, b = (None, None) if lora is None else (lora.a, lora.b)
    weight = projection.weight if isinstance(projection.weight, Tensor) else None
    return weight, a, b, projection.bias


def _cast(name: str, projection: Projection, dtype: torch.dtype) -> Projection:
    lora = autocast_factors(dtype, f"{name}.lora", projection.lora)
    weight = projection.weight
    if isinstance(weight, Tensor):
        weight = autocast_to(dtype, f"{name}.weight", weight)
    return replace(projection, weight=weight, lora=lora)


def check_layer(hidden: Tensor, gate_up: Projection, down: Projection, routing: Routing) -> None:
    """What both projections demand of operands in the dtype of hidden.

    Raises:
        TypeError, ValueError: an operand does not fit.
    """
    check_rows("hidden", hidden, routing, RowOrder.TOKEN)
    for name, part, width, rows in (
        ("gate_up", gate_up, hidden.shape[1], "hidden"),
        ("down", down, gate_up.weight.shape[2] // 2, "the activation"),
    ):
        check_stack_of(
            hidden, part.weight, part.lora, part.bias, routing, width,
            part=f"{name}.", x_name="hidden", k_name=rows,
        )  # fmt: skip
    if down.weight.shape[2] != hidden.shape[1]:
        raise ValueError(
            f"down.weight has output width {down.weight.shape[2]}, which must be the width "
            f"{hidden.shape[1]} of hidden"
        )


def _check_widths(
    hidden: Tensor, gates: Tensor, routing: Routing, gate_up: Projection, down: Projection
) -> None:
    check_tensor("hidden", hidden)
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be [tokens, H], got shape {list(hidden.shape)}")
    check_tensor("gates", gates)
    check_gates(gates, routing)
    for name, projection in (("gate_up", gate_up), ("down", down)):
        check_type(name, projection, Projection)
        check_stack(f"{name}.weight", projection.weight)
        if projection.plans is not None:
            check_type(f"{name}.plans", projection.plans, Plans)
        if len(projection.weight.shape) != 3:
            raise ValueError(
                f"{name}.weight must be [experts, k, n], got {list(projection.weight.shape)}"
            )
    if gate_up.weight.shape[2] != 2 * down.weight.shape[1]:
        raise ValueError(
            f"gate_up.weight has output width {gate_up.weight.shape[2]}, which must be twice the "
            f"input width {down.weight.shape[1]} of down.weight"
        )
