"""The call signatures of axolotl's `libs/scattermoe_lora`, as adapters over this package.

A user of those kernels changes one import. Names, order of arguments, layouts and results are
theirs:

    sorted_expert_idxs [L], sorted_scattered_idxs [L]    expert and slot of each row, by expert
    expert_offsets [E]                                   inclusive cumulative counts
    lora_A [R E, K], lora_B [N, R E]                     expert-major rows and columns
    X [L / k, K], row slot // k; grouped: [L, K] in expert order

Index width, tuning and fusion are chosen by this package: the arguments that steered them
(`int64_indices`, `use_fused_dX`, `use_fused_gather`) are accepted and change nothing.

Submodules have the names and contents of the former ones: `kernels.ops`, `kernels.lora_ops`,
`kernels.single`, `parallel_experts`, `parallel_linear_lora`, `lora_ops`, `lora_layout`, `layers`,
`selective_dequant`, `selective_dequant_kernel`; `experts`, which needs transformers, is not
imported with them. `mlp` has the blocks of shawntan's scattermoe.
"""

from ..compat_selective import (
    get_active_experts,
    remap_expert_indices,
    selective_dequant_nf4_triton,
    selective_expert_weights,
    selective_lora_weights,
    shared_dequant_across_shards,
)
from . import kernels, layers, lora_ops, mlp, ops
from .kernels.lora_ops import (
    _SPLIT_LORA_FWD_MAX_EXPERTS,
    _SPLIT_LORA_FWD_THRESHOLD,
    BLOCK_M,
    group_bwd_lora,
    group_bwd_lora_fused,
    round_expert_counts,
    scatter2scatter_lora,
    scatter2scatter_lora_dX,
)
from .kernels.ops import group, group_bwd_W, scatter2scatter
from .kernels.single import single2scatter
from .layers import (
    HFScatterMoEGatedMLP,
    ScatterMoEGatedMLP,
    _compute_shared_expert,
    _convert_smoe_lora,
    _route,
    _sigmoid_topk_route,
    _softmax_topk_route,
    _unwrap_experts_lora,
    _unwrap_gate_lora,
)
from .lora_layout import (
    peft_down_proj_lora_to_scattermoe,
    peft_lora_B_to_scattermoe,
    peft_lora_to_scattermoe,
    validate_scattermoe_lora_shapes,
)
from .lora_ops import ParallelExperts
from .parallel_experts import ParallelLinear, flatten_sort_count, parallel_linear
from .parallel_linear_lora import (
    ScatterMoELoRA,
    _compute_lora_input_grad,
    get_lora_params_from_wrapper,
    parallel_linear_lora,
)
from .selective_dequant import _selective_dequant_bnb4

__all__ = [
    "BLOCK_M",
    "_SPLIT_LORA_FWD_MAX_EXPERTS",
    "_SPLIT_LORA_FWD_THRESHOLD",
    "HFScatterMoEGatedMLP",
    "ParallelExperts",
    "ParallelLinear",
    "ScatterMoEGatedMLP",
    "ScatterMoELoRA",
    "_compute_lora_input_grad",
    "_compute_shared_expert",
    "_convert_smoe_lora",
    "_route",
    "_selective_dequant_bnb4",
    "_sigmoid_topk_route",
    "_softmax_topk_route",
    "_unwrap_experts_lora",
    "_unwrap_gate_lora",
    "flatten_sort_count",
    "get_active_experts",
    "get_lora_params_from_wrapper",
    "group",
    "group_bwd_W",
    "group_bwd_lora",
    "group_bwd_lora_fused",
    "kernels",
    "layers",
    "lora_ops",
    "mlp",
    "ops",
    "parallel_linear",
    "parallel_linear_lora",
    "peft_down_proj_lora_to_scattermoe",
    "peft_lora_B_to_scattermoe",
    "peft_lora_to_scattermoe",
    "remap_expert_indices",
    "round_expert_counts",
    "scatter2scatter",
    "scatter2scatter_lora",
    "scatter2scatter_lora_dX",
    "selective_dequant_nf4_triton",
    "selective_expert_weights",
    "selective_lora_weights",
    "shared_dequant_across_shards",
    "single2scatter",
    "validate_scattermoe_lora_shapes",
]
