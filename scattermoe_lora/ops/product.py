"""Launcher of the routed product."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._launch import Launch
from .._row_tiles import row_tile_range
from .._sizes import ceil_div, next_power_of_two
from ..plan import (
    Operation,
    Path,
    Plan,
    Precision,
    Tile,
    current_precision,
)
from ..plan_table import plan_for
from ..routing import Routing, RowOrder
from ..weights import BlockedWeight
from ._check import (
    addressable,
    check_bias,
    check_plan,
    check_row_scale,
    check_rows,
    check_target,
    check_tensor,
    check_weight,
    w_map,
)
from ._tile import Matrix, Stack, coefficients, matrix, stack
from .grouped_mm import grouped_product
from .rows import group
from .scatter2scatter import scatter2scatter_kernel


class Rows(NamedTuple):
    """What happens to the rows of a product: their orders, a bias per expert, a factor per slot."""

    source: RowOrder
    target: RowOrder
    bias: Tensor | None = None
    row_scale: Tensor | None = None


def scatter2scatter(
    x: Tensor,
    weight: Tensor | BlockedWeight,
    routing: Routing,
    *,
    source: RowOrder,
    target: RowOrder,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """y[i] = g[i] (x[i] W[e] + b[e]) for every routed row i of expert e; dropped rows are zero.

    Args:
        x: [routing.row_count(source), K], fp32, fp16 or bf16, any strides.
        weight: [experts, K, N], dtype of x, any strides; stored [experts, N, K] it is passed as its
            mT.
        source: order of the rows of x.
        target: order of the rows of the result, SLOT or EXPERT.
        bias: [experts, N], any floating dtype.
        row_scale: g, `rows` coefficients in slot order, any floating dtype.

    Returns:
        [rows, N] in the dtype of x.

    Raises:
        TypeError, ValueError: an operand does not fit; the message names it and both numbers.
    """
    check_rows("x", x, routing, source)
    check_target(target)
    check_weight("weight", weight, routing, width=x.shape[1], dtype=x.dtype, device=x.device)
    check_bias(bias, routing, weight.shape[2], x.device)
    check_row_scale("row_scale", row_scale, routing)
    check_plan(plan)
    rows = Rows(source, target, bias, row_scale)
    return product_rows(x, weight, routing, rows, plan)


def product_rows(
    x: Tensor,
    weight: Tensor | BlockedWeight,
    routing: Routing,
    rows: Rows,
    plan: Plan | None,
) -> Tensor:
    """`scatter2scatter` of operands that were checked."""
    if plan is None:
        plan = product_plan(x, weight, routing, Operation.SCATTER2SCATTER)
    if plan.path is Path.GROUPED_MM:
        return grouped_product(x, dense(weight, plan), routing, **rows._asdict())
    if plan.path is not Path.TILES:
        raise ValueError(f"scatter2scatter has no path {plan.path.value!r}")
    x, rows = gathered(x, routing, rows, plan)
    return launch_product(x, weight, routing, plan.tile, plan.precision, rows)


def shrink(
    x: Tensor,
    factor: Tensor,
    routing: Routing,
    *,
    scaling: float,
    source: RowOrder,
    row_scale: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """scaling x[i] F[e]^T for every routed row, in expert order: the narrow half of a LoRA product.

    Args:
        x: [routing.row_count(source), K].
        factor: [experts, rank, K], dtype of x: A for the forward product, B^T for the gradient.

    Returns:
        [rows, rank] in the dtype of x, rounded once.
    """
    check_rows("x", x, routing, source)
    check_tensor("factor", factor)
    if factor.ndim != 3:
        raise ValueError(f"factor must be [experts, rank, k], got shape {list(factor.shape)}")
    check_weight("factor", factor.mT, routing, width=x.shape[1], dtype=x.dtype, device=x.device)
    check_row_scale("row_scale", row_scale, routing)
    check_plan(plan)
    if plan is None:
        plan = product_plan(x, factor.mT, routing, Operation.SHRINK, factor.shape[1])
    rows = Rows(source, RowOrder.EXPERT, None, row_scale)
    return launch_product(x, factor.mT, routing, plan.tile, plan.precision, rows, scale=scaling)


def product_plan(
    x: Tensor,
    weight: Tensor | BlockedWeight,
    routing: Routing,
    operation: Operation,
    rank: int = 0,
) -> Plan:
    """The plan for a product of operands that were checked."""
    experts, k, n = weight.shape
    precision = current_precision(x.dtype)
    layout = w_map(weight) if isinstance(weight, Tensor) else weight.map
    per_expert = next_power_of_two(routing.rows // experts)
    return plan_for(
        operation, per_expert, experts, k, n, rank, x.dtype, precision, layout, x.device
    )


def gathered(x: Tensor, routing: Routing, rows: Rows, plan: Plan) -> tuple[Tensor, Rows]:
    """x, copied into expert order where the plan says so, and the rows of the product to launch."""
    if not plan.gather or rows.source is RowOrder.EXPERT:
        return x, rows
    return group(x, routing, source=rows.source), rows._replace(source=RowOrder.EXPERT)


def dense(weight: Tensor | BlockedWeight, plan: Plan) -> Tensor:
    """The weight as a tensor; a path that cannot take blocks refuses them."""
    if isinstance(weight, Tensor):
        return weight
    raise ValueError(f"the {plan.path.value} path takes a dense weight, not blocks of experts")


def launch_product(
    x: Tensor,
    weight: Tensor | BlockedWeight,
    routing: Routing,
    tile: Tile,
    precision: Precision,
    rows: Rows,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The routed product [rows, N] of operands that were checked, by the kernel.

    low_rank: (L [rows, rank] in expert order, R [experts, rank, N]), the term L[i] R[e].
    """
    y = x.new_empty((routing.rows, weight.shape[2]))
    if routing.rows == 0:
        return y
    blocks = ((0, weight),) if isinstance(weight, Tensor) else weight.blocks(x.dtype)
    for first_expert, block in blocks:
        _launch(x, block, y, routing, tile, precision, rows, low_rank, scale, first_expert)
    return y


