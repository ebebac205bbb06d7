"""Per-expert Gram product: out[e] = sum over the rows i of e of p[i]^T (g[i] q[i]).

    p [., P]   q [., Q]   out [E, P, Q]   g: one coefficient per slot

Weight gradients: dA^T = X^T YB, dB = dY^T XA, dW = X^T dY; the first two in one launch. The wide
operand is p: it is the M side of the tensor-core product, which needs 64 of it. One program owns
each output tile, so there are no atomics, the sum runs in row order, and an expert without rows
gets exact zeros.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import Launch
from .._sizes import ceil_div
from ..plan import Plan, Precision, Tile
from ..routing import Routing, RowOrder
from ._tile import Matrix, Stack, matrix, stack


class Gram(NamedTuple):
    """The operands of one Gram product, as a kernel takes them."""

    p: Matrix
    q: Matrix
    out: Stack
    p_fan_out: Any
    q_fan_out: Any
    width: Any
    columns: Any


@triton.jit
def gram_tile(
    gram,
    program,
    row_scale,
    slots,
    offsets,
    P_BY_EXPERT: tl.constexpr,
    Q_BY_EXPERT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One [BLOCK_P, BLOCK_Q] tile of out[e]; BLOCK_M rows per step."""
    p = gram.p
    q = gram.q
    out = gram.out
    blocks_p = tl.cdiv(gram.width, BLOCK_P)
    blocks_q = tl.cdiv(gram.columns, BLOCK_Q)
    expert = (program // (blocks_p * blocks_q)).to(tl.int64)
    p_col = (program // blocks_q % blocks_p) * BLOCK_P + tl.arange(0, BLOCK_P)
    q_col = (program % blocks_q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    acc = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for row in range(begin, end, BLOCK_M):
        rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = rows < end
        slot = tl.load(slots + rows, mask=inside, other=0)
        if P_BY_EXPERT:
            p_rows = rows
        else:
            p_rows = slot // gram.p_fan_out
        if Q_BY_EXPERT:
            q_rows = rows
        else:
            q_rows = slot // gram.q_fan_out
        p_ptrs = p.ptr + p_rows[:, None] * p.row + p_col.to(tl.int64)[None, :] * p.col
        q_ptrs = q.ptr + q_rows[:, None] * q.row + q_col.to(tl.int64)[None, :] * q.col
        p_tile = tl.load(p_ptrs, mask=inside[:, None] & (p_col < gram.width)[None, :], other=0.0)
        q_tile = tl.load(q_ptrs, mask=inside[:, None] & (q_col < gram.columns)[None, :], other=0.0)
        if row_scale is not None:
            g = tl.load(row_scale + slot, mask=inside, other=0.0).to(tl.float32)
            q_tile = (q_tile.to(tl.float32) * g[:, None]).to(q.ptr.dtype.element_ty)
        acc = tl.dot(p_tile.T, q_tile, acc, input_precision=PRECISION)
    out_ptrs = out.ptr + expert * out.expert + p_col.to(tl.int64)[:, None] * out.row
    out_ptrs += q_col.to(tl.int64)[None, :] * out.col
    stored = (p_col < gram.width)[:, None] & (q_col < gram.columns)[None, :]
    tl.store(out_ptrs, acc.to(out.ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["programs"])
def gram_kernel(
    first,
    second,
    row_scale,
    slots,
    offsets,
    programs,
    FIRST_P_BY_EXPERT: tl.constexpr,
    FIRST_Q_BY_EXPERT: tl.constexpr,
    SECOND_P_BY_EXPERT: tl.constexpr,
    SECOND_Q_BY_EXPERT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Programs below `programs` work on the first product, the others on the second."""
    program = tl.program_id(0)
    if program < programs:
        gram_tile(
            first, program, row_scale, slots, offsets,
            FIRST_P_BY_EXPERT, FIRST_Q_BY_EXPERT, PRECISION, BLOCK_M, BLOCK_P, BLOCK_Q,
        )  # fmt: skip
    elif second is not None:
        gram_tile(
            second, program - programs, row_scale, slots, offsets,
            SECOND_P_BY_EXPERT, SECOND_Q_BY_EXPERT, PRECISION, BLOCK_M, BLOCK_P, BLOCK_Q,
        )  # fmt: skip


def launch_gram(
    products: tuple[tuple[Tensor, RowOrder, Tensor, RowOrder, Tensor], ...],
    routing: Routing,
    plan: Plan,
    *,
    row_scale: Tensor | None = None,
) -> None:
    """One or two products (p, its order, q, its order, out) of operands that were checked.

    out is [experts, P, Q], any strides, any floating dtype.
    """
    tile = plan.tile
    first, *rest = products
    second = rest[0] if rest else None
    programs = _programs(first[4], routing, plan)
    total = programs + (0 if second is None else _programs(second[4], routing, plan))
    pointers = routing.slots.data_ptr() | routing.offsets.data_ptr()
    scale_form = None
    if row_scale is not None:
        row_scale = row_scale.reshape(-1)
        scale_form = row_scale.dtype
        pointers |= row_scale.data_ptr()
    forms = []
    for p, p_order, q, q_order, out in products:
        pointers |= p.data_ptr() | q.data_ptr()
        operands = (p.dtype, p.stride(), q.stride(), out.dtype, out.stride(), out.shape)
        fan_outs = (routing.fan_out(p_order), routing.fan_out(q_order))
        by_expert = (p_order is RowOrder.EXPERT, q_order is RowOrder.EXPERT)
        forms.append((*by_expert, fan_outs, operands))
    _launch(tile, plan.precision, scale_form, *forms)(
        (total, 1, 1),
        routing.device,
        (
            _gram(first, routing),
            None if second is None else _gram(second, routing),
            row_scale,
            routing.slots,
            routing.offsets,
            programs,
        ),
        pointers,
    )


@lru_cache(maxsize=4096)
def _launch(
    tile: Tile,
    precision: Precision,
    scale: torch.dtype | None,
    first: tuple[Any, ...],
    second: tuple[Any, ...] | None = None,
) -> Launch:
    """The launch for a form: of each product whether p and q are in expert order, and the rest."""
    del scale
    second = second or first
    return Launch(
        gram_kernel,
        warps=tile.warps,
        stages=tile.stages,
        FIRST_P_BY_EXPERT=first[0],
        FIRST_Q_BY_EXPERT=first[1],
        SECOND_P_BY_EXPERT=second[0],
        SECOND_Q_BY_EXPERT=second[1],
        PRECISION=precision.value,
        BLOCK_M=tile.block_m,
        BLOCK_P=tile.block_k,
        BLOCK_Q=tile.block_n,
    )


def _programs(out: Tensor, routing: Routing, plan: Plan) -> int:
    tile = plan.tile
    return (
        routing.experts
        * ceil_div(out.shape[1], tile.block_k)
        * ceil_div(out.shape[2], tile.block_n)
    )


def _gram(product: tuple[Tensor, RowOrder, Tensor, RowOrder, Tensor], routing: Routing) -> Gram:
    p, p_order, q, q_order, out = product
    return Gram(
        matrix(p),
        matrix(q),
        stack(out),
        routing.fan_out(p_order),
        routing.fan_out(q_order),
        out.shape[1],
        out.shape[2],
    )
