"""Per-expert row tiles: which program of a routed product works on which rows.

For each tile height in ROW_TILES the table holds, expert after expert, one entry per tile of that many
rows: (expert, first, begin, end): the expert's first tile in the table, and its rows begin .. end. A kernel
whose programs are numbered (tile, column block) finds its expert by one look-up, and walks the row tiles of
an expert fastest, so that a block of W is read from memory once.

Dropped rows form a last group with expert = DROPPED, whose programs write zeros. The number of tiles in use
is known on the device alone; the table has the largest possible length, and what is left over has
expert = UNUSED.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._interpreter import require_supported

ROW_TILES = (16, 32, 64, 128)
UNUSED = tl.constexpr(-1)
DROPPED = tl.constexpr(-2)


def row_tile_count(rows: int, experts: int, block_m: int) -> int:
    """Entries for tiles of `block_m` rows: an upper bound of the sum over groups of ceil(rows / block_m)."""
    return rows // block_m + min(experts + 1, rows)


def row_tile_start(rows: int, experts: int, block_m: int) -> int:
    """First entry of the table for tiles of `block_m` rows."""
    if block_m not in ROW_TILES:
        raise ValueError(f"block_m must be one of {ROW_TILES}, got {block_m}")
    smaller = ROW_TILES[: ROW_TILES.index(block_m)]
    return sum(row_tile_count(rows, experts, size) for size in smaller)


def row_tiles(offsets: Tensor, *, rows: int, experts: int) -> Tensor:
    """Tables for every height in ROW_TILES, int32 [entries, 4], from offsets int32 [experts + 1]."""
    entries = sum(row_tile_count(rows, experts, size) for size in ROW_TILES)
    tiles = torch.empty((entries, 4), dtype=torch.int32, device=offsets.device)
    if entries:
        require_supported(torch.int32, offsets.device)
        row_tiles_kernel[(experts + 2, len(ROW_TILES))](
            tiles, offsets, rows, experts, FIRST=ROW_TILES[0], BLOCK_E=256, BLOCK_T=256, num_warps=4
        )
    return tiles


@triton.jit(do_not_specialize=["rows", "experts"])
def row_tiles_kernel(
    tiles,
    offsets,
    rows,
    experts,
    FIRST: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Program (g, i) writes the tiles of group g for height FIRST << i; group experts + 1 fills the rest."""
    group = tl.program_id(0)
    level = tl.program_id(1)
    height = FIRST << level
    groups = tl.minimum(experts + 1, rows)
    # The tables of the smaller heights come first: rows // height entries and `groups` spare ones each.
    table = level * groups
    for smaller in tl.static_range(3):
        table += tl.where(smaller < level, rows // (FIRST << smaller), 0)

    # Tiles of all groups before this one. Group `experts` holds the dropped rows.
    first = 0
    for e in range(0, group, BLOCK_E):
        before = e + tl.arange(0, BLOCK_E)
        low = tl.load(offsets + before, mask=before < group, other=0)
        high = tl.load(offsets + before + 1, mask=(before < group) & (before < experts), other=rows)
        size = tl.where(before < group, high - low, 0)
        first += tl.sum((size + height - 1) // height)

    begin = tl.load(offsets + group, mask=group <= experts, other=0)
    end = tl.load(offsets + group + 1, mask=group < experts, other=rows)
    used = (end - begin + height - 1) // height
    expert = tl.where(group == experts, DROPPED, group)
    if group > experts:
        expert = UNUSED + 0 * group
        used = rows // height + groups - first
    index = tl.arange(0, BLOCK_T)
    for t in range(0, used, BLOCK_T):
        entry = tiles + (table + first + t + index).to(tl.int64) * 4
        inside = t + index < used
        zeros = tl.zeros((BLOCK_T,), tl.int32)
        tl.store(entry, zeros + expert, mask=inside)
        tl.store(entry + 1, zeros + first, mask=inside)
        tl.store(entry + 2, zeros + begin, mask=inside)
        tl.store(entry + 3, zeros + end, mask=inside)
