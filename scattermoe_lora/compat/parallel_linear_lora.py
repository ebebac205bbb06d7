"""The differentiable projection with an adapter under its former names."""

from typing import Any

from torch import Tensor

from ..autograd import expert_linear
from ..ops import scatter2scatter, shrink
from ..routing import RowOrder
from ._shared import grouped_routing, lora_of, order_of, routing_of


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
        routing, source = routing_of(
            sorted_expert_idxs, sorted_scattered_idxs, top_k, experts, grouped_in
        )
        if not grouped_in and k != top_k:
            source = RowOrder.SLOT
        lora = None
        if lora_A is not None and lora_B is not None:
            lora = lora_of(lora_A, lora_B, experts, scaling, x)
        return expert_linear(
            x,
            expert_weights.to(x.dtype),
            routing,
            source=source,
            target=order_of(grouped_out),
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


def get_lora_params_from_wrapper(
    module: Any,
) -> tuple[Tensor, Tensor, float] | tuple[None, None, None]:
    """(lora_A, lora_B, scaling) of the first active adapter of a PEFT wrapper, in PEFT's layout.

    Three times None where nothing is wrapped, or no adapter is active, or it is merged.
    """
    if not hasattr(module, "lora_A") or not hasattr(module, "lora_B"):
        return None, None, None
    off = getattr(module, "disable_adapters", False) or getattr(module, "merged", False)
    names = [] if off else [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return None, None, None
    name = names[0]
    return module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]


def _compute_lora_input_grad(
    grouped_grad_out: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    expert_offsets: Tensor,
    E: int,
    scaling: float,
    sorted_expert_idxs: Tensor | None = None,
    sorted_scattered_idxs: Tensor | None = None,
    int64_indices: bool = False,
    yb: Tensor | None = None,
) -> Tensor:
    """The adapter's part of the input gradient, scaling (DY B[e]) A[e], all in expert order.

    yb: DY B[e] [L, R] where it is known, not scaled. The offsets say which rows an expert has: the
    ids and slots are accepted and change nothing.
    """
    routing = grouped_routing(expert_offsets, grouped_grad_out.shape[0], E)
    lora = lora_of(lora_A, lora_B, E, scaling, grouped_grad_out)
    up, down = (factor.to(grouped_grad_out.dtype) for factor in (lora.b, lora.a))
    order = RowOrder.EXPERT
    if yb is None:
        narrow = shrink(grouped_grad_out, up.mT, routing, scaling=scaling, source=order)
    else:
        narrow = (yb.float() * scaling).to(down.dtype)
    return scatter2scatter(narrow, down, routing, source=order, target=order)
