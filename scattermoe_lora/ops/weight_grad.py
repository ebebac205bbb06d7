"""Weight gradients of routed products, one owner per output tile.

    dA[e] = sum over rows of (s dY B)^T X      dB[e] = sum over rows of dY^T (s X A^T)
    dW[e] = sum over rows of X^T dY            db[e] = sum over rows of dY

The rows are those of expert e; an expert without rows gets exact zeros.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import Launch
from .._sizes import ceil_div, next_power_of_two
from ..plan import Operation, Path, Plan, current_precision
from ..plan_table import plan_for
from ..routing import Routing, RowOrder
from ..weights import LoRAWeights
from ._check import check_lora, check_plan, check_row_scale, check_rows, check_same
from ._tile import Matrix, coefficients, matrix, row_of_slot
from .gram import launch_gram
from .grouped_mm import by_expert, grouped_gram, scaled
from .lora import as_operand
from .recompute import launch_recompute

_BIAS_COLUMNS = 128


def lora_weight_grad(
    x: Tensor,
    dy: Tensor,
    xa: Tensor | None,
    yb: Tensor | None,
    lora: LoRAWeights,
    routing: Routing,
    *,
    x_order: RowOrder,
    dy_order: RowOrder,
    row_scale: Tensor | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """dA[e] = sum of g yb^T x and dB[e] = sum of g dy^T xa over the rows of expert e.

    Args:
        x: [row_count(x_order), K]; dy: [row_count(dy_order), N], dtype of x.
        xa: s x A^T [rows, R] and yb: s dy B [rows, R], in expert order, as the products returned
            them; both may be None on the recompute path, which does not read them.
        row_scale: g, `rows` coefficients in slot order (the gates that scaled y).

    Returns:
        dA [experts, R, K] and dB [experts, N, R] in the dtype of the adapter; zero for experts
        without rows.

    Raises:
        TypeError, ValueError: an operand does not fit, or the plan's path does not take it.
    """
    check_rows("x", x, routing, x_order)
    check_rows("dy", dy, routing, dy_order)
    check_same("dy", dy, "x", x)
    check_lora(lora, routing, x.shape[1], dy.shape[1], x, n_name="dy")
    check_row_scale("row_scale", row_scale, routing)
    check_plan(plan)
    for name, low in (("xa", xa), ("yb", yb)):
        if low is None:
            continue
        check_rows(name, low, routing, RowOrder.EXPERT)
        check_same(name, low, "x", x)
        if low.shape[1] != lora.rank:
            raise ValueError(f"{name} has width {low.shape[1]} but the rank is {lora.rank}")
    return lora_grads(
        x, dy, xa, yb, lora.a, lora.b, lora.scaling, routing, x_order, dy_order, row_scale, plan
    )


def lora_grads(
    x: Tensor,
    dy: Tensor,
    xa: Tensor | None,
    yb: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    routing: Routing,
    x_order: RowOrder,
    dy_order: RowOrder,
    row_scale: Tensor | None,
    plan: Plan | None,
) -> tuple[Tensor, Tensor]:
    """`lora_weight_grad` of operands that were checked."""
    rank = a.shape[1]
    if plan is None:
        plan = weight_grad_plan(x, dy, routing, rank)
    da = a.new_empty(a.shape)
    db = b.new_empty(b.shape)
    if plan.path is Path.RECOMPUTE:
        launch_recompute(
            x,
            dy,
            as_operand(b, x.dtype),
            da.mT,
            routing,
            plan,
            scaling=scaling,
            p_order=x_order,
            z_order=dy_order,
            row_scale=row_scale,
        )
        launch_recompute(
            dy,
            x,
            as_operand(a, x.dtype).mT,
            db,
            routing,
            plan,
            scaling=scaling,
            p_order=dy_order,
            z_order=x_order,
            row_scale=row_scale,
        )
        return da, db
    if xa is None or yb is None:
        missing = "xa" if xa is None else "yb"
        raise ValueError(f"{missing} is needed on the {plan.path.value} path")
    if plan.path is Path.GRAM:
        products = (
            (x, x_order, yb, RowOrder.EXPERT, da.mT),
            (dy, dy_order, xa, RowOrder.EXPERT, db),
        )
        launch_gram(products, routing, plan, row_scale=row_scale)
        return da, db
    if plan.path is Path.GROUPED_MM:
        xa, yb = (scaled(low, row_scale, routing) for low in (xa, yb))
        da.copy_(grouped_gram(yb, by_expert(x, routing, x_order), routing))
        db.copy_(grouped_gram(by_expert(dy, routing, dy_order), xa, routing))
        return da, db
    raise ValueError(f"lora_weight_grad has no path {plan.path.value!r}")


def expert_weight_grad(
    x: Tensor,
    dy: Tensor,
    routing: Routing,
    *,
    x_order: RowOrder,
    dy_order: RowOrder,
    row_scale: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """dW[e] = sum over the rows of e of x^T (g dy): [experts, K, N] in the dtype of x.

    Args:
        x: [row_count(x_order), K]; dy: [row_count(dy_order), N], dtype of x.
        row_scale: g, `rows` coefficients in slot order.
    """
    check_rows("x", x, routing, x_order)
    check_rows("dy", dy, routing, dy_order)
    check_same("dy", dy, "x", x)
    check_row_scale("row_scale", row_scale, routing)
    check_plan(plan)
    if plan is None:
        plan = weight_grad_plan(x, dy, routing, 0)
    if plan.path is Path.GROUPED_MM:
        rows = scaled(by_expert(dy, routing, dy_order), row_scale, routing)
        return grouped_gram(by_expert(x, routing, x_order), rows, routing)
    if plan.path is not Path.GRAM:
        raise ValueError(f"expert_weight_grad has no path {plan.path.value!r}")
    out = x.new_empty((routing.experts, x.shape[1], dy.shape[1]))
    launch_gram(((x, x_order, dy, dy_order, out),), routing, plan, row_scale=row_scale)
    return out


def weight_grad_plan(x: Tensor, dy: Tensor, routing: Routing, rank: int) -> Plan:
    """The plan for a weight gradient; rank 0 is the full gradient dW."""
    operation = Operation.LORA_WEIGHT_GRAD if rank else Operation.EXPERT_WEIGHT_GRAD
    precision = current_precision(x.dtype)
    k, n = x.shape[1], dy.shape[1]
    experts = routing.experts
    per_expert = next_power_of_two(routing.rows // experts)
    return plan_for(operation, per_expert, experts, k, n, rank, x.dtype, precision, "", x.device)


def expert_bias_grad(
    dy: Tensor, routing: Routing, *, dy_order: RowOrder, row_scale: Tensor | None = None
) -> Tensor:
    """db[e] = sum over the rows of e of g dy: [experts, N] in fp32.

    Args:
        dy: [row_count(dy_order), N]. row_scale: g, `rows` coefficients in slot order.
    """
    check_rows("dy", dy, routing, dy_order)
    check_row_scale("row_scale", row_scale, routing)
    width = dy.shape[1]
    out = dy.new_empty((routing.experts, width), dtype=torch.float32)
    pointers = dy.data_ptr() | routing.slots.data_ptr() | routing.offsets.data_ptr()
    row_scale, scale_form, scale_pointer = coefficients(row_scale)
    pointers |= scale_pointer
    fan_out = routing.fan_out(dy_order)
    by_expert = dy_order is RowOrder.EXPERT
    _bias_launch(by_expert, dy.dtype, dy.stride(), width, fan_out, scale_form)(
        (routing.experts, ceil_div(width, _BIAS_COLUMNS), 1),
        dy.device,
        (
            matrix(dy),
            row_scale,
            matrix(out),
            routing.slots,
            routing.offsets,
            fan_out,
            width,
        ),
        pointers,
    )
    return out


@lru_cache(maxsize=4096)
def _bias_launch(by_expert: bool, *form: object) -> Launch:  # noqa: FBT001
    del form
    return Launch(
        expert_bias_grad_kernel, warps=4, BY_EXPERT=by_expert, BLOCK_M=32, BLOCK_N=_BIAS_COLUMNS
    )


@triton.jit
def expert_bias_grad_kernel(
    dy: Matrix,
    row_scale,
    out: Matrix,
    slots,
    offsets,
    fan_out,
    N,
    BY_EXPERT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N columns of db[e]."""
    expert = tl.program_id(0).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for row in range(begin, end, BLOCK_M):
        rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = rows < end
        slot = tl.load(slots + rows, mask=inside, other=0)
        dy_rows = row_of_slot(slot, fan_out)
        if BY_EXPERT:
            dy_rows = rows
        ptrs = dy.ptr + dy_rows[:, None] * dy.row + n[None, :] * dy.col
        tile = tl.load(ptrs, mask=inside[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)
        if row_scale is not None:
            tile *= tl.load(row_scale + slot, mask=inside, other=0.0).to(tl.float32)[:, None]
        acc += tl.sum(tile, axis=0)
    tl.store(out.ptr + expert * out.row + n * out.col, acc, mask=n < N)
