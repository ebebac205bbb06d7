"""Per-expert Gram product with one operand recomputed from its factor.

    out[e] = sum over the rows i of e of p[i]^T g[i] (s z[i] F[e])

    p [., P]   z [., Z]   F [E, Z, rank]   out [E, P, rank]   g: one coefficient per slot

dA^T = X^T (s dY B) and dB = dY^T (s X A^T) without saved [rows, rank] operands. Every output block
repeats the reduction over Z, so this is the cross-check of the Gram path, and its fallback when
nothing was saved.
"""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from .._launch import Launch
from .._sizes import ceil_div, next_power_of_two
from ..plan import Plan, Precision, Tile
from ..routing import Routing, RowOrder
from ._tile import coefficients, matrix, row_of_slot, stack


@triton.jit(do_not_specialize=["scale"])
def recompute_kernel(
    p,
    z,
    factor,
    row_scale,
    out,
    slots,
    offsets,
    p_fan_out,
    z_fan_out,
    P,
    Z,
    R,
    scale,
    P_BY_EXPERT: tl.constexpr,
    Z_BY_EXPERT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One [BLOCK_P, rank] tile of out[e]; BLOCK_R covers the whole rank."""
    blocks_p = tl.cdiv(P, BLOCK_P)
    program = tl.program_id(0)
    expert = (program // blocks_p).to(tl.int64)
    p_col = (program % blocks_p) * BLOCK_P + tl.arange(0, BLOCK_P)
    r = tl.arange(0, BLOCK_R)
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    acc = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    for row in range(begin, end, BLOCK_M):
        rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = rows < end
        slot = tl.load(slots + rows, mask=inside, other=0)
        p_rows = row_of_slot(slot, p_fan_out)
        if P_BY_EXPERT:
            p_rows = rows
        z_rows = row_of_slot(slot, z_fan_out)
        if Z_BY_EXPERT:
            z_rows = rows
        low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for z_start in range(0, Z, BLOCK_Z):
            z_col = z_start + tl.arange(0, BLOCK_Z)
            z_ptrs = z.ptr + z_rows[:, None] * z.row + z_col.to(tl.int64)[None, :] * z.col
            z_tile = tl.load(z_ptrs, mask=inside[:, None] & (z_col < Z)[None, :], other=0.0)
            f_ptrs = factor.ptr + expert * factor.expert + z_col.to(tl.int64)[:, None] * factor.row
            f_ptrs += r.to(tl.int64)[None, :] * factor.col
            f_tile = tl.load(f_ptrs, mask=(z_col < Z)[:, None] & (r < R)[None, :], other=0.0)
            low = tl.dot(z_tile, f_tile, low, input_precision=PRECISION)
        low *= scale
        if row_scale is not None:
            low *= tl.load(row_scale + slot, mask=inside, other=0.0).to(tl.float32)[:, None]
        p_ptrs = p.ptr + p_rows[:, None] * p.row + p_col.to(tl.int64)[None, :] * p.col
        p_tile = tl.load(p_ptrs, mask=inside[:, None] & (p_col < P)[None, :], other=0.0)
        low_tile = low.to(p.ptr.dtype.element_ty)
        acc = tl.dot(p_tile.T, low_tile, acc, input_precision=PRECISION)
    out_ptrs = out.ptr + expert * out.expert + p_col.to(tl.int64)[:, None] * out.row
    out_ptrs += r.to(tl.int64)[None, :] * out.col
    stored = (p_col < P)[:, None] & (r < R)[None, :]
    tl.store(out_ptrs, acc.to(out.ptr.dtype.element_ty), mask=stored)


def launch_recompute(
    p: Tensor,
    z: Tensor,
    factor: Tensor,
    out: Tensor,
    routing: Routing,
    plan: Plan,
    *,
    scaling: float,
    p_order: RowOrder,
    z_order: RowOrder,
    row_scale: Tensor | None = None,
) -> Tensor:
    """Fill out [experts, P, rank] from operands that were checked; factor is [experts, Z, rank]."""
    tile = plan.tile
    rank = factor.shape[2]
    pointers = p.data_ptr() | z.data_ptr() | factor.data_ptr()
    pointers |= routing.slots.data_ptr() | routing.offsets.data_ptr()
    row_scale, scale_form, scale_pointer = coefficients(row_scale)
    pointers |= scale_pointer
    _launch(
        tile, plan.precision, p_order is RowOrder.EXPERT, z_order is RowOrder.EXPERT, rank,
        p.dtype, p.stride(), z.stride(), factor.stride(), out.dtype, out.stride(),
        out.shape[1], z.shape[1], routing.fan_out(p_order), routing.fan_out(z_order), scale_form,
    )(
        (routing.experts * ceil_div(out.shape[1], tile.block_k), 1, 1),
        routing.device,
        (
            matrix(p),
            matrix(z),
            stack(factor),
            row_scale,
            stack(out),
            routing.slots,
            routing.offsets,
            routing.fan_out(p_order),
            routing.fan_out(z_order),
            out.shape[1],
            z.shape[1],
            rank,
            float(scaling),
        ),
        pointers,
    )  # fmt: skip
    return out


@lru_cache(maxsize=4096)
def _launch(
    tile: Tile,
    precision: Precision,
    p_by_expert: bool,  # noqa: FBT001
    z_by_expert: bool,  # noqa: FBT001
    rank: int,
    *form: object,
) -> Launch:
    del form
    return Launch(
        recompute_kernel,
        warps=tile.warps,
        stages=tile.stages,
        P_BY_EXPERT=p_by_expert,
        Z_BY_EXPERT=z_by_expert,
        PRECISION=precision.value,
        BLOCK_M=tile.block_m,
        BLOCK_P=tile.block_k,
        BLOCK_Z=64,
        BLOCK_R=max(next_power_of_two(rank), 16),
    )
