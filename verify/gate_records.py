"""Records of the gate: decisions with their raw samples, taken up again where they still hold."""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .bench_records import gpu_state
from .environment import environment, gpu_directory_name
from .gate import Gate, nulls_of, summary_of
from .gate_measure import Visit
from .gate_process import Trees, digest
from .gate_proof import LEAST, prove
from .records import SCHEMA, fingerprints, write_json
from .specs import KERNELS
from .statistics import Rule

SAMPLES = "gate-samples.json"
PLANTED = "gate-planted"
"""The command of a record in which the second revision was slowed on purpose."""
"""Raw samples of equal revisions on one GPU, beside its other records."""

_ASKED = ("seed", "plant", "calibration")
_SAME = ("fingerprint", "base", "head")
_SAME_MACHINE = ("device", "driver", "cuda", "torch", "triton", "python")


@dataclass(slots=True, kw_only=True)
class GateRecord:
    """The record of a run. path None keeps it in memory."""

    path: Path | None
    head: dict[str, Any]
    start: float = field(default_factory=time.monotonic)
    before: float = 0.0
    states: list[str | None] = field(default_factory=lambda: [gpu_state()])

    @classmethod
    def begin(
        cls,
        path: Path | None,
        trees: Trees,
        *,
        against: str,
        calibration: bool,
        package: Path,
    ) -> "GateRecord":
        """A new record of a comparison of two trees; package: the sources that are judged."""
        head = {
            "schema": SCHEMA,
            "command": "gate-samples" if calibration else PLANTED if trees.plant else "gate",
            "environment": environment(torch.device(trees.device)),
            "seed": trees.seed,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "fingerprint": fingerprints(package, KERNELS),
            # Where a directory lies is of no use to whoever reads the record.
            "against": Path(against).resolve().name if Path(against).is_dir() else against,
            "base": digest(trees.base),
            "head": digest(trees.head),
            "plant": trees.plant,
            "calibration": calibration,
        }
        return cls(path=path, head=head)

    def take_up(self, path: Path) -> tuple[list[Visit], str]:
        """The visits of an earlier record of the same comparison, and what was done in words.

        Raises:
            ValueError: something else was asked of the earlier run.
        """
        if not path.is_file():
            return [], "there is no record to go on with"
        old = json.loads(path.read_text())
        for key in _ASKED:
            if old.get(key) != self.head[key]:
                raise ValueError(
                    f"{path} was made with {key} {old.get(key)}, and this is {self.head[key]}"
                )
        for key in _SAME_MACHINE:
            before, now = old["environment"].get(key), self.head["environment"].get(key)
            if before != now:
                return [], f"{path} is of {key} {before}, this is {now}: all is measured again"
        for key in _SAME:
            if old.get(key) != self.head[key]:
                return [], f"{path} has another {key}: everything is measured again"
        self.head["started"], self.before = old["started"], float(old["seconds"])
        visits = [Visit.from_json(values) for values in old["visits"]]
        # What could not be measured is tried again.
        kept = [visit for visit in visits if visit.samples]
        return kept, f"{len(kept)} visits are taken from {path}"

    def write(self, gate: Gate, *, last: bool = False) -> dict[str, Any]:
        """The record so far, also in its file; last: nothing more is coming."""
        results = gate.results()
        summary = summary_of(results, gate.invalid())
        record = {
            **self.head,
            "seconds": round(self.before + time.monotonic() - self.start, 1),
            "rule": asdict(gate.rule),
            "summary": summary,
            "benchmarks": [result.as_json() for result in results],
            "gpu_state": [*self.states, *([gpu_state()] if last else [])],
        }
        if last and self.head["calibration"]:
            record["rates"] = rates(gate.found, Rule())
        record["visits"] = [visit.as_json() for visit in gate.found]
        if self.path is not None:
            write_json(self.path, record)
        return record


def rates(visits: Iterable[Visit], rule: Rule, *, draws: int = 2000) -> dict[str, Any] | None:
    """The published rates; None while there are too few processes."""
    visits = list(visits)
    if len({visit.process for visit in visits if visit.samples}) < LEAST:
        return None
    return prove(visits, rule, draws=draws).as_json()


def visits_of(path: Path) -> list[Visit]:
    """The visits in a record of the gate.

    Raises:
        ValueError: there is no such record.
    """
    try:
        values = json.loads(path.read_text())
        return [Visit.from_json(item) for item in values["visits"]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no record of the gate: {error}") from error


def history_of(directory: Path, device: torch.device) -> dict[str, list[float]]:
    """Ratios of equal revisions that were measured on this kind of GPU before; directory: that of
    all records.

    Raises:
        ValueError: the record is there and cannot be read.
    """
    if device.type != "cuda":
        return {}
    gpu = gpu_directory_name(torch.cuda.get_device_name(device))
    path = directory / gpu / SAMPLES
    return nulls_of(visits_of(path)) if path.is_file() else {}


def line_of(values: Mapping[str, Any]) -> str:
    """Rates in one sentence."""
    return (
        f"false alarms in {values['false_alarms']} of {values['draws']} unchanged suites of "
        f"{values['benchmarks']} benchmarks (at most {values['false_alarm_rate_at_most']:.2%}), "
        f"{values['undecided_suites']} undecided; a slowdown of {values['slowdown']:.0%} is found "
        f"with {values['power']:.2%} where that is hardest ({values['weakest']}), "
        f"{values['mean_power']:.2%} on average; from {values['processes']} processes"
    )
