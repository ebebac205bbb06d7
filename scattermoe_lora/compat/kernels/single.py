"""The product of one token under its former name."""

from torch import Tensor

from ...ops import scatter2scatter
from ...routing import Routing, RowOrder


def single2scatter(X: Tensor, W: Tensor, expert_idxs: Tensor) -> Tensor:
    """Y [k, N] = X W[e]: one token X [1, K] or a row per choice X [k, K]; expert_idxs [1, k].

    Raises:
        ValueError: X has neither 1 nor k rows, or the choices are not those of one token.
    """
    if expert_idxs.ndim != 2 or expert_idxs.shape[0] != 1:
        raise ValueError(f"expert_idxs must be [1, k], got shape {list(expert_idxs.shape)}")
    choices = expert_idxs.shape[1]
    if X.shape[0] not in (1, choices):
        raise ValueError(f"X must have 1 or {choices} rows, one per choice, got {X.shape[0]}")
    routing = Routing.from_top_k(expert_idxs, W.shape[0])
    source = RowOrder.TOKEN if X.shape[0] == 1 else RowOrder.SLOT
    return scatter2scatter(X, W, routing, source=source, target=RowOrder.SLOT)
