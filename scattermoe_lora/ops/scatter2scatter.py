"""Routed product: y[i] = g[i] (c x[i] W[e] + L[i] R[e] + b[e]), e the expert of row i.

    x  [rows or tokens, K]   W [E, K, N]   b [E, N]   y [rows, N]
    L  [rows, rank] in expert order and R [E, rank, N]: a low-rank term, one more reduction step
    g  [rows] per slot, c a number

The forward product, its low-rank shrink X A^T (N = rank) and both input gradients are this one
kernel with other strides. Accumulation is fp32. The last tile of an expert is half as high where
that holds its rows, unless x comes through a tensor map: measured on an H100, a layer step of
Qwen3-30B or OLMoE gains 2 to 3%, and with tensor maps Mixtral's would lose 6%.
"""

import triton
import triton.language as tl

from ._tile import DROPPED, UNUSED, locate, tile_rows

HALVED_FROM = tl.constexpr(128)
"""Tile height from which a short last tile is halved: 64 rows are one tensor-core instruction."""


EARLY_RANKS = tl.constexpr(32)
"""Up to this rank the low-rank operands wait in registers while the loop over K runs."""


@triton.jit
def low_rank_tiles(left, right, left_rows, expert, n, r_start, N, R, BLOCK_R: tl.constexpr):
    """L [rows, BLOCK_R] and R[e] [BLOCK_R, columns] from rank r_start on."""
    r = r_start + tl.arange(0, BLOCK_R)
    left_ptrs = left.ptr + left_rows[:, None] * left.row + r[None, :] * left.col
    left_tile = tl.load(left_ptrs, mask=(r < R)[None, :], other=0.0)
    right_expert = right.ptr + expert.to(tl.int64) * right.expert
    right_ptrs = right_expert + r.to(tl.int64)[:, None] * right.row
    right_ptrs += n.to(tl.int64)[None, :] * right.col
    inside = (r < R)[:, None] & (n < N)[None, :]
    right_tile = tl.load(right_ptrs, mask=inside, other=0.0)
    return left_tile, right_tile


