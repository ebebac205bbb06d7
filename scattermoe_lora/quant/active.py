"""Decoding fewer experts at a time: those in use, or as many as fit into a budget of bytes."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._sizes import ceil_div
from ..ops._check import check_tensor
from ..routing import Routing
from ..weights import LoRAWeights
from .formats import StoredExperts


def active_experts(routing: Routing) -> Tensor:
    """The experts that have rows, int64 [active], ascending; empty where no row is routed.

    How many there are is known on the device alone, so this waits for it. Use `chunks` where a
    layer must not synchronise with the host.
    """
    return torch.nonzero(routing.offsets.diff()).flatten()


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveExperts:
    """A layer call reduced to some of its experts, which are numbered from 0 in it.

    routing: the same rows in the same order, with `ids.numel()` experts. ids: int64 [selected],
    ascending, for `StoredExperts.dense`.
    """

    routing: Routing
    ids: Tensor

    @classmethod
    def of(cls, routing: Routing, ids: Tensor | None = None) -> "ActiveExperts":
        """Keep the experts `ids`, by default those that have rows (which waits for the device).

        Args:
            ids: int64 [selected], ascending, without duplicates, every expert that has rows among
                them. Where no row is routed, expert 0 alone is kept by default.

        Raises:
            TypeError: ids is no tensor of int64.
            ValueError: ids is empty, or has another shape or device than the routing needs; on a
                CPU also where it is not ascending or lacks an expert that has rows.
        """
        stated = ids is not None
        if ids is None:
            ids = active_experts(routing)
            if ids.numel() == 0:
                ids = torch.zeros(1, dtype=torch.int64, device=routing.device)
        check_tensor("ids", ids)
        if ids.dtype != torch.int64:
            raise TypeError(f"ids must be int64, got {ids.dtype}")
        if ids.ndim != 1 or not 1 <= ids.numel() <= routing.experts:
            raise ValueError(
                f"ids must be [selected] with 1 to {routing.experts} experts, got shape "
                f"{list(ids.shape)}"
            )
        if ids.device != routing.device:
            raise ValueError(f"ids is on {ids.device} but the routing is on {routing.device}")
        if stated and ids.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_ids(ids, routing)
        # Dropped rows hold expert `experts`, above every id, and stay dropped.
        compact = torch.searchsorted(ids, routing.expert_of_row.to(ids.dtype))
        return cls(
            routing=Routing.from_sorted(
                compact, routing.slots, top_k=routing.top_k, experts=ids.numel(), validate=False
            ),
            ids=ids,
        )

    def lora(self, lora: LoRAWeights) -> LoRAWeights:
        """The factors of the kept experts. Gradients flow back; experts left out get zeros."""
        return LoRAWeights(
            a=lora.a.index_select(0, self.ids),
            b=lora.b.index_select(0, self.ids),
            scaling=lora.scaling,
        )

    def rows(self, table: Tensor) -> Tensor:
        """The kept experts of a table [experts, ...], a bias for one. Gradients flow back."""
        return table.index_select(0, self.ids)


def _check_ids(ids: Tensor, routing: Routing) -> None:
    known = set(ids.tolist())
    if sorted(known) != ids.tolist() or not 0 <= min(known) <= max(known) < routing.experts:
        raise ValueError(
            f"ids must be ascending experts of 0 to {routing.experts - 1}, got {ids.tolist()}"
        )
    if missing := [expert for expert in active_experts(routing).tolist() if expert not in known]:
        raise ValueError(f"ids lacks expert {missing[0]}, which has rows")


def chunks(
    stored: StoredExperts, budget_bytes: int, *, dtype: torch.dtype, experts: int | None = None
) -> list[range]:
    """Consecutive experts, in order and without gaps, whose dense form fits into `budget_bytes`.

    Chunks are as large as the budget allows and differ by at most one expert. Nothing is asked of
    the device.

    Raises:
        ValueError: one expert alone exceeds the budget, or there are none.
    """
    if experts is not None and experts < 1:
        raise ValueError(f"experts must be at least 1, got {experts}")
    each = math.prod(stored.shape) * dtype.itemsize
    fitting = budget_bytes // each
    if fitting < 1:
        raise ValueError(
            f"one expert of shape {list(stored.shape)} takes {each} bytes in {dtype}, but the "
            f"budget is {budget_bytes} bytes"
        )
    if experts is None:
        experts = stored.experts
    count = ceil_div(experts, fitting)
    bounds = [experts * index // count for index in range(count + 1)]
    return [range(low, high) for low, high in itertools.pairwise(bounds)]
