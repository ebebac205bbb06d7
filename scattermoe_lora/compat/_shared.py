"""What the adapters share: the former triple and layouts as this package's values."""

import torch
from torch import Tensor

from ..ops import lora_weight_grad, shrink
from ..routing import Routing, RowOrder
from ..weights import LoRAWeights


def order_of(grouped: bool) -> RowOrder:
    return RowOrder.EXPERT if grouped else RowOrder.SLOT


def routing_of(
    sorted_expert_idxs: Tensor, sorted_scattered_idxs: Tensor, k: int, experts: int, grouped: bool
) -> tuple[Routing, RowOrder]:
    routing = Routing.from_sorted(
        sorted_expert_idxs, sorted_scattered_idxs, top_k=k, experts=experts
    )
    return routing, RowOrder.EXPERT if grouped else RowOrder.TOKEN


def grouped_routing(
    expert_offsets: Tensor, rows: int, experts: int, slots: Tensor | None = None, k: int = 1
) -> Routing:
    """The routing whose rows end at the offsets; rows after the last one are dropped."""
    if expert_offsets.numel() != experts:
        raise ValueError(f"expert_offsets has {expert_offsets.numel()} entries, E is {experts}")
    row = torch.arange(rows, device=expert_offsets.device)
    ids = torch.searchsorted(expert_offsets.to(row.dtype), row, right=True)
    return Routing.from_sorted(ids, row if slots is None else slots, top_k=k, experts=experts)


def real_rows(padded: Tensor, real: Tensor, rows: int, experts: int) -> Tensor:
    """Which of the padded rows are no padding."""
    start = torch.cat([padded.new_zeros(1), padded[:-1]])
    counts = real.diff(prepend=real.new_zeros(1))
    row = torch.arange(rows, device=padded.device)
    ids = torch.searchsorted(padded, row, right=True).clamp(max=experts - 1)
    return torch.nonzero((row - start[ids] < counts[ids]) & (row < padded[-1])).flatten()


def lora_of(lora_a: Tensor, lora_b: Tensor, experts: int, scaling: float, x: Tensor) -> LoRAWeights:
    if lora_a.dtype not in (x.dtype, torch.float32):
        lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    return LoRAWeights.from_flat(lora_a, lora_b, experts=experts, scaling=scaling)


def adapter_grads(
    dy: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    routing: Routing,
    x_order: RowOrder,
    dy_order: RowOrder,
) -> tuple[Tensor, Tensor]:
    lora = lora_of(lora_a, lora_b, routing.experts, scaling, x)
    down, up = (factor.to(x.dtype).contiguous() for factor in (lora.a, lora.b))
    xa = shrink(x, down, routing, scaling=scaling, source=x_order)
    yb = shrink(dy, up.mT, routing, scaling=scaling, source=dy_order)
    da, db = lora_weight_grad(x, dy, xa, yb, lora, routing, x_order=x_order, dy_order=dy_order)
    da = da.reshape(lora_a.shape).to(lora_a.dtype)
    return da, db.permute(1, 0, 2).reshape(lora_b.shape).to(lora_b.dtype)


def deliver(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)
