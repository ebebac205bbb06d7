"""Numbers that carry the error a correct kernel may make.

`Uncertain` holds a value in fp64 and the variance that correct arithmetic in the kernel's precision
leaves on it, in three parts that behave differently when errors are averaged:

    local    rounding of this very element: independent from element to element
    shared   rounding of an operand that many elements share: the rank-R intermediate, activations
    drift    fp32 accumulation; tensor cores bias it toward zero, so errors may all point one way

A reference is then a straight line of products, sums and `rounded(dtype)` where the kernel stores
or casts: the expected error of every output follows from the arithmetic, and no tolerance is
written anywhere.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_TF32_DROPPED_BITS = 13
_NEAR = 6
"""Standard deviations within which an uncertain value may fall on the other side of a step."""
_FUNCTION_EPSILON = 2.0**-21
"""Relative error allowed to exp, tanh and what is built of a few fp32 operations."""


BLOCK = 2**22
"""Elements of the blocks in which large tensors are worked on, where that needs less memory."""
_SMALLEST = 2.0**-149
"""The smallest fp32 number: sums below the normal numbers are rounded to its multiples."""


def accumulation_epsilon(length: int) -> float:
    """Relative error allowed to fp32 sums of `length` products, tensor cores included."""
    return 4e-9 * length + 1e-7


def _smallest_sums(length: int) -> float:
    """Variance allowed to fp32 sums of `length` products below the normal numbers: a rounding of
    each product, and half of the smallest number cut off wherever a tensor core adds 8 of them,
    always towards zero.
    """
    return (length + (length / 16) ** 2) * _SMALLEST**2


def spacing(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbouring numbers of `dtype` at `value` (fp64), subnormals included."""
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    _, exponent = torch.frexp(value)
    ulp = torch.ldexp(torch.full_like(value, limits.eps), exponent - 1)
    return ulp.clamp_min(smallest)


