"""The error a correct kernel may make: each pipeline as a straight line of `Uncertain` arithmetic.

A model says where a pipeline rounds, and nothing else; its value must equal the truth of
`references`.
Rows are the kept rows in expert order; `Groups` places them.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import Case
from .inputs import Inputs
from .numerics import Uncertain, column_sums, freedom, gram, routed_product
from .references import Groups


class Rounds(Enum):
    """Where a LoRA product rounds to the type of its output."""

    ONCE = "once"
    """One sum in fp32, rounded at the end."""
    PER_TERM = "per term"
    """Base (with bias) and LoRA terms are stored apart, then added."""
    PER_STEP = "per step"
    """After every operation: product, bias, gate, scaling, add."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """How a plan computes.

    tf32: fp32 operands of products are cut to tf32. saved: [rows, R] operands were made by an
    earlier product, of IEEE operands.
    """

    rounds: Rounds = Rounds.ONCE
    tf32: bool = False
    saved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One routed LoRA product: x [kept, K], weight [E, K, N], down [E, K, R], up [E, R, N], bias
    [E, N].

    gates: [kept]. repeats: [kept], see `alike`. The input gradient is the same product of
    dy, the transposed weight and factors.
    """

    groups: Groups
    x: Uncertain
    weight: Uncertain | None
    down: Uncertain | None
    up: Uncertain | None
    bias: Tensor | None
    gates: Tensor | None
    repeats: Tensor
    scaling: float
    dtype: torch.dtype
    arithmetic: Arithmetic

    @classmethod
    def forward(cls, inputs: Inputs, groups: Groups, arithmetic: Arithmetic) -> "Linear":
        """The forward product of a case, with all the terms that its inputs have."""
        rows = groups.places(inputs.case.source)
        gates = inputs.get("gates")
        down, up = _factors(inputs)
        return cls(
            groups=groups,
            x=Uncertain.exact(inputs["x"][rows]),
            weight=Uncertain.exact(inputs["weight"]),
            down=down.mT,
            up=up.mT,
            bias=inputs.get("bias"),
            gates=None if gates is None else gates.reshape(-1)[groups.slots].double(),
            repeats=alike(inputs.case, groups),
            scaling=inputs.scaling,
            dtype=inputs.dtype,
            arithmetic=arithmetic,
        )

    @classmethod
    def input_grad(cls, inputs: Inputs, groups: Groups, arithmetic: Arithmetic) -> "Linear":
        """dx per routed row, from dy in the order of the case's target."""
        forward = cls.forward(inputs, groups, arithmetic)
        down, up = _factors(inputs)
        return replace(
            forward,
            x=Uncertain.exact(inputs["dy"][groups.places(inputs.case.dy_order)]),
            weight=Uncertain.exact(inputs["weight"].mT),
            down=up,
            up=down,
            bias=None,
        )

    def without_adapter(self) -> "Linear":
        """The base product alone."""
        return replace(self, down=None, up=None)

    def product(self, x: Uncertain, weight: Uncertain) -> Uncertain:
        """A routed product as the tensor cores do it."""
        if self.arithmetic.tf32:
            x, weight = x.truncated(), weight.truncated()
        return routed_product(x, weight, self.groups.slices)

    def gram(self, left: Uncertain, right: Uncertain) -> Uncertain:
        """left^T right over the rows of each expert, as the tensor cores do it."""
        if self.arithmetic.tf32:
            left, right = left.truncated(), right.truncated()
        left, right = (rows.alike(self.repeats[:, None]) for rows in (left, right))
        return gram(left, right, self.groups.slices)

    def low_rank(self) -> Uncertain:
        """t = s x D, stored in the activations' type: [kept, R]."""
        if self.down is None:
            raise ValueError("this product has no adapter")
        arithmetic = self.arithmetic
        if arithmetic.saved:
            arithmetic = replace(arithmetic, tf32=False)
        low = replace(self, arithmetic=arithmetic).product(self.x, self.down)
        if self.arithmetic.rounds is Rounds.PER_STEP:
            low = low.rounded(self.dtype)
        return low.scaled(self.scaling).rounded(self.dtype)

    def output(self) -> Uncertain:
        """y (or dx): [kept, N]."""
        step = self.dtype if self.arithmetic.rounds is Rounds.PER_STEP else None
        term = self.dtype if self.arithmetic.rounds is not Rounds.ONCE else None
        result: Uncertain | None = None
        if self.weight is not None:
            result = self.product(self.x, self.weight).rounded(step)
        if self.bias is not None and result is not None:
            labels = torch.repeat_interleave(self.groups.counts)
            result = (result + Uncertain.exact(self.bias[labels])).rounded(step)
        if result is not None:
            result = self._gated(result).rounded(term)
        if self.up is not None:
            lora = self.product(self.low_rank(), self.up).rounded(step)
            lora = self._gated(lora).rounded(term)
            result = lora if result is None else result + lora
        if result is None:
            raise ValueError("this product has no terms")
        return result.rounded(self.dtype)

    def freedom(self) -> Tensor:
        """Degrees of freedom of the rounding of t in each row of the output: [kept]."""
        if self.up is None:
            return self.x.value.new_full((self.x.value.shape[0],), torch.inf, dtype=torch.float64)
        if self.gates is not None and self.arithmetic.rounds is Rounds.PER_STEP:
            return self.x.value.new_ones(self.x.value.shape[0], dtype=torch.float64)
        variance = self.low_rank().local
        if variance.ndim == 0:
            variance = variance.expand(self.x.value.shape[0], self.up.value.shape[1])
        parts = [
            freedom(variance[rows], self.up.value[expert].double())
            for expert, rows in self.groups.live
        ]
        return torch.cat(parts)

    def _gated(self, y: Uncertain) -> Uncertain:
        if self.gates is None:
            return y
        gates = self.gates[:, None]
        if self.arithmetic.rounds is not Rounds.PER_STEP:
            return y.scaled(gates)
        exact = Uncertain.exact(gates)
        rounding = exact.rounded(self.dtype).local
        return y.times(Uncertain(gates, exact.local, rounding, exact.drift))


