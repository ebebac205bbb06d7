"""Experts whose rows are too many for one program of a Gram product, summed in parts.

An expert with more than `height` rows is cut into parts of that many. Each part leaves its
[BLOCK_P, BLOCK_Q] sums in fp32, and a second launch adds them in the order of the rows, so results
are the same from run to run. What an expert is cut into depends on its own rows alone. How many
parts there are is known on the device alone; launches cover the largest possible number.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..routing import Routing


class Parts(NamedTuple):
    """How a launch is cut: rows of a part, most parts, and most experts that have any."""

    height: int
    parts: int
    experts: int


def parts_of(routing: Routing, height: int) -> Parts:
    """The parts of `height` rows that a routing can have at most."""
    experts = min(routing.experts, routing.rows // (height + 1))
    return Parts(height, routing.rows // height + experts, experts)


@triton.jit
def part_counts(offsets, experts, height, BINS: tl.constexpr):
    """First row and number of parts of each expert, [BINS]; 0 parts where it is not cut."""
    bins = tl.arange(0, BINS)
    inside = bins < experts
    begin = tl.load(offsets + bins, mask=inside, other=0)
    rows = tl.load(offsets + bins + 1, mask=inside, other=0) - begin
    return begin, tl.where(rows > height, (rows + height - 1) // height, 0)


@triton.jit
def part_rows(part, offsets, experts, height, BINS: tl.constexpr):
    """Rows begin .. end of a part, numbered over all experts; end < begin past the last part."""
    bins = tl.arange(0, BINS)
    begins, parts = part_counts(offsets, experts, height, BINS)
    ends = tl.cumsum(parts, axis=0)
    expert = tl.sum((ends <= part).to(tl.int32))
    here = begins + (part - (ends - parts)) * height
    begin = tl.sum(tl.where(bins == expert, here, 0))
    last = tl.load(offsets + tl.minimum(expert + 1, experts))
    end = tl.where(expert < experts, tl.minimum(begin + height, last), begin - 1)
    return begin, end


@triton.jit
def cut_expert(number, offsets, experts, height, BINS: tl.constexpr):
    """The `number`-th expert that is cut, its first part and its parts; 0 parts past the last."""
    bins = tl.arange(0, BINS)
    _, parts = part_counts(offsets, experts, height, BINS)
    cut = tl.cumsum((parts > 0).to(tl.int32), axis=0)
    expert = tl.sum((cut <= number).to(tl.int32))
    first = tl.sum(tl.where(bins < expert, parts, 0))
    return expert, first, tl.sum(tl.where(bins == expert, parts, 0))
