"""Routed products by torch._grouped_mm: a path where that is native, and a cross-check.

Its operands are rows in expert order: other orders are gathered before and placed after.
"""

import torch
from torch import Tensor

from ..routing import Routing, RowOrder


def grouped_product(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    *,
    source: RowOrder,
    target: RowOrder,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """y[i] = g[i] (x[i] W[e] + b[e]); base, bias and scale are rounded one after the other."""
    y = grouped(by_expert(x, routing, source), weight, routing)
    if bias is not None:
        kept = routing.expert_of_row.clamp(max=routing.experts - 1)
        y = zero_dropped(y + bias.to(y.dtype).index_select(0, kept), routing)
    if row_scale is not None:
        y = zero_dropped(scaled(y, row_scale, routing), routing)
    return place(y, routing, target)


def scaled(x: Tensor, row_scale: Tensor | None, routing: Routing) -> Tensor:
    """g[i] x[i], rounded once: x in expert order, g in slot order; x itself without g."""
    if row_scale is None:
        return x
    return (x * row_scale.reshape(-1).index_select(0, routing.slots).unsqueeze(1)).to(x.dtype)


def grouped(x: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    """x [rows, K] in expert order times W [experts, K, N] -> [rows, N]; dropped rows are zero."""
    require_native(x, weight)
    return zero_dropped(torch._grouped_mm(x, weight, offs=routing.offsets[1:]), routing)


def zero_dropped(y: Tensor, routing: Routing) -> Tensor:
    """The rows of no expert set to zero, in place."""
    return y.masked_fill_((routing.expert_of_row == routing.experts).unsqueeze(1), 0)


def grouped_gram(p: Tensor, q: Tensor, routing: Routing) -> Tensor:
    """Per-expert p^T q: p [rows, P] and q [rows, Q] in expert order -> [experts, P, Q]."""
    require_native(p, q)
    return torch._grouped_mm(p.t(), q, offs=routing.offsets[1:])


def by_expert(x: Tensor, routing: Routing, order: RowOrder) -> Tensor:
    """A contiguous copy of x in expert order; x itself where it is one, at a 16-byte address."""
    if order is not RowOrder.EXPERT:
        return x.index_select(0, routing.slots // routing.fan_out(order))
    if x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x.contiguous()


def place(y: Tensor, routing: Routing, target: RowOrder) -> Tensor:
    """Rows in expert order written to `target` order."""
    if target is RowOrder.EXPERT:
        return y
    return torch.empty_like(y).index_copy_(0, routing.slots, y)


def require_native(*operands: Tensor) -> None:
    """Refuse operands that torch._grouped_mm would take to a fallback that synchronises."""
    for operand in operands:
        if operand.dtype != torch.bfloat16 or operand.device.type != "cuda":
            raise ValueError(
                "the grouped_mm path needs bfloat16 on CUDA, got "
                f"{operand.dtype} on {operand.device}"
            )
        contiguous = max(operand.stride()[-2:]) if 1 in operand.stride()[-2:] else 0
        if contiguous == 0 or contiguous * operand.itemsize % 16:
            raise ValueError(
                "the grouped_mm path needs 16-byte strides, got shape "
                f"{list(operand.shape)} with strides {list(operand.stride())}"
            )
        if operand.data_ptr() % 16:
            raise ValueError(
                "the grouped_mm path needs operands at multiples of 16 bytes, got one of shape "
                f"{list(operand.shape)} {operand.data_ptr() % 16} bytes past one"
            )