@triton.jit
def product_tile(
    x,
    w,
    bias,
    left,
    right,
    row_scale,
    y,
    slots,
    expert,
    first_expert,
    row,
    end,
    n_start,
    fan_out,
    K,
    N,
    R,
    scale,
    X_BY_EXPERT: tl.constexpr,
    Y_BY_EXPERT: tl.constexpr,
    X_DESCRIPTOR: tl.constexpr,
    W_DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Rows row .. min(end, row + BLOCK_M) and columns n_start .. n_start + BLOCK_N of y."""
    n = n_start + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if not X_DESCRIPTOR:
        x_rows = tile_rows(slots, row, end, fan_out, X_BY_EXPERT, BLOCK_M)
        x_ptrs = x.ptr + x_rows[:, None] * x.row + k.to(tl.int64)[None, :] * x.col
    if not W_DESCRIPTOR:
        w_expert = w.ptr + (expert - first_expert).to(tl.int64) * w.expert
        w_ptrs = w_expert + k.to(tl.int64)[:, None] * w.row + n.to(tl.int64)[None, :] * w.col
    # What the end of the tile reads is asked for here and arrives while the loop over K runs.
    y_rows = tile_rows(slots, row, end, 1, Y_BY_EXPERT, BLOCK_M)
    EARLY: tl.constexpr = BLOCK_R <= EARLY_RANKS
    if left is not None:
        left_rows = tile_rows(slots, row, end, 1, True, BLOCK_M)
        if EARLY:
            left_tile, right_tile = low_rank_tiles(
                left, right, left_rows, expert, n, 0, N, R, BLOCK_R
            )
    # A loop that may not run at all makes ptxas wait for every tensor-core instruction (C7515).
    tl.assume(K > 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k_start in range(0, K, BLOCK_K):
        if X_DESCRIPTOR:
            x_tile = x.load([row, k_start])
        elif EVEN_K:
            x_tile = tl.load(x_ptrs)
        else:
            x_tile = tl.load(x_ptrs, mask=(k_start + k < K)[None, :], other=0.0)
        if W_DESCRIPTOR == "nk":
            w_tile = w.load([expert - first_expert, n_start, k_start]).reshape(BLOCK_N, BLOCK_K).T
        elif W_DESCRIPTOR == "kn":
            w_tile = w.load([expert - first_expert, k_start, n_start]).reshape(BLOCK_K, BLOCK_N)
        else:
            inside = (n < N)[None, :]
            if not EVEN_K:
                inside = inside & (k_start + k < K)[:, None]
            w_tile = tl.load(w_ptrs, mask=inside, other=0.0)
            w_ptrs += BLOCK_K * w.row
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        if not X_DESCRIPTOR:
            x_ptrs += BLOCK_K * x.col
    acc *= scale

    if left is not None:
        if EARLY:
            # Always true; without it Triton waits for the operands before the loop, to stage them.
            left_tile = tl.where(end > row, left_tile, 0.0)
            right_tile = tl.where(end > row, right_tile, 0.0)
            acc = tl.dot(left_tile, right_tile, acc, input_precision=PRECISION)
        else:
            for r_start in tl.range(0, R, BLOCK_R, num_stages=1):
                left_tile, right_tile = low_rank_tiles(
                    left, right, left_rows, expert, n, r_start, N, R, BLOCK_R
                )
                acc = tl.dot(left_tile, right_tile, acc, input_precision=PRECISION)
    if bias is not None:
        bias_ptrs = bias.ptr + expert.to(tl.int64) * bias.row + n.to(tl.int64) * bias.col
        acc += tl.load(bias_ptrs, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if row_scale is not None:
        slot = tile_rows(slots, row, end, 1, False, BLOCK_M)
        acc *= tl.load(row_scale + slot).to(tl.float32)[:, None]
    y_rows = tl.where(end > row, y_rows, 0)
    stored = (row + tl.arange(0, BLOCK_M) < end)[:, None] & (n < N)[None, :]
    y_ptrs = y.ptr + y_rows[:, None] * y.row + n.to(tl.int64)[None, :] * y.col
    tl.store(y_ptrs, acc.to(y.ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["first_entry", "first_expert", "stop_expert", "scale"])
def scatter2scatter_kernel(
    x,
    w,
    bias,
    left,
    right,
    row_scale,
    y,
    slots,
    tiles,
    first_entry,
    first_expert,
    stop_expert,
    fan_out,
    K,
    N,
    R,
    scale,
    X_BY_EXPERT: tl.constexpr,
    Y_BY_EXPERT: tl.constexpr,
    X_DESCRIPTOR: tl.constexpr,
    W_DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_N] tile of y, if its expert is in first_expert .. stop_expert.

    w holds those experts alone; dropped rows go with the launch that has expert 0.
    X_DESCRIPTOR: x is a tensor map [rows, K], in expert order; rows past the expert's end are its
    neighbour's and are not stored. W_DESCRIPTOR: "" pointers, "kn" or "nk" a tensor map [E, ., .].
    """
    expert, row, end, column_block = locate(tiles, first_entry, N, BLOCK_M, BLOCK_N)
    if expert == UNUSED:
        return
    if expert == DROPPED:
        if first_expert > 0:
            return
    elif (expert < first_expert) | (expert >= stop_expert):
        return
    n_start = column_block * BLOCK_N
    if expert == DROPPED:
        n = n_start + tl.arange(0, BLOCK_N)
        y_rows = tile_rows(slots, row, end, 1, Y_BY_EXPERT, BLOCK_M)
        stored = (row + tl.arange(0, BLOCK_M) < end)[:, None] & (n < N)[None, :]
        y_ptrs = y.ptr + y_rows[:, None] * y.row + n.to(tl.int64)[None, :] * y.col
        tl.store(y_ptrs, tl.zeros((BLOCK_M, BLOCK_N), y.ptr.dtype.element_ty), mask=stored)
        return
    if BLOCK_M >= HALVED_FROM and not X_DESCRIPTOR:
        if end - row <= BLOCK_M // 2:
            product_tile(
                x, w, bias, left, right, row_scale, y, slots,
                expert, first_expert, row, end, n_start, fan_out, K, N, R, scale,
                X_BY_EXPERT, Y_BY_EXPERT, X_DESCRIPTOR, W_DESCRIPTOR, EVEN_K, PRECISION,
                BLOCK_M // 2, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip
            return
    product_tile(
        x, w, bias, left, right, row_scale, y, slots,
        expert, first_expert, row, end, n_start, fan_out, K, N, R, scale,
        X_BY_EXPERT, Y_BY_EXPERT, X_DESCRIPTOR, W_DESCRIPTOR, EVEN_K, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
