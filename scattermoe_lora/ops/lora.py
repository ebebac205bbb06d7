"""Routed LoRA products: the forward product and the input gradient, on any of their paths.

    forward     y  = x W + t B^T + b       t  = s x A^T
    input grad  dx = dy W^T + yb A         yb = s dy B

The input gradient is the forward product of dy with weight and adapter transposed.
"""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from .._arguments import check_type
from .._launch import Launch
from .._row_tiles import row_tile_range
from .._sizes import ceil_div, next_power_of_two
from ..plan import Device, Operation, Path, Plan, Precision, Tile, check_height
from ..routing import Routing, RowOrder
from ..weights import BlockedWeight, LoRAWeights
from ._check import (
    check_bias,
    check_lora,
    check_plan,
    check_row_scale,
    check_rows,
    check_target,
    check_weight,
)
from ._tile import coefficients, matrix, stack
from .fused import fused_kernel
from .grouped_mm import by_expert, grouped, grouped_product, zero_dropped
from .product import (
    Rows,
    dense,
    gathered,
    launch_product,
    product_plan,
    rank_block,
)
from .rows import combine

HALVED_BYTES = 2**25
"""Bytes of summed rows from which they are made in two halves: 32 MiB, worth a second launch."""


def lora_forward(
    x: Tensor,
    weight: Tensor | BlockedWeight,
    lora: LoRAWeights,
    routing: Routing,
    *,
    source: RowOrder,
    target: RowOrder,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """y[i] = g[i] (x[i] W[e] + s (x[i] A[e]^T) B[e]^T + b[e]) for every routed row i of expert e.

    Args:
        x: [routing.row_count(source), K], fp32, fp16 or bf16, any strides.
        weight: [experts, K, N], dtype of x, any strides.
        lora: a [experts, R, K], b [experts, N, R]; dtype of x, or fp32 and rounded to it.
        bias: [experts, N]. row_scale: g, `rows` coefficients in slot order.

    Returns:
        y [rows, N] in `target` order, and t = s x A^T [rows, R] in expert order, not scaled by g.

    Raises:
        TypeError, ValueError: an operand does not fit, or the plan's path does not take it.
    """
    check_target(target)
    check_rows("x", x, routing, source)
    check_weight("weight", weight, routing, width=x.shape[1], dtype=x.dtype, device=x.device)
    check_lora(lora, routing, weight.shape[1], weight.shape[2], x)
    check_bias(bias, routing, weight.shape[2], x.device)
    check_row_scale("row_scale", row_scale, routing)
    check_plan(plan)
    rows = Rows(source, target, bias, row_scale)
    operation = Operation.LORA_FORWARD
    return lora_rows(x, weight, lora.a, lora.b, lora.scaling, routing, operation, rows, plan)


def lora_input_grad(
    dy: Tensor,
    weight: Tensor | BlockedWeight,
    lora: LoRAWeights,
    routing: Routing,
    *,
    source: RowOrder,
    target: RowOrder,
    row_scale: Tensor | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """dx[i] = g[i] (dy[i] W[e]^T + s (dy[i] B[e]) A[e]) for every routed row i of expert e.

    Args:
        dy: [routing.row_count(source), N]; source TOKEN where the rows of a token share one
            gradient.
        weight, lora: those of the forward product.

    Returns:
        dx [rows, K] in `target` order, or with target TOKEN its sum over the choices of a token,
        [tokens, K]; and yb = s dy B [rows, R] in expert order, not scaled by g.
    """
    check_type("target", target, RowOrder)
    check_rows("dy", dy, routing, source)
    check_weight("weight", weight, routing, dtype=dy.dtype, device=dy.device, x_name="dy")
    _, k, n = weight.shape
    if n != dy.shape[1]:
        raise ValueError(f"weight has output width {n} but dy has width {dy.shape[1]}")
    check_lora(lora, routing, k, n, dy, x_name="dy", k_name="the weight", n_name="dy")
    check_row_scale("row_scale", row_scale, routing)
    check_plan(plan)
    rows = Rows(source, target, None, row_scale)
    down, up = lora.b.mT, lora.a.mT
    operation = Operation.LORA_INPUT_GRAD
    return lora_rows(dy, weight.mT, down, up, lora.scaling, routing, operation, rows, plan)


def lora_rows(
    x: Tensor,
    weight: Tensor | BlockedWeight,
    down: Tensor,
    up: Tensor,
    scaling: float,
    routing: Routing,
    operation: Operation,
    rows: Rows,
    plan: Plan | None,
) -> tuple[Tensor, Tensor]:
    """x W + t up^T with t = scaling x down^T, and t, of operands that were checked.

    down [experts, R, K], up [experts, N, R]. Target TOKEN sums the rows of a token.
    """
    if plan is None:
        plan = product_plan(x, weight, routing, operation, down.shape[1])
    else:
        check_height(plan, x.dtype, down.shape[1], Device.of(x.device))
    down, up = as_operand(down, x.dtype), as_operand(up, x.dtype)
    if plan.path is Path.EPILOGUE:
        x, rows = gathered(x, routing, rows, plan)
        low = _shrink(x, down, scaling, routing, rows.source, plan)
        if rows.target is RowOrder.TOKEN:
            return _summed(x, weight, low, up, routing, rows, plan), low
        pair = (low, up.mT)
        return launch_product(
            x, weight, routing, plan.tile, plan.precision, rows, low_rank=pair
        ), low
    summed = rows.target is RowOrder.TOKEN
    if summed:
        rows = rows._replace(target=RowOrder.SLOT)
    match plan.path:
        case Path.FUSED:
            y, low = _fused(x, dense(weight, plan), down, up, scaling, routing, rows, plan)
        case Path.SPLIT:
            low = _shrink(x, down, scaling, routing, rows.source, plan)
            y = launch_product(x, weight, routing, plan.tile, plan.precision, rows)
            rows = rows._replace(source=RowOrder.EXPERT, bias=None)
            expand = replace(plan.tile, block_k=rank_block(down.shape[1]), descriptor=False)
            y = y.add_(launch_product(low, up.mT, routing, expand, plan.precision, rows))
        case Path.GROUPED_MM:
            x = by_expert(x, routing, rows.source)
            low = zero_dropped(grouped(x, down.mT, routing) * scaling, routing)
            rows = rows._replace(source=RowOrder.EXPERT)
            y = grouped_product(x, dense(weight, plan), routing, **rows._asdict())
            rows = rows._replace(bias=None)
            y = y.add_(grouped_product(low, up.mT, routing, **rows._asdict()))
        case _:
            raise ValueError(f"{operation.value} has no path {plan.path.value!r}")
    return combine(y, routing) if summed else y, low


def _summed(
    x: Tensor,
    weight: Tensor | BlockedWeight,
    low: Tensor,
    up: Tensor,
    routing: Routing,
    rows: Rows,
    plan: Plan,
) -> Tensor:
    """The product, summed over the choices of a token: [tokens, N].

    From HALVED_BYTES on it is made one half of the columns at a time, which keeps the [rows, N]
    operand of the sum at half its size. Blocks of experts would be decoded once per half, so they
    are not split.
    """
    rows = rows._replace(target=RowOrder.SLOT)
    width = weight.shape[2]
    out = x.new_empty((routing.tokens, width))
    large = routing.rows * width * x.itemsize >= HALVED_BYTES
    halved = weight if isinstance(weight, Tensor) and large and width % 512 == 0 else None
    columns = width if halved is None else width // 2
    for start in range(0, width, columns):
        part = slice(start, start + columns)
        block = weight if halved is None else halved[:, :, part]
        pair = (low, up[:, part].mT)
        y = launch_product(x, block, routing, plan.tile, plan.precision, rows, low_rank=pair)
        combine(y, routing, out=out[:, part])
        del y
    return out


def as_operand(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor in the dtype of the product, copied where no matrix dimension is contiguous."""
    if factor.dtype != dtype:
        factor = factor.to(dtype)
    return factor if 1 in factor.stride()[-2:] else factor.contiguous()


def _shrink(
    x: Tensor, down: Tensor, scaling: float, routing: Routing, source: RowOrder, plan: Plan
) -> Tensor:
    if plan.shrink is None:
        raise ValueError(f"a plan on the {plan.path.value} path needs a shrink tile")
    rows = Rows(source, RowOrder.EXPERT)
    return launch_product(x, down.mT, routing, plan.shrink, plan.precision, rows, scale=scaling)


def _fused(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scaling: float,
    routing: Routing,
    rows: Rows,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    tile = plan.tile
    if tile.descriptor:
        raise ValueError(
            "the fused path loads W through pointers, but the plan asks for a tensor map"
        )
    width, rank = weight.shape[2], down.shape[1]
    y = x.new_empty((routing.rows, width))
    low = x.new_empty((routing.rows, rank))
    if routing.rows == 0:
        return y, low
    bias = rows.bias
    pointers = x.data_ptr() | weight.data_ptr() | down.data_ptr() | up.data_ptr()
    pointers |= routing.slots.data_ptr()
    by_expert = rows.source is RowOrder.EXPERT
    bias_form = None
    if bias is not None:
        bias_form = (bias.dtype, bias.stride())
        pointers |= bias.data_ptr()
    row_scale, scale_form, scale_pointer = coefficients(rows.row_scale)
    pointers |= scale_pointer
    first_entry, count = row_tile_range(routing.rows, routing.experts, tile.block_m)
    _fused_launch(
        tile, plan.precision, by_expert, rows.target is RowOrder.EXPERT, rank,
        x.dtype, x.stride(), weight.stride(), down.stride(), up.stride(), weight.shape[1], width,
        routing.fan_out(rows.source), bias_form, scale_form,
    )(
        (count * ceil_div(width, tile.block_n), 1, 1),
        x.device,
        (
            matrix(x),
            stack(weight),
            stack(down.mT),
            stack(up.mT),
            None if bias is None else matrix(bias),
            row_scale,
            matrix(y),
            matrix(low),
            routing.slots,
            routing.tiles,
            first_entry,
            routing.fan_out(rows.source),
            weight.shape[1],
            width,
            rank,
            float(scaling),
        ),
        pointers,
    )  # fmt: skip
    return y, low


@lru_cache(maxsize=4096)
def _fused_launch(
    tile: Tile,
    precision: Precision,
    x_by_expert: bool,  # noqa: FBT001
    y_by_expert: bool,  # noqa: FBT001
    rank: int,
    *form: object,
) -> Launch:
    del form
    return Launch(
        fused_kernel,
        warps=tile.warps,
        stages=tile.stages,
        X_BY_EXPERT=x_by_expert,
        Y_BY_EXPERT=y_by_expert,
        PRECISION=precision.value,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BLOCK_R=max(next_power_of_two(rank), 16),
    )
