"""Moving rows: gather into expert order, the gated sum over a token's choices, and its gradient.

    group          out[i] = g[slot(i)] x[row(i)]               expert order, dropped rows zero
    combine        out[t] = sum over j of g[t, j] y[t k + j]   fp32, in the order of j, no atomics
    combine_grad   dg[t, j] = <y[t k + j], dout[t]>            fp32

An element of a result belongs to one program, which sums in fp32 and rounds once.
"""

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import Launch
from .._sizes import ceil_div, next_power_of_two
from ..routing import Routing, RowOrder
from ._check import check_gates, check_row_scale, check_rows, check_same
from ._tile import coefficients, matrix, row_of_slot


def group(
    x: Tensor, routing: Routing, *, source: RowOrder, row_scale: Tensor | None = None
) -> Tensor:
    """Rows of x copied into expert order, each times its coefficient; dropped rows are zero.

    Args:
        x: [routing.row_count(source), K], source TOKEN or SLOT.
        row_scale: g, `rows` coefficients in slot order, any floating dtype.

    Returns:
        [rows, K] in the dtype of x.
    """
    check_rows("x", x, routing, source)
    check_row_scale("row_scale", row_scale, routing)
    if source is RowOrder.EXPERT:
        raise ValueError("source must be RowOrder.TOKEN or RowOrder.SLOT, got RowOrder.EXPERT")
    out = x.new_empty((routing.rows, x.shape[1]))
    if out.numel():
        width = x.shape[1]
        fan_out = routing.fan_out(source)
        pointers = x.data_ptr() | routing.slots.data_ptr() | routing.expert_of_row.data_ptr()
        scale, scale_form, scale_pointer = coefficients(row_scale)
        pointers |= scale_pointer
        _group(width, x.dtype, x.stride(), scale_form, fan_out)(
            (routing.rows, ceil_div(width, _columns(width)), 1),
            routing.device,
            (
                matrix(x),
                scale,
                matrix(out),
                routing.slots,
                routing.expert_of_row,
                fan_out,
                routing.experts,
                width,
            ),
            pointers,
        )
    return out


@lru_cache(maxsize=4096)
def _group(width: int, *form: object) -> Launch:
    del form
    return Launch(group_kernel, warps=4, BLOCK_N=_columns(width))


