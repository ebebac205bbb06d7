"""Routing and the differentiable projection without an adapter under their former names."""

from torch import Tensor

from ..routing import Routing
from . import kernels
from .lora_ops import ParallelExperts
from .parallel_linear_lora import parallel_linear_lora

__all__ = ["ParallelExperts", "ParallelLinear", "flatten_sort_count", "kernels", "parallel_linear"]


def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The routing triple of expert_idxs [T, k]; ids outside [0, num_experts) come last."""
    routing = Routing.from_top_k(expert_idxs, num_experts, sentinels=True)
    return routing.expert_of_row.long(), routing.slots, routing.offsets[1:].long()


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


class ParallelLinear:
    """`parallel_linear` as the autograd function it once was; call `apply`."""

    apply = staticmethod(parallel_linear)
