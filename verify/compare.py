"""The judge: one output against what it should be.

Every error is divided by the limit that the arithmetic of a correct kernel implies, so that one
number serves
every dtype and shape: `ratio` <= 1 passes. The limits (verification by variance, `Expected.model`):

    whole, expert, row   ||error|| / sqrt(sum of variances) <= 1.25 + 8 / sqrt(n) over n elements;
    shared errors
                         with few degrees of freedom may vary as much as a chi-square of as many
    element              |error| / sqrt(variance) <= 16 (reported as `row`, with its column)
    slope                the factor fitted to each term is 1, and that of each likely fault 0,
                         within 6 of its standard deviations; roundings of products of few
                         different numbers repeat
    exact                shape, dtype, finite where the truth is and only there (but within 16
                         standard deviations of the largest finite number), zeros that must be
                         +0.0, exact mode
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .expected import Expected
from .numerics import Uncertain, blocks

WORST = 1e9
"""The ratio of an error that no limit allows."""

_GROUP, _GROUP_SPREAD = 1.25, 8.0
_RARE = 16.0  # a chi-square exceeds its limit with probability exp(-16)
_UNIFORM = 3.0  # largest square of a rounding error over its variance
_LEAST_ELEMENTS = 32
_ELEMENT = 16.0
_SLOPE = 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The worst error of one output over its limit, what it was measured on, and where it is."""

    output: str
    ratio: float
    measure: str
    where: Mapping[str, object] = field(default_factory=dict)
    note: str = ""
    ratios: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the output is within every limit."""
        return self.ratio <= 1.0

    def __str__(self) -> str:
        places = ", ".join(f"{key} {value}" for key, value in self.where.items())
        text = f"{self.output}: {self.measure} error {self.ratio:.3g} x its limit"
        return text + (f" ({self.note})" if self.note else "") + (f" at {places}" if places else "")


def compare(output: str, got: Tensor, expected: Expected, *, exact: bool = False) -> Comparison:
    """Judge one output; `exact` demands equality to the bit with the truth rounded to the
    output's type.
    """
    if not isinstance(got, Tensor):
        return _wrong(output, f"is a {type(got).__name__}, not a tensor")
    if got.dtype != expected.dtype:
        return _wrong(output, f"dtype is {got.dtype}, should be {expected.dtype}")
    if got.shape != expected.value.shape:
        return _wrong(output, f"shape is {list(got.shape)}, should be {list(expected.value.shape)}")
    if got.numel() == 0:
        return Comparison(output=output, ratio=0.0, measure="exact")
    for check in (_zeros, _non_finite):
        found = check(output, got, expected)
        if found is not None:
            return found
    return _equal(output, got, expected) if exact else _Errors.of(output, got, expected).judged()


def _wrong(output: str, note: str, where: Mapping[str, object] | None = None) -> Comparison:
    return Comparison(output=output, ratio=WORST, measure="exact", note=note, where=where or {})


def _place(got: Tensor, expected: Expected, vector: int, column: int) -> dict[str, object]:
    value = expected.vectors(expected.value)[vector, column]
    return {
        "expert": int(expected.expert.reshape(-1)[vector]),
        "row": vector,
        "column": column,
        "got": float(expected.vectors(got)[vector, column]),
        "want": float(value),
    }


def _first(mask: Tensor) -> tuple[int, int]:
    vector, column = torch.nonzero(mask)[0].tolist()
    return vector, column


def _zeros(output: str, got: Tensor, expected: Expected) -> Comparison | None:
    vectors = expected.vectors(got)
    wrong = (vectors != 0) | vectors.signbit()
    wrong &= expected.zero.reshape(-1, 1)
    if not wrong.any():
        return None
    return _wrong(output, "must be exactly +0.0", _place(got, expected, *_first(wrong)))


def _non_finite(output: str, got: Tensor, expected: Expected) -> Comparison | None:
    want, have = (_finite(expected.vectors(each), got.dtype) for each in (expected.value, got))
    wrong = want != have
    if wrong.any():
        wrong[wrong.clone()] = ~_may_overflow(got, expected, wrong)
    if not wrong.any():
        return None
    vector, column = _first(wrong)
    note = "is not finite" if want[vector, column] else "is finite, the truth is not"
    count = int(wrong.sum())
    return _wrong(output, f"{note} ({count} elements)", _place(got, expected, vector, column))


def _may_overflow(got: Tensor, expected: Expected, among: Tensor) -> Tensor:
    """Of the elements `among`, bool [count]: which are right although they are finite and the truth
    is not, or the other way, since it lies where both are.
    """

    def of(part: Tensor) -> Tensor:
        return expected.vectors(part)[among] if part.ndim else part

    limits, model = torch.finfo(expected.dtype), expected.model
    edge = limits.max * (1 + limits.eps / (4 - 2 * limits.eps))
    reach = _ELEMENT * (of(model.local) + of(model.shared) + of(model.drift)).sqrt()
    value, have = of(expected.value), of(got).double()
    alike = torch.where(have.isinf(), have.sign() == value.sign(), (have - value).abs() <= reach)
    return alike & ((value.abs() - edge).abs() <= reach)


def _finite(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Which elements are finite numbers of `dtype`: in blocks of vectors, as all of them in it
    would take memory beside the operands.
    """
    finite = torch.empty_like(vectors, dtype=torch.bool)
    for rows in blocks(vectors):
        finite[rows] = vectors[rows].to(dtype).isfinite()
    return finite


