"""Per-expert row tiles: which program of a routed product works on which rows.

For each tile height in ROW_TILES the table holds, expert after expert, one entry per tile of that
many rows: (expert, first, begin, end): the expert's first tile in the table, and its rows
begin .. end. A kernel whose programs are numbered (tile, column block) finds its expert by one
look-up, and walks the row tiles of an expert fastest, so that a block of W is read once.

Dropped rows form a last group with expert = DROPPED, whose programs write zeros. How many entries
are in use is known on the device alone; the table has the largest possible length, and what is
left over has expert = UNUSED.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._interpreter import require_supported
from ._launch import Launch
from ._sizes import next_power_of_two

ROW_TILES = (16, 32, 64, 128)
LEVELS = tl.constexpr(len(ROW_TILES))
LOWEST = tl.constexpr(ROW_TILES[0])
UNUSED = tl.constexpr(-1)
DROPPED = tl.constexpr(-2)


def row_tile_count(rows: int, experts: int, block_m: int) -> int:
    """Entries for tiles of `block_m` rows: bounds the sum over groups of ceil(rows / block_m)."""
    return rows // block_m + min(experts + 1, rows)


@lru_cache(maxsize=4096)
def row_tile_range(rows: int, experts: int, block_m: int) -> tuple[int, int]:
    """First entry and number of entries of the table for tiles of `block_m` rows."""
    if block_m not in ROW_TILES:
        raise ValueError(f"block_m must be one of {ROW_TILES}, got {block_m}")
    level = ROW_TILES.index(block_m)
    above = sum(rows // height for height in ROW_TILES[:level])
    start = above + level * min(experts + 1, rows)
    return start, row_tile_count(rows, experts, block_m)


def row_tile_entries(rows: int, experts: int) -> int:
    """Entries of the tables of all heights."""
    return sum(rows // height + min(experts + 1, rows) for height in ROW_TILES)


def group_bins(experts: int) -> int:
    """Power of two that holds the experts, the dropped rows, and one bin for what is no slot."""
    return next_power_of_two(experts + 2)


def row_tiles(offsets: Tensor, *, rows: int, experts: int) -> Tensor:
    """Tables of every height in ROW_TILES, int32 [entries, 4]; offsets: int32 [experts + 1]."""
    shape = (row_tile_entries(rows, experts), 4)
    tiles = offsets.new_empty(shape)
    if rows:
        require_supported(torch.int32, offsets.device)
        _launch(group_bins(experts))(
            (experts + 2, 1, 1),
            offsets.device,
            (tiles, offsets, rows, experts),
            offsets.data_ptr(),
        )
    return tiles


@lru_cache(maxsize=4096)
def _launch(bins: int) -> Launch:
    return Launch(row_tiles_kernel, warps=4, BINS=bins)


@triton.jit(do_not_specialize=["rows", "experts"])
def row_tiles_kernel(tiles, offsets, rows, experts, BINS: tl.constexpr):
    """Program g writes the tiles of group g; group experts + 1 fills what is left over."""
    bins = tl.arange(0, BINS)
    low = tl.load(offsets + bins, mask=bins <= experts, other=0)
    high = tl.load(offsets + bins + 1, mask=bins < experts, other=rows)
    sizes = tl.where(bins <= experts, high - low, 0)
    write_group_tiles(tiles, sizes, tl.program_id(0), rows, experts, BINS)


@triton.jit
def write_group_tiles(tiles, sizes, group, rows, experts, BINS: tl.constexpr):
    """Write the entries of one group for every height; sizes [BINS] are the rows of each group."""
    bins = tl.arange(0, BINS)
    groups = tl.minimum(experts + 1, rows)
    begin = tl.sum(tl.where(bins < group, sizes, 0))
    end = begin + tl.sum(tl.where(bins == group, sizes, 0))
    expert = tl.where(group == experts, DROPPED, tl.where(group > experts, UNUSED, group))
    table = 0
    for level in tl.static_range(LEVELS):
        height = LOWEST << level
        tiles_of_group = (sizes + height - 1) // height
        first = tl.sum(tl.where(bins < group, tiles_of_group, 0))
        capacity = rows // height + groups
        own = tl.sum(tl.where(bins == group, tiles_of_group, 0))
        used = tl.where(group > experts, capacity - first, own)
        zeros = tl.zeros((BINS,), tl.int32)
        for t in range(0, used, BINS):
            entry = tiles + (table + first + t + bins).to(tl.int64) * 4
            inside = t + bins < used
            tl.store(entry, zeros + expert, mask=inside)
            tl.store(entry + 1, zeros + first, mask=inside)
            tl.store(entry + 2, zeros + begin, mask=inside)
            tl.store(entry + 3, zeros + end, mask=inside)
        table += capacity
