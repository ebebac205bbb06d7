"""The truth: eager, expert by expert, in fp64; its gradients come from autograd.

Nothing here comes from the package under test: rows are grouped by sorting ids, and `Groups` knows
the row orders by their names. Written to be read, not to be fast, but the host waits for the device
once per grouping, not once per expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Who works on what: the kept slots sorted by expert, ties in slot order, and where each
    expert starts.

    slots: int64 [kept]. bounds: [experts + 1]. Slots of no expert are not among them.
    """

    slots: Tensor
    bounds: tuple[int, ...]
    tokens: int
    top_k: int

    @classmethod
    def of(cls, top_k_index: Tensor, experts: int) -> "Groups":
        """Group the slots of `top_k_index` [tokens, top_k]."""
        ids, slots = top_k_index.reshape(-1).sort(stable=True)
        bounds = torch.searchsorted(ids, torch.arange(experts + 1, device=ids.device)).tolist()
        return cls(
            slots=slots[bounds[0] : bounds[-1]],
            bounds=tuple(bound - bounds[0] for bound in bounds),
            tokens=top_k_index.shape[0],
            top_k=top_k_index.shape[1],
        )

    @property
    def experts(self) -> int:
        """Number of experts, those without rows included."""
        return len(self.bounds) - 1

    @property
    def rows(self) -> int:
        """tokens * top_k, dropped rows included."""
        return self.tokens * self.top_k

    @property
    def counts(self) -> Tensor:
        """Rows of each expert, int64 [experts]."""
        return torch.tensor(self.bounds, device=self.slots.device).diff()

    @property
    def slices(self) -> list[slice]:
        """The rows of each expert among the kept rows."""
        return [slice(a, b) for a, b in zip(self.bounds, self.bounds[1:], strict=False)]

    @property
    def live(self) -> list[tuple[int, slice]]:
        """Experts that have rows, with these; where none has, the first, so that one is there."""
        slices = self.slices
        found = [(e, rows) for e, rows in enumerate(slices) if rows.stop > rows.start]
        return found or [(0, slices[0])]

    def places(self, order: str) -> Tensor:
        """Index of each kept row in an operand of that row order, int64 [kept]."""
        if order == "TOKEN":
            return self.slots // self.top_k
        if order == "SLOT":
            return self.slots
        return torch.arange(self.slots.numel(), device=self.slots.device)

    @property
    def repeats(self) -> Tensor:
        """How often the token of each kept row chooses its expert: int64 [kept]."""
        choice = self.places("TOKEN") * self.experts + torch.repeat_interleave(self.counts)
        _, group, times = choice.unique(return_inverse=True, return_counts=True)
        return times[group]

    def spread(self, kept: Tensor, order: str) -> Tensor:
        """Kept rows [kept, ...] as [rows, ...] in SLOT or EXPERT order; dropped rows are zero."""
        full = kept.new_zeros((self.rows, *kept.shape[1:]))
        return full.index_copy(0, self.places(order), kept)

    def labels(self, order: str) -> Tensor:
        """Expert of every row in that order, `experts` for dropped rows: int64 [rows]."""
        kept = torch.repeat_interleave(self.counts)
        full = torch.full((self.rows,), self.experts, device=self.slots.device)
        return full.index_copy(0, self.places(order), kept)


def expert_linear(
    tensors: Mapping[str, Tensor],
    groups: Groups,
    *,
    scaling: float,
    source: str,
    target: str,
    parts: tuple[str, ...] = ("base", "lora", "bias"),
) -> Tensor:
    """y[i] = g[i] (x[i] W[e] + s (x[i] A[e]^T) B[e]^T + b[e]), fp64 [rows, N] in `target` order.

    Of x, weight, lora_a, lora_b, bias and gates, those present in `tensors` take part; gates [T,
    k].
    """
    x = tensors["x"]
    rows = groups.places(source)
    outputs = []
    width = tensors["weight"].shape[-1]
    # The gradient of unbind is one stack, that of an index a stack for every expert.
    own = {
        name: tensors[name].unbind()
        for name in ("weight", "lora_a", "lora_b", "bias")
        if name in tensors
    }
    for expert, slice_ in groups.live:
        mine = x[rows[slice_]].double()
        y = mine.new_zeros((mine.shape[0], width))
        if "base" in parts:
            y = y + mine @ own["weight"][expert].double()
        if "lora" in parts and "lora_a" in own:
            low = mine @ own["lora_a"][expert].double().mT
            y = y + scaling * (low @ own["lora_b"][expert].double().mT)
        if "bias" in parts and "bias" in own:
            y = y + own["bias"][expert].double()
        if "gates" in tensors:
            y = y * tensors["gates"].reshape(-1)[groups.slots[slice_]].double()[:, None]
        outputs.append(y)
    return groups.spread(torch.cat(outputs), target)


