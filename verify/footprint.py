"""Launches and allocated bytes of every benchmark case, counted on a machine without a GPU.

The package's own calls are made at the full sizes of the models, for a stated architecture.
Operands are storage in the address space alone: launches of kernels are counted and run nothing,
what torch is asked for is counted and done. So the numbers are exact, and the same each time.
"""

import importlib
import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .ahead import Architecture, redirected
from .bench_arms import arm_of
from .bench_cases import PROJECTIONS, SHAPES, BenchCase, targets
from .bench_inputs import OUTER_BLOCK, Drawn, draw, problem_of
from .compile_check import BASELINES
from .stated import stated

ALLOCATED = 512
"""CUDA's caching allocator hands out multiples of so many bytes."""
_MODULES = ("layers", "quant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a call asks of the device. launches: times by kernel of the package or operation of
    torch, views and allocations left out. allocations: new storages; allocated_bytes: their sum;
    peak_bytes: the most that was alive at once, above what was there before, as the allocator
    rounds.
    """

    launches: Mapping[str, int]
    allocations: int
    allocated_bytes: int
    peak_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Plain values for a record or a baseline."""
        return {**asdict(self), "launches": dict(sorted(self.launches.items()))}


@dataclass(slots=True)
class _Counted:
    """What was seen so far; alive: bytes by storage."""

    launches: Counter[str] = field(default_factory=Counter)
    allocations: int = 0
    allocated: int = 0
    peak: int = 0
    alive: dict[int, int] = field(default_factory=dict)

    def allocate(self, storage: torch.UntypedStorage) -> None:
        size = -(-storage.nbytes() // ALLOCATED) * ALLOCATED
        key = storage._cdata
        self.alive[key] = size
        weakref.finalize(storage, self.alive.pop, key, 0)
        self.allocations += 1
        self.allocated += size
        self.peak = max(self.peak, sum(self.alive.values()))

    def footprint(self) -> Footprint:
        return Footprint(
            launches=dict(self.launches),
            allocations=self.allocations,
            allocated_bytes=self.allocated,
            peak_bytes=self.peak,
        )


class _Watch(TorchDispatchMode):
    """Counts storages and operations of torch, but for those that hold nothing (meta).

    Integers that nobody computes decide sizes where only the experts in use are decoded: a new
    int32 tensor holds 0, 1, 2, ..., which as offsets mean one row for each expert.
    """

    def __init__(self, counted: _Counted) -> None:
        super().__init__()
        self._counted = counted

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        given = {_key(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        if made and all(value.is_meta for value in made):
            return result
        fresh = {_key(value): value for value in made if _key(value) not in given}
        for value in fresh.values():
            self._counted.allocate(value.untyped_storage())
        if func.overloadpacket.__name__ in ("empty", "new_empty", "empty_strided"):
            for value in fresh.values():
                if value.dtype == torch.int32:
                    torch.arange(value.numel(), dtype=value.dtype, out=value.view(-1))
        elif fresh or not made or func._schema.is_mutable:
            self._counted.launches[str(func.overloadpacket)] += 1
        return result


def _key(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def footprint_of(lib: ModuleType, case: BenchCase, architecture: Architecture) -> Footprint:
    """The footprint of a benchmark case on an architecture."""
    return counted(lib, architecture, lambda: arm_of(lib, case, operands(case)).call)


def counted(
    lib: ModuleType, architecture: Architecture, prepared: Callable[[], Callable[[], object]]
) -> Footprint:
    """The footprint of the call that `prepared` returns; what preparing it takes is not counted."""
    for name in _MODULES:
        importlib.import_module(f"{lib.__name__}.{name}")
    found = _Counted()

    def launched(kernel: Any, grid: Any, args: Any, options: Any) -> None:
        del grid, args, options
        found.launches[kernel.__name__] += 1

    with stated(lib, architecture), redirected(lib, launched):
        call = prepared()
        found.launches.clear()
        with _Watch(found):
            kept = call()
            del kept
    return found.footprint()


def operands(case: BenchCase) -> Drawn:
    """The tensors of `bench_inputs.draw` in names, shapes, strides and dtypes, of storage that is
    never touched; those of a kernel that is timed by its entry are drawn.
    """
    case = case.inputs_key
    if case.by_entry:
        return draw(case, torch.device("cpu"))
    shape, dtype = case.shape, case.torch_dtype

    def rows(count: int, width: int) -> Tensor:
        return torch.empty(count, width, dtype=dtype)

    def projection(name: str) -> dict[str, Tensor]:
        k, n = shape.widths(name)
        tensors = {"weight": torch.empty(shape.experts, n, k, dtype=dtype).mT}
        if case.rank:
            tensors["lora_a"] = torch.empty(shape.experts, case.rank, k, dtype=dtype)
            tensors["lora_b"] = torch.empty(shape.experts, n, case.rank, dtype=dtype)
        return tensors

    if case.kind == "dequant":
        return Drawn(
            case=case, tensors={}, stored={case.projection: _packed(case, case.projection)}
        )
    tensors = {"top_k_index": torch.empty(case.tokens, shape.top_k, dtype=torch.int64)}
    if case.projection:
        k, n = shape.widths(case.projection)
        tensors |= projection(case.projection)
        tensors["x"] = rows(case.tokens if case.projection == "gate_up" else case.rows, k)
        tensors["dy"] = rows(case.rows, n)
        return Drawn(case=case, tensors=tensors)
    tensors["x"] = rows(case.tokens, shape.hidden)
    tensors["dout"] = rows(case.tokens, shape.hidden)
    tensors["gates"] = rows(case.tokens, shape.top_k)
    if case.kind == "kernel":
        tensors["h"] = rows(case.rows, 2 * shape.intermediate)
        tensors["dact"] = rows(case.rows, shape.intermediate)
        tensors["y"] = rows(case.rows, shape.hidden)
        return Drawn(case=case, tensors=tensors)
    for name in PROJECTIONS:
        tensors |= {f"{key}_{name}": value for key, value in projection(name).items()}
    stored = {}
    if case.kind == "qlora-layer":
        stored = {name: _packed(case, name) for name in PROJECTIONS}
    return Drawn(case=case, tensors=tensors, stored=stored)


def _packed(case: BenchCase, projection: str) -> dict[str, Tensor]:
    problem = problem_of(case, projection)
    codebook = torch.empty(16)
    packed = torch.empty(-(-problem.elements // 2), dtype=torch.uint8)
    if not problem.outer_blocksize:
        return {"packed": packed, "absmax": torch.empty(problem.blocks), "codebook": codebook}
    return {
        "packed": packed,
        "absmax": torch.empty(problem.blocks, dtype=torch.uint8),
        "codebook": codebook,
        "outer_code": torch.empty(256),
        "outer_absmax": torch.empty(-(-problem.blocks // OUTER_BLOCK)),
        "outer_offset": torch.empty(1),
    }


def cases() -> tuple[BenchCase, ...]:
    """The benchmarks to count; those that differ in their routing alone are one. Tensors of kernels
    that are timed by their entry are drawn, hence small.
    """
    found = [replace(case, routing="balanced") for case in targets()]
    small = [
        replace(case, shape=SHAPES["tiny"], tokens=24) if case.by_entry else case for case in found
    ]
    return tuple(dict.fromkeys(small))


def key_of(architecture: Architecture, case: BenchCase) -> str:
    """A case on an architecture, as a baseline names it."""
    return f"{architecture.name} {case.name}"


def grouped(found: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Footprints by key as a baseline keeps them: by case, architectures of equal ones together."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for key, values in sorted(found.items()):
        architecture, _, case = key.partition(" ")
        for entry in cases.setdefault(case, []):
            if {name: entry[name] for name in values} == dict(values):
                entry["architectures"].append(architecture)
                break
        else:
            cases[case].append({"architectures": [architecture], **values})
    return dict(sorted(cases.items()))


def ungrouped(cases: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What `grouped` was made of."""
    return {
        f"{architecture} {case}": {k: v for k, v in entry.items() if k != "architectures"}
        for case, entries in cases.items()
        for entry in entries
        for architecture in entry["architectures"]
    }


def differences(key: str, found: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """How a footprint differs from the baseline, a sentence each."""
    new, old = found["launches"], base["launches"]
    sentences = [
        f"{key}: {name} is launched {new.get(name, 0)} times, {old.get(name, 0)} in the baseline"
        for name in sorted({*new, *old})
        if new.get(name, 0) != old.get(name, 0)
    ]
    for name, words in (
        ("allocations", "tensors are allocated"),
        ("allocated_bytes", "bytes are allocated in all"),
        ("peak_bytes", "bytes are alive at the peak"),
    ):
        if found[name] != base[name]:
            sentences.append(f"{key}: {found[name]} {words}, {base[name]} in the baseline")
    return sentences


def baseline_path() -> Path:
    """The committed baseline."""
    return BASELINES / "footprint.json"


def read_baseline(path: Path) -> dict[str, dict[str, Any]]:
    """Footprints by key; empty if there is none."""
    return ungrouped(json.loads(path.read_text())["cases"]) if path.is_file() else {}


def baseline_of(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a baseline file holds."""
    return {"torch": torch.__version__.partition("+")[0], "cases": grouped(found)}
