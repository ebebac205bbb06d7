"""The selective functions under their former module."""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ..compat_selective import (
    get_active_experts,
    remap_expert_indices,
    selective_expert_weights,
    selective_lora_weights,
    shared_dequant_across_shards,
)
from ..quant import four_bit

__all__ = [
    "get_active_experts",
    "remap_expert_indices",
    "selective_expert_weights",
    "selective_lora_weights",
    "shared_dequant_across_shards",
]


def _selective_dequant_bnb4(
    raw_param: Tensor,
    quant_state: Any,
    active_experts: Tensor,
    expert_shape: tuple[int, int],
) -> Tensor:
    """Dense [active, d1, d2], in the state's dtype, from packed bytes and their `QuantState`.

    The state may describe the experts in any shape; blocks may straddle experts.

    Raises:
        TypeError, ValueError: as `quant.four_bit`; or the bytes are no whole number of experts.
    """
    elements, one = 2 * raw_param.nbytes, math.prod(expert_shape)
    if elements % one:
        raise ValueError(
            f"raw_param holds {elements} elements, not a multiple of {one} in an expert of shape "
            f"{list(expert_shape)}"
        )
    state = copy.copy(quant_state)
    state.shape = torch.Size((elements // one, *expert_shape))
    stored = four_bit(raw_param, state)
    return stored.dense(active_experts, dtype=stored.dtype)
