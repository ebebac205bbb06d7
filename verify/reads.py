"""Reads outside of tensors, seen in Triton's interpreter.

A value read past the end of a tensor and then masked changes no result, but on a GPU it may be a
fault. While `Reads` is active, every address that an interpreted kernel loads from or stores to,
and that its mask lets through, is looked up among the guard bands. Where Triton compiles,
compute-sanitizer does this.
"""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np

from .guards import Guards, Region


class Reads:
    """Context in which accesses to the bands of guarded tensors are noted."""

    def __init__(self, guards: Iterable[Guards], regions: Iterable[Region]) -> None:
        self._guards = tuple(guards)
        self._fixed = tuple(regions)
        self._found: dict[str, int] = {}
        self._known = -1
        self._edges = np.empty(0, dtype=np.uint64)
        self._names: list[str] = []
        self._module: Any = None
        self._memory: Any = None

    def __enter__(self) -> Self:
        # Imported here: whether Triton interprets is settled when it is first imported.
        from triton.runtime import interpreter

        self._module, self._memory = interpreter, interpreter._interpreter
        self._module._interpreter = _Watched(self._memory, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._module._interpreter = self._memory

    def problems(self) -> tuple[str, ...]:
        """Accesses outside the tensors, in words."""
        return tuple(
            f"accessed memory outside {name} ({count} elements)"
            for name, count in self._found.items()
        )

    def _note(self, addresses: np.ndarray, mask: np.ndarray) -> None:
        self._refresh()
        if not self._names:
            return
        shown = np.broadcast_to(mask, addresses.shape)
        touched = addresses[shown].astype(np.uint64)
        # Bands do not overlap: an odd position among their sorted edges is inside of one.
        places = np.searchsorted(self._edges, touched, side="right")
        for place in places[places % 2 == 1]:
            name = self._names[place // 2]
            self._found[name] = self._found.get(name, 0) + 1

    def _refresh(self) -> None:
        regions = [*self._fixed, *(region for guards in self._guards for region in guards.regions)]
        if len(regions) == self._known:
            return
        self._known = len(regions)
        bands = []
        for region in regions:
            start, length = region.buffer.data_ptr(), region.buffer.numel()
            stop = region.before + region.size
            bands.append((start, start + region.before, region.name))
            bands.append((start + stop, start + length, region.name))
        bands.sort(key=lambda band: band[0])
        self._names = [name for _, _, name in bands]
        self._edges = np.array([edge for a, b, _ in bands for edge in (a, b)], dtype=np.uint64)


class _Watched:
    """The interpreter's memory, with every access noted first."""

    def __init__(self, memory: Any, note: Any) -> None:
        self._memory = memory
        self._note = note

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def load(self, addresses: np.ndarray, mask: np.ndarray, *rest: Any) -> Any:
        self._note(addresses, mask)
        return self._memory.load(addresses, mask, *rest)

    def store(self, addresses: np.ndarray, value: np.ndarray, mask: np.ndarray) -> Any:
        self._note(addresses, mask)
        return self._memory.store(addresses, value, mask)
