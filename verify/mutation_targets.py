"""Where mutants are made, and which checks look for them.

A check is named "spec" or "spec:path". What is listed first is run first.
"""

from collections.abc import Mapping

ROUTING_FILES = ("_row_tiles.py", "_sizes.py", "_sort.py", "routing.py")
"""A mutant of these builds its routing itself; all others are given a right one."""

CHECKS: Mapping[str, tuple[str, ...]] = {
    "_row_tiles.py": ("routing", "scatter2scatter:tiles"),
    "_sizes.py": ("routing", "lora_forward", "combine", "glu_forward"),
    "_sort.py": ("routing", "scatter2scatter:tiles"),
    "autograd.py": ("expert_linear", "experts_mlp"),
    "layers/experts_mlp.py": ("experts_mlp",),
    "ops/_tile.py": ("lora_forward:epilogue", "lora_forward:fused"),
    "ops/fused.py": ("lora_forward:fused", "lora_input_grad:fused"),
    "ops/gram.py": ("lora_weight_grad:gram", "expert_weight_grad:gram"),
    "ops/gram_parts.py": ("lora_weight_grad:gram",),
    "ops/lora.py": ("lora_forward", "lora_input_grad"),
    "ops/product.py": ("lora_forward:epilogue", "scatter2scatter:tiles", "shrink"),
    "ops/recompute.py": ("lora_weight_grad:recompute",),
    "ops/scatter2scatter.py": (
        *("lora_forward:epilogue", "scatter2scatter:tiles", "shrink"),
        "lora_input_grad:epilogue",
    ),
}
"""By file; a file that is not listed is checked by the specs whose source it is."""

FUNCTION_CHECKS: Mapping[str, tuple[str, ...]] = {
    "group": ("group",),
    "group_kernel": ("group",),
    "combine": ("combine", "expert_linear"),
    "combine_kernel": ("combine",),
    "combine_grad": ("combine_grad",),
    "combine_grad_kernel": ("combine_grad",),
    "expert_bias_grad": ("expert_bias_grad",),
    "expert_bias_grad_kernel": ("expert_bias_grad",),
    "expert_weight_grad": ("expert_weight_grad",),
    "lora_weight_grad": ("lora_weight_grad",),
    "lora_grads": ("lora_weight_grad",),
    "glu_forward": ("glu_forward",),
    "glu_forward_kernel": ("glu_forward",),
    "glu_backward": ("glu_backward",),
    "glu_backward_kernel": ("glu_backward",),
    "gate_and_up": ("glu_backward", "glu_forward"),
    "gate_value": ("glu_backward", "glu_forward"),
}
"""By function, before the table of files."""

HOST_FUNCTIONS: Mapping[str, tuple[str, ...]] = {
    "_row_tiles.py": (
        "row_tile_count",
        "row_tile_range",
        "row_tile_entries",
        "group_bins",
        "row_tiles",
    ),
    "_sizes.py": ("ceil_div",),
    "_sort.py": ("sort_by_expert",),
    "autograd.py": ("linear_forward",),
    "layers/experts_mlp.py": ("mlp_forward", "_gate_grad"),
    "ops/dequantize.py": ("dequantize_four_bit",),
    "ops/dequantize_scaled.py": ("dequantize_scaled",),
    "ops/glu.py": ("glu_forward", "glu_backward"),
    "ops/gram.py": ("launch_gram", "_blocks", "_gram"),
    "ops/gram_parts.py": ("parts_of",),
    "ops/lora.py": ("lora_rows", "_summed", "_shrink", "_fused"),
    "ops/product.py": ("_launch", "rank_block", "weight_operand", "row_operand", "gathered"),
    "ops/recompute.py": ("launch_recompute",),
    "ops/rows.py": ("group", "combine", "combine_grad"),
    "ops/weight_grad.py": ("lora_grads", "expert_weight_grad", "expert_bias_grad"),
}
"""Launchers whose arithmetic reaches a kernel."""

NOT_SEEN = (
    "chunk", "form", "halved", "large", "missing", "plan", "pointers", "stages", "strict", "warps",
    "num_warps",
)  # fmt: skip
"""Names and arguments that choose a plan or a compiled variant, or how much is done at a time, or
what is checked and what an error says: they change no result."""

VARIANTS = ("EARLY", "HALVED_FROM")
"""Names in device functions that choose between variants of equal results."""

GPU_PATH = "Path.GROUPED_MM"
"""The path of torch's own kernel, which refuses operands on a CPU: launchers' branches for it are
not mutated."""

SKIPPED_FUNCTIONS = ("self_test_kernel",)
