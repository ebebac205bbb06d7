"""The calls that a benchmark times, of the package or of a revision of it.

`lib` is the imported package: two revisions of it, loaded under two names, give two arms on the
same tensors.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .bench_cases import PROJECTIONS, BenchCase
from .bench_inputs import BLOCK, OUTER_BLOCK, SCALING, Drawn, problem_of
from .entries import BY_ENTRY, plan_of, prepared

CHUNK_BYTES = 3 * 2**26
"""Transient dense weights of the chunked QLoRA layer: 192 MiB, or one expert where that is more."""

Outputs = Sequence[Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A call and the names of what it returns."""

    call: Callable[[], Outputs]
    outputs: tuple[str, ...]

    def results(self) -> dict[str, Tensor]:
        """Run it once; its results by name."""
        return dict(zip(self.outputs, self.call(), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryArm(Arm):
    """A call that names its results itself."""

    run: Callable[[], Mapping[str, Tensor]]

    def results(self) -> dict[str, Tensor]:
        """Run it once; its results by name."""
        return dict(self.run())


def leaf(value: Tensor) -> Tensor:
    """The same storage, wanting a gradient."""
    return value.detach().requires_grad_()


def arm_of(lib: ModuleType, case: BenchCase, drawn: Drawn) -> Arm:
    """The package's arm of a case on these tensors."""
    if case.kind == "dequant":
        return _dequantise(lib, case, drawn)
    if case.by_entry:
        return _by_entry(lib, case, drawn)
    if case.projection:
        return _Linear(lib, case, drawn).arm()
    if case.kind == "kernel":
        return _kernel(lib, case, drawn)
    return layer_arm(lib, case, drawn)


def _module(lib: ModuleType, name: str) -> Any:
    return importlib.import_module(f"{lib.__name__}.{name}")


def orders(projection: str) -> tuple[str, str, str]:
    """Row orders of x, of y and dy, and of dx per row, in a layer's projection."""
    return ("TOKEN", "EXPERT", "SLOT") if projection == "gate_up" else ("EXPERT", "SLOT", "EXPERT")


class _Linear:
    """Calls of one projection; its routing is built beforehand."""

    def __init__(self, lib: ModuleType, case: BenchCase, drawn: Drawn) -> None:
        self.lib, self.case, self.drawn = lib, case, drawn
        self.ops = _module(lib, "ops")
        self.routing = lib.Routing.from_top_k(drawn["top_k_index"], case.shape.experts)
        self.lora = lib.LoRAWeights(a=drawn["lora_a"], b=drawn["lora_b"], scaling=SCALING)
        source, target, dx_order = orders(case.projection)
        self.rows = {"source": lib.RowOrder[source], "target": lib.RowOrder[target]}
        self.back = {"source": lib.RowOrder[target], "target": lib.RowOrder[dx_order]}

    def forward(self) -> Outputs:
        d = self.drawn
        return self.ops.lora_forward(d["x"], d["weight"], self.lora, self.routing, **self.rows)

    def input_grad(self) -> Outputs:
        d = self.drawn
        return self.ops.lora_input_grad(d["dy"], d["weight"], self.lora, self.routing, **self.back)

    def base(self) -> Outputs:
        d = self.drawn
        return (self.ops.scatter2scatter(d["x"], d["weight"], self.routing, **self.rows),)

    def shrink(self) -> Outputs:
        d, source = self.drawn, self.rows["source"]
        down = self.ops.shrink(d["x"], d["lora_a"], self.routing, scaling=SCALING, source=source)
        return (down,)

    def arm(self) -> Arm:
        match self.case.what:
            case "forward":
                return Arm(call=self.forward, outputs=("y", "xa"))
            case "input-grad":
                return Arm(call=self.input_grad, outputs=("dx_rows", "yb"))
            case "base":
                return Arm(call=self.base, outputs=("base",))
            case "shrink":
                return Arm(call=self.shrink, outputs=("xa",))
            case "weight-grad":
                return self._weight_grad()
            case _:
                return self._step()

    def _weight_grad(self) -> Arm:
        d, lora, routing = self.drawn, self.lora, self.routing
        xa, yb = self.forward()[1], self.input_grad()[1]
        kwargs = {"x_order": self.rows["source"], "dy_order": self.rows["target"]}
        grad = self.ops.lora_weight_grad
        return Arm(
            call=lambda: grad(d["x"], d["dy"], xa, yb, lora, routing, **kwargs),
            outputs=("da", "db"),
        )

    def _step(self) -> Arm:
        d = self.drawn
        leaves = [leaf(d[name]) for name in ("x", "lora_a", "lora_b")]
        lora = self.lib.LoRAWeights(a=leaves[1], b=leaves[2], scaling=SCALING)
        linear = _module(self.lib, "autograd").expert_linear

        def call() -> Outputs:
            y = linear(leaves[0], d["weight"], self.routing, lora=lora, **self.rows)
            return (y.detach(), *torch.autograd.grad(y, leaves, d["dy"]))

        return Arm(call=call, outputs=("y", "dx", "da", "db"))


LAYER_LEAVES = ("x", "gates", "lora_a_gate_up", "lora_b_gate_up", "lora_a_down", "lora_b_down")


def layer_arm(lib: ModuleType, case: BenchCase, drawn: Drawn, *, adapters: bool = True) -> Arm:
    """A layer from the choices of its tokens on: the sort is part of it."""
    layers, ops = _module(lib, "layers"), _module(lib, "ops")
    leaves = {name: leaf(drawn[name]) for name in LAYER_LEAVES if name in drawn.tensors}
    loras = {
        name: lib.LoRAWeights(
            a=leaves[f"lora_a_{name}"], b=leaves[f"lora_b_{name}"], scaling=SCALING
        )
        for name in PROJECTIONS
        if adapters
    }
    weights = {name: _weight(lib, case, drawn, name) for name in PROJECTIONS}
    selective = case.what == "selective"
    experts, activation = case.shape.experts, ops.Activation()
    backward = case.what != "forward"

    def forward() -> Tensor:
        routing = lib.Routing.from_top_k(drawn["top_k_index"], experts)
        used, factors = weights, loras
        if selective:
            active = _module(lib, "quant").ActiveExperts.of(routing)
            routing = active.routing
            used = {name: weight.select(active.ids) for name, weight in weights.items()}
            factors = {name: active.lora(lora) for name, lora in loras.items()}
        up, down = (
            layers.Projection(weight=used[name], lora=factors.get(name)) for name in PROJECTIONS
        )
        return layers.experts_mlp(
            leaves["x"], leaves["gates"], routing, gate_up=up, down=down, activation=activation
        )

    def only_forward() -> Outputs:
        return (forward().detach(),)

    def step() -> Outputs:
        out = forward()
        return (out.detach(), *torch.autograd.grad(out, list(leaves.values()), drawn["dout"]))

    if not backward:
        return Arm(call=only_forward, outputs=("out",))
    return Arm(call=step, outputs=("out", *(f"d{name}" for name in leaves)))


def _weight(lib: ModuleType, case: BenchCase, drawn: Drawn, projection: str) -> Any:
    if case.kind != "qlora-layer":
        return drawn[f"weight_{projection}"]
    stack = four_bit_of(lib, drawn, projection)
    return _module(lib, "quant").StoredWeight(
        stored=stack, transposed=True, budget_bytes=budget_of(case, projection)
    )


def decoding_of(lib: ModuleType, case: BenchCase, drawn: Drawn) -> dict[str, Arm]:
    """By projection of a QLoRA layer, decoding its experts as the layer does, and nothing else."""

    def arm(weight: Any) -> Arm:
        def call() -> Outputs:
            for _ in weight.blocks(case.torch_dtype):
                pass
            return ()

        return Arm(call=call, outputs=())

    return {name: arm(_weight(lib, case, drawn, name)) for name in PROJECTIONS}


def budget_of(case: BenchCase, projection: str) -> int | None:
    """Bytes that the decoded experts of a projection may take; None: all at once."""
    if case.what != "chunked":
        return None
    return max(CHUNK_BYTES, 2 * math.prod(case.shape.widths(projection)))


def four_bit_of(lib: ModuleType, drawn: Drawn, projection: str) -> Any:
    """The package's stored experts of a 4-bit projection."""
    quant, tensors = _module(lib, "quant"), drawn.stored[projection]
    problem = problem_of(drawn.case, projection)
    nested = None
    if problem.outer_blocksize:
        nested = quant.NestedScales(
            code=tensors["outer_code"],
            absmax=tensors["outer_absmax"],
            offset=tensors["outer_offset"],
            blocksize=OUTER_BLOCK,
        )
    return quant.FourBit(
        packed=tensors["packed"],
        absmax=tensors["absmax"],
        codebook=tensors["codebook"],
        blocksize=BLOCK,
        experts=problem.experts,
        shape=problem.shape,
        nested=nested,
    )


def _dequantise(lib: ModuleType, case: BenchCase, drawn: Drawn) -> Arm:
    stack = four_bit_of(lib, drawn, case.projection)
    shape = (stack.experts, *stack.shape)
    packed = drawn.stored[case.projection]["packed"]
    out = torch.empty(shape, dtype=case.torch_dtype, device=packed.device)
    return Arm(
        call=lambda: (stack.dense(dtype=case.torch_dtype, out=out),),
        outputs=("dense",),
    )


def _by_entry(lib: ModuleType, case: BenchCase, drawn: Drawn) -> Arm:
    assert drawn.inputs is not None, "a kernel that is timed by its entry has inputs"
    spec = BY_ENTRY[case.what]
    inputs = prepared(spec, lib, drawn.inputs)
    plan = plan_of(spec, lib, inputs)

    def run() -> Mapping[str, Tensor]:
        return spec.run(lib, inputs, plan)

    return EntryArm(call=lambda: tuple(run().values()), outputs=(), run=run)


def _kernel(lib: ModuleType, case: BenchCase, drawn: Drawn) -> Arm:
    ops, experts = _module(lib, "ops"), case.shape.experts
    index = drawn["top_k_index"]
    routing = lib.Routing.from_top_k(index, experts)
    activation, gates = ops.Activation(), drawn["gates"]
    token = lib.RowOrder.TOKEN

    def sort() -> Outputs:
        found = lib.Routing.from_top_k(index, experts)
        return found.slots, found.expert_of_row, found.offsets

    arms: Mapping[str, Arm] = {
        "sort": Arm(call=sort, outputs=("slots", "expert_of_row", "offsets")),
        "group": Arm(
            call=lambda: (ops.group(drawn["x"], routing, source=token),), outputs=("grouped",)
        ),
        "combine": Arm(
            call=lambda: (ops.combine(drawn["y"], routing, gates=gates),), outputs=("combined",)
        ),
        "glu": Arm(call=lambda: (ops.glu_forward(drawn["h"], activation),), outputs=("act",)),
        "glu-grad": Arm(
            call=lambda: ops.glu_backward(
                drawn["h"], drawn["dact"], routing, activation, gates=gates
            ),
            outputs=("dh", "act", "dgates"),
        ),
    }
    return arms[case.what]
