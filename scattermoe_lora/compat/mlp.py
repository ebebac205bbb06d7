"""The blocks of shawntan's scattermoe: experts of two projections, with and without a gate."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from .lora_ops import ParallelExperts
from .parallel_experts import flatten_sort_count


class MLP(nn.Module):
    """Two stacks: `experts` [E, hidden, input], `output_experts` [E, input, hidden].

    Raises:
        TypeError: bias is no bool, as where an activation stands in its place.
    """

    _widening = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        bias: bool = False,
        activation: Callable[[Tensor], Tensor] = gelu,
    ) -> None:
        super().__init__()
        if not isinstance(bias, bool):
            raise TypeError(
                f"bias must be a bool, got {type(bias).__name__}; activation follows it"
            )
        self.num_experts = num_experts
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.top_k = min(top_k, num_experts)
        self.activation = activation
        width = self._widening * hidden_size
        self.experts = ParallelExperts(num_experts, input_size, width, bias=bias)
        self.output_experts = ParallelExperts(num_experts, hidden_size, input_size, bias=bias)

    def extra_repr(self) -> str:
        """The number of choices of a token."""
        return f"k={self.top_k}"

    def forward(self, x: Tensor, expert_p: Tensor, expert_idxs: Tensor) -> Tensor:
        """Sums of expert outputs like x [.., input_size]; expert_p and expert_idxs [tokens, top_k].

        Raises:
            ValueError: the choices are not `top_k` per token, or an operand does not fit.
        """
        rows = x.reshape(-1, x.shape[-1])
        if expert_idxs.shape[-1] != self.top_k:
            raise ValueError(
                f"expert_idxs chooses {expert_idxs.shape[-1]} experts per token, top_k is "
                f"{self.top_k}"
            )
        with torch.no_grad():
            choices = expert_idxs.reshape(-1, self.top_k)
            triple = flatten_sort_count(choices, self.num_experts)
        h = self._inner(self.experts(rows, self.top_k, *triple, grouped_out=True))
        gates = expert_p.reshape(-1, self.top_k)
        y = self.output_experts(h, 1, *triple, gates=gates, grouped_in=True)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _inner(self, h: Tensor) -> Tensor:
        return self.activation(h)


class GLUMLP(MLP):
    """`experts` is [E, 2 hidden_size, input_size]: first the values, then the gates."""

    _widening = 2

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        bias: bool = False,
        activation: Callable[[Tensor], Tensor] = silu,
    ) -> None:
        super().__init__(
            input_size, hidden_size, num_experts, top_k, bias=bias, activation=activation
        )

    def _inner(self, h: Tensor) -> Tensor:
        value, gate = h.chunk(2, dim=-1)
        return self.activation(gate) * value
