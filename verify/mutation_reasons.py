"""Mutants that no check can see, with the reason."""

from collections.abc import Mapping

EQUIVALENT: Mapping[str, str] = {
    "layers/experts_mlp.py:_gate_grad:conversion:expert_of_slot.view(routing.tokens, "
    "routing.top_k).long() -> expert_of_slot.view(routing.tokens, routing.top_k)": (
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
    "_sort.py:load_keys:other:tl.load(ids + slot, mask=slot < rows, other=0) -> tl.load(ids + "
    "slot, mask=slot < rows, other=1)": "the keys past the end are replaced in the last line",
    "_sort.py:place_kernel:arithmetic:(chunk < chunks)[:, None] & (bins <= experts)[None, :] -> "
    "(chunk < chunks)[:, None]": (
        "what is no slot is counted after the groups, and changes nothing before it"
    ),
    "_sort.py:place_kernel:branch:group == 0 -> True": "every group stores the same offsets",
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
    "_row_tiles.py:group_bins:constant:2 -> 3": (
        "bins past those of the groups are masked everywhere: more of them hold nothing"
    ),
    "_row_tiles.py:write_group_tiles:comparison:group > experts -> group >= experts": (
        "the group of the dropped rows was told apart just before"
    ),
    "_row_tiles.py:write_group_tiles:comparison:group > experts -> group >= experts #2": (
        "the last program writes over what the dropped rows' wrote too much, where programs run "
        "in order"
    ),
    "_row_tiles.py:write_group_tiles:cast:(table + first + t + bins).to(tl.int64) -> (table + "
    "first + t + bins)": (
        "fewer than 2^31 rows among fewer than 2^25 experts have fewer than 2^29 entries"
    ),
    "ops/scatter2scatter.py:scatter2scatter_kernel:branch:expert == UNUSED -> False": (
        "UNUSED is -1, below the first expert of every launch, whose programs end as well"
    ),
    "ops/_tile.py:row_of_slot:cast:slot.to(tl.int32) -> slot": (
        "every slot is below 2^31, and divided in 64 bits it is the same"
    ),
    "ops/fused.py:fused_kernel:comparison:row + tl.arange(0, BLOCK_M) < end -> (row + "
    "tl.arange(0, BLOCK_M) <= end)": (
        "rows past the end repeat the last one: they store the same there"
    ),
    "ops/fused.py:fused_kernel:arithmetic:row + tl.arange(0, BLOCK_M) -> (row - tl.arange(0, "
    "BLOCK_M))": "rows past the end repeat the last one: they store the same there",
    "ops/fused.py:fused_kernel:arithmetic:inside_rows & (n < N)[None, :] -> (n < N)[None, :]": (
        "rows past the end repeat the last one: they store the same there"
    ),
    "ops/fused.py:fused_kernel:arithmetic:inside_rows & (r < R)[None, :] -> (r < R)[None, :]": (
        "rows past the end repeat the last one: they store the same there"
    ),
    "ops/fused.py:fused_kernel:branch:column_block == 0 -> True #2": (
        "every column block computes the same t"
    ),
    "ops/fused.py:fused_kernel:other:tl.load(bias_ptrs, mask=n < N, other=0.0) -> "
    "tl.load(bias_ptrs, mask=n < N, other=float('nan'))": (
        "columns past N are summed apart from the others and are not stored"
    ),
    "ops/fused.py:fused_kernel:branch:column_block == 0 -> True": (
        "every column block writes the same zeros"
    ),
    "ops/fused.py:fused_kernel:neighbour:end -> end + 1 #2": (
        "rows of t past the end are not stored, whichever they are"
    ),
    "ops/dequantize.py:dequantize_four_bit_kernel:cast:(element % BLOCKSIZE).to(tl.int32) -> "
    "(element % BLOCKSIZE)": "what is below a block size is the same in 64 bits",
    "ops/dequantize.py:dequantize_four_bit_kernel:cast:(base % OUTER_BLOCKSIZE).to(tl.int32) -> "
    "(base % OUTER_BLOCKSIZE)": "what is below a block size is the same in 64 bits",
    "ops/dequantize.py:dequantize_four_bit_kernel:other:tl.load( outer_absmax + base // "
    "OUTER_BLOCKSIZE + outer_distance, mask=inside, other=0.0 ) -> tl.load(outer_absmax + base //"
    " OUTER_BLOCKSIZE + outer_dista...inside, other=float('nan'))": (
        "the values of words that are not inside are not stored"
    ),
    "ops/dequantize.py:dequantize_four_bit_kernel:cast:tl.program_id(0).to(tl.int64) -> "
    "tl.program_id(0)": "an expert has fewer than 2^31 words",
    "ops/dequantize.py:dequantize_four_bit_kernel:cast:tl.minimum(items - start, "
    "BLOCK).to(tl.int32) -> tl.minimum(items - start, BLOCK)": "compared in 64 bits it is the same",
    "ops/dequantize.py:dequantize_four_bit_kernel:other:tl.load(packed + source + item, "
    "mask=inside, other=0) -> tl.load(packed + source + item, mask=inside, other=1)": (
        "the values of words that are not inside are not stored"
    ),
    "ops/dequantize.py:dequantize_four_bit_kernel:other:tl.load(absmax + base + distance, "
    "mask=inside, other=0) -> tl.load(absmax + base + distance, mask=inside, other=1)": (
        "the values of words that are not inside are not stored"
    ),
    "ops/dequantize.py:dequantize_four_bit:constant:0 -> 1": (
        "an output has an even number of elements, and a launch without programs does nothing"
    ),
    "ops/dequantize.py:dequantize_four_bit:constant:0 -> 1 #2": (
        "by bytes the same is decoded, only slower"
    ),
    "ops/dequantize.py:dequantize_four_bit:arithmetic:elements % 8 -> elements": (
        "by bytes the same is decoded, only slower"
    ),
    "ops/dequantize.py:dequantize_four_bit:constant:0 -> 1 #3": (
        "by bytes the same is decoded, only slower"
    ),
    "ops/dequantize.py:dequantize_four_bit:arithmetic:blocksize % 8 -> blocksize": (
        "by bytes the same is decoded, only slower"
    ),
    "ops/dequantize.py:dequantize_four_bit:arithmetic:packed.storage_offset() % 4 -> "
    "packed.storage_offset()": "by bytes the same is decoded, only slower",
    "ops/dequantize.py:dequantize_four_bit:arithmetic:plan.block // unit -> plan.block": (
        "a program takes more items, and the grid has fewer programs"
    ),
    "ops/dequantize.py:dequantize_four_bit:negation:False -> True": (
        "the interpreter contracts nothing; tests/test_quant_compile.py looks at the compiled code"
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
    "ops/glu.py:glu_backward:attribute:RowOrder.EXPERT -> RowOrder.SLOT": (
        "the number of rows is checked alone, and both orders have as many"
    ),
    "ops/glu.py:glu_backward:attribute:RowOrder.EXPERT -> RowOrder.SLOT #2": (
        "the number of rows is checked alone, and both orders have as many"
    ),
    "ops/glu.py:glu_backward_kernel:cast:tl.load(dact.ptr + row * dact.row + i * dact.col, "
    "mask=inside, other=0.0).to(tl.float32) -> tl.load(dact.ptr + row * dact.row + i * dact.col, "
    "mask=inside, other=0.0)": "it is multiplied by fp32 numbers, and before that by 1 at most",
    "ops/dequantize_scaled.py:dequantize_scaled_kernel:cast:group_r.to(tl.int64) -> group_r": (
        "within one matrix there are fewer than 2^31 scales"
    ),
    "ops/dequantize_scaled.py:dequantize_scaled_kernel:cast:r_first.to(tl.int64) -> r_first": (
        "one matrix has fewer than 2^31 elements"
    ),
    "ops/dequantize_scaled.py:dequantize_scaled_kernel:other:tl.load(data + expert * d1 * d2 + "
    "corner + distance, mask=inside, other=0) -> tl.load(data + expert * d1 * d2 + corner + "
    "distance, mask=inside, other=1)": "the values of elements that are not inside are not stored",
    "ops/dequantize_scaled.py:dequantize_scaled_kernel:other:tl.load(scale + group + "
    "group_distance, mask=inside, other=0.0) -> tl.load(scale + group + group_distance, "
    "mask=inside, other=float('nan'))": "the values of elements that are not inside are not stored",
    "ops/dequantize_scaled.py:dequantize_scaled_kernel:arithmetic:r_first // rows -> r_first % "
    "rows": "cancels: group_r is subtracted from the distance and added to the corner",
    "ops/dequantize_scaled.py:dequantize_scaled_kernel:arithmetic:r_first // rows -> r_first": (
        "cancels: group_r is subtracted from the distance and added to the corner"
    ),
    "ops/dequantize_scaled.py:dequantize_scaled_kernel:arithmetic:c_first // columns -> c_first %"
    " columns": "cancels: group_c is subtracted from the distance and added to the corner",
    "ops/dequantize_scaled.py:dequantize_scaled_kernel:arithmetic:c_first // columns -> c_first": (
        "cancels: group_c is subtracted from the distance and added to the corner"
    ),
    "ops/dequantize_scaled.py:dequantize_scaled_kernel:cast:half.to(tl.float16, "
    "bitcast=True).to(tl.float32) -> half.to(tl.float16, bitcast=True)": (
        "fp16 holds every e4m3 value, before and after the factor of 256"
    ),
    "ops/dequantize_scaled.py:dequantize_scaled:negation:False -> True": (
        "there are multiplications alone, and nothing to contract"
    ),
    "ops/dequantize_scaled.py:dequantize_scaled_kernel:cast:bits.to(tl.int8, "
    "bitcast=True).to(tl.float32) -> bits.to(tl.int8, bitcast=True)": (
        "what is multiplied by an fp32 number is made fp32 first"
    ),
    "ops/dequantize_scaled.py:dequantize_scaled_kernel:cast:(bits.to(tl.uint16) << "
    "8).to(tl.float16, bitcast=True).to(tl.float32) -> (bits.to(tl.uint16) << 8).to(tl.float16, "
    "bitcast=True)": "what is multiplied by an fp32 number is made fp32 first",
    "ops/dequantize_scaled.py:dequantize_scaled_kernel:negation:True -> False": (
        "a conversion between bytes with and without a sign keeps the bits"
    ),
    "ops/rows.py:group_kernel:comparison:expert < experts -> expert <= experts #2": (
        "a dropped row was loaded as zeros, and stays zero whatever its finite gate"
    ),
    "ops/rows.py:group_kernel:mask:tl.load(row_scale + slot, mask=expert < experts, other=0.0) ->"
    " tl.load(row_scale + slot)": (
        "a dropped row was loaded as zeros, and stays zero whatever its finite gate"
    ),
    "ops/rows.py:combine_kernel:other:tl.load(y.ptr + slot * y.row + n * y.col, mask=n < N, "
    "other=0.0) -> tl.load(y.ptr + slot * y.row + n * y.col, mask=n < N, other=float('nan'))": (
        "columns past N are summed apart from the others and are not stored"
    ),
    "ops/rows.py:combine:attribute:RowOrder.SLOT -> RowOrder.EXPERT": (
        "the number of rows is checked alone, and both orders have as many"
    ),
    "ops/rows.py:combine_grad:attribute:RowOrder.SLOT -> RowOrder.EXPERT": (
        "the number of rows is checked alone, and both orders have as many"
    ),
    "ops/rows.py:combine_grad:exchanged:_combine_grad(width, routing.top_k, y.dtype, y.stride(), "
    "dout.stride()) -> _combine_grad(routing.top_k, width, y.dtype, y.stride(), dout.stride())": (
        "a step of fewer columns adds up to the same"
    ),
    "ops/rows.py:group_kernel:cast:tl.load(row_scale + slot, mask=expert < experts, "
    "other=0.0).to(tl.float32) -> tl.load(row_scale + slot, mask=expert < experts, other=0.0)": (
        "what is multiplied by an fp32 number is made fp32 first"
    ),
    "ops/rows.py:group_kernel:cast:value.to(tl.float32) -> value": (
        "what is multiplied by an fp32 number is made fp32 first"
    ),
    "ops/rows.py:group_kernel:cast:(value.to(tl.float32) * g).to(out.ptr.dtype.element_ty) -> "
    "value.to(tl.float32) * g": "what is stored is made of the dtype of its place",
    "ops/rows.py:combine_grad_kernel:cast:value.to(tl.float32) -> value": (
        "what is multiplied by an fp32 number is made fp32 first"
    ),
    "ops/gram.py:gram_tile:neighbour:end -> end + 1": "a step without rows adds zeros",
    "ops/gram.py:gram_tile:other:tl.load(slots + rows, mask=inside, other=0) -> tl.load(slots + "
    "rows, mask=inside, other=1)": (
        "rows that are not inside are loaded as zeros, whatever their slot"
    ),
    "ops/gram.py:gram_tile:mask:tl.load(row_scale + slot, mask=inside, other=0.0) -> "
    "tl.load(row_scale + slot)": (
        "a row that is not inside was loaded as zeros, and stays zero whatever its finite gate"
    ),
    "ops/gram.py:gram_tile:branch:end >= begin -> True": (
        "sums of parts past the last are not read, and a cut expert is written once more afterwards"
    ),
    "ops/gram.py:gram_kernel:arithmetic:begin - 1 -> begin": (
        "a cut expert gets zeros, and is written once more by the launch that adds its parts"
    ),
    "ops/gram.py:gram_kernel:neighbour:begin -> (begin + 1) #2": (
        "a cut expert gets zeros, and is written once more by the launch that adds its parts"
    ),
    "ops/gram.py:gram_kernel:constant:1 -> 2 #3": (
        "no rows all the same: only whether the end lies before the beginning counts"
    ),
    "ops/lora.py:_summed:reassignment:rows = rows._replace(target=RowOrder.SLOT) -> pass": (
        "whether the target is EXPERT is asked alone, and neither is"
    ),
    "ops/lora.py:_summed:conversion:rows._replace(target=RowOrder.SLOT) -> rows": (
        "whether the target is EXPERT is asked alone, and neither is"
    ),
    "ops/lora.py:lora_rows:reassignment:rows = rows._replace(target=RowOrder.SLOT) -> pass": (
        "whether the target is EXPERT is asked alone, and neither is"
    ),
    "ops/lora.py:lora_rows:conversion:rows._replace(target=RowOrder.SLOT) -> rows": (
        "whether the target is EXPERT is asked alone, and neither is"
    ),
    "ops/lora.py:_summed:arithmetic:width // 2 -> width": (
        "a sum made in other parts of the columns is the same"
    ),
    "ops/lora.py:_summed:constant:2 -> 3": "a sum made in other parts of the columns is the same",
    "ops/lora.py:_fused:scaling:routing.fan_out(rows.source) -> 1": (
        "the interpreter compiles nothing that another fan-out could reuse"
    ),
    "ops/recompute.py:launch_recompute:scaling:routing.fan_out(p_order) -> 1": (
        "the interpreter compiles nothing that another fan-out could reuse"
    ),
    "ops/recompute.py:launch_recompute:scaling:routing.fan_out(z_order) -> 1": (
        "the interpreter compiles nothing that another fan-out could reuse"
    ),
    "ops/recompute.py:recompute_kernel:neighbour:program -> (program + 1) #2": (
        "the blocks of an expert are dealt to its programs in another order"
    ),
    "ops/recompute.py:recompute_kernel:neighbour:end -> end + 1": "a step without rows adds zeros",
    "ops/recompute.py:recompute_kernel:other:tl.load(slots + rows, mask=inside, other=0) -> "
    "tl.load(slots + rows, mask=inside, other=1)": (
        "rows that are not inside are loaded as zeros, whatever their slot"
    ),
    "ops/recompute.py:recompute_kernel:mask:tl.load(row_scale + slot, mask=inside, other=0.0) -> "
    "tl.load(row_scale + slot)": (
        "a row that is not inside was loaded as zeros, and stays zero whatever its finite gate"
    ),
    "ops/weight_grad.py:expert_bias_grad_kernel:neighbour:end -> end + 1": (
        "a step without rows adds zeros"
    ),
    "ops/weight_grad.py:expert_bias_grad_kernel:other:tl.load(slots + rows, mask=inside, other=0)"
    " -> tl.load(slots + rows, mask=inside, other=1)": (
        "rows that are not inside are loaded as zeros, whatever their slot"
    ),
    "ops/weight_grad.py:expert_bias_grad_kernel:mask:tl.load(row_scale + slot, mask=inside, "
    "other=0.0) -> tl.load(row_scale + slot)": (
        "a row that is not inside was loaded as zeros, and stays zero whatever its finite gate"
    ),
    "ops/weight_grad.py:expert_bias_grad:exchanged:_bias_launch(by_expert, dy.dtype, dy.stride(),"
    " width, fan_out, scale_form) -> _bias_launch(by_expert, dy.dtype, dy.stride(), fan_out, "
    "width, scale_form)": "a launch is remembered by all of them, in whatever order",
    "ops/weight_grad.py:expert_bias_grad_kernel:cast:tl.load(row_scale + slot, mask=inside, "
    "other=0.0).to(tl.float32) -> tl.load(row_scale + slot, mask=inside, other=0.0)": (
        "what is multiplied by an fp32 number is made fp32 first"
    ),
    "ops/scatter2scatter.py:product_tile:statement:tl.assume(K > 0) -> pass": (
        "the interpreter reads no assumption, and the loop runs as often"
    ),
    "ops/scatter2scatter.py:product_tile:comparison:K > 0 -> K >= 0": (
        "the interpreter reads no assumption, and the loop runs as often"
    ),
    "ops/scatter2scatter.py:product_tile:constant:0 -> 1 #2": (
        "the interpreter reads no assumption, and the loop runs as often"
    ),
    "ops/scatter2scatter.py:product_tile:branch:EVEN_K -> False": (
        "the mask holds everywhere where EVEN_K is true"
    ),
    "ops/scatter2scatter.py:product_tile:branch:not EVEN_K -> True": (
        "the mask holds everywhere where EVEN_K is true"
    ),
    "ops/scatter2scatter.py:product_tile:comparison:end > row -> end >= row": (
        "a tile that is in use has rows: the condition is always true"
    ),
    "ops/scatter2scatter.py:product_tile:comparison:end > row -> end >= row #2": (
        "a tile that is in use has rows: the condition is always true"
    ),
    "ops/scatter2scatter.py:product_tile:comparison:end > row -> end >= row #3": (
        "a tile that is in use has rows: the condition is always true"
    ),
    "ops/scatter2scatter.py:product_tile:constant:0.0 -> 1.0": (
        "a tile that is in use has rows: the condition is always true"
    ),
    "ops/scatter2scatter.py:product_tile:constant:0.0 -> 1.0 #2": (
        "a tile that is in use has rows: the condition is always true"
    ),
    "ops/scatter2scatter.py:product_tile:constant:0 -> 1 #3": (
        "a tile that is in use has rows: the condition is always true"
    ),
    "ops/scatter2scatter.py:product_tile:other:tl.load(bias_ptrs, mask=n < N, other=0.0) -> "
    "tl.load(bias_ptrs, mask=n < N, other=float('nan'))": (
        "columns past N are summed apart from the others and are not stored"
    ),
    "ops/scatter2scatter.py:scatter2scatter_kernel:branch:first_expert > 0 -> False": (
        "every launch may write the zeros of the dropped rows"
    ),
    "ops/scatter2scatter.py:scatter2scatter_kernel:constant:0 -> 1": (
        "every launch may write the zeros of the dropped rows"
    ),
    "ops/scatter2scatter.py:scatter2scatter_kernel:arithmetic:(row + tl.arange(0, BLOCK_M) < "
    "end)[:, None] & (n < N)[None, :] -> (n < N)[None, :]": (
        "rows past the end repeat the last one, which gets zeros too"
    ),
    "ops/scatter2scatter.py:scatter2scatter_kernel:comparison:row + tl.arange(0, BLOCK_M) < end "
    "-> (row + tl.arange(0, BLOCK_M) <= end)": (
        "rows past the end repeat the last one, which gets zeros too"
    ),
    "ops/scatter2scatter.py:scatter2scatter_kernel:arithmetic:row + tl.arange(0, BLOCK_M) -> (row"
    " - tl.arange(0, BLOCK_M))": "rows past the end repeat the last one, which gets zeros too",
    "ops/scatter2scatter.py:scatter2scatter_kernel:branch:end - row <= BLOCK_M // 2 -> False": (
        "a tile of full height computes what one of half the height does"
    ),
    "ops/scatter2scatter.py:scatter2scatter_kernel:comparison:end - row <= BLOCK_M // 2 -> end - "
    "row < BLOCK_M // 2": "a tile of full height computes what one of half the height does",
    "ops/scatter2scatter.py:scatter2scatter_kernel:arithmetic:end - row -> (end + row)": (
        "a tile of full height computes what one of half the height does"
    ),
    "ops/scatter2scatter.py:scatter2scatter_kernel:arithmetic:end - row -> end": (
        "a tile of full height computes what one of half the height does"
    ),
    "ops/scatter2scatter.py:scatter2scatter_kernel:neighbour:end -> (end + 1)": (
        "a tile of full height computes what one of half the height does"
    ),
    "ops/scatter2scatter.py:scatter2scatter_kernel:arithmetic:BLOCK_M // 2 -> (BLOCK_M % 2)": (
        "a tile of full height computes what one of half the height does"
    ),
    "ops/scatter2scatter.py:scatter2scatter_kernel:constant:2 -> 3": (
        "a tile of full height computes what one of half the height does"
    ),
    "ops/scatter2scatter.py:scatter2scatter_kernel:arithmetic:BLOCK_M // 2 -> BLOCK_M #2": (
        "a tile of full height computes what one of half the height does"
    ),
    "ops/product.py:rank_block:constant:1 -> 2": "blocks of ranks have at least 16 of them",
    "ops/product.py:gathered:negation:not plan.gather -> plan.gather": (
        "rows that were copied into expert order give the same product"
    ),
    "ops/product.py:_launch:exchanged:_product( tile, precision, layout, x_map, by_expert, target"
    " ...m, bias_form, scale_form, ) -> _product(tile, precision, layout, x_map, by_expert, "
    "target i...orm, bias_form, scale_form) #3": (
        "a launch is remembered by all of them, in whatever order"
    ),
    "ops/product.py:_launch:constant:0 -> 1": "without a low-rank term nothing reads the rank",
    "ops/product.py:rank_block:extremum:min(max(next_power_of_two(max(rank, 1)), 16), 64) -> "
    "max(max(next_power_of_two(max(rank, 1)), 16), 64)": (
        "one step over more ranks adds what several steps add"
    ),
}
"""Id of a mutant -> why no input can tell it from the original."""