def _launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    routing: Routing,
    tile: Tile,
    precision: Precision,
    rows: Rows,
    low_rank: tuple[Tensor, Tensor] | None,
    scale: float,
    first_expert: int,
) -> None:
    layout = w_map(weight) if tile.descriptor else ""
    if tile.descriptor and not layout:
        raise ValueError(
            "the plan loads W through a tensor map, but W has shape "
            f"{list(weight.shape)}, strides {list(weight.stride())} and cannot be addressed by one"
        )
    source, target, bias, row_scale = rows
    by_expert = source is RowOrder.EXPERT
    x_map = tile.x_descriptor and by_expert and addressable(x)
    block_experts, k, n = weight.shape
    fan_out = routing.fan_out(source)
    slots = routing.slots
    pointers = x.data_ptr() | weight.data_ptr() | slots.data_ptr()
    left = right = left_form = right_form = bias_form = None
    rank = 0
    if low_rank is not None:
        low, up = low_rank
        rank = up.shape[1]
        left_form, right_form = low.stride(), up.stride()
        left, right = Matrix(low, *left_form), Stack(up, *right_form)
        pointers |= up.data_ptr()
    if bias is not None:
        bias_form = (bias.dtype, bias.stride())
        pointers |= bias.data_ptr()
    row_scale, scale_form, scale_pointer = coefficients(row_scale)
    pointers |= scale_pointer
    launch = _product(
        tile, precision, layout, x_map, by_expert, target is RowOrder.EXPERT, rank, k, n, fan_out,
        x.dtype, x.stride(), weight.stride(), left_form, right_form, bias_form, scale_form,
    )  # fmt: skip
    first_entry, count = row_tile_range(routing.rows, routing.experts, tile.block_m)
    launch(
        (count * ceil_div(n, tile.block_n), 1, 1),
        x.device,
        (
            row_operand(x, tile) if x_map else matrix(x),
            weight_operand(weight, layout, tile),
            None if bias is None else matrix(bias),
            left,
            right,
            row_scale,
            matrix(y),
            slots,
            routing.tiles,
            first_entry,
            first_expert,
            first_expert + block_experts,
            fan_out,
            k,
            n,
            rank,
            float(scale),
        ),
        pointers,
    )


@lru_cache(maxsize=4096)
def _product(
    tile: Tile,
    precision: Precision,
    layout: str,
    x_map: bool,  # noqa: FBT001
    by_expert: bool,  # noqa: FBT001
    y_by_expert: bool,  # noqa: FBT001
    rank: int,
    k: int,
    *form: object,
) -> Launch:
    """The launch for a form; form: what the kernel specialises on besides."""
    del form
    return Launch(
        scatter2scatter_kernel,
        warps=tile.warps,
        stages=tile.stages,
        X_BY_EXPERT=by_expert,
        Y_BY_EXPERT=y_by_expert,
        X_DESCRIPTOR=x_map,
        W_DESCRIPTOR=layout,
        EVEN_K=k % tile.block_k == 0,
        PRECISION=precision.value,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BLOCK_R=rank_block(rank),
    )


def rank_block(rank: int) -> int:
    """Ranks per step of the low-rank term: a power of two of at least 16 and at most 64."""
    return min(max(next_power_of_two(max(rank, 1)), 16), 64)


def weight_operand(weight: Tensor, layout: str, tile: Tile) -> Stack | TensorDescriptor:
    """W as the kernel takes it: pointer and strides, or a tensor map over [experts, ., .]."""
    if not layout:
        return stack(weight)
    if layout == "nk":
        return tensor_map(weight.mT, (1, tile.block_n, tile.block_k))
    return tensor_map(weight, (1, tile.block_k, tile.block_n))


def row_operand(x: Tensor, tile: Tile) -> TensorDescriptor:
    """Rows in expert order as a tensor map [rows, K]."""
    return tensor_map(x, (tile.block_m, tile.block_k))


def tensor_map(base: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """A tensor map of `base` with blocks of that shape; Triton checks one of each form only."""
    described: TensorDescriptor = object.__new__(TensorDescriptor)
    described.__dict__.update(_described(base.shape, base.stride(), base.dtype, block), base=base)
    return described


@lru_cache(maxsize=4096)
def _described(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, block: tuple[int, ...]
) -> dict[str, Any]:
    like = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    return vars(TensorDescriptor(like, list(shape), list(strides), list(block)))
