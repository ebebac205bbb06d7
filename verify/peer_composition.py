"""The strong baseline: torch._grouped_mm for every product, with a backward written by hand.

Rows are gathered into expert order, the adapter adds two thin grouped products per direction,
weight gradients are grouped products over ragged rows. XA and YB are computed once and saved. No
weight gradient of the frozen base; the gradient of a gate is <act, dact> before gating, so that no
product is run twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bench_arms import LAYER_LEAVES, Arm, leaf, orders
from .bench_cases import PROJECTIONS, BenchCase
from .bench_inputs import SCALING, Drawn


def product(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """rows [M, K] sorted by expert times weight [E, K, N]."""
    return torch._grouped_mm(rows, weight, offs=offs)


def gram(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    """left^T right over the rows of each expert, [E, L, R]."""
    return torch._grouped_mm(left.t(), right, offs=offs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorted:
    """Slots in expert order, where each slot went, and where each expert's rows end (int32 [E])."""

    slots: Tensor
    place: Tensor
    token: Tensor
    offs: Tensor

    @classmethod
    def of(cls, top_k_index: Tensor, experts: int) -> "Sorted":
        """Sort the choices of every token."""
        flat = top_k_index.reshape(-1)
        chosen, slots = torch.sort(flat, stable=True)
        place = torch.empty_like(slots)
        place[slots] = torch.arange(slots.numel(), device=slots.device)
        bounds = torch.arange(experts, device=slots.device)
        offs = torch.searchsorted(chosen, bounds, right=True, out_int32=True)
        return cls(slots=slots, place=place, token=slots // top_k_index.shape[1], offs=offs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """A stack [E, K, N] and its adapter, A [E, R, K] and B [E, N, R]."""

    weight: Callable[[], Tensor]
    a: Tensor
    b: Tensor

    def forward(self, x: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
        """x W + t B^T, and t = s x A^T."""
        low = product(x, self.a.mT, offs).mul_(SCALING)
        y = product(x, self.weight(), offs)
        return y.add_(product(low, self.b.mT, offs)), low

    def input_grad(self, dy: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
        """dy W^T + t A, and t = s dy B."""
        low = product(dy, self.b, offs).mul_(SCALING)
        dx = product(dy, self.weight().mT, offs)
        return dx.add_(product(low, self.a, offs)), low


def projection_arm(case: BenchCase, drawn: Drawn) -> Arm:
    """A projection on rows that were sorted beforehand; gathering x and dy is part of it."""
    order = Sorted.of(drawn["top_k_index"], case.shape.experts)
    offs, up = order.offs, case.projection == "gate_up"
    factors = Factors(weight=lambda: drawn["weight"], a=drawn["lora_a"], b=drawn["lora_b"])
    _, target, dx_order = orders(case.projection)

    def rows(value: Tensor, gathered: Tensor | None) -> Tensor:
        return value if gathered is None else value.index_select(0, gathered)

    x_index, dy_index = (order.token, None) if up else (None, order.slots)

    def placed(value: Tensor, row_order: str) -> Tensor:
        return value if row_order == "EXPERT" else value.index_select(0, order.place)

    def forward() -> tuple[Tensor, ...]:
        y, _ = factors.forward(rows(drawn["x"], x_index), offs)
        return (placed(y, target),)

    def input_grad() -> tuple[Tensor, ...]:
        dx, _ = factors.input_grad(rows(drawn["dy"], dy_index), offs)
        return (placed(dx, dx_order),)

    xa = factors.forward(rows(drawn["x"], x_index), offs)[1]
    yb = factors.input_grad(rows(drawn["dy"], dy_index), offs)[1]

    def weight_grad() -> tuple[Tensor, ...]:
        x, dy = rows(drawn["x"], x_index), rows(drawn["dy"], dy_index)
        return gram(yb, x, offs), gram(dy, xa, offs)

    def step() -> tuple[Tensor, ...]:
        x = rows(drawn["x"], x_index)
        y, low = factors.forward(x, offs)
        y = placed(y, target)
        dy = rows(drawn["dy"], dy_index)
        dx, back = factors.input_grad(dy, offs)
        da, db = gram(back, x, offs), gram(dy, low, offs)
        if up:
            dx = dx.index_select(0, order.place).view(case.tokens, -1, dx.shape[1]).sum(1)
        return y, dx, da, db

    calls = {
        "forward": (forward, ("y",)),
        "input-grad": (input_grad, ("dx_rows",)),
        "weight-grad": (weight_grad, ("da", "db")),
        "step": (step, ("y", "dx", "da", "db")),
    }
    call, outputs = calls[case.what]
    return Arm(call=call, outputs=outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCall:
    """What the layer is told and does not differentiate."""

    top_k_index: Tensor
    up: Callable[[], Tensor]
    down: Callable[[], Tensor]
    experts: int


class ComposedLayer(torch.autograd.Function):
    """gate_up, SiLU gating, down and the gated sum, with adapters on both."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gates: Tensor,
        a1: Tensor,
        b1: Tensor,
        a2: Tensor,
        b2: Tensor,
        call: LayerCall,
    ) -> Tensor:
        """x [T, H], gates [T, k], the factors of both projections -> [T, H]."""
        order = Sorted.of(call.top_k_index, call.experts)
        up = Factors(weight=call.up, a=a1, b=b1)
        down = Factors(weight=call.down, a=a2, b=b2)
        h, xa1 = up.forward(x.index_select(0, order.token), order.offs)
        gate, wide = h.chunk(2, dim=1)
        act = torch.nn.functional.silu(gate).mul_(wide)
        y, xa2 = down.forward(act, order.offs)
        y = y.index_select(0, order.place).view(*gates.shape, -1)
        ctx.order, ctx.up, ctx.down = order, up, down
        ctx.save_for_backward(x, gates, h, xa1, xa2)
        return torch.bmm(gates.unsqueeze(1), y).squeeze(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, the gates and the factors."""
        x, gates, h, xa1, xa2 = ctx.saved_tensors
        order, offs = ctx.order, ctx.order.offs
        g = gates.reshape(-1).index_select(0, order.slots).unsqueeze(1)
        dy = dout.index_select(0, order.token)
        dact, yb2 = ctx.down.input_grad(dy, offs)
        gate, wide = h.chunk(2, dim=1)
        silu = torch.nn.functional.silu(gate)
        act = silu * wide
        dgates = (act * dact).sum(1, dtype=torch.float32)
        dgates = dgates.index_select(0, order.place).view(gates.shape).to(gates.dtype)
        db2 = gram(dy, xa2 * g, offs)
        da2 = gram(yb2 * g, act, offs)
        del act, dy
        dact.mul_(g)
        dh = torch.empty_like(h)
        dgate, dwide = dh.chunk(2, dim=1)
        torch.mul(dact, silu, out=dwide)
        torch.ops.aten.silu_backward.grad_input(dact.mul_(wide), gate, grad_input=dgate)
        del dact, silu
        dx, yb1 = ctx.up.input_grad(dh, offs)
        rows = x.index_select(0, order.token)
        da1, db1 = gram(yb1, rows, offs), gram(dh, xa1, offs)
        dx = dx.index_select(0, order.place).view(*gates.shape, -1).sum(1)
        return dx, dgates, da1, db1, da2, db2, None


def layer_arm(case: BenchCase, drawn: Drawn, weights: dict[str, Callable[[], Tensor]]) -> Arm:
    """A layer from the choices of its tokens on; `weights` give the dense stacks [E, K, N] when
    called.
    """
    leaves = {name: leaf(drawn[name]) for name in LAYER_LEAVES}
    call = LayerCall(
        top_k_index=drawn["top_k_index"],
        up=weights[PROJECTIONS[0]],
        down=weights[PROJECTIONS[1]],
        experts=case.shape.experts,
    )

    def forward() -> tuple[Tensor, ...]:
        return (ComposedLayer.apply(*leaves.values(), call).detach(),)

    def step() -> tuple[Tensor, ...]:
        out = ComposedLayer.apply(*leaves.values(), call)
        return (out.detach(), *torch.autograd.grad(out, list(leaves.values()), drawn["dout"]))

    if case.what == "forward":
        return Arm(call=forward, outputs=("out",))
    return Arm(call=step, outputs=("out", *(f"d{name}" for name in leaves)))
