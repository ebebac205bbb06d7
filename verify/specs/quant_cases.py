"""Stored stacks to decode: their sizes, their storage, and which experts are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cases import Case
from ..routings import RoutingKind

_BEYOND_32_BITS = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How a 4-bit case is laid out; outer 0 is not nested.

    start: byte of the storage at which the packed elements start. apart: how many experts of the
    stored stack lie from one that is decoded to the next; not 1 where an expert is one block.
    """

    size: int = 64
    codebook: str = "nf4"
    outer: int = 0
    start: int = 0
    apart: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The storage of an 8-bit case: int8 with a scale per row, or fp8 with one per block.

    every_byte: infinities and NaN too. apart: as of `Blocks`.
    """

    encoding: str
    block: tuple[int, int] = (1, 1)
    every_byte: bool = False
    apart: int = 1


def placed(experts: Tensor, *, start: int = 0, apart: int = 1) -> Tensor:
    """The same experts [experts, ...], `apart` experts from each other and `start` elements into
    storage of their own.

    What lies between is neither written nor guarded: on a CPU it is address space alone.
    """
    shape = ((experts.shape[0] - 1) * apart + 1, *experts.shape[1:])
    elements = start + shape[0] * experts[0].numel()
    storage = torch.UntypedStorage(elements * experts.itemsize, device=experts.device)
    flat = torch.empty(0, dtype=experts.dtype, device=experts.device).set_(storage)
    whole = flat[start:].view(shape)
    whole[::apart] = experts
    return whole


def _case(
    name: str, experts: int, d1: int, d2: int, *tags: str, selected: int = 5, ids: str = "uniform"
) -> Case:
    return Case(
        name=name,
        tokens=selected,
        experts=experts,
        top_k=1,
        k_in=d1,
        n_out=d2,
        routing=RoutingKind(ids),
        tags=frozenset(tags or ("edge",)),
    )


UNKNOWN_IDS = "unknown-ids"
"""Of one expert: the case that asks for others as well."""
FAR_APART = "experts-far-apart"
"""Of experts of one block: the case whose storage holds more than 2^31 bytes."""

FOUR_BIT: Mapping[Case, Blocks] = {
    _case("nf4", 4, 12, 64, "smoke"): Blocks(),
    _case("nf4-nested", 7, 6, 40, "smoke"): Blocks(size=32, outer=5),
    _case("fp4", 5, 5, 6, "smoke"): Blocks(size=32, codebook="fp4"),
    _case("fp4-nested", 5, 8, 64, ids="one"): Blocks(codebook="fp4", outer=256),
    _case("blocks-straddle-rows", 4, 10, 48): Blocks(size=128),
    _case("blocks-straddle-experts", 7, 6, 40): Blocks(size=64),
    _case("block-of-several-experts", 9, 8, 32): Blocks(size=4096),
    _case("expert-of-odd-bytes", 5, 5, 6): Blocks(size=32, outer=2),
    _case("expert-of-half-a-word", 5, 6, 6): Blocks(size=64),
    _case("smallest", 1, 1, 2, selected=1, ids="one"): Blocks(size=32),
    _case("none-selected", 4, 8, 32, selected=0): Blocks(outer=4),
    _case("block-of-no-power-of-two", 4, 8, 30): Blocks(size=24),
    _case("block-of-half-words", 4, 5, 8): Blocks(size=12),
    _case("block-below-a-word", 3, 4, 12): Blocks(size=6),
    _case("block-of-nine-bytes", 3, 6, 12): Blocks(size=18, outer=3),
    _case("storage-starts-at-byte-1", 3, 4, 24): Blocks(start=1),
    _case("storage-starts-at-byte-5", 3, 4, 24): Blocks(start=5, outer=2),
    _case(UNKNOWN_IDS, 1, 6, 8, ids="one"): Blocks(size=32, outer=2),
    _case(FAR_APART, 2, 10, 15): Blocks(size=150, apart=_BEYOND_32_BITS // 75 + 1),
    _case("qwen3-gate-up", 128, 1536, 2048, "model", "bench", selected=128): Blocks(),
    _case("qwen3-gate-up-nested", 128, 1536, 2048, "model", "bench", selected=128): Blocks(
        outer=256
    ),
}

SCALED: Mapping[Case, Grid] = {
    _case("int8", 4, 10, 48, "smoke"): Grid(encoding="int8"),
    _case("e4m3fn-blocks", 3, 20, 24, "smoke"): Grid(encoding="e4m3fn", block=(16, 16)),
    _case("e5m2-blocks", 3, 12, 40, "smoke"): Grid(encoding="e5m2", block=(8, 32)),
    _case("e4m3fn-rows", 3, 9, 31): Grid(encoding="e4m3fn", block=(1, 31)),
    _case("e4m3fn-experts", 5, 7, 16): Grid(encoding="e4m3fn", block=(7, 16)),
    _case("e5m2-columns", 3, 12, 17): Grid(encoding="e5m2", block=(12, 1)),
    _case("int8-tails", 5, 3, 1): Grid(encoding="int8"),
    _case("int8-wide", 2, 2, 1030): Grid(encoding="int8"),
    _case("int8-one-element", 1, 1, 1, selected=1, ids="one"): Grid(encoding="int8"),
    _case("e4m3fn-blocks-in-tiles", 2, 7, 600): Grid(encoding="e4m3fn", block=(2, 100)),
    _case("e4m3fn-every-byte", 2, 16, 48): Grid(encoding="e4m3fn", block=(8, 16), every_byte=True),
    _case("e5m2-every-byte", 2, 16, 48): Grid(encoding="e5m2", block=(8, 16), every_byte=True),
    _case(UNKNOWN_IDS, 1, 6, 8, ids="one"): Grid(encoding="e4m3fn", block=(4, 8)),
    _case(FAR_APART, 2, 33, 64): Grid(
        encoding="e5m2", block=(33, 64), apart=_BEYOND_32_BITS // 2112 + 1
    ),
    _case("e4m3fn-qwen3-gate-up", 128, 1536, 2048, "model", "bench", selected=128): Grid(
        encoding="e4m3fn", block=(128, 128)
    ),
}
