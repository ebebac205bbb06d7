"""The call signatures of axolotl's `libs/scattermoe_lora`, as adapters over this package.

A user of those kernels changes one import. Names, order of arguments, layouts and results are
theirs:

    sorted_expert_idxs [L], sorted_scattered_idxs [L]    expert and slot of each row, by expert
    expert_offsets [E]                                   inclusive cumulative counts
    lora_A [R E, K], lora_B [N, R E]                     expert-major rows and columns
    X [L / k, K], row slot // k; grouped: [L, K] in expert order

Index width, tuning and fusion are chosen by this package: the arguments that steered them
(`int64_indices`, `use_fused_dX`, `use_fused_gather`) are accepted and change nothing.
"""

import torch
from torch import Tensor, nn

from .autograd import expert_linear
from .compat_selective import (
    get_active_experts,
    remap_expert_indices,
    selective_dequant_nf4_triton,
    selective_expert_weights,
    selective_lora_weights,
)
from .ops import (
    expert_bias_grad,
    expert_weight_grad,
    lora_forward,
    lora_input_grad,
    lora_weight_grad,
    shrink,
)
from .ops import scatter2scatter as routed_product
from .routing import Routing, RowOrder
from .weights import LoRAWeights

__all__ = [
    "ParallelExperts",
    "ScatterMoELoRA",
    "flatten_sort_count",
    "get_active_experts",
    "group",
    "group_bwd_W",
    "group_bwd_lora",
    "group_bwd_lora_fused",
    "parallel_linear",
    "parallel_linear_lora",
    "peft_lora_to_scattermoe",
    "remap_expert_indices",
    "round_expert_counts",
    "scatter2scatter",
    "scatter2scatter_lora",
    "scatter2scatter_lora_dX",
    "selective_dequant_nf4_triton",
    "selective_expert_weights",
    "selective_lora_weights",
]