def rounding_variance(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Variance of rounding `value` (fp64) to nearest in `dtype`: uniform over one spacing."""
    if dtype == torch.float64:
        return _zero(value)
    places = blocks(value)
    if len(places) > 1:
        variance = torch.empty_like(value)
        for rows in places:
            variance[rows] = rounding_variance(value[rows], dtype)
        return variance
    variance = spacing(value, dtype).square_().div_(12)
    # A stored zero is exact.
    return variance.masked_fill_(value == 0, 0)


def blocks(value: Tensor) -> Sequence[Any]:
    """Slices of the first dimension that hold at most BLOCK elements, or one index each."""
    if value.numel() <= BLOCK or value.ndim == 0:
        return (...,)
    step = max(1, BLOCK * value.shape[0] // value.numel())
    return [slice(start, start + step) for start in range(0, value.shape[0], step)]


def by_rows(
    function: Callable[..., "Uncertain"], width: int, *operands: "Uncertain | Tensor"
) -> "Uncertain":
    """[rows, width] of operands with as many rows, each row by itself: a block of rows after the
    other.
    """
    first = operands[0]
    like = first.value if isinstance(first, Uncertain) else first
    places = blocks(like)
    if len(places) == 1:
        return function(*operands)
    parts = (function(*(operand[rows] for operand in operands)) for rows in places)
    return _gathered(parts, places, (like.shape[0], width), like)


def tf32_spacing(value: Tensor) -> Tensor:
    """Distance between neighbouring tf32 numbers at `value` (fp64)."""
    return spacing(value, torch.float32) * (1 << _TF32_DROPPED_BITS)


def truncated_to_tf32(value: Tensor) -> Tensor:
    """`value` (fp64) as a tensor core reads an fp32 operand: 13 low mantissa bits cut off."""
    bits = value.float().view(torch.int32)
    return (bits & -(1 << _TF32_DROPPED_BITS)).view(torch.float32).double()


@dataclass(frozen=True, slots=True)
class Uncertain:
    """A tensor and the variance of a correct result: in its shape, or a scalar zero if exact."""

    value: Tensor
    local: Tensor
    shared: Tensor
    drift: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> "Uncertain":
        """An input: known without error, kept in its own type until it is used."""
        zero = _zero(value)
        return cls(value, zero, zero, zero)

    @property
    def variance(self) -> Tensor:
        """All parts together."""
        return self.local + self.shared + self.drift

    def rounded(self, dtype: torch.dtype | None) -> "Uncertain":
        """Stored or cast to `dtype`; None keeps it as it is."""
        if dtype is None or dtype == torch.float64:
            return self
        value = self.value.double()
        local = rounding_variance(value, dtype).add_(self.local)
        return Uncertain(value, local, self.shared, self.drift)

    def truncated(self) -> "Uncertain":
        """Read as a tf32 operand, the low bits cut off.

        A value that is itself uncertain and lies near a step may fall on its other side, which
        moves it by one step.
        """
        value = truncated_to_tf32(self.value)
        error = self.variance
        if error.ndim == 0 and not error:
            return Uncertain(value, self.local, self.shared, self.drift)
        step = tf32_spacing(value)
        above = (self.value.double() - value).abs()
        reach = _NEAR * error.sqrt()
        near = (above < reach) | (above > step - reach)
        return Uncertain(value, self.local + near * step.square(), self.shared, self.drift)

    def scaled(self, factor: float | Tensor) -> "Uncertain":
        """Times an exact factor."""
        return Uncertain(self.value.double() * factor, *_times(self, factor * factor))

    def alike(self, count: Tensor) -> "Uncertain":
        """As a sum meets summands of which so many err alike: m equal errors have m^2 the variance
        of one, m each.
        """
        return Uncertain(self.value, *_times(self, count))

    def times(self, other: "Uncertain") -> "Uncertain":
        """Elementwise product; errors of the factors are taken as independent, to first order."""
        mine, theirs = _squares(self, other.value), _squares(other, self.value)
        parts = [a + b for a, b in zip(mine, theirs, strict=True)]
        return Uncertain(self.value.double() * other.value, *parts)

    def mapped(self, value: Tensor, slope: Tensor) -> "Uncertain":
        """f(self), given f's value and derivative there."""
        return Uncertain(value, *_squares(self, slope))

    def __add__(self, other: "Uncertain") -> "Uncertain":
        return Uncertain(
            self.value.double() + other.value,
            self.local + other.local,
            self.shared + other.shared,
            self.drift + other.drift,
        )

    def __getitem__(self, index: Any) -> "Uncertain":
        return self.rearranged(lambda tensor: tensor[index])

    @property
    def mT(self) -> "Uncertain":  # noqa: N802 - as torch has it
        """Last two dimensions exchanged."""
        return self.rearranged(lambda tensor: tensor.mT)

    def rearranged(self, move: Callable[[Tensor], Tensor]) -> "Uncertain":
        """Value and variances moved alike."""

        def part(variance: Tensor) -> Tensor:
            return variance if variance.ndim == 0 else move(variance)

        return Uncertain(move(self.value), part(self.local), part(self.shared), part(self.drift))


def matmul(left: Uncertain, right: Uncertain) -> Uncertain:
    """left [m, k] times right [k, n], accumulated in fp32: rounding of the operands becomes
    shared error.
    """
    length = left.value.shape[-1]
    left_value, right_value = left.value.double(), right.value.double()
    value = left_value @ right_value
    left_square, right_square = left_value.square(), right_value.square()
    shared = _carried(left.local + left.shared, right_square)
    shared = shared + _carried_right(left_square, right.local + right.shared)
    drift = _carried(left.drift, right_square) + _carried_right(left_square, right.drift)
    spread = left_square @ right_square + value.square()
    drift = drift + spread.mul_(accumulation_epsilon(length) ** 2)
    drift = drift + _smallest_sums(length)
    return Uncertain(value, _zero(value), shared, drift)


def routed_product(x: Uncertain, weight: Uncertain, groups: Sequence[slice]) -> Uncertain:
    """Rows of x [rows, k] times weight [experts, k, n] of their expert; rows of no group stay
    zero.
    """
    live = [(e, rows) for e, rows in enumerate(groups) if rows.stop > rows.start]
    parts = (matmul(x[rows], weight[e]) for e, rows in live)
    shape = (x.value.shape[0], weight.value.shape[-1])
    return _gathered(parts, [rows for _, rows in live], shape, x.value)


def gram(left: Uncertain, right: Uncertain, groups: Sequence[slice]) -> Uncertain:
    """left[rows].T @ right[rows] for every expert: [experts, p, q] from [rows, p] and [rows, q]."""
    live = [(e, rows) for e, rows in enumerate(groups) if rows.stop > rows.start]
    parts = (matmul(left[rows].mT, right[rows]) for _, rows in live)
    shape = (len(groups), left.value.shape[-1], right.value.shape[-1])
    return _gathered(parts, [e for e, _ in live], shape, left.value)


def column_sums(x: Uncertain, groups: Sequence[slice]) -> Uncertain:
    """Sum of the rows of every expert, accumulated in fp32: [experts, n] from [rows, n]."""
    ones = Uncertain.exact(x.value.new_ones((x.value.shape[0], 1)))
    return gram(ones, x, groups)[:, 0]


def freedom(variance: Tensor, right: Tensor) -> Tensor:
    """Degrees of freedom of ||sum_k d[i, k] right[k]||^2 for independent d of these variances: [m].

    variance [m, k], right [k, n]. It is k for orthogonal lines of `right` and 1 for parallel ones:
    then all errors push the whole vector one way, and its norm varies as much as a single number.
    """
    lines = right.shape[0]
    energy = variance @ right.square().sum(-1)
    common = torch.zeros_like(energy)
    step = max(1, BLOCK // max(lines, 1))
    for some in (slice(start, start + step) for start in range(0, lines, step)):
        gram_square = (right[some] @ right.mT).square()
        common += ((variance[:, some] @ gram_square) * variance).sum(-1)
    return energy.square() / common.clamp_min(1e-300)


def summed(x: Uncertain, dim: int) -> Uncertain:
    """Sum over `dim`, accumulated in fp32; errors of the summands are taken as independent.

    Below the normal numbers each summand, a product that nothing rounded before, is rounded to the
    nearest multiple of the smallest one; sums of such multiples are exact.
    """

    def part(variance: Tensor) -> Tensor:
        return variance if variance.ndim == 0 else variance.sum(dim)

    value, length = x.value.double().sum(dim), x.value.shape[dim]
    spread = x.value.double().square().sum(dim) + value.square()
    drift = part(x.drift) + accumulation_epsilon(length) ** 2 * spread
    drift = drift + length * _SMALLEST**2 / 12
    return Uncertain(value, _zero(value), part(x.local) + part(x.shared), drift)


def _gathered(
    parts: Iterable[Uncertain], places: Sequence[Any], shape: tuple[int, ...], like: Tensor
) -> Uncertain:
    value = like.new_zeros(shape, dtype=torch.float64)
    variances = [_zero(value)] * 3
    for place, part in zip(places, parts, strict=True):
        value[place] = part.value
        for index, variance in enumerate((part.local, part.shared, part.drift)):
            if variance.ndim == 0:
                continue
            if variances[index].ndim == 0:
                variances[index] = torch.zeros_like(value)
            variances[index][place] = variance
    return Uncertain(value, *variances)


def _squares(x: Uncertain, slope: Tensor) -> tuple[Tensor, ...]:
    return _times(x, slope.square())


def _times(x: Uncertain, factor: float | Tensor) -> tuple[Tensor, ...]:
    """The variances of x times a factor; those of an exact tensor stay the scalar zero."""
    parts = (x.local, x.shared, x.drift)
    return tuple(part if part.ndim == 0 else part * factor for part in parts)


def _carried(variance: Tensor, square: Tensor) -> Tensor:
    return variance if variance.ndim == 0 else variance @ square


def _carried_right(square: Tensor, variance: Tensor) -> Tensor:
    return variance if variance.ndim == 0 else square @ variance


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=like.device)


def elementwise(
    function: Callable[..., Tensor], *operands: Uncertain, scale: Tensor | None = None
) -> Uncertain:
    """function of operands of one shape, elementwise; errors carried to first order, operands
    independent.

    scale: size of the largest intermediate that an fp32 evaluation of the function goes through,
    where it
    cancels; that of the value unless stated.
    """
    leaves = [operand.value.double().detach().requires_grad_() for operand in operands]
    with torch.enable_grad():
        value = function(*leaves)
        slopes = torch.autograd.grad(value.sum(), leaves, materialize_grads=True, allow_unused=True)
    value = value.detach()
    parts = [_squares(operand, slope) for operand, slope in zip(operands, slopes, strict=True)]
    local, shared, drift = (
        sum((part[i] for part in parts[1:]), start=parts[0][i]) for i in range(3)
    )
    size = value if scale is None else scale
    return Uncertain(value, local, shared, drift + (_FUNCTION_EPSILON * size).square())
