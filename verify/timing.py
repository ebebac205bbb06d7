"""How long calls take: on a GPU between events, on a CPU by the host's clock, in tests by a
virtual one.

A GPU sample is flush, event, call, event. The flush reads more than the L2 holds, so that every
call finds its operands in memory and no dirty lines in the way. A busy-wait before it keeps the
queue full: the host enqueues the whole call while the GPU is still waiting, so that no gap between
launches is measured. Arms are interleaved, forwards in even rounds and backwards in odd ones
(base, head, head, base).
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Protocol

import torch

Call = Callable[[], object]

FLUSH = 3
"""Multiple of the L2 that a flush reads: with random replacement exp(-3) = 5% of the lines stay."""

_CYCLES_PER_MS = 2_000_000
"""Cycles of torch.cuda._sleep per millisecond, at a clock above that of any GPU so far."""

_BATCHES = 3
"""Rows of calls of which a wall time is the median: a host that is disturbed once counts once."""

_LEAD_FACTOR, _LEAD_MS = 1.4, 0.06
"""The GPU waits this much longer than the host took to enqueue a call when it was measured."""


class Clock(Protocol):
    """Runs calls and says how long they took, in milliseconds."""

    def once(self, call: Call) -> float:
        """Until all work of one call is done."""

    def back_to_back(self, call: Call, count: int) -> float:
        """Per call, of `count` calls in a row, until the work of the last is done."""

    def enqueue(self, call: Call, count: int) -> float:
        """Host time per call, of `count` calls in a row, whether their work is done or not."""

    def samples(
        self, calls: Sequence[Call], rounds: int, host_ms: Sequence[float]
    ) -> list[list[float]]:
        """`rounds` interleaved samples of every call; host_ms: what `enqueue` said of each."""


def turn_order(count: int, turn: int) -> list[int]:
    """Order of the arms in one round."""
    order = list(range(count))
    return order if turn % 2 == 0 else order[::-1]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's cycle collector out of what is timed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class HostClock:
    """The host's clock, for a device that works while the host waits."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def _synchronise(self) -> None:
        """Wait for the device."""

    def _timed(self, call: Call, count: int, *, wait: bool) -> float:
        with _no_collection():
            self._synchronise()
            start = self._now()
            for _ in range(count):
                call()
            if wait:
                self._synchronise()
            elapsed = self._now() - start
        self._synchronise()
        return elapsed / count * 1e3

    def once(self, call: Call) -> float:
        """As `Clock.once`."""
        return self._timed(call, 1, wait=True)

    def back_to_back(self, call: Call, count: int) -> float:
        """As `Clock.back_to_back`."""
        return self._timed(call, count, wait=True)

    def enqueue(self, call: Call, count: int) -> float:
        """As `Clock.enqueue`."""
        return self._timed(call, count, wait=False)

    def samples(
        self, calls: Sequence[Call], rounds: int, host_ms: Sequence[float]
    ) -> list[list[float]]:
        """As `Clock.samples`."""
        del host_ms
        found: list[list[float]] = [[] for _ in calls]
        for turn in range(rounds):
            for index in turn_order(len(calls), turn):
                found[index].append(self.once(calls[index]))
        return found


class VirtualClock(HostClock):
    """A clock that moves only when told to: calls `spend` the time they are supposed to take."""

    def __init__(self) -> None:
        self.seconds = 0.0
        super().__init__(self.now)

    def now(self) -> float:
        """Seconds that have passed."""
        return self.seconds

    def spend(self, milliseconds: float) -> None:
        """Let time pass."""
        self.seconds += milliseconds / 1e3


