"""Times benchmarks whose results are right, beside the peers, and keeps what was found as a
record.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch

from . import bench_plans, peer_figures
from .bench_arms import Arm, arm_of, budget_of, decoding_of
from .bench_cases import BenchCase, multiplied_as, stored_as
from .bench_check import Judge
from .bench_inputs import Drawn, draw
from .floors import Ceilings, ceilings, floor_ms, work_of
from .peers import PEERS, arms_beside
from .timing import Clock, Effort, Timing, launches, measure, peak_bytes, replay_of, wall_ms

OURS, BASE = "ours", "base product alone"
NORMAL = Effort()


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerResult:
    """A peer's median on the same tensors, interleaved, and its peak above them."""

    ms: float
    peak_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One benchmark, measured. Times in milliseconds unless named otherwise, sizes in bytes.

    detail: what explains the numbers: plans, quartiles, rates, share of the floor, host time,
    controls. samples: what `ms` is the median of; records do not keep them.
    """

    case: BenchCase
    path: str
    ms: float
    floor_ms: float
    wall_ms: float
    first_call_s: float
    peak_bytes: int | None
    launches: int | None
    peers: Mapping[str, PeerResult] = field(default_factory=dict)
    detail: Mapping[str, Any] = field(default_factory=dict)
    samples: tuple[float, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values for a record; of a decoding, its rate as a share of a copy's too."""
        case = self.case
        decoded = case.kind == "dequant"
        return {
            "name": case.name,
            "kind": case.kind,
            "model": case.shape.name,
            "T": case.tokens,
            "R": case.rank,
            "routing": case.routing,
            "path": self.path,
            "ms": self.ms,
            "floor_ms": self.floor_ms,
            "wall_ms": self.wall_ms,
            "first_call_s": self.first_call_s,
            "peak_bytes": self.peak_bytes,
            "launches": self.launches,
            "peers": {
                name: {"ms": peer.ms, "peak_bytes": peer.peak_bytes}
                for name, peer in self.peers.items()
            },
            **({"copy_share": round(self.floor_ms / self.ms, 4)} if decoded else {}),
            "detail": dict(self.detail),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A benchmark that has no numbers, because its results are wrong or could not be made."""

    case: BenchCase
    status: str
    reason: str

    def as_json(self) -> dict[str, Any]:
        """Plain values for a record."""
        return {"name": self.case.name, "status": self.status, "reason": self.reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """How benchmarks are run. peers: which to measure beside. graphs: replay steps of layers as
    CUDA graphs.
    """

    lib: ModuleType
    device: torch.device
    clock: Clock
    effort: Effort = NORMAL
    peers: tuple[str, ...] = tuple(PEERS)
    graphs: bool = True
    seed: int = 0
    peaks: Mapping[str, Ceilings] = field(default_factory=dict)

    def ready(self, dtypes: Iterable[str]) -> "Bench":
        """With the ceilings of the device for these dtypes."""
        peaks = {}
        for name in set(dtypes):
            with multiplied_as(name):
                peaks[name] = ceilings(self.device, stored_as(name))
        return replace(self, peaks={**self.peaks, **peaks})

    def run(self, cases: Iterable[BenchCase]) -> Iterator[Entry | Failure]:
        """Measure cases in order; the tensors of neighbours with equal inputs are drawn once."""
        drawn: Drawn | None = None
        for case in cases:
            try:
                if drawn is None or drawn.case != case.inputs_key:
                    drawn = None
                    drawn = draw(case, self.device, seed=self.seed)
                with multiplied_as(case.dtype):
                    found = self._one(case, drawn)
                yield found
            except _WrongError as error:
                yield Failure(case=case, status="failed", reason=str(error))
            except Exception as error:  # noqa: BLE001 - becomes a result
                text = " ".join(str(error).split())[:400]
                yield Failure(case=case, status="error", reason=f"{type(error).__name__}: {text}")
                if self.device.type == "cuda":
                    drawn = None
                    torch.cuda.empty_cache()

    def _one(self, case: BenchCase, drawn: Drawn) -> Entry:
        arm = arm_of(self.lib, case, drawn)
        results: dict[str, torch.Tensor] = {}
        first = self.clock.once(lambda: results.update(arm.results())) / 1e3
        judge = Judge.of(case, drawn)
        problem = judge.problem_of(results)
        if problem:
            raise _WrongError(problem)
        results.clear()
        arms, left_out = arms_beside(case, drawn, judge, self.peers)
        controls = self._controls(case, drawn)
        del judge
        calls = {OURS: arm.call, **{name: item.call for name, item in {**controls, **arms}.items()}}
        timings = measure(self.clock, calls, self.effort)
        ours = timings[OURS]
        floor = floor_ms(case, self.peaks[case.dtype])
        path, plans = bench_plans.in_words(bench_plans.plans_of(self.lib, case, drawn))
        detail = {
            "what": case.what,
            "projection": case.projection,
            "dtype": case.dtype,
            "plans": plans,
            "samples": len(ours.samples),
            "quartiles": [round(value, 6) for value in ours.quartiles],
            "host_ms": round(ours.host_ms, 6),
            **self._one_thread(case, arm, ours),
            **_rates(case, ours, floor),
            "controls": {name: round(timings[name].median, 6) for name in controls},
            "peer_wall_ms": {name: round(timings[name].wall_ms, 6) for name in arms},
            "peers_left_out": left_out,
            "invalid": self._invalid(case, {name: timings[name].median for name in arms}),
            **self._graph(case, arm),
            **self._transient(case, drawn),
        }
        return Entry(
            case=case,
            path=path,
            ms=round(ours.median, 6),
            floor_ms=round(floor, 6),
            wall_ms=round(ours.wall_ms, 6),
            first_call_s=round(first, 4),
            peak_bytes=peak_bytes(arm.call, self.device),
            launches=launches(arm.call, self.device),
            peers={
                name: PeerResult(
                    ms=round(timings[name].median, 6),
                    peak_bytes=peak_bytes(item.call, self.device),
                )
                for name, item in arms.items()
            },
            detail=detail,
            samples=ours.samples,
        )

    def _controls(self, case: BenchCase, drawn: Drawn) -> dict[str, Arm]:
        """The package's own product without an adapter, beside the one with it."""
        if case.kind != "projection" or case.what != "forward":
            return {}
        base = arm_of(self.lib, replace(case, kind="kernel", what="base", rank=0), drawn)
        base.results()
        return {BASE: base}

    def _transient(self, case: BenchCase, drawn: Drawn) -> dict[str, Any]:
        """What decoded experts take at a time, beside the budget that was asked for."""
        if case.kind != "qlora-layer":
            return {}
        arms = decoding_of(self.lib, case, drawn)
        return {
            "budget_bytes": {name: budget_of(case, name) for name in arms},
            "transient_bytes": {
                name: peak_bytes(arm.call, self.device) for name, arm in arms.items()
            },
        }

    def _invalid(self, case: BenchCase, measured: Mapping[str, float]) -> list[str]:
        if self.device.type != "cuda":
            return []
        gpu = torch.cuda.get_device_name(self.device)
        return peer_figures.too_slow(gpu, case.name, measured)

    def _one_thread(self, case: BenchCase, arm: Arm, ours: Timing) -> dict[str, Any]:
        """The wall time of a step whose backward runs in the calling thread: autograd has a thread
        per GPU, and waking it costs once per backward, not once per layer.
        """
        if case.what != "step" or self.device.type != "cuda":
            return {}
        with torch.autograd.set_multithreading_enabled(False):
            found = wall_ms(self.clock, arm.call, self.effort.calls(ours.median))
        return {"one_thread_wall_ms": round(found, 6)}

    def _graph(self, case: BenchCase, arm: Arm) -> dict[str, Any]:
        if not self.graphs or self.device.type != "cuda" or (case.kind, case.what) != _GRAPHED:
            return {}
        try:
            replay, equal = replay_of(arm.call)
        except RuntimeError as error:
            return {"graph": {"error": " ".join(str(error).split())[:200]}}
        timing = measure(self.clock, {"graph": replay}, replace(self.effort, most=30))["graph"]
        found = {"ms": round(timing.median, 6), "wall_ms": round(timing.wall_ms, 6)}
        return {"graph": {**found, "bitwise_equal": equal}}


_GRAPHED = ("layer", "step")


class _WrongError(Exception):
    """The results that were to be timed are wrong."""


def _rates(case: BenchCase, ours: Timing, floor: float) -> dict[str, float]:
    works = work_of(case)
    seconds = ours.median / 1e3
    return {
        "tflops": round(sum(work.flops for work in works) / seconds / 1e12, 3),
        "gb_per_s": round(sum(work.bytes for work in works) / seconds / 1e9, 3),
        "of_floor": round(floor / ours.median, 4),
    }


def summary_of(
    entries: Iterable[Mapping[str, Any]], failures: Iterable[Mapping[str, Any]], *, wanted: int
) -> dict[str, Any]:
    """Counts, and geometric means of time over floor and of peers over ours, by kind and what."""
    entries, failures = list(entries), list(failures)
    groups: dict[str, list[float]] = {}
    speedups: dict[str, list[float]] = {}
    for entry in entries:
        key = f"{entry['kind']}.{entry['detail']['what']}.t{entry['T']}"
        if entry["routing"] == "balanced" and entry["detail"]["dtype"] == "bfloat16":
            groups.setdefault(key, []).append(entry["ms"] / entry["floor_ms"])
            for name, peer in entry["peers"].items():
                speedups.setdefault(f"{key} {name}", []).append(peer["ms"] / entry["ms"])
    return {
        "measured": len(entries),
        "failed": len(failures),
        "wanted": wanted,
        "complete": len(entries) + len(failures) >= wanted,
        "over_floor": {key: _mean_and_worst(values, max) for key, values in groups.items()},
        "times_faster_than": {key: _mean_and_worst(v, min) for key, v in speedups.items()},
        "invalid": [text for entry in entries for text in entry["detail"]["invalid"]],
    }


def _mean_and_worst(
    values: list[float], worst: Callable[[list[float]], float]
) -> dict[str, float | int]:
    return {
        "geometric_mean": round(statistics.geometric_mean(values), 3),
        "worst": round(worst(values), 3),
        "count": len(values),
    }


@dataclass(slots=True)
class Deadline:
    """When to stop: so many seconds from now, or never."""

    seconds: float | None
    start: float = field(default_factory=time.monotonic)

    @property
    def passed(self) -> bool:
        """Whether it is time to stop."""
        return self.seconds is not None and time.monotonic() - self.start > self.seconds