def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The routing triple of expert_idxs [T, k]; ids outside [0, num_experts) come last."""
    routing = Routing.from_top_k(expert_idxs, num_experts, sentinels=True)
    return routing.expert_of_row.long(), routing.slots, routing.offsets[1:].long()


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
    return _deliver(rows, out)


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
    routing, source = _routing(sorted_expert_idxs, sorted_scattered_idxs, k, W.shape[0], x_grouped)
    y = routed_product(X, W.to(X.dtype), routing, source=source, target=_order(y_grouped), bias=b)
    if residual is not None:
        y = y + residual
    return _deliver(y, out)


def group_bwd_W(
    DY: Tensor, X: Tensor, expert_offsets: Tensor, E: int, has_bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """dW [E, K, N] and, if asked, db [E, N]; DY and X in expert order."""
    routing = _grouped_routing(expert_offsets, X.shape[0], E)
    dw = expert_weight_grad(X, DY, routing, x_order=RowOrder.EXPERT, dy_order=RowOrder.EXPERT)
    if not has_bias:
        return dw, None
    return dw, expert_bias_grad(DY, routing, dy_order=RowOrder.EXPERT).to(DY.dtype)


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
    routing, source = _routing(sorted_expert_idxs, sorted_scattered_idxs, k, W.shape[0], x_grouped)
    lora = _lora(lora_A, lora_B, W.shape[0], scaling, X)
    y, _ = lora_forward(
        X, W.to(X.dtype), lora, routing, source=source, target=_order(y_grouped), bias=b
    )
    return _deliver(y, out)


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
    routing, source = _routing(sorted_expert_idxs, sorted_scattered_idxs, k, W.shape[0], dy_grouped)
    lora = _lora(lora_A, lora_B, W.shape[0], scaling, DY)
    dx, _ = lora_input_grad(
        DY, W.to(DY.dtype), lora, routing, source=source, target=_order(dx_grouped)
    )
    return _deliver(dx, out)


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
    routing = _grouped_routing(expert_offsets, DY.shape[0], E, sorted_scattered_idxs, k)
    order = RowOrder.EXPERT if sorted_scattered_idxs is None else RowOrder.TOKEN
    return _adapter_grads(DY, X, lora_A, lora_B, scaling, routing, order, RowOrder.EXPERT)


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
        routing = _grouped_routing(expert_offsets, slots.numel(), E, slots, k)
    else:
        kept = _real_rows(expert_offsets, real_expert_offsets, slots.numel(), E)
        slots = slots.index_select(0, kept)
        DY = DY.index_select(0, kept) if dy_grouped else DY
        routing = _grouped_routing(real_expert_offsets, slots.numel(), E, slots, k)
    order = RowOrder.EXPERT if dy_grouped else RowOrder.SLOT
    return _adapter_grads(DY, X, lora_A, lora_B, scaling, routing, RowOrder.TOKEN, order)


def round_expert_counts(
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    E: int,
    block_m: int = 128,
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


class ScatterMoELoRA:
    """The routed LoRA projection under its former name; call `apply`."""

    @staticmethod
    def apply(
        x: Tensor,
        expert_weights: Tensor,
        k: int,
        sorted_expert_idxs: Tensor,
        sorted_scattered_idxs: Tensor,
        expert_offsets: Tensor,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        scaling: float,
        expert_biases: Tensor | None = None,
        gates: Tensor | None = None,
        grouped_in: bool = False,
        grouped_out: bool = False,
        use_fused_dX: bool = False,
        use_fused_gather: bool = False,
    ) -> Tensor:
        """Output [L, N], or [T, N] with gates [T, top_k]; differentiable in every tensor that asks.

        Raises:
            ValueError: gates together with a grouped output, or an operand that does not fit.
        """
        if gates is not None and grouped_out:
            raise ValueError(
                "gates sum over the choices of a token, so the output cannot be grouped"
            )
        experts, top_k = expert_weights.shape[0], k if gates is None else gates.shape[1]
        routing, source = _routing(
            sorted_expert_idxs, sorted_scattered_idxs, top_k, experts, grouped_in
        )
        if not grouped_in and k != top_k:
            source = RowOrder.SLOT
        lora = None
        if lora_A is not None and lora_B is not None:
            lora = _lora(lora_A, lora_B, experts, scaling, x)
        return expert_linear(
            x,
            expert_weights.to(x.dtype),
            routing,
            source=source,
            target=_order(grouped_out),
            lora=lora,
            bias=expert_biases,
            gates=gates,
        )


def parallel_linear_lora(
    inputs: Tensor,
    expert_weights: Tensor,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    expert_biases: Tensor | None = None,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
    use_fused_dX: bool = False,
    use_fused_gather: bool = False,
) -> Tensor:
    """`ScatterMoELoRA.apply`; without lora_A the plain product."""
    return ScatterMoELoRA.apply(
        inputs,
        expert_weights,
        k,
        sorted_expert_idxs,
        sorted_scattered_idxs,
        expert_offsets,
        lora_A,
        lora_B,
        scaling,
        expert_biases,
        gates,
        grouped_in,
        grouped_out,
    )


def parallel_linear(
    inputs: Tensor,
    expert_weights: Tensor,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    expert_biases: Tensor | None = None,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    """The routed product without an adapter; weight and bias gradients where they are required."""
    return parallel_linear_lora(
        inputs,
        expert_weights,
        k,
        sorted_expert_idxs,
        sorted_scattered_idxs,
        expert_offsets,
        expert_biases=expert_biases,
        gates=gates,
        grouped_in=grouped_in,
        grouped_out=grouped_out,
    )


class ParallelExperts(nn.Module):
    """A trainable stack of expert projections; weight [experts, output_size, input_size]."""

    def __init__(
        self, num_experts: int, input_size: int, output_size: int, bias: bool = False
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.input_size = input_size
        self.output_size = output_size
        self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))
        self.bias = nn.Parameter(torch.empty(num_experts, output_size)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of standard deviation 0.02, biases zero."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """The sizes."""
        return (
            f"num_experts={self.num_experts}, input_size={self.input_size}, "
            f"output_size={self.output_size}"
        )

    def forward(
        self,
        inputs: Tensor,
        k: int,
        sorted_expert_idxs: Tensor,
        sorted_scattered_idxs: Tensor,
        expert_offsets: Tensor,
        gates: Tensor | None = None,
        grouped_in: bool = False,
        grouped_out: bool = False,
    ) -> Tensor:
        """`parallel_linear` with this module's weight and bias."""
        return parallel_linear(
            inputs,
            self.weight.mT,
            k,
            sorted_expert_idxs,
            sorted_scattered_idxs,
            expert_offsets,
            self.bias,
            gates,
            grouped_in,
            grouped_out,
        )


