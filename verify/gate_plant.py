"""Slowdowns planted on purpose: real work of the device, of a known share of what it is beside.

`Plant` follows every call of a benchmark with a busy-wait on the device of the stated share of that
benchmark. `slow_tree` writes a revision of the package whose launcher does the same after every
kernel, for whatever runs whole revisions.
"""

import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .timing import Call, Clock

_ROUNDS = 20
_WAKE_MS = 300.0
_LAUNCH_FILE = "_launch.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plant:
    """Slows calls. percent: of the time of what they are compared with. wait: makes a call that
    keeps the device busy for so many milliseconds.
    """

    percent: float
    wait: Callable[[float], Call]

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"a slowdown of {self.percent}% is not between 0 and 100%")

    def slowed(self, clock: Clock, base: Call, calls: Mapping[str, Call]) -> dict[str, Call]:
        """The calls, each followed by the share of the median time of `base` that is planted."""
        host = clock.enqueue(base, 5)
        (samples,) = clock.samples([base], _ROUNDS, [host])
        wait = self.wait(statistics.median(samples) * self.percent / 100)
        return {name: _followed(call, wait) for name, call in calls.items()}


def _wake(clock: Clock, call: Call) -> None:
    """Run a call until the clock of an idle GPU has risen: cycles are counted in time."""
    spent = 0.0
    for _ in range(10_000):
        spent += clock.once(call)
        if spent >= _WAKE_MS:
            return


def _followed(call: Call, wait: Call) -> Call:
    def both() -> object:
        found = call()
        wait()
        return found

    return both


def busy_wait(
    clock: Clock, spin: Callable[[int], None] = torch.cuda._sleep
) -> Callable[[float], Call]:
    """Makes calls that keep the device busy for so many milliseconds, by the clock.

    spin: keeps the current device busy for so many cycles. What a call of it adds beyond them to
    work before it is counted, so that waits shorter than that are longer than they should be.
    """

    def spinning(cycles: int) -> Call:
        return lambda: spin(cycles)

    few, many = 20_000, 220_000
    _wake(clock, spinning(many))
    calls = [spinning(few), _followed(spinning(few), spinning(few)), spinning(many)]
    found = clock.samples(calls, _ROUNDS, [0.05] * len(calls))
    short, twice, long = (statistics.median(samples) for samples in found)
    per_ms = (many - few) / (long - short)
    overhead = max(twice - short - few / per_ms, 0.0)
    return lambda milliseconds: spinning(max(int((milliseconds - overhead) * per_ms), 1))


_PLANTED = '''

def _planted_wait(launch: Any) -> int:
    """Cycles of {percent}% of what a launch takes with a cold cache, measured now."""
    lines = torch.zeros(2**25, device="cuda")
    times = []
    for _ in range({rounds}):
        lines.sum()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)
        start.record()
        launch()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(2_000_000)
    end.record()
    torch.cuda.synchronize()
    middle = sorted(times)[len(times) // 2]
    return max(int(middle * {percent} / 100 * 2_000_000 / start.elapsed_time(end)), 1)
'''

_BEFORE = "        variant = self._variants.get(index)\n"
_AFTER = """        variant = self._variants.get(index)
        if variant is not None and not pointers & 15:
            waits = self.__class__.WAITS
            variant[grid](*args, *self._values)
            if (id(self), grid) not in waits:
                launch = functools.partial(variant[grid], *args, *self._values)
                waits[id(self), grid] = _planted_wait(launch)
            torch.cuda._sleep(waits[id(self), grid])
            return
"""


def slow_tree(package: Path, destination: Path, percent: float) -> Path:
    """Write a copy of the package in which every kernel of `Launch` is followed by a busy-wait of
    a share of its time; returns its directory. Kernels have to be launched twice before they are
    slow: what they take is measured at the second launch.

    Raises:
        ValueError: the destination is there already, or the launcher is not the one known here.
    """
    plant = Plant(percent=percent, wait=lambda milliseconds: lambda: None)
    target = destination / package.name
    if target.exists():
        raise ValueError(f"{target} exists already")
    text = (package / _LAUNCH_FILE).read_text()
    slots = '    __slots__ = ("_values", "_variants", "constants", "kernel", "options")\n'
    for known in (_BEFORE, slots, "from typing import Any\n"):
        if text.count(known) != 1:
            raise ValueError(f"{_LAUNCH_FILE} has not one {known.strip()!r}: nowhere to plant")
    text = text.replace(_BEFORE, _AFTER).replace(
        slots, f"{slots}    WAITS: dict[Any, int] = {{}}\n"
    )
    text = text.replace("from typing import Any\n", "import functools\nfrom typing import Any\n")
    text += _PLANTED.format(percent=plant.percent, rounds=7)
    shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__"))
    (target / _LAUNCH_FILE).write_text(text)
    return target


def planted_on(device: Any, clock: Clock, percent: float) -> Plant | None:
    """The plant for a device; none where nothing is planted.

    Raises:
        ValueError: something is to be planted on a device that is no GPU.
    """
    if not percent:
        return None
    if device.type != "cuda":
        raise ValueError("a slowdown is planted as work of a GPU, and this device is none")
    return Plant(percent=percent, wait=busy_wait(clock))
