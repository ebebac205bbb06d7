"""The products with an adapter, and its gradients, under their former names."""

import torch
from torch import Tensor

from ...ops import lora_forward, lora_input_grad
from ...routing import RowOrder
from .._shared import (
    adapter_grads,
    deliver,
    grouped_routing,
    lora_of,
    order_of,
    real_rows,
    routing_of,
)
from .ops import BLOCK_M

_SPLIT_LORA_FWD_THRESHOLD = 20_000_000
"""Elements of an expert from which the former kernels split the forward; it steers nothing here:
a plan says which path is taken."""
_SPLIT_LORA_FWD_MAX_EXPERTS = 32
"""Experts up to which they did; it steers nothing here either."""


def scatter2scatter_lora(
    X: Tensor,
    W: Tensor,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    k: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    b: Tensor | None = None,
    x_grouped: bool = False,
    y_grouped: bool = False,
    out: Tensor | None = None,
    int64_indices: bool = False,
) -> Tensor:
    """Y [L, N] = X W[e] + scaling (X A[e]^T) B[e]^T + b[e]."""
    routing, source = routing_of(
        sorted_expert_idxs, sorted_scattered_idxs, k, W.shape[0], x_grouped
    )
    lora = lora_of(lora_A, lora_B, W.shape[0], scaling, X)
    y, _ = lora_forward(
        X, W.to(X.dtype), lora, routing, source=source, target=order_of(y_grouped), bias=b
    )
    return deliver(y, out)


def scatter2scatter_lora_dX(
    DY: Tensor,
    W: Tensor,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    k: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dy_grouped: bool = True,
    dx_grouped: bool = False,
    out: Tensor | None = None,
    int64_indices: bool = False,
) -> Tensor:
    """dX [L, K] = DY W[e]^T + scaling (DY B[e]) A[e]."""
    routing, source = routing_of(
        sorted_expert_idxs, sorted_scattered_idxs, k, W.shape[0], dy_grouped
    )
    lora = lora_of(lora_A, lora_B, W.shape[0], scaling, DY)
    dx, _ = lora_input_grad(
        DY, W.to(DY.dtype), lora, routing, source=source, target=order_of(dx_grouped)
    )
    return deliver(dx, out)


def group_bwd_lora(
    DY: Tensor,
    X: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    expert_offsets: Tensor,
    E: int,
    scaling: float,
    sorted_scattered_idxs: Tensor | None = None,
    k: int = 1,
    int64_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """(dA, dB) in the layouts of lora_A and lora_B; exact zeros for experts without rows.

    DY is in expert order; so is X, unless `sorted_scattered_idxs` says where its rows are.
    """
    routing = grouped_routing(expert_offsets, DY.shape[0], E, sorted_scattered_idxs, k)
    order = RowOrder.EXPERT if sorted_scattered_idxs is None else RowOrder.TOKEN
    return adapter_grads(DY, X, lora_A, lora_B, scaling, routing, order, RowOrder.EXPERT)


def group_bwd_lora_fused(
    DY: Tensor,
    X: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    expert_offsets: Tensor,
    sorted_scattered_idxs: Tensor,
    E: int,
    k: int,
    scaling: float,
    real_expert_offsets: Tensor | None = None,
    dy_grouped: bool = False,
    int64_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    """`group_bwd_lora` from X [T, K] and DY [L, N] by slot (or in expert order).

    With `real_expert_offsets` the rows are those of `round_expert_counts`, and padding adds
    nothing; DY in expert order is then padded likewise.
    """
    slots = sorted_scattered_idxs
    if real_expert_offsets is None:
        routing = grouped_routing(expert_offsets, slots.numel(), E, slots, k)
    else:
        kept = real_rows(expert_offsets, real_expert_offsets, slots.numel(), E)
        slots = slots.index_select(0, kept)
        DY = DY.index_select(0, kept) if dy_grouped else DY
        routing = grouped_routing(real_expert_offsets, slots.numel(), E, slots, k)
    order = RowOrder.EXPERT if dy_grouped else RowOrder.SLOT
    return adapter_grads(DY, X, lora_A, lora_B, scaling, routing, RowOrder.TOKEN, order)


def round_expert_counts(
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    E: int,
    block_m: int = BLOCK_M,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(padded ids, padded slots, padded offsets, real offsets): counts rounded up to block_m.

    Padding repeats the last slot of its expert; experts without rows stay empty. The sizes of the
    result depend on the counts, so this waits for the device.
    """
    counts = expert_offsets.diff(prepend=expert_offsets.new_zeros(1))
    padded_counts = (counts + block_m - 1) // block_m * block_m
    padded_offsets = padded_counts.cumsum(0)
    experts = torch.arange(E, device=expert_offsets.device)
    ids = torch.repeat_interleave(experts, padded_counts)
    position = torch.arange(ids.numel(), device=ids.device) - (padded_offsets - padded_counts)[ids]
    row = (expert_offsets - counts)[ids] + torch.minimum(position, counts[ids] - 1)
    slots = sorted_scattered_idxs.index_select(0, row)
    return ids.to(sorted_expert_idxs.dtype), slots, padded_offsets, expert_offsets.clone()
