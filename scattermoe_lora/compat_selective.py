"""The selective functions of axolotl's scattermoe_lora, with their names, arguments and layouts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .quant import FourBit, stored_experts

NF4_CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 values of NF4, as bitsandbytes writes them (QLoRA, appendix E)."""


def get_active_experts(sorted_expert_idxs: Tensor, E: int) -> Tensor:
    """The experts that occur in `sorted_expert_idxs` [rows], ascending.

    Ids outside [0, E) are left out. How many there are is known on the device alone, so this waits
    for it.
    """
    ids = torch.unique(sorted_expert_idxs)
    return ids[(ids >= 0) & (ids < E)]


def remap_expert_indices(
    sorted_expert_idxs: Tensor, expert_offsets: Tensor, active_experts: Tensor, E: int
) -> tuple[Tensor, Tensor]:
    """The routing in terms of the active experts, numbered 0 .. active - 1.

    Args:
        sorted_expert_idxs: [rows], ascending. Rows of expert E or above (dropped) get id `active`.
        expert_offsets: [E] inclusive cumulative counts.
        active_experts: [active], ascending, every expert that has rows among them.

    Returns:
        Compact ids [rows] and inclusive cumulative counts [active], dtypes as given.

    Raises:
        ValueError: `expert_offsets` has not E entries.
    """
    if expert_offsets.numel() != E:
        raise ValueError(
            f"expert_offsets has {expert_offsets.numel()} entries but there are {E} experts"
        )
    ids = torch.searchsorted(active_experts, sorted_expert_idxs.to(active_experts.dtype))
    return ids.to(sorted_expert_idxs.dtype), expert_offsets[active_experts]


def selective_expert_weights(
    experts_module: nn.Module, param_name: str, active_experts: Tensor
) -> Tensor:
    """Dense [active, d1, d2] of some experts of a module's parameter, however it is stored.

    In the dtype that a 4-bit state records, bfloat16 for 8-bit storage, the parameter's own where
    it is dense (gradients flow back to it then). Nothing else is decoded.

    Raises:
        AttributeError, TypeError, ValueError: as `quant.stored_experts`.
    """
    stored = stored_experts(experts_module, param_name)
    return stored.dense(active_experts, dtype=stored.dtype)


def shared_dequant_across_shards(
    experts_module: nn.Module, param_name: str, sei_per_shard: Sequence[Tensor], E: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`selective_expert_weights` once for shards of a batch whose active experts overlap.

    Args:
        sei_per_shard: the sorted_expert_idxs [rows] of each shard.

    Returns:
        The experts of any shard, ascending [union]; their dense weights [union, d1, d2]; and for
        each shard the positions int64 [active] of its active experts in that union.

    Raises:
        ValueError: there are no shards.
        AttributeError, TypeError, ValueError: as `quant.stored_experts`.
    """
    if not sei_per_shard:
        raise ValueError("sei_per_shard must hold at least 1 shard, got 0")
    per_shard = [get_active_experts(ids, E) for ids in sei_per_shard]
    union = torch.unique(torch.cat(per_shard))
    dense = selective_expert_weights(experts_module, param_name, union)
    return union, dense, [torch.searchsorted(union, active) for active in per_shard]


def selective_lora_weights(
    lora_A: Tensor, lora_B: Tensor, active_experts: Tensor, E: int
) -> tuple[Tensor, Tensor]:
    """The factors of the active experts.

    lora_A [R*E, K] becomes [R*active, K], lora_B [N, R*E] becomes [N, R*active].
    Both are expert-major. Gradients flow back; inactive experts get zeros.

    Raises:
        ValueError: the rank dimensions do not divide into E experts, or differ.
    """
    if lora_A.shape[0] % E or lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(
            f"lora_A has {lora_A.shape[0]} rank rows and lora_B {lora_B.shape[1]} rank columns; "
            f"both must be the same multiple of {E} experts"
        )
    a = lora_A.unflatten(0, (E, -1)).index_select(0, active_experts)
    b = lora_B.unflatten(1, (E, -1)).index_select(1, active_experts)
    return a.flatten(0, 1), b.flatten(1, 2)


def selective_dequant_nf4_triton(
    packed_data: Tensor,
    absmax: Tensor,
    active_experts: Tensor,
    expert_shape: tuple[int, int],
    blocksize: int,
    dtype: torch.dtype = torch.bfloat16,
    codebook: Tensor | None = None,
) -> Tensor:
    """Dense [active, d1, d2] from packed 4-bit experts and scales that are not nested.

    Args:
        packed_data: uint8, any shape, 2 elements per byte.
        absmax: fp32 [blocks].
        codebook: fp32 [16], NF4's by default.

    Raises:
        TypeError, ValueError: as `quant.FourBit`; or packed_data is no whole number of experts.
    """
    d1, d2 = expert_shape
    elements = packed_data.numel() * 2
    if elements % (d1 * d2):
        raise ValueError(
            f"packed_data holds {elements} elements, not a multiple of {d1 * d2} in an expert of "
            f"shape {[d1, d2]}"
        )
    if codebook is None:
        codebook = torch.tensor(NF4_CODEBOOK, dtype=torch.float32, device=packed_data.device)
    stored = FourBit(
        packed=packed_data.reshape(-1),
        absmax=absmax.reshape(-1),
        codebook=codebook,
        blocksize=blocksize,
        experts=elements // (d1 * d2),
        shape=(d1, d2),
    )
    return stored.dense(active_experts, dtype=dtype)
