"""Gather, routed product and weight gradient under their former names."""

from torch import Tensor

from ...ops import expert_bias_grad, expert_weight_grad
from ...ops import scatter2scatter as routed_product
from ...routing import RowOrder
from .._shared import deliver, grouped_routing, order_of, routing_of

BLOCK_M = 128
"""Rows that `round_expert_counts` pads to."""


def group(
    A: Tensor,
    sorted_expert_idxs: Tensor,
    coeff: Tensor | None = None,
    fan_out: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """out[i] = coeff[slot] A[slot // fan_out]; the second argument is the slot of each row."""
    slots = sorted_expert_idxs
    rows = A.index_select(0, slots // fan_out)
    if coeff is not None:
        factor = coeff.reshape(-1).index_select(0, slots).unsqueeze(1)
        rows = (rows.float() * factor.float()).to(A.dtype)
    return deliver(rows, out)


def scatter2scatter(
    X: Tensor,
    W: Tensor,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    k: int,
    b: Tensor | None = None,
    x_grouped: bool = False,
    y_grouped: bool = False,
    out: Tensor | None = None,
    int64_indices: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Y [L, N] = X W[e] + b[e] (+ residual, laid out like Y)."""
    routing, source = routing_of(
        sorted_expert_idxs, sorted_scattered_idxs, k, W.shape[0], x_grouped
    )
    y = routed_product(X, W.to(X.dtype), routing, source=source, target=order_of(y_grouped), bias=b)
    if residual is not None:
        y = y + residual
    return deliver(y, out)


def group_bwd_W(
    DY: Tensor, X: Tensor, expert_offsets: Tensor, E: int, has_bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """dW [E, K, N] and, if asked, db [E, N]; DY and X in expert order."""
    routing = grouped_routing(expert_offsets, X.shape[0], E)
    dw = expert_weight_grad(X, DY, routing, x_order=RowOrder.EXPERT, dy_order=RowOrder.EXPERT)
    if not has_bias:
        return dw, None
    return dw, expert_bias_grad(DY, routing, dy_order=RowOrder.EXPERT).to(DY.dtype)
