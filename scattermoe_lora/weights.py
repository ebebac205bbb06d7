"""The weights of a routed projection: stacks that come in blocks, and LoRA factors of experts."""

import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class BlockedWeight(Protocol):
    """A stack [experts, K, N] that is not at hand as a tensor, but block of experts by block."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, K, N)."""

    @property
    def device(self) -> torch.device:
        """Where the blocks appear."""

    @property
    def mT(self) -> "BlockedWeight":  # noqa: N802
        """The stack of the transposed matrices."""

    @property
    def map(self) -> str:
        """The layout of its blocks that a tensor map can address: "nk", "kn", or "" for none."""

    @property
    def trains(self) -> bool:
        """Whether it requires a gradient, which products do not compute of blocks."""

    @property
    def versions(self) -> tuple[int, ...]:
        """How often each tensor of the storage was changed in place."""

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """(first expert, [experts of the block, K, N]) in order; a block may overwrite the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAWeights:
    """W_e + scaling * (B_e A_e)^T for every expert e.

    a: [experts, rank, k_in]. b: [experts, n_out, rank]. Any strides; both floating point, on one
    device.

    Raises:
        TypeError: a factor is no floating-point tensor, or scaling is no number.
        ValueError: shapes or devices of the factors do not fit, or scaling is not finite.
    """

    a: Tensor
    b: Tensor
    scaling: float

    def __post_init__(self) -> None:
        for name, factor in (("a", self.a), ("b", self.b)):
            if not isinstance(factor, Tensor):
                raise TypeError(f"lora.{name} must be a tensor, got {type(factor).__name__}")
            if not factor.dtype.is_floating_point:
                raise TypeError(f"lora.{name} must be floating point, got {factor.dtype}")
            if factor.ndim != 3:
                raise ValueError(
                    f"lora.{name} must have 3 dimensions, got shape {list(factor.shape)}"
                )
        if self.a.shape[0] != self.b.shape[0]:
            raise ValueError(
                f"lora.a has {self.a.shape[0]} experts but lora.b has {self.b.shape[0]}"
            )
        if self.a.shape[1] != self.b.shape[2]:
            raise ValueError(
                f"lora.a has rank {self.a.shape[1]} but lora.b has rank {self.b.shape[2]}"
            )
        if self.a.shape[1] < 1:
            raise ValueError(f"the rank must be at least 1, got {self.a.shape[1]}")
        if self.a.device != self.b.device:
            raise ValueError(f"lora.a is on {self.a.device} but lora.b is on {self.b.device}")
        if self.a.dtype != self.b.dtype:
            raise TypeError(f"lora.a is {self.a.dtype} but lora.b is {self.b.dtype}")
        if not isinstance(self.scaling, numbers.Real | torch.SymFloat | torch.SymInt):
            raise TypeError(
                f"scaling must be a number, got {type(self.scaling).__name__}; it is not trained"
            )
        if not math.isfinite(self.scaling):
            raise ValueError(f"scaling must be finite, got {self.scaling}")

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.a.shape[0]

    @property
    def rank(self) -> int:
        """Rank of the adapter."""
        return self.a.shape[1]

    @classmethod
    def from_flat(
        cls, lora_a: Tensor, lora_b: Tensor, *, experts: int, scaling: float
    ) -> "LoRAWeights":
        """Views of the expert-major layout.

        lora_a is [experts * rank, k_in], lora_b [n_out, experts * rank]: row e * rank + r of lora_a
        and column e * rank + r of lora_b belong to expert e.

        Raises:
            ValueError: a factor is not 2-D, or its rank dimension does not divide into `experts`.
        """
        rank = _rank(lora_a, lora_b, experts)
        a = lora_a.unflatten(0, (experts, rank))
        b = lora_b.unflatten(1, (experts, rank)).permute(1, 0, 2)
        return cls(a=a, b=b, scaling=scaling)

    @classmethod
    def from_peft(
        cls,
        lora_a: Tensor,
        lora_b: Tensor,
        *,
        experts: int,
        scaling: float,
        swapped: bool,
        transposed: bool,
    ) -> "LoRAWeights":
        """Views of PEFT's layout for a 3-D parameter, through which gradients flow back.

        lora_a [experts * rank, a] is expert-major; lora_b [b, rank * experts] has the expert index
        fastest.

        Args:
            swapped: the wrapper's `_did_swap_in_out_features`; false where it has none.
            transposed: the parameter is stored [experts, k_in, n_out] (`is_transposed` experts).

        Raises:
            ValueError: as in `from_flat`.
        """
        rank = _rank(lora_a, lora_b, experts)
        a = lora_a.unflatten(0, (experts, rank))
        b = lora_b.unflatten(1, (rank, experts)).permute(2, 0, 1)
        if swapped == transposed:
            a, b = b.mT, a.mT
        return cls(a=a, b=b, scaling=scaling)


def _rank(lora_a: Tensor, lora_b: Tensor, experts: int) -> int:
    if lora_a.ndim != 2 or lora_b.ndim != 2:
        raise ValueError(
            f"flat factors must be 2-D, got shapes {list(lora_a.shape)} and {list(lora_b.shape)}"
        )
    if experts < 1 or lora_a.shape[0] % experts:
        raise ValueError(f"lora_a has {lora_a.shape[0]} rows, not a multiple of {experts} experts")
    if lora_a.shape[0] != lora_b.shape[1]:
        raise ValueError(
            f"lora_a has {lora_a.shape[0]} rank rows but lora_b has {lora_b.shape[1]} rank columns"
        )
    return lora_a.shape[0] // experts