@triton.jit(do_not_specialize=["experts"])
def group_kernel(
    x, row_scale, out, slots, expert_of_row, fan_out, experts, N, BLOCK_N: tl.constexpr
):
    """BLOCK_N columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    slot = tl.load(slots + row)
    expert = tl.load(expert_of_row + row)
    columns = tl.where(expert < experts, N, 0)
    x_row = row_of_slot(slot, fan_out)
    value = tl.load(x.ptr + x_row * x.row + n * x.col, mask=n < columns, other=0.0)
    if row_scale is not None:
        g = tl.load(row_scale + slot, mask=expert < experts, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) * g).to(out.ptr.dtype.element_ty)
    tl.store(out.ptr + row * out.row + n * out.col, value, mask=n < N)


def combine(
    y: Tensor, routing: Routing, *, gates: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """out[t] = sum over j of gates[t, j] y[t k + j]; without gates the plain sum.

    Args:
        y: [rows, N] in slot order.
        gates: [tokens, top_k], any floating dtype.
        out: [tokens, N], dtype of y, any strides that give each element a place of its own:
            written and returned. It must not overlap the memory that y or gates span: programs read
            those while others write.

    Returns:
        [tokens, N] in the dtype of y, rounded once.
    """
    check_rows("y", y, routing, RowOrder.SLOT)
    check_gates(gates, routing)
    if out is None:
        out = y.new_empty((routing.tokens, y.shape[1]))
    else:
        check_same("out", out, "y", y)
        if tuple(out.shape) != (routing.tokens, y.shape[1]):
            raise ValueError(
                f"out must have shape {[routing.tokens, y.shape[1]]}, got {list(out.shape)}"
            )
        _check_places(out)
        _check_apart(out, "y", y)
        if gates is not None:
            _check_apart(out, "gates", gates)
    if out.numel():
        width = y.shape[1]
        gates, gates_form, pointers = coefficients(gates)
        pointers |= y.data_ptr() | out.data_ptr()
        _combine(width, routing.top_k, y.dtype, y.stride(), out.stride(), gates_form)(
            (routing.tokens, ceil_div(width, _columns(width)), 1),
            routing.device,
            (matrix(y), gates, matrix(out), width),
            pointers,
        )
    return out


@lru_cache(maxsize=4096)
def _combine(width: int, top_k: int, *form: object) -> Launch:
    del form
    return Launch(combine_kernel, warps=4, TOP_K=top_k, BLOCK_N=_columns(width))


@triton.jit
def combine_kernel(y, gates, out, N, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_N columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for j in range(TOP_K):
        slot = token * TOP_K + j
        value = tl.load(y.ptr + slot * y.row + n * y.col, mask=n < N, other=0.0).to(tl.float32)
        if gates is not None:
            value *= tl.load(gates + slot).to(tl.float32)
        acc += value
    ptrs = out.ptr + token * out.row + n * out.col
    tl.store(ptrs, acc.to(out.ptr.dtype.element_ty), mask=n < N)


def combine_grad(y: Tensor, dout: Tensor, routing: Routing) -> Tensor:
    """Gradient of the gates: <y[t k + j], dout[t]>, [tokens, top_k] in fp32.

    Args:
        y: [rows, N] in slot order, before gating. dout: [tokens, N], dtype of y.
    """
    check_rows("y", y, routing, RowOrder.SLOT)
    check_rows("dout", dout, routing, RowOrder.TOKEN)
    check_same("dout", dout, "y", y)
    if y.shape[1] != dout.shape[1]:
        raise ValueError(f"y has width {y.shape[1]} but dout has {dout.shape[1]}")
    grad = y.new_empty((routing.tokens, routing.top_k), dtype=torch.float32)
    if routing.rows:
        width = y.shape[1]
        _combine_grad(width, routing.top_k, y.dtype, y.stride(), dout.stride())(
            (routing.rows, 1, 1),
            routing.device,
            (matrix(y), matrix(dout), grad, routing.top_k, width),
            y.data_ptr() | dout.data_ptr(),
        )
    return grad


@lru_cache(maxsize=4096)
def _combine_grad(width: int, *form: object) -> Launch:
    del form
    return Launch(combine_grad_kernel, warps=4, BLOCK_N=_columns(width))


@triton.jit
def combine_grad_kernel(y, dout, grad, fan_out, N, BLOCK_N: tl.constexpr):
    """The gradient of one gate."""
    slot = tl.program_id(0).to(tl.int64)
    token = row_of_slot(slot, fan_out)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        value = tl.load(y.ptr + slot * y.row + n * y.col, mask=n < N, other=0.0)
        out = tl.load(dout.ptr + token * dout.row + n * dout.col, mask=n < N, other=0.0)
        acc += value.to(tl.float32) * out.to(tl.float32)
    tl.store(grad + slot, tl.sum(acc))


def _check_places(out: Tensor) -> None:
    """Elements that share a place lie column / common rows and row / common columns apart."""
    (rows, columns), (row, column) = out.shape, out.stride()
    common = math.gcd(row, column) or 1
    if out.numel() > 1 and column // common < rows and row // common < columns:
        raise ValueError(
            f"out must have a place for each element, got strides {list(out.stride())} of shape "
            f"{list(out.shape)}"
        )


def _check_apart(out: Tensor, name: str, operand: Tensor) -> None:
    (first, past), (start, end) = _span(out), _span(operand)
    if first < end and start < past:
        raise ValueError(
            f"out must not overlap {name}: it spans {past - first} bytes from address {first}, and "
            f"{name} {end - start} bytes from {start}"
        )


def _span(value: Tensor) -> tuple[int, int]:
    """The address of the first byte, and the one after the last; the same where it is empty."""
    start = value.data_ptr()
    if not value.numel():
        return start, start
    steps = zip(value.shape, value.stride(), strict=True)
    return start, start + (1 + sum((size - 1) * stride for size, stride in steps)) * value.itemsize


def _columns(width: int) -> int:
    return min(max(next_power_of_two(width), 64), 2048)
