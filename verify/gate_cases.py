"""The benchmarks of the gate: few enough for minutes, and one of every regime."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from .bench_cases import PROJECTIONS, SHAPES, BenchCase, Shape, together

MOST = 60
"""More benchmarks than this do not end within eight minutes."""

PRODUCTS = ("forward", "input-grad", "weight-grad")
QWEN, QWEN35, OLMOE, MIXTRAL = (
    SHAPES[name] for name in ("qwen3-30b", "qwen3.5-35b", "olmoe", "mixtral")
)

WITNESSES = (
    "projection.forward.qwen3-30b.gate_up.t2048.r16.balanced",
    "projection.forward.mixtral.gate_up.t2048.r16.balanced",
)
"""Benchmarks beside which the peer whose figure is known is timed too, once: a peer that is slower
than its figure says that the GPU does not run as it should.
"""


def suite() -> tuple[BenchCase, ...]:
    """The named benchmarks of the gate on a GPU; cases on the same tensors are neighbours."""
    return together((*_kernels(), *_projections(), *_layers(), *_stored()))


def tiny_suite() -> tuple[BenchCase, ...]:
    """A small stand-in for a machine without a GPU."""
    tiny = SHAPES["tiny"]
    facts: Mapping[str, Any] = {"shape": tiny, "tokens": 24, "rank": 8}
    return together(
        (
            BenchCase(kind="kernel", what="sort", shape=tiny, tokens=24, rank=0),
            BenchCase(kind="projection", what="forward", projection="gate_up", **facts),
            BenchCase(kind="layer", what="step", **facts),
            BenchCase(
                kind="dequant",
                what="nf4",
                shape=tiny,
                projection="down",
                tokens=1,
                rank=0,
                dtype="float32",
            ),
        )
    )


def _cases(
    kind: str, whats: Iterable[str], shape: Shape, projection: str = "", **fields: Any
) -> Iterator[BenchCase]:
    for what in whats:
        yield BenchCase(kind=kind, what=what, shape=shape, projection=projection, **fields)


def _kernels() -> Iterator[BenchCase]:
    small = ("sort", "group", "combine", "glu", "glu-grad")
    yield from _cases("kernel", small, QWEN, rank=0)
    yield from _cases("kernel", ("sort", "combine"), QWEN, rank=0, tokens=8192)
    yield from _cases("kernel", ("sort",), QWEN35, rank=0, routing="half")
    yield from _cases("kernel", ("base",), QWEN, "gate_up", rank=0)
    yield from _cases("kernel", ("base",), MIXTRAL, "gate_up", rank=0)
    yield from _cases("kernel", ("shrink",), QWEN, "gate_up")


def _projections() -> Iterator[BenchCase]:
    for projection in PROJECTIONS:
        yield from _cases("projection", PRODUCTS, QWEN, projection)
    yield from _cases("projection", PRODUCTS, QWEN35, "down")
    yield from _cases("projection", PRODUCTS, OLMOE, "gate_up")
    yield from _cases("projection", PRODUCTS, MIXTRAL, "gate_up")
    yield from _cases("projection", PRODUCTS[:2], MIXTRAL, "down")
    yield from _cases("projection", PRODUCTS, QWEN, "gate_up", tokens=8192)
    yield from _cases("projection", PRODUCTS, QWEN, "gate_up", tokens=128)
    yield from _cases("projection", PRODUCTS, QWEN, "gate_up", routing="half")
    yield from _cases("projection", PRODUCTS[:1], QWEN, "gate_up", routing="zipf")
    yield from _cases("projection", PRODUCTS[:1], QWEN, "gate_up", rank=32)
    yield from _cases("projection", PRODUCTS, QWEN, "gate_up", rank=64)
    yield from _cases("projection", PRODUCTS[:1], QWEN, "gate_up", dtype="float16")
    yield from _cases("projection", PRODUCTS[:1], OLMOE, "gate_up", dtype="float32")
    yield from _cases("projection", ("step",), OLMOE, "down")


def _layers() -> Iterator[BenchCase]:
    step = BenchCase(kind="layer", what="step", shape=QWEN)
    yield step
    yield replace(step, what="forward")
    yield from (replace(step, shape=shape) for shape in (QWEN35, OLMOE, MIXTRAL))
    yield replace(step, tokens=8192)
    yield replace(step, tokens=128)
    yield replace(step, routing="half")
    yield replace(step, routing="zipf", tokens=8192)
    yield replace(step, rank=64)


def _stored() -> Iterator[BenchCase]:
    yield from _cases("qlora-layer", ("full", "selective", "chunked"), QWEN)
    yield from _cases("dequant", ("nf4", "nf4-nested"), QWEN, "gate_up", tokens=1, rank=0)
