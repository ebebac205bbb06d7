"""Wrong versions of the routed products, made by hand.

Each is a mistake that such kernels have had; the checks of its operation must reject it.
`old` is in its file once.
"""

from collections.abc import Mapping

from ..spec import Mutant

_FUSED = "ops/fused.py"
_LORA = "ops/lora.py"
_PRODUCT = "ops/scatter2scatter.py"
_PRODUCT_LAUNCHER = "ops/product.py"


PRODUCTS: Mapping[str, tuple[Mutant, ...]] = {
    "scatter2scatter": (
        Mutant(
            id="scatter2scatter-last-k-step",
            what="the last step of the reduction is left out",
            file=_PRODUCT,
            old="for k_start in range(0, K, BLOCK_K):",
            new="for k_start in range(0, K - BLOCK_K, BLOCK_K):",
        ),
        Mutant(
            id="scatter2scatter-neighbour",
            what="the weight of the next expert",
            file=_PRODUCT,
            old="w.ptr + (expert - first_expert).to(tl.int64)",
            new="w.ptr + (expert - first_expert + 1).to(tl.int64)",
        ),
        Mutant(
            id="scatter2scatter-k-tail",
            what="one column past the end of K is read",
            file=_PRODUCT,
            old="(k_start + k < K)[None, :], other",
            new="(k_start + k <= K)[None, :], other",
        ),
        Mutant(
            id="scatter2scatter-n-tail",
            what="one column past the end of N is written",
            file=_PRODUCT,
            old="& (n < N)[None, :]\n    y_ptrs",
            new="& (n <= N)[None, :]\n    y_ptrs",
        ),
        Mutant(
            id="scatter2scatter-row-tail",
            what="one row past the end of the expert is written",
            file=_PRODUCT,
            old=(
                "    y_rows = tl.where(end > row, y_rows, 0)\n"
                "    stored = (row + tl.arange(0, BLOCK_M) < end)"
            ),
            new=(
                "    y_rows = tile_rows(slots, row, end + 1, 1, Y_BY_EXPERT, BLOCK_M)\n"
                "    stored = (row + tl.arange(0, BLOCK_M) <= end)"
            ),
        ),
        Mutant(
            id="scatter2scatter-halved",
            what="a last tile of one row more than half is halved too",
            file=_PRODUCT,
            old="if end - row <= BLOCK_M // 2:",
            new="if end - row <= BLOCK_M // 2 + 1:",
        ),
        Mutant(
            id="scatter2scatter-always-halved",
            what="the second half of every high tile is lost",
            file=_PRODUCT,
            old="if end - row <= BLOCK_M // 2:",
            new="if end - row <= BLOCK_M:",
        ),
        Mutant(
            id="scatter2scatter-dropped",
            what="dropped rows are not written",
            file=_PRODUCT,
            old=(
                "        tl.store(y_ptrs, tl.zeros((BLOCK_M, BLOCK_N), y.ptr."
                "dtype.element_ty), mask=stored)\n"
            ),
            new="",
        ),
        Mutant(
            id="scatter2scatter-bias",
            what="the bias is lost",
            file=_PRODUCT,
            old="acc += tl.load(bias_ptrs",
            new="acc += 0.0 * tl.load(bias_ptrs",
        ),
        Mutant(
            id="scatter2scatter-bias-expert",
            what="the bias of the first expert",
            file=_PRODUCT,
            old="expert.to(tl.int64) * bias.row",
            new="first_expert * bias.row",
        ),
        Mutant(
            id="scatter2scatter-gate",
            what="the factor per row is lost",
            file=_PRODUCT,
            old="acc *= tl.load(row_scale + slot).to(tl.float32)[:, None]",
            new="acc *= 1.0",
        ),
        Mutant(
            id="scatter2scatter-fan-out",
            what="rows of tokens are read by slot",
            file=_PRODUCT,
            old="tile_rows(slots, row, end, fan_out, X_BY_EXPERT, BLOCK_M)",
            new="tile_rows(slots, row, end, 1, X_BY_EXPERT, BLOCK_M)",
        ),
    ),
    "shrink": (
        Mutant(
            id="shrink-scale",
            what="the scale is lost",
            file=_PRODUCT,
            old="acc *= scale",
            new="acc *= 1.0",
        ),
        Mutant(
            id="shrink-scale-twice",
            what="the scale is applied twice",
            file=_PRODUCT,
            old="acc *= scale",
            new="acc *= scale * scale",
        ),
        Mutant(
            id="shrink-scale-sign",
            what="the scale loses its sign",
            file=_PRODUCT,
            old="acc *= scale",
            new="acc *= tl.abs(scale)",
        ),
        Mutant(
            id="shrink-last-rank",
            what="the last rank stays unwritten",
            file=_PRODUCT,
            old="& (n < N)[None, :]\n    y_ptrs",
            new="& (n < N - 1)[None, :]\n    y_ptrs",
        ),
        Mutant(
            id="shrink-half-sum",
            what="sums are kept in fp16",
            file=_PRODUCT,
            old="acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)",
            new=(
                "acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)"
                ".to(tl.float16).to(tl.float32)"
            ),
        ),
        Mutant(
            id="shrink-first-k-step",
            what="the reduction starts one step late",
            file=_PRODUCT,
            old="for k_start in range(0, K, BLOCK_K):",
            new="for k_start in range(BLOCK_K, K, BLOCK_K):",
        ),
        Mutant(
            id="shrink-order",
            what="the result is in slot order",
            file=_PRODUCT_LAUNCHER,
            old="rows = Rows(source, RowOrder.EXPERT, None, row_scale)",
            new="rows = Rows(source, RowOrder.SLOT, None, row_scale)",
        ),
        Mutant(
            id="shrink-scaling",
            what="the launcher forgets the scaling",
            file=_PRODUCT_LAUNCHER,
            old="plan.tile, plan.precision, rows, scale=scaling)",
            new="plan.tile, plan.precision, rows)",
        ),
    ),
    "lora_forward": (
        Mutant(
            id="lora_forward-lora",
            what="the low-rank term is lost",
            file=_PRODUCT,
            old="if left is not None:\n        if EARLY:\n            # Always",
            new="if False:\n        if EARLY:\n            # Always",
        ),
        Mutant(
            id="lora_forward-last-rank-step",
            what="the last step over the rank is left out",
            file=_PRODUCT,
            old="tl.range(0, R, BLOCK_R",
            new="tl.range(0, R - BLOCK_R, BLOCK_R",
        ),
        Mutant(
            id="lora_forward-adapter-expert",
            what="the adapter of the next expert",
            file=_PRODUCT,
            old="right.ptr + expert.to(tl.int64)",
            new="right.ptr + (expert + 1).to(tl.int64)",
        ),
        Mutant(
            id="lora_forward-low-rank-rows",
            what="rows of s x A^T in slot order",
            file=_PRODUCT,
            old="left_rows = tile_rows(slots, row, end, 1, True, BLOCK_M)",
            new="left_rows = tile_rows(slots, row, end, 1, False, BLOCK_M)",
        ),
        Mutant(
            id="lora_forward-adapter-stride",
            what="B read with the stride of the other dimension",
            file=_PRODUCT,
            old="r.to(tl.int64)[:, None] * right.row",
            new="r.to(tl.int64)[:, None] * right.col",
        ),
        Mutant(
            id="lora_forward-fused-scale",
            what="the fused path forgets the scaling",
            file=_FUSED,
            old="low_tile = (low * scale)",
            new="low_tile = (low)",
        ),
        Mutant(
            id="lora_forward-fused-low-rank",
            what="the fused path stores s x A^T from the second column block",
            file=_FUSED,
            old="if column_block == 0:\n        tl.store(t_ptrs, low_tile",
            new="if column_block == 1:\n        tl.store(t_ptrs, low_tile",
        ),
        Mutant(
            id="lora_forward-fused-rank-tail",
            what="ranks past the end are read",
            file=_FUSED,
            old="mask=inside[:, None] & (r < R)[None, :], other=0.0)",
            new="mask=inside[:, None], other=0.0)",
        ),
        Mutant(
            id="lora_forward-split-bias",
            what="the split path adds the bias twice",
            file=_LORA,
            old="rows._replace(source=RowOrder.EXPERT, bias=None)",
            new="rows._replace(source=RowOrder.EXPERT)",
        ),
        Mutant(
            id="lora_forward-split-lora",
            what="the split path loses the low-rank term",
            file=_LORA,
            old="y = y.add_(launch_product(low,",
            new="y = y.add_(0 * launch_product(low,",
        ),
        Mutant(
            id="lora_forward-split-base",
            what="the split path keeps the low-rank term alone",
            file=_LORA,
            old="y = y.add_(launch_product(low,",
            new="y = y.copy_(launch_product(low,",
        ),
        Mutant(
            id="lora_forward-split-sign",
            what="the split path takes the low-rank term away",
            file=_LORA,
            old="y = y.add_(launch_product(low,",
            new="y = y.sub_(launch_product(low,",
        ),
        Mutant(
            id="lora_forward-split-adapter-expert",
            what="the split path takes the adapter of the expert before",
            file=_LORA,
            old="launch_product(low, up.mT, routing, expand,",
            new="launch_product(low, up.roll(1, 0).mT, routing, expand,",
        ),
        Mutant(
            id="lora_forward-split-low-rank-rows",
            what="the split path reads s x A^T by slot",
            file=_LORA,
            old="rows._replace(source=RowOrder.EXPERT, bias=None)",
            new="rows._replace(source=RowOrder.SLOT, bias=None)",
        ),
        Mutant(
            id="lora_forward-split-gate",
            what="the split path does not gate the low-rank term",
            file=_LORA,
            old="rows._replace(source=RowOrder.EXPERT, bias=None)",
            new="rows._replace(source=RowOrder.EXPERT, bias=None, row_scale=None)",
        ),
        Mutant(
            id="lora_forward-split-scaling",
            what="the split path scales the base too",
            file=_LORA,
            old="plan.precision, rows)\n            rows = rows",
            new="plan.precision, rows, scale=scaling)\n            rows = rows",
        ),
        Mutant(
            id="lora_forward-split-rank",
            what="the split path leaves the last rank out",
            file=_LORA,
            old="launch_product(low, up.mT, routing, expand,",
            new="launch_product(low[:, :-1], up.mT[:, :-1], routing, expand,",
        ),
        Mutant(
            id="lora_forward-epilogue-scale",
            what="the epilogue path forgets the scaling",
            file=_LORA,
            old="plan.shrink, plan.precision, rows, scale=scaling)",
            new="plan.shrink, plan.precision, rows)",
        ),
    ),
    "lora_input_grad": (
        Mutant(
            id="lora_input_grad-gates",
            what="gates are lost in the gradient",
            file=_LORA,
            old="rows = Rows(source, target, None, row_scale)\n    down",
            new="rows = Rows(source, target, None, None)\n    down",
        ),
        Mutant(
            id="lora_input_grad-adapter",
            what="the adapter counts twice",
            file=_LORA,
            old="pair = (low, up.mT)\n        return",
            new="pair = (low + low, up.mT)\n        return",
        ),
        Mutant(
            id="lora_input_grad-fan-out",
            what="rows of tokens are read by slot",
            file=_FUSED,
            old="tile_rows(slots, row, end, fan_out, X_BY_EXPERT, BLOCK_M)",
            new="tile_rows(slots, row, end, 1, X_BY_EXPERT, BLOCK_M)",
        ),
        Mutant(
            id="lora_input_grad-k-tail",
            what="one column past the end of K is read",
            file=_FUSED,
            old="inside = k_start + k < K",
            new="inside = k_start + k <= K",
        ),
        Mutant(
            id="lora_input_grad-last-k-step",
            what="the last step of the reduction is left out",
            file=_FUSED,
            old="for k_start in range(0, K, BLOCK_K):",
            new="for k_start in range(0, K - BLOCK_K, BLOCK_K):",
        ),
        Mutant(
            id="lora_input_grad-neighbour",
            what="the weight of the next expert",
            file=_FUSED,
            old="        + expert * w.expert\n",
            new="        + (expert + 1) * w.expert\n",
        ),
        Mutant(
            id="lora_input_grad-gate",
            what="the factor per row is lost",
            file=_FUSED,
            old="acc *= tl.load(row_scale + slot).to(tl.float32)[:, None]",
            new="acc *= 1.0",
        ),
        Mutant(
            id="lora_input_grad-dropped-low-rank",
            what="dropped rows of s dy B are not written",
            file=_FUSED,
            old="if column_block == 0:\n            tl.store(t_ptrs, tl.zeros",
            new="if column_block < 0:\n            tl.store(t_ptrs, tl.zeros",
        ),
        Mutant(
            id="lora_input_grad-adapter-expert",
            what="the adapter of the next expert",
            file=_FUSED,
            old="right.ptr + expert * right.expert",
            new="right.ptr + (expert + 1) * right.expert",
        ),
        Mutant(
            id="lora_input_grad-rank-tail",
            what="ranks past the end are read",
            file=_PRODUCT,
            old="inside = (r < R)[:, None] & (n < N)[None, :]",
            new="inside = (r <= R)[:, None] & (n < N)[None, :]",
        ),
    ),
}