def _equal(output: str, got: Tensor, expected: Expected) -> Comparison:
    wrong = expected.vectors(got) != expected.vectors(expected.value).to(expected.dtype)
    wrong &= ~expected.vectors(expected.value).isnan()
    if not wrong.any():
        return Comparison(output=output, ratio=0.0, measure="exact", ratios={"exact": 0.0})
    note = f"{int(wrong.sum())} of {wrong.numel()} elements differ in exact arithmetic"
    return _wrong(output, note, _place(got, expected, *_first(wrong)))


@dataclass(frozen=True, slots=True)
class _Vectors:
    """What was got, the truth and its variances, as [vectors, length].

    Errors and variances are zero where the truth or what was got is not finite. They are made when
    asked for: all of them held would take as much memory as the truth and its variances do.
    """

    got: Tensor
    truth: Uncertain
    finite: Tensor

    @classmethod
    def of(cls, got: Tensor, expected: Expected) -> "_Vectors":
        truth = replace(expected.model, value=expected.value).rearranged(expected.vectors)
        finite = _finite(truth.value, expected.dtype) & expected.vectors(got).isfinite()
        return cls(expected.vectors(got), truth, finite)

    def __getitem__(self, rows: Any) -> "_Vectors":
        return _Vectors(self.got[rows], self.truth[rows], self.finite[rows])

    @property
    def error(self) -> Tensor:
        return self._kept(self.got.double() - self.truth.value)

    @property
    def independent(self) -> Tensor:
        return self._kept(self.truth.local) + self.drift

    @property
    def shared(self) -> Tensor:
        return self._kept(self.truth.shared)

    @property
    def drift(self) -> Tensor:
        return self._kept(self.truth.drift)

    def _kept(self, part: Tensor) -> Tensor:
        return torch.where(self.finite, part, 0.0)

    def figures(self) -> tuple[Tensor, ...]:
        """Of each vector the sums of squared errors and of independent and shared variances, its
        largest error in standard deviations, and the column of that.
        """
        squares, independent, shared = self.error.square(), self.independent, self.shared
        score, column = _over(squares, independent + shared).max(1)
        return squares.sum(1), independent.sum(1), shared.sum(1), score, column


