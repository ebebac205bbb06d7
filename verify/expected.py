"""What an output should be, and how its elements group when errors are judged."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .numerics import Uncertain


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The true value of one output with the error that a correct kernel may make.

    A vector is a line of the output along `vector_dim`: a row of Y, one (expert, rank) line of dA
    or dB.

    value: fp64, in the shape of the output. model: same shape, its variances. dtype: of the output.
    expert: int64, the owner of each vector (any shape that flattens to the number of vectors),
    `experts` for
    vectors that belong to none. sources: per vector, how many independently rounded operand
    elements its shared error comes from. freedom: per vector, the degrees of freedom of the norm of
    its shared error, `sources` unless stated. repeats: per vector, how many of its expert are made
    of the same operands and err alike, itself among them; 1 unless stated. zero: bool per vector,
    which must be +0.0 to the bit. terms: parts that the value is the sum of, each judged by its
    fitted slope. directions: what the error of a likely fault looks like, per unit of the fault:
    each is fitted to the error alone. coupled: whether shared errors are common to one vector or to
    all vectors of an expert.

    Raises:
        ValueError: there is not one owner, one number of sources and one zero per vector.
    """

    value: Tensor
    model: Uncertain
    dtype: torch.dtype
    expert: Tensor
    sources: Tensor
    zero: Tensor
    freedom: Tensor | None = None
    repeats: Tensor | None = None
    vector_dim: int = -1
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    directions: Mapping[str, Tensor] = field(default_factory=dict)
    coupled: Literal["vector", "expert"] = "vector"

    def __post_init__(self) -> None:
        shape = list(self.value.shape)
        length = shape.pop(self.vector_dim) if shape else 1
        for name in ("expert", "sources", "zero"):
            count = getattr(self, name).numel()
            if count != math.prod(shape):
                raise ValueError(
                    f"{name} is given for {count} vectors, and an output of shape "
                    f"{tuple(self.value.shape)} has {math.prod(shape)} of length {length} along "
                    f"dimension {self.vector_dim}"
                )

    def vectors(self, tensor: Tensor) -> Tensor:
        """A tensor in the shape of the output as [vectors, length]."""
        if tensor.ndim == 0:
            return tensor
        moved = tensor.movedim(self.vector_dim, -1)
        return moved.reshape(-1, moved.shape[-1])

    def weakest_share(self) -> tuple[str, float]:
        """The term that carries the least of the output's norm, what is finite of it, and its
        share; ("", 1) without terms.
        """
        if not self.terms:
            return "", 1.0
        finite = self.value.isfinite()
        norm = float(torch.linalg.vector_norm(self.value[finite]))
        shares = {
            name: float(torch.linalg.vector_norm(term[finite])) / norm if norm else 1.0
            for name, term in self.terms.items()
        }
        name = min(shares, key=shares.__getitem__)
        return name, shares[name]
