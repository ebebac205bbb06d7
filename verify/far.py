"""Checks with operands whose elements lie more than 2^31 elements apart.

A 32-bit offset misses them. The storage is address space of which only the touched pages exist, so
this runs on a CPU with little memory, and without guards. One dimension at a time is stretched, of
every operand that has it.
"""

import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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
FAR_DIMS = (-1, -2, -3)
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
    tensors = {
        name: value if name in _KEPT or value.ndim < -dim else _far(value, dim)
        for name, value in inputs.tensors.items()
    }
    return replace(inputs, tensors=tensors)


class FarOutputs(TorchDispatchMode):
    """Context in which what is allocated empty has its rows up to 2^31 elements apart (dim -2), or
    gaps between its columns (dim -1).

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
        if result.shape[-1] == self._narrow or (self._dim == -2 and result.ndim > 2):
            return result
        if self._dim == -2:
            return _far(result, -2, copied=False)
        return result.new_empty((*result.shape, _GAP)).select(-1, 0) if self._dim == -1 else result


def _far(value: Tensor, dim: int, *, copied: bool = True) -> Tensor:
    extent = value.shape[dim]
    if extent < 2 or value.numel() == 0:
        return value
    stride = list(torch.empty(value.shape, device="meta").stride())
    stride[dim] = -(-_SPAN // (extent - 1)) // 16 * 16
    span = 1 + sum((size - 1) * step for size, step in zip(value.shape, stride, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, span * value.itemsize, flags=flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(value.dtype)
    view = flat.as_strided(value.shape, stride)
    return view.copy_(value) if copied else view


class FarBench:
    """Runs specs on stretched operands; inputs and references are made once.

    prepare: (lib, spec, inputs) -> what the spec finds in `inputs.prepared`.
    """

    def __init__(self, prepare: Callable[[ModuleType, KernelSpec, Inputs], Any]) -> None:
        self.prepare = prepare
        self._known: dict[str, tuple[Far, ...]] = {}

    def ratios(
        self, lib: ModuleType, spec: KernelSpec, paths: tuple[str, ...]
    ) -> Iterator[tuple[str, str, float]]:
        """(path, case and stretched dimension, worst error over its limit) of every quick plan."""
        if spec.name not in self._known:
            self._known[spec.name] = tuple(_far_of(spec, case) for case in far_cases(spec))
        for known in self._known[spec.name]:
            prepared = self.prepare(lib, spec, known.inputs)
            for dim, apart in known.apart.items():
                inputs = replace(apart, prepared=prepared)
                name = f"{known.inputs.case.name}, dimension {dim}"
                for plan in spec.plans(lib, inputs):
                    if plan.quick and not plan.unavailable and (not paths or plan.path in paths):
                        with FarOutputs(dim, inputs.case.top_k):
                            outputs = spec.run(lib, inputs, plan.plan)
                        yield plan.path, name, _worst(outputs, known)


@dataclass(frozen=True, slots=True, kw_only=True)
class Far:
    """Inputs of a spec, what it should make of them, and the inputs stretched in each dimension."""

    inputs: Inputs
    expected: Mapping[str, Expected]
    apart: Mapping[int, Inputs]


def _far_of(spec: KernelSpec, case: Case) -> Far:
    mode = "exact" if "exact" in spec.modes else "balanced"
    inputs = spec.inputs(case, torch.float16, mode, torch.device("cpu"))
    with torch.enable_grad():
        expected = spec.reference(inputs, Arithmetic())
    apart = {dim: stretched(inputs, dim) for dim in FAR_DIMS}
    return Far(inputs=inputs, expected=expected, apart=apart)


def _worst(outputs: Mapping[str, Tensor], known: Far) -> float:
    exact = known.inputs.mode == "exact"
    found = [
        compare(name, outputs[name], known.expected[name], exact=exact) for name in known.expected
    ]
    return max(item.ratio for item in found)
