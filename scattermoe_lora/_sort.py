"""Stable counting sort of the chosen experts, in two launches and without a host sync.

    count   counts[c, e] = slots of chunk c that chose expert e
    place   row of a slot = rows of smaller experts + slots of e in earlier chunks
                            + its rank among the slots of e in its own chunk

Ids outside [0, experts) count as group `experts`. The second launch also writes the expert offsets
and the row-tile tables.
"""

# Device code is Triton's language, not Python's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._interpreter import require_supported
from ._launch import Launch
from ._row_tiles import group_bins, row_tile_entries, write_group_tiles
from ._sizes import ceil_div


class Sorted(NamedTuple):
    """Rows in expert order; the tensors of a Routing."""

    slots: Tensor
    expert_of_row: Tensor
    offsets: Tensor
    tiles: Tensor


def sort_by_expert(ids: Tensor, experts: int) -> Sorted:
    """Sort ids (integer [rows], contiguous) stably by expert."""
    rows = ids.numel()
    chunk = 256 if rows <= 2**16 else 1024
    chunks = ceil_div(rows, chunk)
    bins = group_bins(experts)
    entries = row_tile_entries(rows, experts)
    slots = ids.new_empty(rows, dtype=torch.int64)
    lengths = [rows, experts + 1, 4 * entries, chunks * bins]
    aligned = [ceil_div(length, 4) * 4 for length in lengths]
    buffer = ids.new_empty(sum(aligned), dtype=torch.int32)
    parts = [part[:length] for part, length in zip(buffer.split(aligned), lengths, strict=True)]
    expert_of_row, offsets, tiles, counts = parts
    result = Sorted(slots, expert_of_row, offsets, tiles.view(entries, 4))
    if rows == 0:
        offsets.zero_()
        return result
    require_supported(torch.int32, ids.device)
    pointers = ids.data_ptr()
    _launch(count_kernel, bins, chunk, ids.dtype)(
        (chunks, 1, 1), ids.device, (ids, counts, rows, experts), pointers
    )
    _launch(place_kernel, bins, chunk, ids.dtype)(
        (chunks + experts + 2, 1, 1),
        ids.device,
        (ids, counts, slots, expert_of_row, offsets, tiles, rows, experts, chunks),
        pointers,
    )
    return result


@lru_cache(maxsize=4096)
def _launch(kernel: triton.JITFunction, bins: int, chunk: int, dtype: torch.dtype) -> Launch:
    del dtype
    return Launch(kernel, warps=4, BINS=bins, CHUNK=chunk)


@triton.jit
def load_keys(ids, start, rows, experts, CHUNK: tl.constexpr):
    """Keys of a chunk of slots: the expert, `experts` where dropped, experts + 1 past the end."""
    slot = start + tl.arange(0, CHUNK)
    chosen = tl.load(ids + slot, mask=slot < rows, other=0)
    valid = (chosen >= 0) & (chosen < experts)
    key = tl.where(valid, chosen, experts).to(tl.int32)
    return tl.where(slot < rows, key, experts + 1)


@triton.jit(do_not_specialize=["rows", "experts"])
def count_kernel(ids, counts, rows, experts, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """The counts of one chunk."""
    chunk = tl.program_id(0)
    keys = load_keys(ids, chunk * CHUNK, rows, experts, CHUNK)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), tl.histogram(keys, BINS))


@triton.jit(do_not_specialize=["rows", "experts", "chunks"])
def place_kernel(
    ids,
    counts,
    slots,
    expert_of_row,
    offsets,
    tiles,
    rows,
    experts,
    chunks,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Programs below `chunks` place a chunk of slots; the others write the tiles of one group."""
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    sizes = tl.zeros((BINS,), tl.int32)
    earlier = tl.zeros((BINS,), tl.int32)
    for start in range(0, chunks, 8):
        chunk = start + tl.arange(0, 8)
        inside = (chunk < chunks)[:, None] & (bins <= experts)[None, :]
        part = tl.load(counts + chunk[:, None] * BINS + bins[None, :], mask=inside, other=0)
        sizes += tl.sum(part, axis=0)
        earlier += tl.sum(tl.where((chunk < program)[:, None], part, 0), axis=0)
    begin = tl.cumsum(sizes, axis=0) - sizes
    if program < chunks:
        keys = load_keys(ids, program * CHUNK, rows, experts, CHUNK)
        here = tl.histogram(keys, BINS)
        rank_zero = tl.cumsum(here, axis=0) - here
        order = tl.sort(keys * CHUNK + tl.arange(0, CHUNK))
        key = order // CHUNK
        row = tl.gather(begin + earlier - rank_zero, key, 0) + tl.arange(0, CHUNK)
        stored = key <= experts
        tl.store(slots + row, (program * CHUNK + order % CHUNK).to(tl.int64), mask=stored)
        tl.store(expert_of_row + row, key, mask=stored)
    else:
        group = program - chunks
        if group == 0:
            tl.store(offsets + bins, begin, mask=bins <= experts)
        write_group_tiles(tiles, sizes, group, rows, experts, BINS)
