"""Dense experts from 8-bit storage with scales: int8 row-wise, fp8 with any grid of scales.

    out[i, r, c] = round((q[e, r, c] scale[e, r // rows, c // columns]) step),   e = expert_ids[i]

    out    [selected, d1, d2]   fp32, fp16 or bf16
    q      [experts, d1, d2]    int8, float8_e4m3fn or float8_e5m2, as bytes
    scale  [experts, g1, g2]    fp32, one per block of rows x columns elements
    step   1 for fp8, 1/127 for int8 whose scale is the largest magnitude of the row

Each multiplication rounds to fp32; the result is rounded once more to the dtype of `out`. fp8 is
decoded by its bits, through fp16, which holds both formats exactly: it works on GPUs without fp8
and in the interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._interpreter import require_supported
from .._sizes import ceil_div, next_power_of_two, power_of_two
from ..plan import Device
from ._selection import Selection, on_device
from .dequantize import DequantizePlan

ENCODINGS = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3fn", torch.float8_e5m2: "e5m2"}


@triton.jit(do_not_specialize=["experts", "first", "d1", "rows", "columns", "g1", "g2", "step"])
def dequantize_scaled_kernel(
    out,
    data,
    expert_ids,
    scale,
    experts,
    first,
    d1,
    d2,
    rows,
    columns,
    g1,
    g2,
    step,
    ENCODING: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A [BLOCK_R, BLOCK_C] tile of one selected expert."""
    slot = tl.program_id(1).to(tl.int64)
    if expert_ids is None:
        expert = slot + first
    else:
        expert = tl.load(expert_ids + slot).to(tl.int64)
    known = (expert >= 0) & (expert < experts)
    expert = tl.where(known, expert, 0)
    column_blocks = tl.cdiv(d2, BLOCK_C)
    r_first = tl.program_id(0) // column_blocks * BLOCK_R
    c_first = tl.program_id(0) % column_blocks * BLOCK_C
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    inside = (r < d1 - r_first)[:, None] & (c < d2 - c_first)[None, :]

    # Every place is a 64-bit corner of the tile and a 32-bit distance from it.
    corner = r_first.to(tl.int64) * d2 + c_first
    distance = r[:, None] * d2 + c[None, :]
    bits = tl.load(data + expert * d1 * d2 + corner + distance, mask=inside, other=0)
    group_r = r_first // rows
    group_c = c_first // columns
    group_distance = ((r_first + r) // rows - group_r)[:, None] * g2
    group_distance += ((c_first + c) // columns - group_c)[None, :]
    group = expert * g1 * g2 + group_r.to(tl.int64) * g2 + group_c
    factor = tl.load(scale + group + group_distance, mask=inside, other=0.0)
    if ENCODING == "int8":
        value = bits.to(tl.int8, bitcast=True).to(tl.float32)
    elif ENCODING == "e5m2":
        value = (bits.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        # Sign and seven bits moved to fp16's places: exponent bias 15 for 7, so 2^8 too small.
        magnitude = bits.to(tl.uint16) & 0x7F
        half = ((bits.to(tl.uint16) & 0x80) << 8) | (magnitude << 7)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        value = tl.where(magnitude == 0x7F, float("nan"), value)
    value = value * factor * step
    value = tl.where(known, value, float("nan"))
    tl.store(out + slot * d1 * d2 + corner + distance, value.to(out.dtype.element_ty), mask=inside)


def default_scaled_plan(elements: int, device: Device) -> DequantizePlan:
    """The plan for experts of `elements` elements each."""
    largest = 2**16 if device.interpreted else 2**12
    block = power_of_two(elements, low=64, high=largest)
    return DequantizePlan(block=block, warps=4)


def dequantize_scaled(
    data: Tensor,
    scale: Tensor,
    selection: Selection,
    *,
    rows: int,
    columns: int,
    step: float,
    out: Tensor,
    plan: DequantizePlan | None = None,
) -> Tensor:
    """Decode the selected experts into `out` [selected, d1, d2]; operands as in `quant.Float8`.

    Returns:
        `out`.
    """
    require_supported(out.dtype, out.device)
    if out.numel() == 0:
        return out
    experts, d1, d2 = data.shape
    if plan is None:
        plan = default_scaled_plan(d1 * d2, Device.of(out.device))
    block_c = min(next_power_of_two(d2), plan.block, 1024)
    block_r = plan.block // block_c
    with on_device(out.device):
        dequantize_scaled_kernel[(ceil_div(d1, block_r) * ceil_div(d2, block_c), selection.count)](
            out,
            data.view(torch.uint8),
            selection.ids,
            scale,
            experts,
            selection.first,
            d1,
            d2,
            rows,
            columns,
            scale.shape[1],
            scale.shape[2],
            float(step),
            ENCODING=ENCODINGS[data.dtype],
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=plan.warps,
            enable_fp_fusion=False,
        )
    return out
