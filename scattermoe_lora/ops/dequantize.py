"""Dense experts from 4-bit storage, gathered, decoded and scaled in one pass.

    out[i, j] = round(codebook[nibble(e, j)] scale((e n + j) // blocksize)),   e = expert_ids[i]

    out       [selected, n]    n = d1 d2 elements per expert; fp32, fp16 or bf16
    packed    [experts n / 2]  bytes; an even element is the high nibble of its byte
    absmax    [blocks]         scale(b) = absmax[b] in fp32, or with nested statistics
                               scale(b) = code[absmax[b]] outer[b // outer blocksize] + offset

Blocks run over the flattened stack: they may straddle rows and experts. The value that is stored is
the fp32 product rounded once. The nested scale (absmax uint8) is rounded after the multiplication
and after the addition, as two separate operations round; contracted into one multiply-add, 8% of
the scales would differ in their last bit. The launcher therefore turns contraction off
(`enable_fp_fusion=False`): the PTX then says mul.rn and add.rn, which must not be contracted.

One load takes UNIT elements that share a block: a 32-bit word of 8, or a byte of 2 where an expert,
a block or the storage does not start on whole words. A thread's word becomes one 16-byte store of 8
16-bit values, and neighbouring threads read neighbouring words, so loads and stores are both
coalesced with no exchange between threads. The codebook lies in shared memory (`tl.gather`), 16
entries in 16 banks, so look-ups do not conflict.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._interpreter import require_supported
from .._sizes import ceil_div, power_of_two
from ..plan import Device
from ._selection import Selection, on_device


@dataclass(frozen=True, slots=True, kw_only=True)
class DequantizePlan:
    """Launch knobs of a decoding kernel: elements that one program writes, and its warps.

    Raises:
        ValueError: a knob is not a power of two, or block is below 64.
    """

    block: int
    warps: int

    def __post_init__(self) -> None:
        for name in ("block", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if self.block < 64:
            raise ValueError(f"block must be at least 64 elements, got {self.block}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NestedScales:
    """Statistics of statistics: scale(b) = code[q[b]] absmax[b // blocksize] + offset.

    code: fp32 [256]. absmax: fp32 [ceil(blocks / blocksize)]. offset: fp32, one element.
    """

    code: Tensor
    absmax: Tensor
    offset: Tensor
    blocksize: int


@triton.jit(do_not_specialize=["experts", "first", "items"])
def dequantize_four_bit_kernel(
    out,
    packed,
    expert_ids,
    absmax,
    codebook,
    outer_code,
    outer_absmax,
    outer_offset,
    experts,
    first,
    items,
    UNIT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    OUTER_BLOCKSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK items of UNIT elements of one selected expert; `items` per expert."""
    slot = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if expert_ids is None:
        expert = slot + first
    else:
        expert = tl.load(expert_ids + slot).to(tl.int64)
    known = (expert >= 0) & (expert < experts)
    source = tl.where(known, expert, 0) * items + start
    item = tl.arange(0, BLOCK)
    inside = item < tl.minimum(items - start, BLOCK).to(tl.int32)
    words = tl.load(packed + source + item, mask=inside, other=0).to(tl.int32)

    # Block indices are a 64-bit base per program and a 32-bit distance per item.
    element = source * UNIT
    base = element // BLOCKSIZE
    distance = ((element % BLOCKSIZE).to(tl.int32) + item * UNIT) // BLOCKSIZE
    scale = tl.load(absmax + base + distance, mask=inside, other=0)
    if OUTER_BLOCKSIZE != 0:
        outer_distance = ((base % OUTER_BLOCKSIZE).to(tl.int32) + distance) // OUTER_BLOCKSIZE
        outer = tl.load(
            outer_absmax + base // OUTER_BLOCKSIZE + outer_distance, mask=inside, other=0.0
        )
        scale = tl.load(outer_code + scale.to(tl.int32)) * outer + tl.load(outer_offset)
    scale = tl.where(known, scale, float("nan"))

    # Element j of a word lies in byte j // 2, in the high nibble where j is even.
    j = tl.arange(0, UNIT)
    nibble = (words[:, None] >> ((j * 4) ^ 4)[None, :]) & 15
    table = tl.load(codebook + tl.arange(0, 16))
    code = tl.gather(table, tl.reshape(nibble, BLOCK * UNIT), 0)
    value = tl.reshape(code, BLOCK, UNIT) * scale[:, None]
    target = out + (slot * items + start) * UNIT + item[:, None] * UNIT + j[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=inside[:, None])


def default_dequantize_plan(elements: int, device: Device) -> DequantizePlan:
    """The plan for experts of `elements` elements each."""
    largest = 2**16 if device.interpreted else 2**12
    block = power_of_two(elements, low=64, high=largest)
    return DequantizePlan(block=block, warps=4)


def dequantize_four_bit(
    packed: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    selection: Selection,
    *,
    blocksize: int,
    nested: NestedScales | None,
    experts: int,
    out: Tensor,
    plan: DequantizePlan | None = None,
) -> Tensor:
    """Decode the selected experts into `out` [selected, d1, d2]; operands as in `quant.FourBit`.

    Returns:
        `out`.
    """
    elements = out.shape[1] * out.shape[2]
    require_supported(out.dtype, out.device)
    if out.numel() == 0:
        return out
    if plan is None:
        plan = default_dequantize_plan(elements, Device.of(out.device))
    by_word = elements % 8 == 0 and blocksize % 8 == 0 and packed.storage_offset() % 4 == 0
    unit = 8 if by_word else 2
    items = elements // unit
    block = plan.block // unit
    with on_device(out.device):
        dequantize_four_bit_kernel[(ceil_div(items, block), selection.count)](
            out,
            packed.view(torch.int32) if by_word else packed,
            selection.ids,
            absmax,
            codebook,
            None if nested is None else nested.code,
            None if nested is None else nested.absmax,
            None if nested is None else nested.offset,
            experts,
            selection.first,
            items,
            UNIT=unit,
            BLOCKSIZE=blocksize,
            OUTER_BLOCKSIZE=0 if nested is None else nested.blocksize,
            BLOCK=block,
            num_warps=plan.warps,
            enable_fp_fusion=False,
        )
    return out
