"""PEFT's adapters on stacks of experts as factors, and back.

Which factor sits on the input side is what the wrapper says of itself, `_did_swap_in_out_features`,
against the layout of the experts; shapes decide nothing, since a square projection has one shape
either way.
"""

from collections.abc import Sequence
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..weights import LoRAWeights

FIRST_SWAPPING = (0, 19, 1)
"""The first version of PEFT that puts lora_A on the input side of [experts, out, in] parameters."""


def wrapper_swaps(wrapper: Any) -> bool:
    """Whether a wrapper says that it exchanged the input and output sizes of its parameter."""
    return bool(getattr(wrapper, "_did_swap_in_out_features", False))


def version_swaps(version: str, *, transposed: bool) -> bool:
    """Whether PEFT `version` exchanges the sizes when it wraps experts of that layout.

    Raises:
        ValueError: `version` is no version number.
    """
    try:
        numbers = Version(version).release[:3]
    except InvalidVersion:
        raise ValueError(f"{version!r} is not a version of PEFT") from None
    if numbers >= FIRST_SWAPPING:
        return not transposed
    return transposed if numbers[:2] == (0, 19) else False


def adapter_factors(wrapper: Any, adapter: str, *, transposed: bool) -> LoRAWeights:
    """One adapter of one wrapper: views through which gradients reach PEFT's parameters.

    Raises:
        RuntimeError: the factors are sharded and were not gathered.
    """
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    if isinstance(a, DTensor) or isinstance(b, DTensor):
        raise RuntimeError(
            f"adapter {adapter!r} of {wrapper.parameter_name} is a sharded DTensor: shard the "
            "decoder layer with fully_shard, so that its adapters are gathered before they are used"
        )
    return LoRAWeights.from_peft(
        a,
        b,
        experts=wrapper.num_experts,
        scaling=float(wrapper.scaling[adapter]),
        swapped=wrapper_swaps(wrapper),
        transposed=transposed,
    )


def active_factors(wrapper: Any, *, transposed: bool) -> LoRAWeights | None:
    """The active adapters of a wrapper as one; None where none is active or some are merged."""
    if wrapper.disable_adapters or wrapper.merged:
        return None
    names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    return combined([adapter_factors(wrapper, name, transposed=transposed) for name in names])


def combined(parts: Sequence[LoRAWeights]) -> LoRAWeights | None:
    """Adapters as one: A = [A_1; A_2; ..], B = [B_1 s_1/s, B_2 s_2/s, ..], scaling s.

    s is the first scaling that is not zero. Parts of that scaling are taken as they are; for others
    B is scaled in fp32, one rounding of 2^-24 that vanishes in the rounding of the operands to 16
    bits. Factors of different dtypes are taken in fp32.
    """
    if len(parts) < 2:
        return parts[0] if parts else None
    scaling = next((part.scaling for part in parts if part.scaling), 0.0)
    same = all(part.scaling == scaling for part in parts)
    dtypes = {part.a.dtype for part in parts}
    dtype = parts[0].a.dtype if same and len(dtypes) == 1 else torch.float32
    columns = [_scaled(part, scaling, dtype) for part in parts]
    return LoRAWeights(
        a=torch.cat([part.a.to(dtype) for part in parts], dim=1),
        b=torch.cat(columns, dim=2),
        scaling=scaling,
    )


def _scaled(part: LoRAWeights, scaling: float, dtype: torch.dtype) -> Tensor:
    b = part.b.to(dtype)
    return b if part.scaling == scaling else b * (part.scaling / scaling)


def to_peft(lora: LoRAWeights, *, swapped: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    """PEFT's lora_A [experts * rank, a] and lora_B [b, rank * experts]; undoes `from_peft`."""
    a, b = (lora.b.mT, lora.a.mT) if swapped == transposed else (lora.a, lora.b)
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
