"""What is timed, by name: kernel, projection, layer, QLoRA layer and dequantisation of the experts
of a model.

A name is `kind.what.model.projection.t<tokens>.r<rank>.<routing>.<dtype>`, without what does not
apply. A kernel that has no benchmark of its own is timed by its entry in `verify.specs`, under its
name there.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .entries import BY_ENTRY, dtype_of, sized
from .routings import RoutingKind

KINDS = ("kernel", "projection", "layer", "qlora-layer", "dequant")

WHATS: Mapping[str, tuple[str, ...]] = {
    "kernel": ("sort", "base", "shrink", "group", "combine", "glu", "glu-grad"),
    "projection": ("forward", "input-grad", "weight-grad", "step"),
    "layer": ("forward", "step"),
    "qlora-layer": ("full", "selective", "chunked"),
    "dequant": ("nf4", "nf4-nested"),
}
PROJECTIONS = ("gate_up", "down")
PROJECTION_KERNELS = ("base", "shrink")


def by_projection(kind: str, what: str) -> bool:
    """Whether something is timed once per projection; the rest is once per layer."""
    return kind in ("projection", "dequant") or what in PROJECTION_KERNELS


_LARGEST = 2**29
"""Elements of a stack of experts for which a kernel is timed by its entry: the fp64 truth of a
larger one does not fit on a GPU beside it.
"""

DTYPES: tuple[str, ...] = ("bfloat16", "float16", "float32", "tf32")
"""tf32: float32, multiplied as tf32."""

ROUTINGS: tuple[str, ...] = ("balanced", "zipf", "half")
"""balanced: uniform choices; zipf: probability ~ 1 / rank of the expert; half: one expert gets
half of the rows.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the experts of one model: gate_up [hidden, 2 intermediate], down [intermediate,
    hidden].
    """

    name: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int

    def __post_init__(self) -> None:
        sizes = (self.experts, self.hidden, self.intermediate, self.top_k)
        if min(sizes) < 1 or self.top_k > self.experts:
            raise ValueError(
                f"{self.name}: {self.experts} experts of {self.hidden} x {self.intermediate}, "
                f"{self.top_k} per token, is no experts layer"
            )

    def widths(self, projection: str) -> tuple[int, int]:
        """(K, N) of a projection."""
        if projection == "gate_up":
            return self.hidden, 2 * self.intermediate
        return self.intermediate, self.hidden


SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(name="qwen3-30b", experts=128, hidden=2048, intermediate=768, top_k=8),
        Shape(name="qwen3.5-35b", experts=256, hidden=2048, intermediate=512, top_k=8),
        Shape(name="olmoe", experts=64, hidden=2048, intermediate=1024, top_k=8),
        Shape(name="mixtral", experts=8, hidden=4096, intermediate=14336, top_k=2),
        Shape(name="tiny", experts=4, hidden=64, intermediate=32, top_k=2),
    )
}
"""Qwen3-30B-A3B, Qwen3.5-35B-A3B, OLMoE-1B-7B, Mixtral-8x7B, and one for a machine without a GPU.
"""

BUILT_IN = ("qwen3-30b", "qwen3.5-35b", "olmoe", "mixtral")


def shape_of(name: str) -> Shape:
    """A built-in shape by name, or that of a transformers configuration (a directory or a model's
    name).

    Raises:
        ValueError: neither knows the name, or the configuration states no expert sizes.
    """
    if name in SHAPES:
        return SHAPES[name]
    try:
        from transformers import AutoConfig

        from scattermoe_lora.integrations.model_types import moe_shape

        found = moe_shape(AutoConfig.from_pretrained(name))
    except (ImportError, OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{name!r} is none of {', '.join(SHAPES)} and no transformers configuration: {error}"
        ) from error
    label = name.rstrip("/").rpartition("/")[2].lower().replace(".json", "")
    return Shape(
        name=label,
        experts=found.experts,
        hidden=found.hidden,
        intermediate=found.intermediate,
        top_k=found.top_k,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchCase:
    """One benchmark. projection: gate_up or down, or empty where it is of the whole layer. rank 0:
    no adapter.
    """

    kind: str
    what: str
    shape: Shape
    projection: str = ""
    tokens: int = 2048
    rank: int = 16
    routing: str = "balanced"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.kind not in KINDS or (self.what not in WHATS[self.kind] and not self.by_entry):
            raise ValueError(f"there is no benchmark {self.what!r} of kind {self.kind!r}")
        if by_projection(self.kind, self.what) != (self.projection in PROJECTIONS):
            raise ValueError(f"{self.kind} {self.what} of projection {self.projection!r}")
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing {self.routing!r} is none of {', '.join(ROUTINGS)}")
        if self.tokens < 1 or self.rank < 0:
            raise ValueError(f"{self.tokens} tokens and rank {self.rank} make no benchmark")

    @property
    def name(self) -> str:
        """Its name; two cases of one name are equal."""
        words = [self.kind, self.what, self.shape.name]
        words += [self.projection] if self.projection else []
        if self.kind != "dequant":
            words += [f"t{self.tokens}"]
            words += [f"r{self.rank}"] if self.rank else []
            words += [self.routing]
        words += [self.dtype] if self.dtype != "bfloat16" else []
        return ".".join(words)

    @property
    def by_entry(self) -> bool:
        """Whether the entry of a kernel says all of it."""
        return self.kind == "kernel" and self.what in BY_ENTRY

    @property
    def case(self) -> Case:
        """What an entry is asked for: the first case of the kernel at the sizes of a model."""
        spec, shape = BY_ENTRY[self.what], self.shape
        k_in, n_out = shape.widths(spec.timed_at)
        return sized(
            spec,
            tokens=self.tokens,
            experts=shape.experts,
            top_k=shape.top_k,
            k_in=k_in,
            n_out=n_out,
            rank=self.rank,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """Storage type of activations, weights and adapters."""
        return stored_as(self.dtype)

    @property
    def rows(self) -> int:
        """Routed rows."""
        return self.tokens * self.shape.top_k

    @property
    def inputs_key(self) -> "BenchCase":
        """Cases with the same key are run on the same tensors."""
        if self.projection and self.kind != "dequant":
            return replace(self, kind="projection", what="step", rank=self.rank or 16)
        if self.kind == "kernel" and not self.by_entry:
            return replace(self, what="sort", rank=0)
        if self.kind == "layer":
            return replace(self, what="step")
        return replace(self, what=WHATS[self.kind][0]) if self.kind == "qlora-layer" else self


def stored_as(dtype: str) -> torch.dtype:
    """The storage type that one of DTYPES means."""
    return torch.float32 if dtype == "tf32" else getattr(torch, dtype)


@contextmanager
def multiplied_as(dtype: str) -> Iterator[None]:
    """Within it fp32 operands are multiplied as one of DTYPES says: as tf32, or exactly."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def choices(case: BenchCase, seed: int) -> Tensor:
    """top_k_index int64 [tokens, top_k] of a case, on the CPU; the same for the same arguments."""
    shape = case.shape
    sizes = {"tokens": case.tokens, "top_k": shape.top_k, "experts": shape.experts, "seed": seed}
    if case.routing != "half":
        kind = RoutingKind({"balanced": "uniform", "zipf": "zipf"}[case.routing])
        return kind.draw(**sizes)
    # Expert 0 takes half of the slots of every token; a token with a single slot, every other time.
    index = RoutingKind("uniform").draw(**sizes)
    generator = torch.Generator().manual_seed(seed + 1)
    keys = torch.rand(index.shape, generator=generator)
    taken = keys.argsort(dim=1) < max(shape.top_k // 2, 1)
    if shape.top_k == 1:
        taken = keys < 0.5
    return torch.where(taken, torch.zeros_like(index), index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Which cases: the product of its lists. An empty list of kinds means all."""

    models: tuple[str, ...] = BUILT_IN
    kinds: tuple[str, ...] = ()
    tokens: tuple[int, ...] = (2048, 8192)
    ranks: tuple[int, ...] = (16, 32, 64)
    routings: tuple[str, ...] = ("balanced", "zipf", "half")
    dtypes: tuple[str, ...] = ("bfloat16",)

    def cases(self) -> tuple[BenchCase, ...]:
        """Every case of the grid, cases on the same tensors together."""
        found = [
            case
            for name, tokens, rank, routing, dtype in itertools.product(
                self.models, self.tokens, self.ranks, self.routings, self.dtypes
            )
            for case in _cases_of(shape_of(name), tokens, rank, routing, dtype)
            if not self.kinds or case.kind in self.kinds
        ]
        return together(found)


def _cases_of(
    shape: Shape, tokens: int, rank: int, routing: str, dtype: str
) -> Iterable[BenchCase]:
    for kind, whats in WHATS.items():
        for what in whats:
            plain = kind == "dequant"
            base = BenchCase(
                kind=kind,
                what=what,
                shape=shape,
                projection="gate_up" if by_projection(kind, what) else "",
                tokens=1 if plain else tokens,
                rank=0 if plain or (kind == "kernel" and what != "shrink") else rank,
                routing="balanced" if plain else routing,
                dtype=dtype,
            )
            yield base
            if base.projection:
                yield replace(base, projection="down")
    for what, spec in BY_ENTRY.items():
        stack = shape.experts * math.prod(shape.widths(spec.timed_at))
        if dtype != "tf32" and stored_as(dtype) in spec.dtypes and stack <= _LARGEST:
            yield BenchCase(
                kind="kernel",
                what=what,
                shape=shape,
                tokens=tokens,
                rank=rank if spec.ranked else 0,
                routing=routing,
                dtype=dtype,
            )


def together(cases: Iterable[BenchCase]) -> tuple[BenchCase, ...]:
    """Each case once, in the order given, cases on the same tensors one after the other."""
    groups: dict[BenchCase, dict[BenchCase, None]] = {}
    for case in cases:
        groups.setdefault(case.inputs_key, {})[case] = None
    return tuple(case for group in groups.values() for case in group)


def targets(models: Iterable[str] = BUILT_IN) -> tuple[BenchCase, ...]:
    """The cases that state how fast the package is, the most telling first; the full product is
    `Grid`.
    """
    shapes = [shape_of(name) for name in models]
    found: list[BenchCase] = []

    def add(kind: str, whats: Iterable[str], **fields: Any) -> None:
        for what in whats:
            for shape in shapes:
                both = PROJECTIONS if by_projection(kind, what) else ("",)
                base = BenchCase(kind=kind, what=what, shape=shape, projection=both[0])
                found.extend(replace(base, projection=name, **fields) for name in both)

    add("layer", ("step", "forward"))
    add("layer", ("step", "forward"), tokens=8192)
    products = ("forward", "input-grad", "weight-grad")
    add("projection", (*products, "step"))
    add("projection", products, tokens=8192)
    found += [
        BenchCase(kind="qlora-layer", what=what, shape=shape, tokens=tokens)
        for shape in shapes[:2]
        for tokens in (2048, 8192)
        for what in WHATS["qlora-layer"]
    ]
    add("dequant", WHATS["dequant"], tokens=1, rank=0)
    for tokens in (2048, 8192):
        for routing in ("zipf", "half"):
            add("layer", ("step",), tokens=tokens, routing=routing)
    add("projection", ("forward",), rank=64)
    for rank in (8, 32, 64, 128):
        found += [
            BenchCase(kind="layer", what="step", shape=shape, rank=rank) for shape in shapes[:1]
        ]
    for dtype in DTYPES[1:]:
        found += [
            BenchCase(kind="layer", what="step", shape=shape, dtype=dtype) for shape in shapes[:1]
        ]
    whats = [what for what in WHATS["kernel"] if what not in PROJECTION_KERNELS]
    found += [
        BenchCase(kind="kernel", what=what, shape=shape, rank=0)
        for shape in shapes[:1]
        for what in whats
    ]
    found += [
        BenchCase(
            kind="kernel",
            what=what,
            shape=shape,
            rank=16 if spec.ranked else 0,
            dtype=str(dtype_of(spec)).rpartition(".")[2],
        )
        for shape in shapes[:1]
        for what, spec in BY_ENTRY.items()
    ]
    return together(found)
