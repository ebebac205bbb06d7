"""Stored experts as the weight of a routed product, decoded when it runs and not kept.

The product asks for its weight block by block. A block is decoded into one buffer that the next
block overwrites, so the transient is bounded by the caller's budget; backward decodes again. Dense
storage in the dtype of the product is handed out as it is, without a copy.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops._check import check_tensor
from .active import chunks
from .formats import Dense, StoredExperts


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """The weight [experts, K, N] of a product whose experts are stored in some format.

    transposed: the stored matrices are [N, K], as in nn.Linear; otherwise [K, N].
    budget_bytes: bound of the decoded block; None decodes the whole stack at once.
    ids: the experts to use, int64 [selected] on the device of the storage; None for all.

    Raises:
        TypeError: stored or ids is of another type.
        ValueError: one expert alone exceeds the budget (when the product runs).
    """

    stored: StoredExperts
    transposed: bool
    budget_bytes: int | None = None
    ids: Tensor | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.stored, "dense"):
            raise TypeError(
                f"stored must be experts in a storage format, got {type(self.stored).__name__}"
            )
        if self.ids is not None:
            check_tensor("ids", self.ids)

    @property
    def trains(self) -> bool:
        """Whether a tensor of the storage requires a gradient, which products do not compute."""
        return any(part.requires_grad for part in _parts(self.stored))

    @property
    def versions(self) -> tuple[int, ...]:
        """How often each tensor of the storage was changed in place."""
        return tuple(part._version for part in _parts(self.stored) if not part.is_inference())

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, K, N)."""
        first, second = self.stored.shape
        experts = self.stored.experts if self.ids is None else self.ids.numel()
        return (experts, second, first) if self.transposed else (experts, first, second)

    @property
    def device(self) -> torch.device:
        """Where the storage is."""
        return self.stored.device

    @property
    def mT(self) -> "StoredWeight":  # noqa: N802
        """The stack of the transposed matrices, from the same storage."""
        return replace(self, transposed=not self.transposed)

    @property
    def map(self) -> str:
        """The layout of a decoded block that a tensor map can address."""
        width_bytes = 2 * self.stored.shape[1]
        if width_bytes % 16:
            return ""
        return "nk" if self.transposed else "kn"

    def select(self, ids: Tensor) -> "StoredWeight":
        """The same storage, only the experts `ids`, numbered 0 .. selected - 1."""
        return replace(self, ids=ids)

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """(first expert, [experts of the block, K, N]) in order; a block may overwrite the last."""
        experts = self.shape[0]
        ranges = [range(experts)]
        if self.budget_bytes is not None:
            ranges = chunks(self.stored, self.budget_bytes, dtype=dtype, experts=experts)
        buffer = None
        if not self._is_at_hand(dtype):
            longest = max(len(part) for part in ranges)
            buffer = torch.empty((longest, *self.stored.shape), dtype=dtype, device=self.device)
        for part in ranges:
            chosen = part if self.ids is None else self.ids[part.start : part.stop]
            out = None if buffer is None else buffer[: len(part)]
            block = self.stored.dense(chosen, dtype=dtype, out=out).detach()
            yield part.start, block.mT if self.transposed else block

    def _is_at_hand(self, dtype: torch.dtype) -> bool:
        """Whether a block is a view of the storage, addressed as a decoded block would be."""
        if not isinstance(self.stored, Dense) or self.ids is not None:
            return False
        data = self.stored.data
        first, second = self.stored.shape
        packed = data.stride() == (first * second, second, 1) and data.data_ptr() % 16 == 0
        return packed and data.dtype == dtype


def _parts(value: Any) -> Iterator[Tensor]:
    """The tensors of a storage format that is a dataclass."""
    for field in fields(value) if is_dataclass(value) else ():
        part = getattr(value, field.name)
        if isinstance(part, Tensor):
            yield part
        elif is_dataclass(part):
            yield from _parts(part)
