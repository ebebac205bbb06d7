"""Per-expert Gram product: out[e] = sum over the rows i of e of p[i]^T (g[i] q[i]).

    p [., P]   q [., Q]   out [E, P, Q]   g: one coefficient per slot

Weight gradients: dA^T = X^T YB, dB = dY^T XA, dW = X^T dY; the first two in one launch. The wide
operand is p: it is the M side of the tensor-core product, which needs 64 of it. One program owns
each output tile, or each part of it (`gram_parts`), so there are no atomics, the sum runs in row
order, and an expert without rows gets exact zeros.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import Launch
from .._row_tiles import group_bins
from .._sizes import ceil_div, power_of_two
from ..plan import Plan, Precision, Tile
from ..routing import Routing, RowOrder
from ._tile import coefficients, row_of_slot
from .gram_parts import cut_expert, part_rows, parts_of

LOADS = tl.constexpr(4)
"""Sums of parts that are asked for at once."""
_ADDED_PER_WARP = 1024
"""Sums of one part that a warp holds: LOADS of them and their total stay in registers."""


Product = tuple[Tensor, RowOrder, Tensor, RowOrder, Tensor]
"""p, its order, q, its order, and out."""


class Gram(NamedTuple):
    """The operands of one Gram product, as a kernel takes them: pointers, each with its strides.

    Flat, because Triton 3.6 forgets strides of 1 in nested tuples after a branch.
    """

    p: Any
    p_row: Any
    p_col: Any
    q: Any
    q_row: Any
    q_col: Any
    out: Any
    out_expert: Any
    out_row: Any
    out_col: Any
    p_fan_out: Any
    q_fan_out: Any
    width: Any
    columns: Any


@triton.jit
def tile_columns(gram, block, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The columns of p and of q whose products are block `block` of out[e]."""
    blocks_q = tl.cdiv(gram.columns, BLOCK_Q)
    p_col = (block // blocks_q) * BLOCK_P + tl.arange(0, BLOCK_P)
    q_col = (block % blocks_q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return p_col, q_col


@triton.jit
def store_tile(gram, expert, p_col, q_col, acc):
    """Write the columns of out[e] that are there."""
    ptrs = gram.out + expert.to(tl.int64) * gram.out_expert
    ptrs += p_col.to(tl.int64)[:, None] * gram.out_row + q_col.to(tl.int64)[None, :] * gram.out_col
    stored = (p_col < gram.width)[:, None] & (q_col < gram.columns)[None, :]
    tl.store(ptrs, acc.to(gram.out.dtype.element_ty), mask=stored)


@triton.jit
def sums_ptrs(sums, tile, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Where the sums of tile `tile` are kept, contiguous [tiles, BLOCK_P, BLOCK_Q]."""
    p = tl.arange(0, BLOCK_P)
    within = p[:, None] * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :]
    return sums + tile.to(tl.int64) * (BLOCK_P * BLOCK_Q) + within


@triton.jit
def gram_tile(
    gram,
    block,
    unit,
    parts,
    kept,
    begin,
    end,
    row_scale,
    slots,
    sums,
    P_BY_EXPERT: tl.constexpr,
    Q_BY_EXPERT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Sum one [BLOCK_P, BLOCK_Q] tile over the rows begin .. end, BLOCK_M rows per step.

    A part's goes to tile `kept` of sums, an expert's to out; nothing is written where end < begin.
    """
    p_col, q_col = tile_columns(gram, block, BLOCK_P, BLOCK_Q)
    acc = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for row in range(begin, end, BLOCK_M):
        rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = rows < end
        slot = tl.load(slots + rows, mask=inside, other=0)
        p_rows = rows
        if not P_BY_EXPERT:
            p_rows = row_of_slot(slot, gram.p_fan_out)
        q_rows = rows
        if not Q_BY_EXPERT:
            q_rows = row_of_slot(slot, gram.q_fan_out)
        p_ptrs = gram.p + p_rows[:, None] * gram.p_row + p_col.to(tl.int64)[None, :] * gram.p_col
        q_ptrs = gram.q + q_rows[:, None] * gram.q_row + q_col.to(tl.int64)[None, :] * gram.q_col
        p_tile = tl.load(p_ptrs, mask=inside[:, None] & (p_col < gram.width)[None, :], other=0.0)
        q_tile = tl.load(q_ptrs, mask=inside[:, None] & (q_col < gram.columns)[None, :], other=0.0)
        if row_scale is not None:
            g = tl.load(row_scale + slot, mask=inside, other=0.0).to(tl.float32)
            q_tile = (q_tile.to(tl.float32) * g[:, None]).to(gram.q.dtype.element_ty)
        acc = tl.dot(p_tile.T, q_tile, acc, input_precision=PRECISION)
    if sums is None:
        store_tile(gram, unit, p_col, q_col, acc)
    elif end >= begin:
        if unit < parts:
            tl.store(sums_ptrs(sums, kept, BLOCK_P, BLOCK_Q), acc)
        else:
            store_tile(gram, unit - parts, p_col, q_col, acc)


@triton.jit(do_not_specialize=["first_blocks", "second_blocks", "experts", "parts", "height"])
def gram_kernel(
    first,
    second,
    row_scale,
    slots,
    offsets,
    sums,
    first_blocks,
    second_blocks,
    experts,
    parts,
    height,
    FIRST_P_BY_EXPERT: tl.constexpr,
    FIRST_Q_BY_EXPERT: tl.constexpr,
    SECOND_P_BY_EXPERT: tl.constexpr,
    SECOND_Q_BY_EXPERT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BINS: tl.constexpr,
):
    """Programs of the first product, then of the second, which have each so many blocks of output.

    In both the parts of cut experts come first, then the experts, and all blocks of each.
    """
    units = parts + experts
    program = tl.program_id(0)
    of_first = program < units * first_blocks
    within = tl.where(of_first, program, program - units * first_blocks)
    blocks = tl.where(of_first, first_blocks, second_blocks)
    kept = tl.where(of_first, within, within + parts * first_blocks)
    unit = within // blocks
    block = within % blocks
    if sums is None:
        begin = tl.load(offsets + unit)
        end = tl.load(offsets + unit + 1)
    elif unit < parts:
        begin, end = part_rows(unit, offsets, experts, height, BINS)
    else:
        begin = tl.load(offsets + unit - parts)
        end = tl.load(offsets + unit - parts + 1)
        end = tl.where(end - begin > height, begin - 1, end)
    if of_first:
        gram_tile(
            first, block, unit, parts, kept, begin, end, row_scale, slots, sums,
            FIRST_P_BY_EXPERT, FIRST_Q_BY_EXPERT, PRECISION, BLOCK_M, BLOCK_P, BLOCK_Q,
        )  # fmt: skip
    elif second is not None:
        gram_tile(
            second, block, unit, parts, kept, begin, end, row_scale, slots,
            sums, SECOND_P_BY_EXPERT, SECOND_Q_BY_EXPERT, PRECISION, BLOCK_M, BLOCK_P, BLOCK_Q,
        )  # fmt: skip


@triton.jit
def store_added(
    gram, block, expert, parts, sums, kept, blocks, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """Write one tile of out[e]: its sums of each part, added in order, `blocks` tiles apart."""
    acc = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for start in range(0, parts, LOADS):
        for load in tl.static_range(LOADS):
            part = start + load
            ptrs = sums_ptrs(sums, kept + part * blocks, BLOCK_P, BLOCK_Q)
            there = tl.full((BLOCK_P, BLOCK_Q), part, tl.int32) < parts
            acc += tl.load(ptrs, mask=there, other=0.0)
    p_col, q_col = tile_columns(gram, block, BLOCK_P, BLOCK_Q)
    store_tile(gram, expert, p_col, q_col, acc)


@triton.jit(do_not_specialize=["first_blocks", "second_blocks", "experts", "parts", "height"])
def add_parts_kernel(
    first,
    second,
    sums,
    offsets,
    first_blocks,
    second_blocks,
    experts,
    parts,
    height,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BINS: tl.constexpr,
):
    """One tile of one cut expert from the sums that `gram_kernel` left."""
    blocks = first_blocks + second_blocks
    block = tl.program_id(0) % blocks
    number = tl.program_id(0) // blocks
    expert, first_part, own_parts = cut_expert(number, offsets, experts, height, BINS)
    if own_parts == 0:
        return
    if block < first_blocks:
        kept = first_part * first_blocks + block
        store_added(first, block, expert, own_parts, sums, kept, first_blocks, BLOCK_P, BLOCK_Q)
    elif second is not None:
        block -= first_blocks
        kept = parts * first_blocks + first_part * second_blocks + block
        store_added(second, block, expert, own_parts, sums, kept, second_blocks, BLOCK_P, BLOCK_Q)


def launch_gram(
    products: tuple[Product, ...],
    routing: Routing,
    plan: Plan,
    *,
    row_scale: Tensor | None = None,
) -> None:
    """One or two products of operands that were checked.

    out is [experts, P, Q], any strides, any floating dtype.
    """
    tile = plan.tile
    experts, device = routing.experts, routing.device
    first, second = (*(_gram(product, routing) for product in products), None)[:2]
    first_blocks, second_blocks = (*(_blocks(product, tile) for product in products), 0)[:2]
    blocks = first_blocks + second_blocks
    row_scale, scale_form, pointers = coefficients(row_scale)
    pointers |= routing.slots.data_ptr() | routing.offsets.data_ptr()
    forms = []
    for p, p_order, q, q_order, out in products:
        pointers |= p.data_ptr() | q.data_ptr()
        operands = (p.dtype, p.stride(), q.stride(), out.dtype, out.stride(), out.shape)
        fan_outs = (routing.fan_out(p_order), routing.fan_out(q_order))
        by_expert = (p_order is RowOrder.EXPERT, q_order is RowOrder.EXPERT)
        forms.append((*by_expert, fan_outs, operands))
    cut = parts_of(routing, plan.part_rows) if plan.part_rows else None
    sums = None
    if cut is not None:
        shape = (cut.parts, blocks, tile.block_k, tile.block_n)
        sums = torch.empty(shape, dtype=torch.float32, device=device)
    height, parts, cut_experts = cut or (0, 0, 0)
    sizes = (first_blocks, second_blocks, experts, parts, height)
    _launch(tile, plan.precision, experts if cut else 0, scale_form, *forms)(
        ((experts + parts) * blocks, 1, 1),
        device,
        (first, second, row_scale, routing.slots, routing.offsets, sums, *sizes),
        pointers,
    )
    if cut is not None:
        _add_launch(tile, experts, *forms)(
            (max(cut_experts, 1) * blocks, 1, 1),
            device,
            (first, second, sums, routing.offsets, *sizes),
            pointers,
        )


@lru_cache(maxsize=4096)
def _launch(
    tile: Tile,
    precision: Precision,
    cut_of: int,
    scale: torch.dtype | None,
    first: tuple[Any, ...],
    second: tuple[Any, ...] | None = None,
) -> Launch:
    """The launch for a form: of each product whether p and q are in expert order, and the rest.

    cut_of: the number of experts where some may be cut, 0 where none is.
    """
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
        BINS=group_bins(cut_of) if cut_of else 0,
    )


@lru_cache(maxsize=4096)
def _add_launch(tile: Tile, experts: int, *form: object) -> Launch:
    del form
    return Launch(
        add_parts_kernel,
        warps=power_of_two(tile.block_k * tile.block_n // _ADDED_PER_WARP, low=4, high=16),
        BLOCK_P=tile.block_k,
        BLOCK_Q=tile.block_n,
        BINS=group_bins(experts),
    )


def _blocks(product: Product, tile: Tile) -> int:
    """Output tiles of one expert."""
    _, width, columns = product[4].shape
    return ceil_div(width, tile.block_k) * ceil_div(columns, tile.block_n)


def _gram(product: Product, routing: Routing) -> Gram:
    p, p_order, q, q_order, out = product
    p_row, p_col = p.stride()
    q_row, q_col = q.stride()
    expert, row, col = out.stride()
    fan_outs = routing.fan_out(p_order), routing.fan_out(q_order)
    _, width, columns = out.shape
    return Gram(
        p, p_row, p_col, q, q_row, q_col, out, expert, row, col, fan_outs[0], fan_outs[1],
        width, columns,
    )  # fmt: skip
