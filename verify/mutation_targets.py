"""Where mutants are made, which checks look for them, and which no check can see, with the reason.

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
    "ops/scatter2scatter.py": ("lora_forward:epilogue", "scatter2scatter:tiles", "shrink"),
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

NOT_SEEN = ("chunk", "form", "pointers", "strict", "warps", "stages", "num_warps")
"""Names and arguments that choose a compiled variant, or how much is done at a time, or what is
checked: they change no result."""

SKIPPED_FUNCTIONS = ("self_test_kernel",)

EQUIVALENT: Mapping[str, str] = {
    "layers/experts_mlp.py:_gate_grad:conversion:"
    "expert_of_slot.view(routing.tokens, routing.top_k).long() -> "
    "expert_of_slot.view(routing.tokens, routing.top_k)": (
        "newer versions of torch gather by 32-bit indices too"
    ),
    "_sort.py:load_keys:comparison:chosen < experts -> (chosen <= experts)": (
        "the key of a row that is dropped is the number of experts"
    ),
    "_sort.py:sort_by_expert:constant:2 -> 3": (
        "the program too many marks the same entries as not in use"
    ),
    "_sort.py:place_kernel:constant:0 -> 1 #3": (
        "there are two other groups at least, and each stores the same offsets"
    ),
    "_sort.py:sort_by_expert:constant:4 -> 5 #2": (
        "the parts of the buffer lie further apart than they need to"
    ),
    "_sort.py:place_kernel:comparison:group == 0 -> group != 0": (
        "there are two other groups at least, and each stores the same offsets"
    ),
    "_row_tiles.py:row_tiles:constant:2 -> 3": (
        "the program too many marks the same entries as not in use"
    ),
    "_row_tiles.py:row_tiles_kernel:other:tl.load(offsets + bins, mask=bins <= experts, other=0) "
    "-> tl.load(offsets + bins, mask=bins <= experts, other=1)": (
        "sizes past the groups are replaced by 0 in the next line but one"
    ),
    "_row_tiles.py:row_tiles_kernel:constant:0 -> 1": (
        "sizes past the groups are read for the rows of entries that are not in use alone"
    ),
    "ops/_tile.py:row_of_slot:cast:slot.to(tl.int32) -> slot": (
        "every slot is below 2^31, and divided in 64 bits it is the same"
    ),
    "ops/fused.py:fused_kernel:cast:tl.load(bias_ptrs, mask=n < N, other=0.0).to(tl.float32) -> "
    "tl.load(bias_ptrs, mask=n < N, other=0.0)": (
        "what is added to an fp32 sum is made fp32 first"
    ),
    "ops/dequantize.py:dequantize_four_bit_kernel:constant:0 -> 1 #3": (
        "ids not known are refused on a CPU; tests/test_quant.py decodes some"
    ),
    "ops/dequantize.py:dequantize_four_bit_kernel:cast:(element % BLOCKSIZE).to(tl.int32) -> "
    "(element % BLOCKSIZE)": "what is below a block size is the same in 64 bits",
    "ops/dequantize.py:dequantize_four_bit_kernel:cast:(base % OUTER_BLOCKSIZE).to(tl.int32) -> "
    "(base % OUTER_BLOCKSIZE)": "what is below a block size is the same in 64 bits",
    "ops/dequantize_scaled.py:dequantize_scaled_kernel:constant:0 -> 1 #2": (
        "ids not known are refused on a CPU; tests/test_quant.py decodes some"
    ),
    "_row_tiles.py:group_bins:constant:2 -> 3": (
        "bins past those of the groups are masked everywhere: more of them hold nothing"
    ),
    "ops/glu.py:gate_and_up:branch:CLAMPED -> True": (
        "without CLAMPED the limit is infinite, and clamping at infinity changes no value"
    ),
    "ops/glu.py:gate_and_up:comparison:u > limit -> u >= limit": (
        "clipping the limit itself to the limit changes no value"
    ),
    "ops/glu.py:gate_and_up:comparison:u < -limit -> u <= -limit": (
        "clipping the limit itself to the limit changes no value"
    ),
    "ops/dequantize.py:dequantize_four_bit_kernel:comparison:expert < experts -> "
    "(expert <= experts)": (
        "ids not known are refused on a CPU; tests/test_quant.py decodes some, and sees it"
    ),
    "ops/dequantize.py:dequantize_four_bit_kernel:other:tl.load( outer_absmax + base // "
    "OUTER_BLOCKSIZE + outer_distance, mask=inside, other=0.0 ) -> tl.load(outer_absmax + base // "
    "OUTER_BLOCKSIZE + outer_dista...inside, other=float('nan'))": (
        "the values of words that are not inside are not stored"
    ),
    "ops/dequantize_scaled.py:dequantize_scaled_kernel:cast:group_r.to(tl.int64) -> group_r": (
        "within one matrix there are fewer than 2^31 scales"
    ),
    "ops/rows.py:group:exchanged:_group(width, x.dtype, x.stride(), scale_form, fan_out) -> "
    "_group(width, x.dtype, x.stride(), fan_out, scale_form)": (
        "a launch is remembered by all of them, in whatever order"
    ),
    "ops/rows.py:group_kernel:comparison:expert < experts -> expert <= experts #2": (
        "a dropped row was loaded as zeros, and stays zero whatever its finite gate"
    ),
    "ops/rows.py:group_kernel:mask:tl.load(row_scale + slot, mask=expert < experts, other=0.0) -> "
    "tl.load(row_scale + slot)": (
        "a dropped row was loaded as zeros, and stays zero whatever its finite gate"
    ),
    "ops/rows.py:combine_kernel:other:tl.load(y.ptr + slot * y.row + n * y.col, mask=n < N, "
    "other=0.0) -> tl.load(y.ptr + slot * y.row + n * y.col, mask=n < N, other=float('nan'))": (
        "columns past N are summed apart from the others and are not stored"
    ),
}
"""Id of a mutant -> why no input can tell it from the original."""
