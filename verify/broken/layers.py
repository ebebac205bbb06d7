"""Wrong versions of the projection, the layer and the routing, made by hand.

Each is a mistake that such kernels have had; the checks of its operation must reject it.
`old` is in its file once.
"""

from collections.abc import Mapping

from ..spec import Mutant

_AUTOGRAD = "autograd.py"
_LAYER = "layers/experts_mlp.py"
_ROW_TILES = "_row_tiles.py"
_SORT = "_sort.py"


LAYERS: Mapping[str, tuple[Mutant, ...]] = {
    "expert_linear": (
        Mutant(
            id="expert_linear-gates",
            what="gates are lost in the weight gradients",
            file=_AUTOGRAD,
            old="x_order=call.source, dy_order=dy_order, row_scale=gates",
            new="x_order=call.source, dy_order=dy_order, row_scale=None",
        ),
        Mutant(
            id="expert_linear-lora-gates",
            what="gates are lost in the gradient of the adapter",
            file=_AUTOGRAD,
            old="call.source, dy_order, gates, plan",
            new="call.source, dy_order, None, plan",
        ),
        Mutant(
            id="expert_linear-scaling",
            what="the scaling is lost",
            file=_AUTOGRAD,
            old="scaling=1.0 if lora is None else lora.scaling,\n            plans=plans",
            new="scaling=1.0,\n            plans=plans",
        ),
        Mutant(
            id="expert_linear-bias-gates",
            what="gates are lost in the gradient of the bias",
            file=_AUTOGRAD,
            old="dy_order=dy_order, row_scale=gates)",
            new="dy_order=dy_order)",
        ),
        Mutant(
            id="expert_linear-ungated",
            what="choices are summed without gates",
            file=_AUTOGRAD,
            old="combine(y, call.routing, gates=gates)",
            new="combine(y, call.routing)",
        ),
        Mutant(
            id="expert_linear-bias",
            what="the bias is lost",
            file=_AUTOGRAD,
            old="rows = Rows(call.source, call.target, bias)",
            new="rows = Rows(call.source, call.target, None)",
        ),
        Mutant(
            id="expert_linear-gate-gradient",
            what="the gradient of the gates has the wrong sign",
            file=_AUTOGRAD,
            old="dgates = combine_grad(y, dout, routing)",
            new="dgates = -combine_grad(y, dout, routing)",
        ),
        Mutant(
            id="expert_linear-input-gates",
            what="gates are lost in the gradient of x",
            file=_AUTOGRAD,
            old="input_grad(dout, weight, a, b, gates,",
            new="input_grad(dout, weight, a, b, None,",
        ),
    ),
    "experts_mlp": (
        Mutant(
            id="experts_mlp-gates",
            what="choices are summed without gates",
            file=_LAYER,
            old="combine(y, call.gate_up.routing, gates=gates)",
            new="combine(y, call.gate_up.routing)",
        ),
        Mutant(
            id="experts_mlp-bias-of-gate",
            what="the bias is lost in the gradient of the gates",
            file=_LAYER,
            old="return torch.where(expert_of_slot < routing.experts, dgates + part, dgates)",
            new="return dgates",
        ),
        Mutant(
            id="experts_mlp-dropped-gate",
            what="dropped slots get a gradient of their gate",
            file=_LAYER,
            old="return torch.where(expert_of_slot < routing.experts, dgates + part, dgates)",
            new="return dgates + part",
        ),
        Mutant(
            id="experts_mlp-down-gates",
            what="gates are lost in the gradient of down's adapter",
            file=_LAYER,
            old="RowOrder.EXPERT, RowOrder.TOKEN, gates, plan",
            new="RowOrder.EXPERT, RowOrder.TOKEN, None, plan",
        ),
        Mutant(
            id="experts_mlp-down-weight",
            what="gates are lost in the gradient of down",
            file=_LAYER,
            old="x_order=RowOrder.EXPERT, dy_order=RowOrder.TOKEN, row_scale=gates",
            new="x_order=RowOrder.EXPERT, dy_order=RowOrder.TOKEN, row_scale=None",
        ),
        Mutant(
            id="experts_mlp-down-bias",
            what="gates are lost in the gradient of down's bias",
            file=_LAYER,
            old="dy_order=RowOrder.TOKEN, row_scale=gates)",
            new="dy_order=RowOrder.TOKEN)",
        ),
        Mutant(
            id="experts_mlp-glu-gates",
            what="gates are lost behind the activation",
            file=_LAYER,
            old="call.activation, gates=gates)\n    del",
            new="call.activation)\n    del",
        ),
        Mutant(
            id="experts_mlp-activation",
            what="the activation loses its form",
            file=_LAYER,
            old="activation=activation,\n    )\n    run =",
            new="activation=replace(activation, limit=1.0),\n    )\n    run =",
        ),
        Mutant(
            id="experts_mlp-exchanged",
            what="the narrow operands of the gradients of an adapter exchanged",
            file=_LAYER,
            old="x, dh, xa1, yb1, a1, b1, call.gate_up.scaling",
            new="x, dh, yb1, xa1, a1, b1, call.gate_up.scaling",
        ),
    ),
    "routing": (
        Mutant(
            id="routing-sentinel",
            what="negative ids are experts",
            file=_SORT,
            old="valid = (chosen >= 0) & (chosen < experts)",
            new="valid = chosen < experts",
        ),
        Mutant(
            id="routing-last",
            what="the last expert counts as dropped",
            file=_SORT,
            old="(chosen < experts)",
            new="(chosen < experts - 1)",
        ),
        Mutant(
            id="routing-earlier",
            what="rows of the own chunk count as earlier ones",
            file=_SORT,
            old="(chunk < program)[:, None]",
            new="(chunk <= program)[:, None]",
        ),
        Mutant(
            id="routing-rank",
            what="the rank within a chunk is lost",
            file=_SORT,
            old="key, 0) + tl.arange(0, CHUNK)",
            new="key, 0)",
        ),
        Mutant(
            id="routing-stable",
            what="slots of an expert in reverse order",
            file=_SORT,
            old="program * CHUNK + order % CHUNK",
            new="program * CHUNK + (CHUNK - 1 - order % CHUNK)",
        ),
        Mutant(
            id="routing-chunks",
            what="chunks of the first step alone are counted",
            file=_SORT,
            old="for start in range(0, chunks, 8):",
            new="for start in range(0, 2, 2):",
        ),
        Mutant(
            id="routing-offsets",
            what="the last offset stays unwritten",
            file=_SORT,
            old="tl.store(offsets + bins, begin, mask=bins <= experts)",
            new="tl.store(offsets + bins, begin, mask=bins < experts)",
        ),
        Mutant(
            id="routing-dropped",
            what="dropped slots get no row",
            file=_SORT,
            old="stored = key <= experts",
            new="stored = key < experts",
        ),
        Mutant(
            id="routing-height",
            what="the smallest tile height for every table",
            file=_ROW_TILES,
            old="height = LOWEST << level",
            new="height = LOWEST + 0 * level",
        ),
        Mutant(
            id="routing-part",
            what="tiles that are not full are left out",
            file=_ROW_TILES,
            old="tiles_of_group = (sizes + height - 1) // height",
            new="tiles_of_group = sizes // height",
        ),
        Mutant(
            id="routing-unused",
            what="what is left over is not marked",
            file=_ROW_TILES,
            old="tl.where(group > experts, capacity - first, own)",
            new="own",
        ),
        Mutant(
            id="routing-dropped-mark",
            what="dropped rows marked as an expert",
            file=_ROW_TILES,
            old="tl.where(group == experts, DROPPED, ",
            new="tl.where(group == experts, experts, ",
        ),
    ),
}
