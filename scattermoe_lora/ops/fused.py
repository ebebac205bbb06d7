"""Fused LoRA product: base and low-rank term of a routed product in one loop over K.

    y[i] = g[i] (x[i] W[e] + t[i] R[e] + b[e])      t[i] = s x[i] D[e]      e the expert of row i

    x  [rows or tokens, K]    W  [E, K, N]       b  [E, N]        y  [rows, N]
    g  [rows] per slot        D  [E, K, rank]    s  a number      t  [rows, rank]
                              R  [E, rank, N]

Every column block recomputes t (rank / BLOCK_N more arithmetic); the first one stores it, in expert
order.
"""

import triton
import triton.language as tl

from ._tile import DROPPED, UNUSED, locate, tile_rows


@triton.jit(do_not_specialize=["first_entry", "scale"])
def fused_kernel(
    x,
    w,
    down,
    right,
    bias,
    row_scale,
    y,
    t,
    slots,
    tiles,
    first_entry,
    fan_out,
    K,
    N,
    R,
    scale,
    X_BY_EXPERT: tl.constexpr,
    Y_BY_EXPERT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_N] tile of y; BLOCK_R covers the whole rank."""
    expert, row, end, column_block = locate(tiles, first_entry, N, BLOCK_M, BLOCK_N)
    if expert == UNUSED:
        return
    n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    inside_rows = (row + tl.arange(0, BLOCK_M) < end)[:, None]
    y_rows = tile_rows(slots, row, end, 1, Y_BY_EXPERT, BLOCK_M)
    t_rows = tile_rows(slots, row, end, 1, True, BLOCK_M)
    stored = inside_rows & (n < N)[None, :]
    t_stored = inside_rows & (r < R)[None, :]
    y_ptrs = y.ptr + y_rows[:, None] * y.row + n.to(tl.int64)[None, :] * y.col
    t_ptrs = t.ptr + t_rows[:, None] * t.row + r[None, :] * t.col
    if expert == DROPPED:
        tl.store(y_ptrs, tl.zeros((BLOCK_M, BLOCK_N), y.ptr.dtype.element_ty), mask=stored)
        if column_block == 0:
            tl.store(t_ptrs, tl.zeros((BLOCK_M, BLOCK_R), t.ptr.dtype.element_ty), mask=t_stored)
        return

    x_rows = tile_rows(slots, row, end, fan_out, X_BY_EXPERT, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    expert = expert.to(tl.int64)
    x_ptrs = x.ptr + x_rows[:, None] * x.row + k.to(tl.int64)[None, :] * x.col
    w_ptrs = (
        w.ptr
        + expert * w.expert
        + k.to(tl.int64)[:, None] * w.row
        + n.to(tl.int64)[None, :] * w.col
    )
    down_ptrs = down.ptr + expert * down.expert + k.to(tl.int64)[:, None] * down.row
    down_ptrs += r.to(tl.int64)[None, :] * down.col
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k_start in range(0, K, BLOCK_K):
        inside = k_start + k < K
        x_tile = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
        w_tile = tl.load(w_ptrs, mask=inside[:, None] & (n < N)[None, :], other=0.0)
        down_tile = tl.load(down_ptrs, mask=inside[:, None] & (r < R)[None, :], other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        low = tl.dot(x_tile, down_tile, low, input_precision=PRECISION)
        x_ptrs += BLOCK_K * x.col
        w_ptrs += BLOCK_K * w.row
        down_ptrs += BLOCK_K * down.row

    low_tile = (low * scale).to(t.ptr.dtype.element_ty)
    if column_block == 0:
        tl.store(t_ptrs, low_tile, mask=t_stored)
    right_ptrs = right.ptr + expert * right.expert + r.to(tl.int64)[:, None] * right.row
    right_ptrs += n.to(tl.int64)[None, :] * right.col
    right_tile = tl.load(right_ptrs, mask=(r < R)[:, None] & (n < N)[None, :], other=0.0)
    acc = tl.dot(low_tile, right_tile, acc, input_precision=PRECISION)
    if bias is not None:
        bias_ptrs = bias.ptr + expert * bias.row + n.to(tl.int64) * bias.col
        acc += tl.load(bias_ptrs, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if row_scale is not None:
        slot = tile_rows(slots, row, end, 1, False, BLOCK_M)
        acc *= tl.load(row_scale + slot).to(tl.float32)[:, None]
    tl.store(y_ptrs, acc.to(y.ptr.dtype.element_ty), mask=stored)
