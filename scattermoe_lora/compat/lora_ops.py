"""The module of expert projections, which takes an adapter; beside it all of `kernels.lora_ops`."""

import torch
from torch import Tensor, nn

from .kernels.lora_ops import (
    _SPLIT_LORA_FWD_MAX_EXPERTS,
    _SPLIT_LORA_FWD_THRESHOLD,
    BLOCK_M,
    group_bwd_lora,
    group_bwd_lora_fused,
    round_expert_counts,
    scatter2scatter_lora,
    scatter2scatter_lora_dX,
)
from .parallel_linear_lora import parallel_linear_lora

__all__ = [
    "BLOCK_M",
    "_SPLIT_LORA_FWD_MAX_EXPERTS",
    "_SPLIT_LORA_FWD_THRESHOLD",
    "ParallelExperts",
    "group_bwd_lora",
    "group_bwd_lora_fused",
    "parallel_linear_lora",
    "round_expert_counts",
    "scatter2scatter_lora",
    "scatter2scatter_lora_dX",
]


class ParallelExperts(nn.Module):
    """A trainable stack of expert projections; weight [experts, output_size, input_size].

    With `set_lora` an adapter is added to it.
    """

    def __init__(
        self, num_experts: int, input_size: int, output_size: int, bias: bool = False
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.input_size = input_size
        self.output_size = output_size
        self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))
        self.bias = nn.Parameter(torch.empty(num_experts, output_size)) if bias else None
        self._lora_A: Tensor | None = None
        self._lora_B: Tensor | None = None
        self._lora_scaling: float | None = None
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

    def set_lora(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        """Add an adapter, lora_A [R E, input_size] and lora_B [output_size, R E]; replaces one."""
        self._lora_A, self._lora_B, self._lora_scaling = lora_A, lora_B, scaling

    def clear_lora(self) -> None:
        """Take the adapter away."""
        self._lora_A, self._lora_B, self._lora_scaling = None, None, None

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
        """`parallel_linear_lora` with this module's weight, bias and adapter."""
        return parallel_linear_lora(
            inputs,
            self.weight.mT,
            k,
            sorted_expert_idxs,
            sorted_scattered_idxs,
            expert_offsets,
            lora_A=self._lora_A,
            lora_B=self._lora_B,
            scaling=1.0 if self._lora_scaling is None else self._lora_scaling,
            expert_biases=self.bias,
            gates=gates,
            grouped_in=grouped_in,
            grouped_out=grouped_out,
        )
