"""The machine that pytest's benchmarks are measured on.

Importing this module does not import Triton, so that GPU or interpreter can be chosen first.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .bench_cases import BenchCase
from .benchmark_plugin import Measured
from .environment import environment
from .gate import Gate, Result
from .gate_process import Trees, digest, tree_of
from .timing import clock_of

if TYPE_CHECKING:
    from .bench import Entry, Failure

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGE = "scattermoe_lora"


class ThisMachine:
    """This process's device; its GPU is first touched when something is measured."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._next: BenchCase | None = None
        self._entries: Iterator[Entry | Failure] | None = None

    @property
    def gpu(self) -> str:
        """Its name, empty where there is none."""
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else ""

    def facts(self) -> Mapping[str, Any]:
        """Versions that are stored with the name of the GPU."""
        known = environment(self._device)
        return {key: known.get(key) for key in ("torch", "triton", "cuda", "driver")}

    def sources(self) -> Path:
        """The directory of today's package."""
        return Path(importlib.import_module(_PACKAGE).__path__[0])

    def tree(self, against: str, destination: Path) -> Path:
        """The package as of a revision or in a directory, below another.

        Raises:
            ValueError: there is no such revision.
        """
        return tree_of(against, _ROOT, destination, package=_PACKAGE)

    def measure(self, case: BenchCase) -> Measured:
        """Measure today's sources; neighbours on the same tensors share them."""
        from .bench import Bench, Failure

        if self._entries is None:
            bench = Bench(
                lib=importlib.import_module(_PACKAGE),
                device=self._device,
                clock=clock_of(self._device),
                peers=(),
                graphs=False,
            )
            self._entries = bench.ready(("bfloat16", "float16", "float32")).run(self._feed())
        self._next = case
        entry = next(self._entries)
        if isinstance(entry, Failure):
            return Measured(problem=f"{entry.status}: {entry.reason}")
        return Measured(samples=entry.samples, info=info_of(entry))

    def _feed(self) -> Iterator[BenchCase]:
        while self._next is not None:
            yield self._next

    def compare(
        self,
        base: Path,
        cases: Sequence[BenchCase],
        *,
        seconds: float,
        say: Callable[[str], None],
    ) -> tuple[Sequence[Result], Sequence[str]]:
        """Decide every case against the package in `base`; also what makes that invalid."""
        from .bench_ahead import compile_ahead
        from .gate_records import history_of

        self._entries = self._next = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        head = tree_of(str(self.sources()), _ROOT, base.parent.parent / "head", package=_PACKAGE)
        trees = Trees(base=base, head=head, device=str(self._device))
        history = history_of(Path(__file__).resolve().parent / "records", self._device)
        gate = Gate(cases=cases, visit=trees.visit, history=history, seconds=seconds)
        if self._device.type == "cuda" and digest(base) != digest(head):
            # Today's kernels are compiled: they were measured.
            for name, _, error in compile_ahead(cases, self._device, tree=base):
                if error:
                    say(f"ahead: {name}: {error}")
        process = -1
        for visit in gate.run():
            if visit.process != process:
                process = visit.process
                say(f"gate: process {process + 1}")
        return gate.results(), gate.invalid()


def info_of(entry: "Entry") -> dict[str, Any]:
    """What is stored beside the samples of a benchmark."""
    detail = entry.detail
    return {
        "name": entry.case.name,
        "tflops": detail["tflops"],
        "gb_per_s": detail["gb_per_s"],
        "of_floor": detail["of_floor"],
        "floor_ms": entry.floor_ms,
        "path": entry.path,
        "plan": detail["plans"],
        "peak_bytes": entry.peak_bytes,
        "launches": entry.launches,
        "host_ms": detail["host_ms"],
        "wall_ms": entry.wall_ms,
        "first_call_s": entry.first_call_s,
    }