class FactorGradient(NamedTuple):
    """Gradient of a factor. freedom: degrees of freedom of its shared error, [E, R]. sources:
    roundings behind the rank-R element of a row that it is made of.
    """

    model: Uncertain
    freedom: Tensor
    sources: int


def alike(case: Case, groups: Groups) -> Tensor:
    """How many rows of its expert equal each kept row in x and in dy, and so err alike: [kept]."""
    return equal_rows(groups, "TOKEN" if case.source == case.dy_order == "TOKEN" else "")


def equal_rows(groups: Groups, order: str) -> Tensor:
    """How many rows of its expert equal each kept row of an operand in that order: [kept]."""
    return groups.repeats if order == "TOKEN" else torch.ones_like(groups.slots)


def weight_gradients(
    inputs: Inputs, groups: Groups, arithmetic: Arithmetic
) -> dict[str, FactorGradient]:
    """da [E, R, K] = (g yb)^T x and db [E, N, R] = dy^T (g t) over the rows of each expert."""
    gates = inputs.get("gates")
    gates = None if gates is None else gates.reshape(-1)[groups.slots].double()
    once = replace(arithmetic, rounds=Rounds.ONCE)
    forward = Linear.forward(inputs, groups, once)
    backward = Linear.input_grad(inputs, groups, once)
    found = gradients_of(forward, backward, gates)
    step = inputs.dtype if arithmetic.rounds is Rounds.PER_STEP else None
    da, db = (found[name].rounded(step).rounded(inputs.lora_dtype) for name in ("lora_a", "lora_b"))
    yb, t = (_gated_rows(low.low_rank(), gates, inputs.dtype) for low in (backward, forward))
    narrowed, case = inputs.narrowed, inputs.case
    stored = 1 if gates is None else 2
    if narrowed and not arithmetic.saved:
        # What a factor is rounded by reaches all rows of its expert, in parallel at worst.
        free_da = free_db = torch.ones_like(da.value[..., 0])
    else:
        free_da = _gram_freedom(yb, forward.x, groups, equal_rows(groups, case.dy_order))
        free_db = _gram_freedom(t, backward.x, groups, equal_rows(groups, case.source))
    return {
        "da": FactorGradient(da, free_da, stored + narrowed * case.n_out),
        "db": FactorGradient(db, free_db, stored + narrowed * case.k_in),
    }


