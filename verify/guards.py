"""Poisoned outputs and guard bands around every buffer.

While `Guards` is active, every tensor that torch allocates through the dispatcher (empty, zeros,
new_empty, ...) or copies is a view into a larger buffer: an empty interior starts as NaN (integers:
1), and bands on both sides hold a pattern that must still be there afterwards. The mode travels
with autograd into its backward threads.

`shelter` gives inputs the same bands, and reports afterwards whether anything in them changed.

Floating-point bands are NaN to whoever reads them, with a payload that arithmetic does not
produce; integer
bands hold 1, so that an index read past the end is wrong but never wild.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .inputs import Inputs

_BAND = 512
_NAN_BYTES = (0xA5, 0xFF)  # every float type reads 0xFFA5FFA5.. as NaN
_INTERIOR_INTEGER = 1

_aten = torch.ops.aten
_POISONED = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
_FILLED = {
    _aten.zeros.default,
    _aten.zeros_like.default,
    _aten.new_zeros.default,
    _aten.ones.default,
    _aten.ones_like.default,
    _aten.new_ones.default,
    _aten.full.default,
    _aten.full_like.default,
    _aten.new_full.default,
    _aten.clone.default,
    _aten._to_copy.default,
    _aten.searchsorted.Tensor,
}
"""What makes a tensor of its own: its result is copied into a guarded buffer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """One guarded tensor: its interior lies in buffer[before : before + size], bytes."""

    name: str
    buffer: Tensor
    before: int
    size: int
    pattern: Tensor

    def damage(self) -> str:
        """What was written outside the interior, or an empty string."""
        for side, start, stop in (
            ("before", 0, self.before),
            ("after", self.before + self.size, self.buffer.numel()),
        ):
            band = self.buffer[start:stop]
            wrong = band != self._expected(start, stop)
            if bool(wrong.any()):
                first = int(torch.nonzero(wrong)[0])
                distance = self.before - start - first if side == "before" else first
                return (
                    f"wrote {side} {self.name}, {distance} bytes outside ({int(wrong.sum())} bytes)"
                )
        return ""

    def _expected(self, start: int, stop: int) -> Tensor:
        period = self.pattern.numel()
        repeats = (stop - start) // period + 2
        return self.pattern.repeat(repeats)[start % period :][: stop - start]


def _pattern(dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype.is_floating_point:
        return torch.tensor(_NAN_BYTES, dtype=torch.uint8, device=device)
    one = torch.ones(1, dtype=dtype, device=device)
    return one.view(torch.uint8)


def _span(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last one of a strided tensor."""
    if any(extent == 0 for extent in size):
        return 0
    return 1 + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))


def _banded(
    name: str,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    lead: int = 0,
) -> tuple[Tensor, Region]:
    """A poisoned tensor between two bands; `lead` bytes move its start off the allocator's
    alignment.
    """
    width = _span(size, stride) * dtype.itemsize
    total = _BAND + lead + width + _BAND
    total += -total % 16
    pattern = _pattern(dtype, device)
    repeats = total // pattern.numel() + 1
    buffer = pattern.repeat(repeats)[:total].clone()
    before = _BAND + lead
    inside = buffer[before : before + width]
    inside.fill_(0xFF) if dtype.is_floating_point else inside.view(dtype).fill_(_INTERIOR_INTEGER)
    tensor = inside.view(dtype).as_strided(size, stride)
    return tensor, Region(name=name, buffer=buffer, before=before, size=width, pattern=pattern)


class Guards(TorchDispatchMode):
    """Context in which every allocation is poisoned and banded; `problems()` says what was hit."""

    def __init__(self) -> None:
        super().__init__()
        self._regions: list[Region] = []

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        poisoned, filled = func in _POISONED, func in _FILLED
        if not (poisoned or filled) or not _guardable(result):
            return result
        name = f"an output of shape {list(result.shape)} ({str(func).removeprefix('aten.')})"
        guarded, region = _banded(
            name, tuple(result.shape), result.stride(), result.dtype, result.device
        )
        if filled:
            guarded.copy_(result)
        self._regions.append(region)
        return guarded

    @property
    def regions(self) -> tuple[Region, ...]:
        """The buffers allocated so far."""
        return tuple(self._regions)

    def problems(self) -> tuple[str, ...]:
        """Writes outside the buffers allocated so far."""
        found = (region.damage() for region in self._regions)
        return tuple(text for text in found if text)


def _guardable(tensor: Any) -> bool:
    return (
        isinstance(tensor, Tensor)
        and type(tensor) is Tensor
        and tensor.numel() > 0
        and tensor.layout == torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not tensor.dtype.is_complex
        and tensor.dtype != torch.bool
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelter:
    """Inputs in guarded buffers, with copies of the bytes that must not change."""

    inputs: Inputs
    regions: tuple[Region, ...]
    copies: tuple[Tensor, ...]

    def problems(self) -> tuple[str, ...]:
        """Inputs or their surroundings that were written to."""
        found = []
        for region, copy in zip(self.regions, self.copies, strict=True):
            inside = slice(region.before, region.before + region.size)
            if not torch.equal(region.buffer[inside], copy):
                found.append(f"changed {region.name}")
            elif region.damage():
                found.append(region.damage())
        return tuple(found)


def shelter(inputs: Inputs) -> Shelter:
    """Copy every input into a guarded buffer with the same strides and alignment; gaps hold NaN."""
    tensors: dict[str, Tensor] = {}
    regions, copies = [], []
    for name, tensor in inputs.tensors.items():
        tensors[name] = tensor
        if not _guardable(tensor):
            continue
        lead = int(tensor.storage_offset()) * tensor.itemsize % _BAND
        guarded, region = _banded(
            f"input {name}", tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, lead
        )
        _filled_from(guarded, tensor)
        tensors[name] = guarded
        regions.append(region)
        copies.append(region.buffer[region.before : region.before + region.size].clone())
    return Shelter(inputs=inputs.having(**tensors), regions=tuple(regions), copies=tuple(copies))


def _filled_from(target: Tensor, source: Tensor) -> None:
    """Copy values; dimensions of stride 0 hold one value."""
    for dim, stride in enumerate(source.stride()):
        if stride == 0:
            target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    target.copy_(source)