@dataclass(frozen=True, slots=True, kw_only=True)
class _Errors:
    """The vectors of an output, and their `figures`."""

    output: str
    got: Tensor
    expected: Expected
    vectors: _Vectors
    squares: Tensor
    independent: Tensor
    shared: Tensor
    score: Tensor
    column: Tensor

    @classmethod
    def of(cls, output: str, got: Tensor, expected: Expected) -> "_Errors":
        vectors = _Vectors.of(got, expected)
        parts = [vectors[rows].figures() for rows in blocks(vectors.got)]
        squares, independent, shared, score, column = map(torch.cat, zip(*parts, strict=True))
        return cls(
            output=output,
            got=got,
            expected=expected,
            vectors=vectors,
            squares=squares,
            independent=independent,
            shared=shared,
            score=score,
            column=column,
        )

    @property
    def labels(self) -> Tensor:
        return self.expected.expert.reshape(-1)

    @property
    def repeats(self) -> Tensor:
        """Of each vector how many err alike, itself among them, fp64."""
        given = self.expected.repeats
        return torch.ones_like(self.squares) if given is None else given.double().clamp_min(1)

    def judged(self) -> Comparison:
        found = [self._rows(), self._experts(), self._whole(), self._elements(), self._slopes()]
        found += [self._direction(name) for name in self.expected.directions]
        worst = max(found, key=lambda item: item.ratio)
        ratios: dict[str, float] = {}
        for item in found:
            ratios[item.measure] = max(ratios.get(item.measure, 0.0), item.ratio)
        return Comparison(
            output=self.output,
            ratio=worst.ratio,
            measure=worst.measure,
            where=worst.where,
            note=worst.note,
            ratios=ratios,
        )

    def _limits(self, count: Tensor, energy: Tensor, freedom: Tensor, sources: Tensor) -> Tensor:
        """Largest allowed sum of squared errors of groups: `energy` [2, groups], independent and
        shared.

        Shared errors: the bound of Laurent and Massart on a chi-square, or, if lower, every one
        of the
        `sources` roundings as large as it can be and all of them parallel. Where one rounding
        decides, those of the results may lean the same way: then the two errors add up.
        """
        limit = (_GROUP + _GROUP_SPREAD / count.double().sqrt()).square()
        chi_square = 1 + 2 * (_RARE / freedom).sqrt() + 2 * _RARE / freedom
        together = torch.maximum(limit, torch.minimum(chi_square, _UNIFORM * sources))
        alone, common = energy[0] * limit, energy[1] * together
        return alone + common + 2 * (alone * common).sqrt() / torch.maximum(freedom, sources)

    def _group(
        self, measure: str, owner: Tensor, groups: int, repeats: float | Tensor
    ) -> Comparison:
        """Judge groups of vectors; `owner` int64 [vectors] says which group each vector is in.

        repeats: of each vector how many of its group err alike.
        """
        length = self.vectors.got.shape[1]

        def total(per_vector: Tensor) -> Tensor:
            sums = torch.zeros(groups, dtype=torch.float64, device=owner.device)
            return sums.index_add_(0, owner, per_vector.double())

        count = total(torch.full(owner.shape, length, device=owner.device))
        squares = total(self.squares)
        energy = torch.stack([total(self.independent), total(self.shared)])
        sources = total(self.expected.sources.reshape(-1))
        given = self.expected.freedom
        own = (self.expected.sources if given is None else given).reshape(-1).double()
        own = own.nan_to_num(nan=1.0).clamp_min(1)
        if self.expected.coupled == "expert":
            fluctuation = total(self.shared / own.sqrt()).square()
        else:
            fluctuation = total(self.shared.square() * repeats / own)
        freedom = (energy[1].square() / fluctuation.clamp_min(1e-300)).clamp_min(1.0)
        limit = self._limits(count.clamp_min(1), energy, freedom, sources.clamp_min(1))
        ratios = _over(squares, limit)
        ratios = torch.where(count >= _LEAST_ELEMENTS, ratios, torch.zeros_like(ratios))
        worst = int(ratios.argmax())
        return self._found(measure, float(ratios[worst]), owner == worst)

    def _whole(self) -> Comparison:
        return self._group("whole", torch.zeros_like(self.labels), 1, self.repeats)

    def _experts(self) -> Comparison:
        groups = int(self.labels.max()) + 1
        return self._group("expert", self.labels, groups, self.repeats)

    def _rows(self) -> Comparison:
        vectors = len(self.score)
        owner = torch.arange(vectors, device=self.labels.device)
        return self._group("row", owner, vectors, 1.0)

    def _elements(self) -> Comparison:
        score = float(self.score.max())
        return self._found("row", score if score >= WORST else score / _ELEMENT, None)

    def _slopes(self) -> Comparison:
        """Least squares of the error on the terms: the excess of each term's factor over 1."""
        terms = {
            name: torch.where(self.vectors.finite, self.expected.vectors(term), 0.0)
            for name, term in self.expected.terms.items()
        }
        terms = {name: term for name, term in terms.items() if bool(term.any())}
        nothing = Comparison(output=self.output, ratio=0.0, measure="slope")
        if not terms or self.vectors.got.numel() < _LEAST_ELEMENTS:
            return nothing
        names = list(terms)
        gram = torch.stack(
            [torch.stack([(terms[a] * terms[b]).sum() for b in names]) for a in names]
        )
        if not bool(torch.linalg.cond(gram) < 1e6):
            return nothing
        inverse = torch.linalg.inv(gram)
        worst, label, excess = 0.0, "", 0.0
        for index, name in enumerate(names):
            influence = sum(inverse[index, j] * terms[other] for j, other in enumerate(names))
            slope = float((influence * self.vectors.error).sum())
            ratio = abs(slope) / self._slope_limit(influence)
            if ratio > worst:
                worst, label, excess = ratio, name, slope
        note = f"fitted factor of the {label} term is {1 + excess:.6f}" if label else ""
        return replace(self._found("slope", min(worst, WORST), None), note=note)

    def _direction(self, name: str) -> Comparison:
        """How much of a likely fault the error holds, fitted alone."""
        line = self.expected.vectors(self.expected.directions[name])
        line = torch.where(self.vectors.finite & line.isfinite(), line, 0.0)
        square = float(line.square().sum())
        if not square or line.numel() < _LEAST_ELEMENTS:
            return Comparison(output=self.output, ratio=0.0, measure="slope")
        influence = line / square
        excess = float((influence * self.vectors.error).sum())
        ratio = abs(excess) / self._slope_limit(influence)
        found = self._found("slope", min(ratio, WORST), None)
        return replace(found, note=f"{name} is {excess:+.3%} off")

    def _slope_limit(self, influence: Tensor) -> float:
        vectors, size, repeats = self.vectors, influence.abs(), self.repeats
        squares = (influence.square() * (vectors.independent - vectors.drift)).sum(1)
        alone = float((squares * repeats).sum())
        # The rounding of a product depends on two mantissas: in a line or column that shares a
        # factor there are as many different ones as the type has mantissas.
        mantissas = 1 / torch.finfo(self.expected.dtype).eps
        alone *= max(1.0, size.shape[1] / mantissas) * max(1.0, size.shape[0] / mantissas)
        pull = (size * vectors.shared.sqrt()).sum(1)
        if self.expected.coupled == "expert":
            groups = int(self.labels.max()) + 1
            pull = torch.zeros(groups, dtype=pull.dtype, device=pull.device).index_add_(
                0, self.labels, pull
            )
            repeats = torch.ones_like(pull)
        together = float((pull.square() * repeats).sum())
        drift = float((size * vectors.drift.sqrt()).sum())
        return _SLOPE * (alone + together) ** 0.5 + drift + 1e-300

    def _found(self, measure: str, ratio: float, mask: Tensor | None) -> Comparison:
        scores = self.score if mask is None else self.score * mask
        vector = int(scores.argmax())
        column = int(self.column[vector])
        where = _place(self.got, self.expected, vector, column)
        return Comparison(output=self.output, ratio=ratio, measure=measure, where=where)


def _over(squares: Tensor, limits: Tensor) -> Tensor:
    """sqrt(squares / limits); an error where none is allowed counts as WORST."""
    ratios = (squares / limits.clamp_min(1e-300)).sqrt()
    return torch.where(squares == 0, torch.zeros_like(ratios), ratios).clamp_max(WORST)