def gradients_of(forward: Linear, backward: Linear, gates: Tensor | None) -> dict[str, Uncertain]:
    """lora_a [E, R, K] = (g yb)^T x and lora_b [E, N, R] = dy^T (g t) of a product.

    t and yb are rounded to the activations' type, as operands or in memory; with gates [kept] once
    more, after g. The results are rounded to the same type when they are stored.
    """
    yb = _gated_rows(backward.low_rank(), gates, forward.dtype)
    t = _gated_rows(forward.low_rank(), gates, forward.dtype)
    return {"lora_a": forward.gram(yb, forward.x), "lora_b": forward.gram(backward.x, t)}


def _gram_freedom(rounded: Uncertain, exact: Uncertain, groups: Groups, equal: Tensor) -> Tensor:
    """Degrees of freedom of each line of rounded^T exact: [E, R]; of `equal` rows of `rounded`,
    [kept], which err alike, those of one.
    """
    variance = rounded.variance.expand_as(rounded.value)
    times = equal.tolist()
    found = variance.new_zeros((groups.experts, variance.shape[1]))
    for expert, rows in groups.live:
        free = freedom(variance[rows].mT, exact.value[rows].double())
        found[expert] = free / max(times[rows], default=1)
    return found


def expert_weight_gradient(inputs: Inputs, groups: Groups, arithmetic: Arithmetic) -> Uncertain:
    """dW [E, K, N] = x^T (g dy) over the rows of each expert."""
    forward = Linear.forward(inputs, groups, arithmetic)
    dy = Uncertain.exact(inputs["dy"][groups.places(inputs.case.dy_order)])
    dy = _gated_rows(dy, forward.gates, inputs.dtype)
    return forward.gram(forward.x, dy).rounded(inputs.dtype)


def expert_bias_gradient(inputs: Inputs, groups: Groups) -> Uncertain:
    """db [E, N] = sum of g dy over the rows of each expert, stored in fp32."""
    dy = Uncertain.exact(inputs["dy"][groups.places(inputs.case.dy_order)])
    gates = inputs.get("gates")
    if gates is not None:
        dy = dy.scaled(gates.reshape(-1)[groups.slots].double()[:, None])
    return column_sums(dy, groups.slices).rounded(torch.float32)


def _gated_rows(rows: Uncertain, gates: Tensor | None, dtype: torch.dtype) -> Uncertain:
    """Rows times their gates [kept], as an operand of a product: rounded to its type."""
    return rows if gates is None else rows.scaled(gates[:, None]).rounded(dtype)


def _factors(inputs: Inputs) -> tuple[Uncertain, Uncertain]:
    """A and B as the kernels read them: fp32 factors are rounded to the activations' type."""
    factors = [Uncertain.exact(inputs[name]) for name in ("lora_a", "lora_b")]
    if inputs.narrowed:
        factors = [_read_as(factor, inputs.dtype) for factor in factors]
    a, b = factors
    return a, b


def _read_as(factor: Uncertain, dtype: torch.dtype) -> Uncertain:
    """A factor rounded on its way into a kernel; the rounding is known, but not part of the
    truth.
    """
    rounded = factor.rounded(dtype)
    return Uncertain(factor.value, rounded.local, rounded.shared, rounded.drift)
