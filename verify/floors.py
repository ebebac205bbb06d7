"""The least time that a benchmark's work takes: FLOPs at the peak of products, or bytes at that of
copies.

Every operand counts once: weights and adapters of all experts, x of gate_up per token, everything
else per row; dx before the sum over the choices. A step is the sum of its products. Sorting,
activation and the sum over the choices are left out of a layer: they could be fused away.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .bench_cases import PROJECTIONS, BenchCase
from .entries import BY_ENTRY

NF4_BITS = 4 + 32 / 64
"""Bits per weight of NF4 in blocks of 64 with fp32 scales."""
NESTED_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""The same with 8-bit scales in blocks of 256."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What a GPU reaches: operations per second in large products, bytes per second in large
    copies.
    """

    flops: float
    bandwidth: float

    def milliseconds(self, work: "Work") -> float:
        """The floor of one kernel."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth) * 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Floating-point operations and bytes moved."""

    flops: float
    bytes: float


STATED: Mapping[str, Ceilings] = {
    "NVIDIA H100 80GB HBM3": Ceilings(flops=777e12, bandwidth=3.02e12),
}
"""16-bit ceilings of GPUs that were measured at length; others are measured when they are used."""


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The ceilings of a device for products of a dtype: stated, or measured now by a product and a
    copy.
    """
    if device.type != "cuda":
        return Ceilings(flops=1e11, bandwidth=1e10)
    stated = STATED.get(torch.cuda.get_device_name(device))
    if stated is not None and dtype.itemsize == 2:
        return stated
    bandwidth = stated.bandwidth if stated is not None else _copy_rate(device)
    return Ceilings(flops=_product_rate(device, dtype), bandwidth=bandwidth)


def _milliseconds(call: object, device: torch.device, count: int) -> float:
    assert callable(call)
    best = float("inf")
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize(device)
        best = min(best, start.elapsed_time(end) / count)
    return best


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if dtype.itemsize == 2 else 4096
    a = torch.randn(size, size, device=device).to(dtype)
    b, out = torch.randn_like(a), torch.empty_like(a)
    return 2.0 * size**3 / _milliseconds(lambda: torch.mm(a, b, out=out), device, 10) * 1e3


def _copy_rate(device: torch.device) -> float:
    source = torch.zeros(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * 2**30 / _milliseconds(lambda: target.copy_(source), device, 10) * 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Linear:
    """Work of one projection of a case. bits: per stored weight."""

    case: BenchCase
    projection: str
    bits: float

    def _work(self, flops: float, elements: float, weights: float = 0.0) -> Work:
        moved = elements * self.case.torch_dtype.itemsize + weights * self.bits / 8
        return Work(flops=flops, bytes=moved)

    def products(self) -> dict[str, Work]:
        """The work of each product by name."""
        case = self.case
        experts, rows, rank = case.shape.experts, case.rows, case.rank
        k, n = case.shape.widths(self.projection)
        x = (case.tokens if self.projection == "gate_up" else rows) * k
        factors, low = experts * rank * (k + n), rows * rank
        flops = 2.0 * rows * (k * n + rank * (k + n))
        stack = experts * k * n
        return {
            "base": self._work(2.0 * rows * k * n, x + rows * n, stack),
            "shrink": self._work(2.0 * rows * k * rank, x + experts * rank * k + low),
            "forward": self._work(flops, x + factors + rows * n, stack),
            "input-grad": self._work(flops, rows * n + factors + rows * k, stack),
            "weight-grad": self._work(
                2.0 * rows * rank * (k + n), x + rows * n + 2 * low + factors
            ),
        }


_STEP = ("forward", "input-grad", "weight-grad")


def work_of(case: BenchCase) -> tuple[Work, ...]:
    """The kernels that a benchmark cannot do without; its floor is the sum of theirs."""
    if case.by_entry:
        flops, moved = BY_ENTRY[case.what].cost(case.case, case.torch_dtype)
        return (Work(flops=flops, bytes=moved),)
    bits = NF4_BITS if case.kind == "qlora-layer" else 8.0 * case.torch_dtype.itemsize
    if case.projection and case.kind != "dequant":
        products = _Linear(case=case, projection=case.projection, bits=bits).products()
        return tuple(products[name] for name in (_STEP if case.what == "step" else (case.what,)))
    if case.kind in ("layer", "qlora-layer"):
        wanted = ("forward",) if case.what == "forward" else _STEP
        return tuple(
            _Linear(case=case, projection=name, bits=bits).products()[what]
            for name in PROJECTIONS
            for what in wanted
        )
    return (_pass(case),)


def _pass(case: BenchCase) -> Work:
    """The work of what only moves memory."""
    shape, size = case.shape, case.torch_dtype.itemsize
    rows, hidden, wide = case.rows, shape.hidden, shape.intermediate
    if case.kind == "dequant":
        k, n = shape.widths(case.projection)
        bits = NF4_BITS if case.what == "nf4" else NESTED_BITS
        return Work(flops=0.0, bytes=shape.experts * k * n * (size + bits / 8))
    moved = {
        "sort": rows * (8 + 8 + 4) + 4 * shape.experts,
        "group": (case.tokens + rows) * hidden * size + 8 * rows,
        "combine": (case.tokens + rows) * hidden * size + 4 * rows,
        "glu": 3 * rows * wide * size,
        "glu-grad": 6 * rows * wide * size + 8 * rows,
    }
    return Work(flops=0.0, bytes=float(moved[case.what]))


def floor_ms(case: BenchCase, peak: Ceilings) -> float:
    """The sum over the kernels of a benchmark of the least time each of them takes."""
    return sum(peak.milliseconds(work) for work in work_of(case))