def peft_lora_to_scattermoe(
    peft_A: Tensor, peft_B: Tensor, num_experts: int, rank: int
) -> tuple[Tensor, Tensor]:
    """PEFT factors (0.19.1 and newer: A on the input side) as lora_A [R E, K], lora_B [N, R E]."""
    if peft_A.shape[0] != num_experts * rank or peft_B.shape[1] != num_experts * rank:
        raise ValueError(
            f"{num_experts} experts of rank {rank} need {num_experts * rank} rank rows and "
            f"columns, got shapes {list(peft_A.shape)} and {list(peft_B.shape)}"
        )
    by_expert = peft_B.unflatten(1, (rank, num_experts)).transpose(1, 2)
    return peft_A, by_expert.reshape(peft_B.shape)


def _order(grouped: bool) -> RowOrder:
    return RowOrder.EXPERT if grouped else RowOrder.SLOT


def _routing(
    sorted_expert_idxs: Tensor, sorted_scattered_idxs: Tensor, k: int, experts: int, grouped: bool
) -> tuple[Routing, RowOrder]:
    routing = Routing.from_sorted(
        sorted_expert_idxs, sorted_scattered_idxs, top_k=k, experts=experts
    )
    return routing, RowOrder.EXPERT if grouped else RowOrder.TOKEN


def _grouped_routing(
    expert_offsets: Tensor, rows: int, experts: int, slots: Tensor | None = None, k: int = 1
) -> Routing:
    """The routing whose rows end at the offsets; rows after the last one are dropped."""
    if expert_offsets.numel() != experts:
        raise ValueError(f"expert_offsets has {expert_offsets.numel()} entries, E is {experts}")
    row = torch.arange(rows, device=expert_offsets.device)
    ids = torch.searchsorted(expert_offsets.to(row.dtype), row, right=True)
    return Routing.from_sorted(ids, row if slots is None else slots, top_k=k, experts=experts)


def _real_rows(padded: Tensor, real: Tensor, rows: int, experts: int) -> Tensor:
    """Which of the padded rows are no padding."""
    start = torch.cat([padded.new_zeros(1), padded[:-1]])
    counts = real.diff(prepend=real.new_zeros(1))
    row = torch.arange(rows, device=padded.device)
    ids = torch.searchsorted(padded, row, right=True).clamp(max=experts - 1)
    return torch.nonzero((row - start[ids] < counts[ids]) & (row < padded[-1])).flatten()


def _lora(lora_a: Tensor, lora_b: Tensor, experts: int, scaling: float, x: Tensor) -> LoRAWeights:
    if lora_a.dtype not in (x.dtype, torch.float32):
        lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    return LoRAWeights.from_flat(lora_a, lora_b, experts=experts, scaling=scaling)


def _adapter_grads(
    dy: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    routing: Routing,
    x_order: RowOrder,
    dy_order: RowOrder,
) -> tuple[Tensor, Tensor]:
    lora = _lora(lora_a, lora_b, routing.experts, scaling, x)
    down, up = (factor.to(x.dtype).contiguous() for factor in (lora.a, lora.b))
    xa = shrink(x, down, routing, scaling=scaling, source=x_order)
    yb = shrink(dy, up.mT, routing, scaling=scaling, source=dy_order)
    da, db = lora_weight_grad(x, dy, xa, yb, lora, routing, x_order=x_order, dy_order=dy_order)
    da = da.reshape(lora_a.shape).to(lora_a.dtype)
    return da, db.permute(1, 0, 2).reshape(lora_b.shape).to(lora_b.dtype)


def _deliver(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)
