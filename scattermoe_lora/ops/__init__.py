"""Launchers of the kernels; each takes plain tensors, a routing and, if wanted, a plan."""

from .glu import Activation, Gate, glu_backward, glu_forward
from .lora import lora_forward, lora_input_grad
from .product import scatter2scatter, shrink
from .rows import combine, combine_grad, group
from .weight_grad import expert_bias_grad, expert_weight_grad, lora_weight_grad

__all__ = [
    "Activation",
    "Gate",
    "combine",
    "combine_grad",
    "expert_bias_grad",
    "expert_weight_grad",
    "glu_backward",
    "glu_forward",
    "group",
    "lora_forward",
    "lora_input_grad",
    "lora_weight_grad",
    "scatter2scatter",
    "shrink",
]
