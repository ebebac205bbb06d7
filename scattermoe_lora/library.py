"""The package's operators for torch.compile and export, with fakes and gradients.

    route           sort the choices of a layer call by expert
    expert_linear   the routed LoRA projection          expert_linear_backward
    experts_mlp     the gated expert MLP                experts_mlp_backward

Eager calls go to the same functions directly: an operator costs 12 us more per call on an H100's
host. The namespace is the name of the package, so that two revisions can be loaded side by side.
What is absent (an adapter, a bias, a gradient that is not needed) comes out as an empty tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._row_tiles import row_tile_entries
from ._sort import sort_by_expert
from .autograd import CHOSEN, Call, Saved, check_projection, linear_backward, linear_forward
from .layers.experts_mlp import (
    Intermediates,
    LayerCall,
    Operands,
    Projection,
    check_layer,
    mlp_backward,
    mlp_forward,
)
from .ops import Activation
from .routing import Routing, RowOrder
from .weights import LoRAWeights

NAMESPACE = __name__.partition(".")[0]


def _present(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An operator returns tensors, and none of them may be an input."""
    return like.new_empty(0) if tensor is None else tensor


def _given(tensor: Tensor, operand: Tensor | None) -> Tensor | None:
    """What the forward made for an operand: as absent as that is, and of no rows where none are."""
    return None if operand is None else tensor


def _adapter(a: Tensor | None, b: Tensor | None, scaling: float) -> LoRAWeights | None:
    return None if a is None or b is None else LoRAWeights(a=a, b=b, scaling=scaling)


