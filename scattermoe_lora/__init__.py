"""LoRA on routed experts: y[i] = x[i] W[e] + s (x[i] A[e]^T) B[e]^T + b[e], e the expert of i."""

from . import library as library
from .autograd import Plans, expert_linear
from .layers import Projection, experts_mlp
from .ops import Activation, Gate
from .plan import Device, Operation, Path, Plan, Precision, Problem, Tile, choose
from .plan_candidates import candidates
from .routing import Routing, RowOrder
from .weights import LoRAWeights

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "Device",
    "Gate",
    "LoRAWeights",
    "Operation",
    "Path",
    "Plan",
    "Plans",
    "Precision",
    "Problem",
    "Projection",
    "Routing",
    "RowOrder",
    "Tile",
    "candidates",
    "choose",
    "expert_linear",
    "experts_mlp",
]
