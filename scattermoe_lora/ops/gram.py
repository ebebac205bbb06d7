"""Per-expert Gram product: out[e] = sum over the rows i of e of p[i]^T (g[i] q[i]).

    p [., P]   q [., Q]   out [E, P, Q]   g: one coefficient per slot

Weight gradients: dA^T = X^T YB, dB = dY^T XA, dW = X^T dY. The wide operand is p: it is the M side of the
tensor-core product, which needs 64 of it. One program owns each output tile, so there are no atomics, the sum
runs in row order, and an expert without rows gets exact zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import Plan
from ..routing import Routing, RowOrder
from ._tile import matrix, stack


@triton.jit
def gram_kernel(
    p,
    q,
    row_scale,
    out,
    slots,
    offsets,
    p_fan_out,
    q_fan_out,
    P,
    Q,
    P_BY_EXPERT: tl.constexpr,
    Q_BY_EXPERT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One [BLOCK_P, BLOCK_Q] tile of out[e]; BLOCK_M rows per step."""
    blocks_p = tl.cdiv(P, BLOCK_P)
    blocks_q = tl.cdiv(Q, BLOCK_Q)
    program = tl.program_id(0)
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
        p_rows = slot // p_fan_out
        if P_BY_EXPERT:
            p_rows = rows
        q_rows = slot // q_fan_out
        if Q_BY_EXPERT:
            q_rows = rows
        p_ptrs = p.ptr + p_rows[:, None] * p.row + p_col.to(tl.int64)[None, :] * p.col
        q_ptrs = q.ptr + q_rows[:, None] * q.row + q_col.to(tl.int64)[None, :] * q.col
        p_tile = tl.load(p_ptrs, mask=inside[:, None] & (p_col < P)[None, :], other=0.0)
        q_tile = tl.load(q_ptrs, mask=inside[:, None] & (q_col < Q)[None, :], other=0.0)
        if row_scale is not None:
            g = tl.load(row_scale + slot, mask=inside, other=0.0).to(tl.float32)
            q_tile = (q_tile.to(tl.float32) * g[:, None]).to(q.ptr.dtype.element_ty)
        acc = tl.dot(p_tile.T, q_tile, acc, input_precision=PRECISION)
    out_ptrs = out.ptr + expert * out.expert + p_col.to(tl.int64)[:, None] * out.row
    out_ptrs += q_col.to(tl.int64)[None, :] * out.col
    stored = (p_col < P)[:, None] & (q_col < Q)[None, :]
    tl.store(out_ptrs, acc.to(out.ptr.dtype.element_ty), mask=stored)


def launch_gram(
    p: Tensor,
    q: Tensor,
    out: Tensor,
    routing: Routing,
    plan: Plan,
    *,
    p_order: RowOrder,
    q_order: RowOrder,
    row_scale: Tensor | None = None,
) -> Tensor:
    """Fill out [experts, P, Q] (any strides, any floating dtype) from operands that were checked."""
    tile = plan.tile
    blocks = triton.cdiv(out.shape[1], tile.block_k) * triton.cdiv(out.shape[2], tile.block_n)
    gram_kernel[(routing.experts * blocks,)](
        matrix(p),
        matrix(q),
        None if row_scale is None else row_scale.reshape(-1),
        stack(out),
        routing.slots,
        routing.offsets,
        routing.fan_out(p_order),
        routing.fan_out(q_order),
        out.shape[1],
        out.shape[2],
        P_BY_EXPERT=p_order is RowOrder.EXPERT,
        Q_BY_EXPERT=q_order is RowOrder.EXPERT,
        PRECISION=plan.precision.value,
        BLOCK_M=tile.block_m,
        BLOCK_P=tile.block_k,
        BLOCK_Q=tile.block_n,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def empty_like_factor(factor: Tensor) -> Tensor:
    """An uninitialised contiguous gradient for a LoRA factor."""
    return torch.empty(factor.shape, dtype=factor.dtype, device=factor.device)