class EventClock(HostClock):
    """Events of a CUDA device around calls that find its L2 cold and its queue full."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        size = torch.cuda.get_device_properties(device).L2_cache_size * FLUSH
        self._lines = torch.zeros(size // 4, dtype=torch.float32, device=device)
        self._sum = torch.zeros((), dtype=torch.float32, device=device)

    def _synchronise(self) -> None:
        torch.cuda.synchronize(self._device)

    def samples(
        self, calls: Sequence[Call], rounds: int, host_ms: Sequence[float]
    ) -> list[list[float]]:
        """As `Clock.samples`, between events."""
        cycles = [int((ms * _LEAD_FACTOR + _LEAD_MS) * _CYCLES_PER_MS) for ms in host_ms]
        pairs: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
        with _no_collection():
            for turn in range(rounds):
                for index in turn_order(len(calls), turn):
                    start = torch.cuda.Event(enable_timing=True)
                    end = torch.cuda.Event(enable_timing=True)
                    torch.cuda._sleep(cycles[index])
                    torch.sum(self._lines, dim=0, out=self._sum)
                    start.record()
                    calls[index]()
                    end.record()
                    pairs[index].append((start, end))
            self._synchronise()
        return [[start.elapsed_time(end) for start, end in found] for found in pairs]


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return EventClock(device) if device.type == "cuda" else HostClock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What was measured of one call, in milliseconds.

    samples: one per round. wall_ms: back to back, the middle of `_BATCHES` rows of calls. host_ms:
    on the host alone.
    """

    samples: tuple[float, ...]
    wall_ms: float
    host_ms: float

    @property
    def median(self) -> float:
        """The middle sample."""
        return median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = quantiles(self.samples, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much to measure. budget_ms: for the samples of one arm; least, most: samples per arm."""

    budget_ms: float = 250.0
    least: int = 21
    most: int = 100

    def rounds(self, each_ms: Sequence[float]) -> int:
        """Rounds for arms that take so long each."""
        return int(min(max(self.budget_ms / max(*each_ms, 1e-6), self.least), self.most))

    def calls(self, each_ms: float) -> int:
        """Calls in a row for a wall or host time."""
        return int(min(max(0.1 * self.budget_ms / max(each_ms, 1e-6), 3), 30))


def wall_ms(clock: Clock, call: Call, count: int) -> float:
    """Milliseconds per call, the middle of `_BATCHES` rows of `count` calls."""
    return median(clock.back_to_back(call, count) for _ in range(_BATCHES))


def measure(clock: Clock, calls: Mapping[str, Call], effort: Effort) -> dict[str, Timing]:
    """Time calls that have run before, interleaved."""
    each = {name: clock.once(call) for name, call in calls.items()}
    wall, host = {}, {}
    for name, call in calls.items():
        count = effort.calls(each[name])
        clock.back_to_back(call, 2)
        wall[name] = wall_ms(clock, call, count)
        host[name] = clock.enqueue(call, min(count, 10))
    rounds = effort.rounds([wall[name] + host[name] for name in calls])
    found = clock.samples(list(calls.values()), rounds, list(host.values()))
    return {
        name: Timing(samples=tuple(samples), wall_ms=wall[name], host_ms=host[name])
        for name, samples in zip(calls, found, strict=True)
    }


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Bytes that a call holds at most above what was allocated before; None where nothing counts
    them.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def launches(call: Call, device: torch.device) -> int | None:
    """Kernels that a call runs on its GPU, without copies and fills by the driver and busy-waits;
    None on a CPU.
    """
    if device.type != "cuda":
        return None
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        call()
        torch.cuda.synchronize(device)
    on_device = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sum(map(is_kernel, on_device))


def is_kernel(name: str) -> bool:
    """Whether what a profiler saw on the device is a kernel that does work."""
    return not name.startswith(("Memcpy", "Memset", "Activity")) and "::spin_kernel(" not in name


def replay_of(call: Callable[[], Sequence[torch.Tensor]]) -> tuple[Call, bool]:
    """A call captured as a CUDA graph, and whether its results equal the eager ones to the bit.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    eager = [value.clone() for value in call()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    torch.cuda.synchronize()
    equal = all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
    return graph.replay, equal