@torch.library.custom_op(f"{NAMESPACE}::route", mutates_args=())
def route(top_k_index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """slots, expert_of_row, offsets, tiles of a Routing; ids outside [0, experts) are dropped."""
    rows = sort_by_expert(top_k_index.reshape(-1).contiguous(), experts)
    return rows.slots, rows.expert_of_row.clone(), rows.offsets.clone(), rows.tiles.clone()


@route.register_fake
def _(top_k_index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = top_k_index.numel()
    entries = row_tile_entries(rows, experts)
    slots = top_k_index.new_empty(rows, dtype=torch.int64)
    expert_of_row = top_k_index.new_empty(rows, dtype=torch.int32)
    offsets = top_k_index.new_empty(experts + 1, dtype=torch.int32)
    tiles = top_k_index.new_empty((entries, 4), dtype=torch.int32)
    return slots, expert_of_row, offsets, tiles


def _linear_call(routing: Routing, scaling: float, source: str, target: str) -> Call:
    return Call(
        routing=routing,
        source=RowOrder(source),
        target=RowOrder(target),
        scaling=scaling,
        plans=CHOSEN,
    )


@torch.library.custom_op(f"{NAMESPACE}::expert_linear", mutates_args=())
def expert_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    gates: Tensor | None,
    slots: Tensor,
    expert_of_row: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    tokens: int,
    top_k: int,
    experts: int,
    scaling: float,
    source: str,
    target: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result of `expert_linear`, and for its gradient s x A^T and the ungated rows."""
    routing = Routing(slots, expert_of_row, offsets, tiles, tokens, top_k, experts)
    call = _linear_call(routing, scaling, source, target)
    check_projection(x, weight, _adapter(a, b, scaling), bias, routing, call.source)
    out, xa, y = linear_forward(x, weight, a, b, bias, gates, call)
    return out, _present(xa, x), x.new_empty(0) if gates is None else y


@expert_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    gates: Tensor | None,
    slots: Tensor,
    expert_of_row: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    tokens: int,
    top_k: int,
    experts: int,
    scaling: float,
    source: str,
    target: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = slots.shape[0], weight.shape[2]
    xa = x.new_empty(0) if a is None else x.new_empty((rows, a.shape[1]))
    if gates is None:
        return x.new_empty((rows, width)), xa, x.new_empty(0)
    return x.new_empty((tokens, width)), xa, x.new_empty((rows, width))


@torch.library.custom_op(f"{NAMESPACE}::expert_linear_backward", mutates_args=())
def expert_linear_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    gates: Tensor | None,
    xa: Tensor,
    y: Tensor,
    slots: Tensor,
    expert_of_row: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    tokens: int,
    top_k: int,
    experts: int,
    scaling: float,
    source: str,
    target: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, a, b, bias, gates; empty where `needs` says none."""
    routing = Routing(slots, expert_of_row, offsets, tiles, tokens, top_k, experts)
    call = _linear_call(routing, scaling, source, target)
    saved = Saved(x, weight, a, b, bias, gates, _given(xa, a), _given(y, gates))
    dx, dweight, da, db, dbias, dgates = linear_backward(dout, saved, call, needs)
    grads = (dx, dweight, da, db, dbias, dgates)
    first, second, third, fourth, fifth, sixth = (_present(grad, dout) for grad in grads)
    return first, second, third, fourth, fifth, sixth


def _fake_grads(
    dout: Tensor, operands: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """Contiguous gradients like their operands, empty where none is needed."""
    return [
        operand.new_empty(operand.shape) if operand is not None and needed else dout.new_empty(0)
        for operand, needed in zip(operands, needs, strict=True)
    ]


@expert_linear_backward.register_fake
def _(dout: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs = list(rest[-1])
    needs[2] = needs[3] = needs[2] or needs[3]
    return tuple(_fake_grads(dout, rest[:6], needs))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, ctx.settings = inputs[:6], inputs[10:]
    _, xa, y = output
    ctx.save_for_backward(*operands, xa, y, *inputs[6:10])


def _linear_grad(ctx: Any, dout: Tensor, _dxa: Tensor, _dy: Tensor) -> tuple[Tensor | None, ...]:
    *operands, xa, y, slots, expert_of_row, offsets, tiles = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    grads = expert_linear_backward(
        dout, *operands, xa, y, slots, expert_of_row, offsets, tiles, *ctx.settings, needs
    )
    wanted = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
    return (*wanted, *[None] * 10)


expert_linear.register_autograd(_linear_grad, setup_context=_linear_setup)


def _layer_call(
    routing: Routing, scalings: tuple[float, float], activation: Activation
) -> LayerCall:
    first, second = scalings
    return LayerCall(
        gate_up=_linear_call(routing, first, "token", "expert"),
        down=_linear_call(routing, second, "expert", "slot"),
        activation=activation,
    )


@torch.library.custom_op(f"{NAMESPACE}::experts_mlp", mutates_args=())
def experts_mlp(
    x: Tensor,
    gates: Tensor,
    w1: Tensor,
    a1: Tensor | None,
    b1: Tensor | None,
    bias1: Tensor | None,
    w2: Tensor,
    a2: Tensor | None,
    b2: Tensor | None,
    bias2: Tensor | None,
    slots: Tensor,
    expert_of_row: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    tokens: int,
    top_k: int,
    experts: int,
    scaling1: float,
    scaling2: float,
    gate: str,
    alpha: float,
    shift: float,
    limit: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result of `experts_mlp`, and for its gradient h, s1 x A1^T and s2 act A2^T."""
    routing = Routing(slots, expert_of_row, offsets, tiles, tokens, top_k, experts)
    activation = Activation.of(gate, alpha, shift, limit, interleaved)
    gate_up = Projection(weight=w1, lora=_adapter(a1, b1, scaling1), bias=bias1)
    down = Projection(weight=w2, lora=_adapter(a2, b2, scaling2), bias=bias2)
    check_layer(x, gate_up, down, routing)
    call = _layer_call(routing, (scaling1, scaling2), activation)
    operands = Operands(x, gates, w1, a1, b1, bias1, w2, a2, b2, bias2)
    out, made = mlp_forward(operands, call)
    return out, made.h, _present(made.xa1, x), _present(made.xa2, x)


@experts_mlp.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    x, _gates, w1, a1, _b1, _bias1, w2, a2, _b2, _bias2, slots, *_ = inputs
    rows = slots.shape[0]
    thin = [x.new_empty(0) if a is None else x.new_empty((rows, a.shape[1])) for a in (a1, a2)]
    return x.new_empty((x.shape[0], w2.shape[2])), x.new_empty((rows, w1.shape[2])), *thin


@torch.library.custom_op(f"{NAMESPACE}::experts_mlp_backward", mutates_args=())
def experts_mlp_backward(
    dout: Tensor,
    x: Tensor,
    gates: Tensor,
    w1: Tensor,
    a1: Tensor | None,
    b1: Tensor | None,
    bias1: Tensor | None,
    w2: Tensor,
    a2: Tensor | None,
    b2: Tensor | None,
    bias2: Tensor | None,
    h: Tensor,
    xa1: Tensor,
    xa2: Tensor,
    slots: Tensor,
    expert_of_row: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    tokens: int,
    top_k: int,
    experts: int,
    scaling1: float,
    scaling2: float,
    gate: str,
    alpha: float,
    shift: float,
    limit: float,
    interleaved: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the ten operands of `experts_mlp`; empty where `needs` says none."""
    routing = Routing(slots, expert_of_row, offsets, tiles, tokens, top_k, experts)
    activation = Activation.of(gate, alpha, shift, limit, interleaved)
    call = _layer_call(routing, (scaling1, scaling2), activation)
    operands = Operands(x, gates, w1, a1, b1, bias1, w2, a2, b2, bias2)
    made = Intermediates(h, _given(xa1, a1), _given(xa2, a2))
    return [_present(grad, dout) for grad in mlp_backward(dout, operands, made, call, needs)]


@experts_mlp_backward.register_fake
def _(dout: Tensor, *rest: Any) -> list[Tensor]:
    needs = list(rest[-1])
    needs[3] = needs[4] = needs[3] or needs[4]
    needs[7] = needs[8] = needs[7] or needs[8]
    return _fake_grads(dout, rest[:10], needs)


def _mlp_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.settings = inputs[14:]
    ctx.save_for_backward(*inputs[:10], *output[1:], *inputs[10:14])


def _mlp_grad(
    ctx: Any, dout: Tensor, _dh: Tensor, _dxa1: Tensor, _dxa2: Tensor
) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:10])
    grads = experts_mlp_backward(dout, *ctx.saved_tensors, *ctx.settings, needs)
    wanted = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
    return (*wanted, *[None] * 14)


experts_mlp.register_autograd(_mlp_grad, setup_context=_mlp_setup)
