"""LoRA on routed experts: Y[i] = X[i] W[e] + s (X[i] A[e]^T) B[e]^T + b[e], e the expert of row i."""

from .plan import Device, Operation, Path, Plan, Precision, Problem, Tile, candidates, choose
from .routing import Routing, RowOrder
from .weights import LoRAWeights

__version__ = "0.1.0"

__all__ = [
    "Device",
    "LoRAWeights",
    "Operation",
    "Path",
    "Plan",
    "Precision",
    "Problem",
    "Routing",
    "RowOrder",
    "Tile",
    "candidates",
    "choose",
]
