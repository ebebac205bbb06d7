"""The record of a benchmark run: written after every benchmark, taken up again where it still
holds.
"""

import json
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .bench import summary_of
from .bench_cases import BenchCase
from .environment import environment
from .first_call import measured_cold
from .records import SCHEMA, fingerprints, write_json
from .specs import KERNELS


class BenchRecord:
    """The record of a run, written after every benchmark."""

    def __init__(self, path: Path | None, head: dict[str, Any], cases: Sequence[BenchCase]) -> None:
        self.path, self.head, self.cases = path, head, cases
        self.entries: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self._start = time.monotonic()
        self._before = 0.0
        self._states = [gpu_state()]

    @classmethod
    def start(
        cls,
        path: Path | None,
        cases: Sequence[BenchCase],
        *,
        package: Path,
        device: torch.device,
        seed: int,
    ) -> "BenchRecord":
        """A new record of these benchmarks of the package in that directory."""
        head = {
            "schema": SCHEMA,
            "command": "bench",
            "environment": environment(device),
            "seed": seed,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "fingerprint": fingerprints(package, KERNELS),
        }
        return cls(path, head, cases)

    def take_up(self) -> str:
        """Keep what the file has, if it was made by the same code on the same machine; says what
        was done.

        Raises:
            ValueError: it was measured with another seed.
        """
        if self.path is None or not self.path.is_file():
            return "there is no record to go on with"
        old = json.loads(self.path.read_text())
        if old.get("seed") != self.head["seed"]:
            raise ValueError(
                f"{self.path} has seed {old.get('seed')}, and --seed is {self.head['seed']}"
            )
        for key in ("environment", "fingerprint"):
            if old.get(key) != self.head[key]:
                return f"{self.path} has another {key}: everything is measured again"
        wanted = {case.name for case in self.cases}
        self.entries = [entry for entry in old["benchmarks"] if entry["name"] in wanted]
        self.head["started"] = old["started"]
        self._before = float(old["seconds"])
        return f"{len(self.entries)} of {len(self.cases)} are taken from {self.path}"

    @property
    def names(self) -> set[str]:
        """What is measured already."""
        return {entry["name"] for entry in self.entries}

    def write(self, *, last: bool = False) -> dict[str, Any]:
        """The record so far, also in its file; last: nothing more is coming."""
        summary = summary_of(self.entries, self.failures, wanted=len(self.cases))
        seconds = round(self._before + time.monotonic() - self._start, 1)
        record = {
            **self.head,
            "seconds": seconds,
            "summary": summary,
            "benchmarks": self.entries,
            "failures": self.failures,
            "gpu_state": [*self._states, *([gpu_state()] if last else [])],
        }
        if self.path is not None:
            write_json(self.path, record)
        return record

    def add_cold(self, console: Console) -> None:
        """First calls of the layer steps, each model in a fresh process with an empty compile
        cache.
        """
        steps = [case for case in self.cases if (case.kind, case.what) == ("layer", "step")]
        plain = [case for case in steps if case.routing == "balanced" and case.rank == 16]
        for name in dict.fromkeys(case.shape.name for case in plain):
            mine = [case for case in plain if case.shape.name == name]
            try:
                seconds = measured_cold(mine)
            except (subprocess.SubprocessError, ValueError) as error:
                console.print(f"cold {name}: {error}", style="red", markup=False)
                continue
            for entry in self.entries:
                if entry["name"] in seconds:
                    entry["first_call_s"] = seconds[entry["name"]]
                    entry["detail"]["first_call"] = "fresh process, empty compile cache"
            console.print(f"cold {name}: {seconds}", markup=False)
            self.write()


def gpu_state() -> str | None:
    """Clocks, power and throttle reasons of the GPU in use, as nvidia-smi tells them; or None."""
    if not torch.cuda.is_available():
        return None
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
    gpu = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip() or None if ran.returncode == 0 else None
