"""Wrong versions of the weight gradients, made by hand.

Each is a mistake that such kernels have had; the checks of its operation must reject it.
`old` is in its file once.
"""

from collections.abc import Mapping

from ..spec import Mutant

_GRAM = "ops/gram.py"
_PARTS = "ops/gram_parts.py"
_RECOMPUTE = "ops/recompute.py"
_WEIGHT_GRAD = "ops/weight_grad.py"


GRADIENTS: Mapping[str, tuple[Mutant, ...]] = {
    "lora_weight_grad": (
        Mutant(
            id="lora_weight_grad-last-step",
            what="the last rows of an expert are left out",
            file=_GRAM,
            old="for row in range(begin, end, BLOCK_M):",
            new="for row in range(begin, end - BLOCK_M, BLOCK_M):",
        ),
        Mutant(
            id="lora_weight_grad-row-tail",
            what="the first row of the next expert is added",
            file=_GRAM,
            old="inside = rows < end",
            new="inside = rows <= end",
        ),
        Mutant(
            id="lora_weight_grad-last-row",
            what="the last row of an expert is left out",
            file=_GRAM,
            old="end = tl.load(offsets + unit + 1)",
            new="end = tl.load(offsets + unit + 1) - 1",
        ),
        Mutant(
            id="lora_weight_grad-gate",
            what="the factor per row is lost",
            file=_GRAM,
            old="if row_scale is not None:\n            g",
            new="if False:\n            g",
        ),
        Mutant(
            id="lora_weight_grad-flags",
            what="dB is computed with the row orders of dA",
            file=_GRAM,
            old="SECOND_P_BY_EXPERT, SECOND_Q_BY_EXPERT, PRECISION",
            new="FIRST_P_BY_EXPERT, FIRST_Q_BY_EXPERT, PRECISION",
        ),
        Mutant(
            id="lora_weight_grad-part-tail",
            what="the last rows of an expert that is cut are no part",
            file=_PARTS,
            old="(rows + height - 1) // height",
            new="rows // height",
        ),
        Mutant(
            id="lora_weight_grad-part-end",
            what="the last part goes on into the next expert",
            file=_PARTS,
            old="tl.minimum(begin + height, last)",
            new="begin + height",
        ),
        Mutant(
            id="lora_weight_grad-part-expert",
            what="the first part of an expert is taken for one of the expert before",
            file=_PARTS,
            old="(ends <= part)",
            new="(ends < part)",
        ),
        Mutant(
            id="lora_weight_grad-part-whole",
            what="an expert of exactly as many rows as a part is neither cut nor whole",
            file=_GRAM,
            old="end - begin > height",
            new="end - begin >= height",
        ),
        Mutant(
            id="lora_weight_grad-part-order",
            what="the sums of parts of another expert are added",
            file=_PARTS,
            old="first = tl.sum(tl.where(bins < expert, parts, 0))",
            new="first = tl.sum(tl.where(bins <= expert, parts, 0))",
        ),
        Mutant(
            id="lora_weight_grad-part-last",
            what="the last part is not added",
            file=_GRAM,
            old="tl.int32) < parts",
            new="tl.int32) < parts - 1",
        ),
        Mutant(
            id="lora_weight_grad-part-sums",
            what="the sums of parts are kept in fp16",
            file=_GRAM,
            old="torch.empty(shape, dtype=torch.float32",
            new="torch.empty(shape, dtype=torch.float16",
        ),
        Mutant(
            id="lora_weight_grad-part-experts",
            what="the last of the experts that are cut is forgotten",
            file=_PARTS,
            old="return Parts(height, routing.rows // height + experts, experts)",
            new="return Parts(height, routing.rows // height + experts, max(experts // 2, 1))",
        ),
        Mutant(
            id="lora_weight_grad-second",
            what="programs of dB start one tile late",
            file=_GRAM,
            old="second, block, unit, parts, kept",
            new="second, block + 1, unit, parts, kept",
        ),
        Mutant(
            id="lora_weight_grad-empty",
            what="experts without rows stay unwritten",
            file=_GRAM,
            old="    elif end >= begin:\n",
            new="    elif end > begin:\n",
        ),
        Mutant(
            id="lora_weight_grad-fan-out",
            what="rows of tokens are read by slot",
            file=_GRAM,
            old="p_rows = row_of_slot(slot, gram.p_fan_out)",
            new="p_rows = slot",
        ),
        Mutant(
            id="lora_weight_grad-recompute-scale",
            what="the recomputed operand is not scaled",
            file=_RECOMPUTE,
            old="low *= scale",
            new="low *= 1.0",
        ),
        Mutant(
            id="lora_weight_grad-recompute-gate",
            what="the recomputed operand is not gated",
            file=_RECOMPUTE,
            old="if row_scale is not None:\n            low",
            new="if False:\n            low",
        ),
        Mutant(
            id="lora_weight_grad-recompute-order",
            what="rows by slot where they are by expert",
            file=_RECOMPUTE,
            old="        if Z_BY_EXPERT:\n            z_rows = rows\n",
            new="",
        ),
        Mutant(
            id="lora_weight_grad-recompute-cast",
            what="the recomputed operand keeps bf16 from the first step on",
            file=_RECOMPUTE,
            old="low = tl.dot(z_tile, f_tile, low, input_precision=PRECISION)",
            new=(
                "low = tl.dot(z_tile, f_tile, low, input_precision=PRECISION)"
                ".to(tl.bfloat16).to(tl.float32)"
            ),
        ),
        Mutant(
            id="lora_weight_grad-recompute-row-tail",
            what="the first row of the next expert is added to the recomputed sums",
            file=_RECOMPUTE,
            old="inside = rows < end",
            new="inside = rows <= end",
        ),
        Mutant(
            id="lora_weight_grad-recompute-last-step",
            what="the recomputing path leaves the last rows of an expert out",
            file=_RECOMPUTE,
            old="for row in range(begin, end, BLOCK_M):",
            new="for row in range(begin, end - BLOCK_M, BLOCK_M):",
        ),
        Mutant(
            id="lora_weight_grad-recompute-expert",
            what="the recomputed operand has the factor of the next expert",
            file=_RECOMPUTE,
            old="factor.ptr + expert * factor.expert",
            new="factor.ptr + (expert + 1) * factor.expert",
        ),
        Mutant(
            id="lora_weight_grad-recompute-z-tail",
            what="the recomputing reduction starts one step late",
            file=_RECOMPUTE,
            old="for z_start in range(0, Z, BLOCK_Z):",
            new="for z_start in range(BLOCK_Z, Z, BLOCK_Z):",
        ),
        Mutant(
            id="lora_weight_grad-recompute-fan-out",
            what="the recomputing path reads rows of tokens by slot",
            file=_RECOMPUTE,
            old="p_rows = row_of_slot(slot, p_fan_out)",
            new="p_rows = slot",
        ),
        Mutant(
            id="lora_weight_grad-recompute-overwritten",
            what="of the recomputed sums only the last rows count",
            file=_RECOMPUTE,
            old="acc = tl.dot(p_tile.T, low_tile, acc, input_precision=PRECISION)",
            new="acc = tl.dot(p_tile.T, low_tile, input_precision=PRECISION)",
        ),
        Mutant(
            id="lora_weight_grad-recompute-last-rank",
            what="the recomputing path leaves the last rank unwritten",
            file=_RECOMPUTE,
            old="stored = (p_col < P)[:, None] & (r < R)[None, :]",
            new="stored = (p_col < P)[:, None] & (r < R - 1)[None, :]",
        ),
    ),
    "expert_weight_grad": (
        Mutant(
            id="expert_weight_grad-row-stride",
            what="rows of the gradient with the stride of columns",
            file=_GRAM,
            old="p_col.to(tl.int64)[:, None] * gram.out_row",
            new="p_col.to(tl.int64)[:, None] * gram.out_col",
        ),
        Mutant(
            id="expert_weight_grad-column-stride",
            what="columns of the gradient with the stride of rows",
            file=_GRAM,
            old="q_col.to(tl.int64)[None, :] * gram.out_col",
            new="q_col.to(tl.int64)[None, :] * gram.out_row",
        ),
        Mutant(
            id="expert_weight_grad-half-sum",
            what="sums are kept in fp16",
            file=_GRAM,
            old="acc = tl.dot(p_tile.T, q_tile, acc, input_precision=PRECISION)",
            new=(
                "acc = tl.dot(p_tile.T, q_tile, acc, input_precision=PRECISIO"
                "N).to(tl.float16).to(tl.float32)"
            ),
        ),
        Mutant(
            id="expert_weight_grad-p-tail",
            what="columns past the width are read",
            file=_GRAM,
            old="inside[:, None] & (p_col < gram.width)[None, :], other",
            new="inside[:, None] & (p_col <= gram.width)[None, :], other",
            unseen_on_gpu="what is read there is not stored; the interpreter watches reads",
        ),
        Mutant(
            id="expert_weight_grad-expert",
            what="tiles of an expert go to another",
            file=_GRAM,
            old="unit = within // blocks",
            new="unit = within // (blocks + 1)",
        ),
        Mutant(
            id="expert_weight_grad-column",
            what="column blocks counted by rows",
            file=_GRAM,
            old="q_col = (block % blocks_q) * BLOCK_Q + tl.arange(0, BLOCK_Q)",
            new="q_col = (block // blocks_q) * BLOCK_Q + tl.arange(0, BLOCK_Q)",
        ),
        Mutant(
            id="expert_weight_grad-first-row",
            what="the first row of an expert is left out",
            file=_GRAM,
            old="begin = tl.load(offsets + unit)\n",
            new="begin = tl.load(offsets + unit) + 1\n",
        ),
        Mutant(
            id="expert_weight_grad-stored",
            what="one row of the gradient too few",
            file=_GRAM,
            old="stored = (p_col < gram.width)",
            new="stored = (p_col < gram.width - 1)",
        ),
        Mutant(
            id="expert_weight_grad-overwritten",
            what="only the last rows of an expert count",
            file=_GRAM,
            old="acc = tl.dot(p_tile.T, q_tile, acc, input_precision=PRECISION)",
            new="acc = tl.dot(p_tile.T, q_tile, input_precision=PRECISION)",
        ),
    ),
    "expert_bias_grad": (
        Mutant(
            id="expert_bias_grad-row-tail",
            what="the first row of the next expert is added",
            file=_WEIGHT_GRAD,
            old="inside = rows < end",
            new="inside = rows <= end",
        ),
        Mutant(
            id="expert_bias_grad-last-step",
            what="the last rows of an expert are left out",
            file=_WEIGHT_GRAD,
            old="for row in range(begin, end, BLOCK_M):",
            new="for row in range(begin, end - BLOCK_M, BLOCK_M):",
        ),
        Mutant(
            id="expert_bias_grad-order",
            what="rows by slot where they are by expert",
            file=_WEIGHT_GRAD,
            old="        if BY_EXPERT:\n            dy_rows = rows\n",
            new="",
        ),
        Mutant(
            id="expert_bias_grad-gate",
            what="the factor per row is lost",
            file=_WEIGHT_GRAD,
            old="if row_scale is not None:\n            tile",
            new="if False:\n            tile",
        ),
        Mutant(
            id="expert_bias_grad-overwritten",
            what="only the last rows of an expert count",
            file=_WEIGHT_GRAD,
            old="acc += tl.sum(tile, axis=0)",
            new="acc = tl.sum(tile, axis=0)",
        ),
        Mutant(
            id="expert_bias_grad-half-sum",
            what="sums are kept in fp16",
            file=_WEIGHT_GRAD,
            old="acc += tl.sum(tile, axis=0)",
            new="acc = (acc + tl.sum(tile, axis=0)).to(tl.float16).to(tl.float32)",
        ),
        Mutant(
            id="expert_bias_grad-fan-out",
            what="rows of tokens are read by slot",
            file=_WEIGHT_GRAD,
            old="dy_rows = row_of_slot(slot, fan_out)",
            new="dy_rows = slot",
        ),
        Mutant(
            id="expert_bias_grad-last-row",
            what="the last row of an expert is left out",
            file=_WEIGHT_GRAD,
            old="end = tl.load(offsets + expert + 1)",
            new="end = tl.load(offsets + expert + 1) - 1",
        ),
        Mutant(
            id="expert_bias_grad-empty",
            what="experts without rows stay unwritten",
            file=_WEIGHT_GRAD,
            old="acc = tl.zeros((BLOCK_N,), tl.float32)",
            new=("acc = tl.zeros((BLOCK_N,), tl.float32)\n    if begin == end:\n        return"),
        ),
        Mutant(
            id="expert_bias_grad-n-tail",
            what="one column past the width is written",
            file=_WEIGHT_GRAD,
            old="acc, mask=n < N)",
            new="acc, mask=n <= N)",
        ),
    ),
}
