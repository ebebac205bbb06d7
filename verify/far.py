"""Checks with operands whose elements lie more than 2^31 elements apart.

A 32-bit offset misses them. The storage of the operands of one type is shared: they lie side by
side, and the dimension that is stretched, one at a time, takes each of them through all of it. On a
CPU it is address space of which only the touched pages exist, on a GPU memory, 4 GiB for 16 bits.
There are no guards.
"""

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .cases import Case
from .compare import compare
from .expected import Expected
from .inputs import Inputs
from .models import Arithmetic
from .spec import KernelSpec

_SPAN = 2**31 + 2**20
_LINE = 16
"""Operands start and are stretched at multiples of so many elements, as allocations are."""
FAR_DIMS = (-1, -2, -3)
_CPU = torch.device("cpu")
_GAP = 3
_EMPTY = (torch.ops.aten.new_empty.default, torch.ops.aten.empty.memory_format)
_KEPT = ("top_k_index",)


def far_cases(spec: KernelSpec) -> tuple[Case, ...]:
    """Small cases of a spec that stretch well: rows by token, and where it takes them by expert."""
    narrow = next((case for case in spec.cases if case.name == "narrow"), None)
    if narrow is None:
        return ()
    gated = narrow.gated or spec.source.startswith("ops/")
    first = replace(narrow, bias=True, gated=gated, name="far")
    if not any(case.source == "EXPERT" for case in spec.cases):
        return (first,)
    return first, replace(first, source="EXPERT", target="SLOT", name="far-by-expert")


def stretched(inputs: Inputs, dim: int) -> Inputs:
    """The same values, dimension `dim` of each operand spread over 2^31 elements."""
    moved = {
        name: value
        for name, value in inputs.tensors.items()
        if name not in _KEPT and _stretches(value, dim)
    }
    for dtype in {value.dtype for value in moved.values()}:
        own = [name for name, value in moved.items() if value.dtype == dtype]
        views = _far([moved[name] for name in own], dim)
        for name, view in zip(own, views, strict=True):
            moved[name] = view.copy_(moved[name])
    return replace(inputs, tensors={**inputs.tensors, **moved})


class FarOutputs(TorchDispatchMode):
    """Context in which what is allocated empty has its experts (dim -3) or its rows (dim -2) up to
    2^31 elements apart, or gaps between its columns (dim -1).

    narrow: width of outputs that are one number per slot, which kernels address without strides.
    """

    def __init__(self, dim: int, narrow: int) -> None:
        super().__init__()
        self._dim = dim
        self._narrow = narrow

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _EMPTY or not result.is_floating_point() or result.ndim < 2:
            return result
        if result.shape[-1] == self._narrow:
            return result
        if self._dim == -1:
            return result.new_empty((*result.shape, _GAP)).select(-1, 0)
        if result.ndim > 3 or not _stretches(result, self._dim):
            return result
        return _far([result], self._dim)[0].fill_(torch.nan)


def _stretches(value: Tensor, dim: int) -> bool:
    return value.ndim >= -dim and value.shape[dim] > 1 and value.numel() > 0


def _far(values: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Tensors like these of one dtype, not filled, whose dimension `dim` is spread.

    The last elements of any two lie equally far from their first but for what strides are rounded,
    less than _LINE times the extent: so far apart they start.
    """
    gap = _LINE * max(value.shape[dim] for value in values)
    starts = list(accumulate((value.numel() + gap) // _LINE * _LINE + gap for value in values))
    flat = space(_SPAN + starts[-1], values[0].dtype, values[0].device)
    views = []
    for value, start in zip(values, (0, *starts), strict=False):
        stride = list(torch.empty(value.shape, device="meta").stride())
        stride[dim] = -(-_SPAN // (value.shape[dim] - 1)) // _LINE * _LINE
        views.append(flat.as_strided(value.shape, stride, start))
    return views


def space(elements: int, dtype: torch.dtype, device: torch.device = _CPU) -> Tensor:
    """Room for so many elements: memory of a GPU, on a CPU zeros that take none until touched."""
    if device.type != "cpu":
        return torch.empty(elements, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype)


class FarBench:
    """Runs specs on stretched operands; inputs and references are made once, and on a CPU, where
    they cost nothing, the stretched operands too.

    prepare: (lib, spec, inputs) -> what the spec finds in `inputs.prepared`.
    """

    def __init__(
        self, prepare: Callable[[ModuleType, KernelSpec, Inputs], Any], device: torch.device = _CPU
    ) -> None:
        self.prepare = prepare
        self._device = device
        self._known: dict[str, tuple[Far, ...]] = {}

    def ratios(
        self, lib: ModuleType, spec: KernelSpec, paths: tuple[str, ...]
    ) -> Iterator[tuple[str, str, float]]:
        """(path, case and stretched dimension, worst error over its limit) of every quick plan."""
        if spec.name not in self._known:
            self._known[spec.name] = tuple(
                _far_of(spec, case, self._device) for case in far_cases(spec)
            )
        for known in self._known[spec.name]:
            prepared = self.prepare(lib, spec, known.inputs)
            for dim in FAR_DIMS:
                inputs = replace(known.apart(dim), prepared=prepared)
                name = f"{known.inputs.case.name}, dimension {dim}"
                for plan in spec.plans(lib, inputs):
                    if plan.quick and not plan.unavailable and (not paths or plan.path in paths):
                        with FarOutputs(dim, inputs.case.top_k):
                            outputs = spec.run(lib, inputs, plan.plan)
                        yield plan.path, name, _worst(outputs, known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Far:
    """Inputs of a spec, what it should make of them, and the inputs stretched in a dimension."""

    inputs: Inputs
    expected: Mapping[str, Expected]
    apart: Callable[[int], Inputs]


def _far_of(spec: KernelSpec, case: Case, device: torch.device) -> Far:
    mode = "exact" if "exact" in spec.modes else "balanced"
    inputs = spec.inputs(case, torch.float16, mode, device)
    with torch.enable_grad():
        expected = spec.reference(inputs, Arithmetic())
    apart: Callable[[int], Inputs] = partial(stretched, inputs)
    if device.type == "cpu":
        apart = cache(apart)
    return Far(inputs=inputs, expected=expected, apart=apart)


def _worst(outputs: Mapping[str, Tensor], known: Far) -> float:
    exact = known.inputs.mode == "exact"
    found = [
        compare(name, outputs[name], known.expected[name], exact=exact) for name in known.expected
    ]
    return max(item.ratio for item in found)
