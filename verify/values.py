"""Kinds of values that a case is drawn with, beside those of unit variance.

offset      x has a mean of one
scales      weight, B and bias of every expert times a power of two of its own, over many decades;
            rows of dy with an expert times the root of its inverse
tiny-x      x and bias so small that products are subnormal numbers; tiny-dy likewise
huge-x      x and bias so large that products come near the largest finite number; huge-dy likewise
not-finite  a NaN and an infinity in rows of x, and in rows of dy
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .cases import Case
from .references import Groups

_DECADES: Mapping[torch.dtype, int] = {torch.float16: 6, torch.bfloat16: 40, torch.float32: 40}
"""Largest exponent of an expert's scale; sums over thousands of rows must stay finite."""
_HUGE: Mapping[torch.dtype, tuple[int, int]] = {
    torch.float16: (11, -8),
    torch.bfloat16: (122, -16),
    torch.float32: (122, -16),
}
"""Exponents of the huge operand and of the other one, so that sums of products stay finite with a
scaling of at most 2 and where they are at most 4 times their operand; else it is as much smaller.
"""


def valued(
    tensors: Mapping[str, Tensor], case: Case, dtype: torch.dtype, top_k_index: Tensor
) -> dict[str, Tensor]:
    """Operands of a linear problem, drawn with unit variance, with the values of the case."""
    found = dict(tensors)
    kind, _, operand = case.values.partition("-")
    if kind == "offset":
        found["x"] = found["x"] + 1.0
    elif kind == "scales":
        found |= _scaled(found, case, dtype, top_k_index)
    elif kind in ("tiny", "huge"):
        other = {"x": "dy", "dy": "x"}[operand]
        own, others = _huge(dtype, case, operand) if kind == "huge" else (_tiny(dtype), 0)
        found[operand] = found[operand] * 2.0**own
        found[other] = found[other] * 2.0**others
        found["bias"] = found["bias"] * 2.0 ** (own if operand == "x" else others)
    elif kind == "not":
        found["x"] = poisoned(found["x"])
        if not case.drops:
            found["dy"] = poisoned(found["dy"])
    return found


def poisoned(rows: Tensor) -> Tensor:
    """An infinity in row 3, and a NaN in row 0, which masked rows are often read from."""
    rows = rows.clone()
    if rows.numel():
        count, width = rows.shape
        rows[3 % count, width // 2] = -torch.inf
        rows[0, -1] = torch.nan
    return rows


def _huge(dtype: torch.dtype, case: Case, operand: str) -> tuple[int, int]:
    """The exponents of _HUGE, with what is too large off a scaling or a sum taken off the huge
    operand. The sums of dy are dy B, before and after scaling, dy W^T, and that over the rows.
    """
    own, others = _HUGE[dtype]
    excess = math.log2(abs(case.scaling)) - 1
    if operand == "dy":
        low = case.n_out / case.rank
        rows = case.rows if case.bias else 1
        largest = max(low, low / case.scaling**2, case.n_out / case.k_in, rows)
        excess = max(excess, math.log2(largest) / 2 - 2)
    return own - max(0, math.ceil(excess)), others


def _tiny(dtype: torch.dtype) -> int:
    """The exponent of a quarter of the smallest normal number."""
    _, exponent = math.frexp(torch.finfo(dtype).smallest_normal)
    return exponent - 3


def _scaled(
    tensors: Mapping[str, Tensor], case: Case, dtype: torch.dtype, top_k_index: Tensor
) -> dict[str, Tensor]:
    largest = _DECADES[dtype]
    steps = torch.linspace(-largest, largest, case.experts).div(2).round().mul(2)
    order = torch.randperm(case.experts, generator=torch.Generator().manual_seed(case.seed))
    exponents = steps[order] if case.experts > 1 else steps.abs()
    device = tensors["weight"].device
    scale = torch.exp2(exponents.to(device))
    found = {name: tensors[name] * scale[:, None, None] for name in ("weight", "lora_b")}
    found["bias"] = tensors["bias"] * scale[:, None]
    if case.dy_order != "TOKEN":
        labels = Groups.of(top_k_index, case.experts).labels(case.dy_order).to(device)
        inverse = torch.cat([scale.rsqrt(), scale.new_ones(1)])
        found["dy"] = tensors["dy"] * inverse[labels][:, None]
    return found