def linear_gradients(
    tensors: Mapping[str, Tensor],
    groups: Groups,
    wanted: tuple[str, ...],
    *,
    scaling: float,
    source: str,
    target: str,
    dy_order: str = "",
    parts: tuple[str, ...] = ("base", "lora", "bias"),
) -> dict[str, Tensor]:
    """Gradients of sum(y * dy) for the tensors named in `wanted`, fp64; dy in `dy_order` or that
    of y.
    """
    leaves = {name: tensors[name].double().requires_grad_() for name in wanted}
    y = expert_linear(
        {**tensors, **leaves}, groups, scaling=scaling, source=source, target=target, parts=parts
    )
    dy = groups.spread(tensors["dy"][groups.places(dy_order or target)].double(), target)
    gradients = torch.autograd.grad(
        y, list(leaves.values()), dy, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, gradients, strict=True))


def row_gradients(
    tensors: Mapping[str, Tensor],
    groups: Groups,
    *,
    scaling: float,
    dy_order: str,
    order: str,
    parts: tuple[str, ...] = ("base", "lora"),
) -> Tensor:
    """Gradient of x for every routed row apart, before the rows of a token are summed: [rows, K]
    in `order`.
    """
    k_in = tensors["weight"].shape[1]
    rows = {**tensors, "x": tensors["weight"].new_zeros((groups.rows, k_in))}
    found = linear_gradients(
        rows, groups, ("x",), scaling=scaling, source=order, target="EXPERT", dy_order=dy_order,
        parts=parts,
    )  # fmt: skip
    return found["x"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedActivation:
    """f(gate, up) = (up + shift) s(gate): s is a sigmoid(alpha a), or tanh-GELU where `tanh`.

    limit clips gate from above and up on both sides. interleaved: gate and up alternate in h,
    else halves.
    """

    tanh: bool = False
    alpha: float = 1.0
    shift: float = 0.0
    limit: float = float("inf")
    interleaved: bool = False

    def halves(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up columns of h [., 2 I]."""
        if self.interleaved:
            return h[..., 0::2], h[..., 1::2]
        gate, up = h.chunk(2, dim=-1)
        return gate, up

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """f, elementwise."""
        gate, up = _at_most(gate, self.limit), -_at_most(-_at_most(up, self.limit), self.limit)
        if self.tanh:
            return up * torch.nn.functional.gelu(gate, approximate="tanh")
        return (up + self.shift) * gate * torch.sigmoid(self.alpha * gate)


def _at_most(value: Tensor, limit: float) -> Tensor:
    """Clipped from above; a NaN stays one, in the value and in its derivative."""
    return torch.where(value > limit, torch.full_like(value, limit), value)


def experts_mlp(
    tensors: Mapping[str, Tensor], groups: Groups, activation: GatedActivation, *, scaling: float
) -> Tensor:
    """out[t] = sum over j of g[t, j] MLP_e(x[t]): fp64 [tokens, H].

    tensors: x [T, H], gates [T, k], and of each projection p in (up, down): weight_p, and as far as
    present
    lora_a_p, lora_b_p, bias_p.
    """

    def projection(name: str, x: Tensor, source: str, target: str) -> Tensor:
        suffix = f"_{name}"
        own = {key.removesuffix(suffix): v for key, v in tensors.items() if key.endswith(suffix)}
        own["x"] = x
        return expert_linear(own, groups, scaling=scaling, source=source, target=target)

    h = projection("up", tensors["x"], "TOKEN", "EXPERT")
    act = activation(*activation.halves(h))
    y = projection("down", act, "EXPERT", "SLOT")
    gates = tensors["gates"].double()
    choices = y.view(groups.tokens, groups.top_k, y.shape[1])
    return (choices * gates[..., None]).sum(1)
