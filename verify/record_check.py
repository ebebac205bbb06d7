"""Whether the committed records still stand in for a GPU: well-formed, whole, good and fresh.

A directory of records holds one directory per GPU. Each must have a `check.json`, and one of them
must be whole and fresh, so that who has one GPU can change a kernel. What other commands found is
read too. All must be fresh for a release.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .environment import gpu_directory_name
from .gate_cases import suite
from .qualify import STAGES
from .records import SCHEMA, fingerprints, judges, selection_of, summary_of
from .run import Outcome, ProblemName, Selection
from .spec import KernelSpec

CHECK = "check.json"
GOOD = "good"
_HEAD: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "command": (str,),
    "environment": (dict,),
    "seed": (int,),
    "started": (str,),
    "seconds": (int, float),
    "fingerprint": (dict,),
    "summary": (dict,),
}
_STATUSES = ("passed", "failed", "error", "unavailable")
_KEY = ("kernel", "case", "dtype", "mode")
_WORDS = (*_KEY, "path", "plan", "status", "measure", "reason")
_OPTIONS = {
    "check": ("--full",),
    "compile": ("--full",),
    "mutants": ("--full",),
    "fuzz": ("--minutes", "20"),
    "gate": ("--against", "main"),
    "gate-samples": ("--calibrate",),
    "gate-planted": ("--against", "."),
}
_COMMANDS = {"gate-samples": "gate", "gate-planted": "gate"}
"""Records that are not named after the command that makes them."""
_RELEASE = ("check", "mutants", "sanitize", "bench", "gate", "gate-samples")
"""Commands of which a release has a record."""
_FAULTS = ("failed", "errors", "survived", "findings", "alarms", "wrong")
"""Counts of a summary that are zero where all is well."""
_AGED = ("stale", "incomplete")
"""What becomes of a good record when kernels change or cases are added."""
_WITHOUT_DEVICE = ("compile", "qualify")
_SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Today's sources: hash of each kernel and of its judge, and the problems of a selection."""

    fingerprint: Mapping[str, str]
    judge: Mapping[str, str]
    enumerate: Callable[[Selection], frozenset[ProblemName]]

    @classmethod
    def of(cls, lib: ModuleType, kernels: tuple[KernelSpec, ...]) -> "Sources":
        """The sources of a package; needs no GPU."""

        @cache
        def enumerated(selection: Selection) -> frozenset[ProblemName]:
            problems = selection.problems(lib, kernels, torch.device("cuda"))
            return frozenset(item.name for item in problems)

        found = fingerprints(Path(lib.__path__[0]), kernels)
        return cls(fingerprint=found, judge=judges(kernels), enumerate=enumerated)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is to be said of one record.

    state: good, missing, malformed, failed, incomplete or stale. fault: whether it counts. days:
    its age, or None where it is not known. reason: in words. refresh: the command that makes it.
    """

    record: str
    state: str
    fault: bool
    days: float | None
    reason: str
    refresh: str

    @property
    def age(self) -> str:
        """Its age in days or hours."""
        if self.days is None:
            return "-"
        return f"{self.days:.0f} d" if self.days >= 2 else f"{24 * self.days:.0f} h"


def inspect(
    directory: Path, sources: Sources, *, release: bool = False, now: datetime | None = None
) -> tuple[Verdict, ...]:
    """Judge `<directory>/<gpu>/*.json`. Where the check of one GPU is good, one of another may be
    stale. A check by an older judge is good, and the reason says so. release: every record counts,
    none of those that a release has is missing, and a check must be full and by today's judge.

    `now` is the time that ages are counted from.
    """
    moment = now or datetime.now(UTC)
    machines = sorted(path for path in directory.glob("*") if path.is_dir())
    found: list[Verdict] = []
    for machine in machines or [directory / "<gpu>"]:
        wanted = {machine / f"{name}.json" for name in (_RELEASE if release else _RELEASE[:1])}
        files = sorted({*wanted, *machine.glob("*.json")})
        found += [_verdict(file, sources, release=release, now=moment) for file in files]
    good = any(item.state == GOOD and item.record.endswith(f"/{CHECK}") for item in found)
    if good and not release:
        found = [replace(item, fault=item.fault and item.state not in _AGED) for item in found]
    return tuple(found)


def _verdict(file: Path, sources: Sources, *, release: bool, now: datetime) -> Verdict:
    name, required = f"{file.parent.name}/{file.name}", file.name == CHECK
    days, command, options = None, file.stem, _OPTIONS.get(file.stem, ())
    if not file.is_file():
        what = "there is no such record" if file.parent.is_dir() else "no GPU has records"
        state, reason = "missing", f"{what}: {file}"
    else:
        try:
            record = read_record(file)
            _demand_machine(record, file)
            command = record["command"]
            options = _OPTIONS.get(command, ())
            days = (now - datetime.fromisoformat(record["started"])).total_seconds() / 86400
            judge = _judge_check if required or command == "check" else _judge_other
            state, reason = judge(record, sources, release=release)
            if command == "check" and not release:
                options = _narrowing(record["selection"])
            if command == "gate-planted":
                options = (*options, "--plant", f"{record['plant']:g}")
            if command == "mutants" and not release:
                options = _trying(record)
        except ValueError as error:
            state, reason = "malformed", str(error)
    fault = state != GOOD and (required or release or state == "malformed")
    return Verdict(
        record=name,
        state=state,
        fault=fault,
        days=days,
        reason=reason,
        refresh=refresh_command(command, file, options),
    )


def _narrowing(selection: Mapping[str, Any]) -> tuple[str, ...]:
    """The options that make a selection of problems."""
    words = ["--quick" if selection["quick"] else "--full"]
    for name in ("kernels", "paths", "cases", "dtypes", "modes"):
        if selection[name]:
            words += ["--" + name, ",".join(selection[name])]
    return tuple(words)


def _trying(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The options that try the mutants of a record where they were tried."""
    generated = any(not item.get("by_hand") for item in record.get("mutants", ()))
    words = ("--full",) if generated else ("--per-kernel", "0")
    return (*words, "--device", "cpu") if record["environment"].get("interpreted") else words


def refresh_command(command: str, file: Path, options: Sequence[str]) -> str:
    """The command line that makes a record anew."""
    path = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    stated = command in _WITHOUT_DEVICE or "--device" in options
    device = () if stated else ("--device", "cuda")
    name = _COMMANDS.get(command, command)
    words = ("python -m verify", name, *options, *device)
    return " ".join((*words, "--json", str(path)))


def read_record(file: Path) -> dict[str, Any]:
    """A record with a good head.

    Raises:
        ValueError: it is not JSON, or a key is missing or of the wrong type.
    """
    try:
        record = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    _demand_types(record, _HEAD, "the record")
    if record["schema"] != SCHEMA:
        raise ValueError(f"schema is {record['schema']}, and this reads {SCHEMA}")
    try:
        started = datetime.fromisoformat(record["started"])
    except ValueError as error:
        raise ValueError(f"started is {record['started']!r}, not a time") from error
    if started.tzinfo is None:
        raise ValueError(f"started is {record['started']!r}, without a time zone")
    return record


def _demand_machine(record: Mapping[str, Any], file: Path) -> None:
    """Raises ValueError where a record of `check` is not of the GPU whose directory it is in."""
    device = record["environment"].get("device")
    if record["environment"].get("interpreted") and file.name == CHECK:
        raise ValueError(f"it was made by the interpreter on {device}, not on a GPU")
    if file.name == CHECK and gpu_directory_name(str(device)) != file.parent.name:
        raise ValueError(f"it was made on {device!r}, and its directory is {file.parent.name}")


def _demand_types(value: Any, wanted: Mapping[str, tuple[type, ...]], what: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {type(value).__name__}, not an object")
    missing = [key for key in wanted if key not in value]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    for key, types in wanted.items():
        # A truth value is an int to Python, not to a record.
        if type(value[key]) not in types:
            names = " or ".join(item.__name__ for item in types)
            raise ValueError(f"{key} of {what} is {type(value[key]).__name__}, not {names}")


def _judge_check(record: dict[str, Any], sources: Sources, *, release: bool) -> tuple[str, str]:
    """State and reason of a record of `check`."""
    outcomes, selection = outcomes_of(record), _selection(record)
    bad = [item for item in outcomes if item.status in ("failed", "error")]
    if bad:
        return "failed", f"{len(bad)} of {len(outcomes)} outcomes are no success: {bad[0]}"
    if not record["summary"]["complete"]:
        return "incomplete", f"the run was interrupted after {len(outcomes)} outcomes"
    wanted = sources.enumerate(selection)
    have = {item.problem for item in outcomes}
    if have != wanted or not have:
        parts = (("missing", wanted - have), ("not enumerated by the specs", have - wanted))
        texts = [f"{len(keys)} {what}: {_few(map(' '.join, keys))}" for what, keys in parts if keys]
        return "incomplete", "; ".join(texts) or "its selection takes nothing"
    checked = {kernel for kernel, *_ in wanted}
    stale = _stale(record["fingerprint"], sources.fingerprint, checked)
    if stale:
        return "stale", stale
    judged = _judged_by(record, sources, checked)
    if judged and release:
        return "stale", judged
    narrowed = [key for key, value in selection_of(selection).items() if value]
    whole = f"whole, but of a selection only: {', '.join(narrowed)}" if narrowed else ""
    notes = "; ".join(note for note in (whole, judged) if note)
    return ("incomplete" if narrowed and release else GOOD), notes


def _judged_by(record: Mapping[str, Any], sources: Sources, checked: Iterable[str]) -> str:
    """What is to be said of the judge of a record; nothing where it is today's."""
    recorded = record.get("judge")
    if not isinstance(recorded, Mapping):
        return "it does not say which judge it had"
    changed = sorted(name for name in checked if recorded.get(name) != sources.judge.get(name))
    return f"the judge has changed since, of {_few(changed)}" if changed else ""


def _judge_other(record: dict[str, Any], sources: Sources, *, release: bool) -> tuple[str, str]:  # noqa: ARG001
    """State and reason of a record of another command."""
    if record["summary"].get("complete") is False:
        return "incomplete", "the run was interrupted"
    if record["command"] == "qualify":
        named = {stage["name"] for stage in record["stages"]}
        if waiting := [name for name in STAGES if name not in named]:
            return "incomplete", f"not run: {', '.join(waiting)}"
    if record["command"] in ("gate", *_COMMANDS) and (found := _judge_gate(record)):
        return found
    counts = ((name, record["summary"].get(name, 0)) for name in _FAULTS)
    if faults := [f"{count} {name}" for name, count in counts if count]:
        return "failed", ", ".join(faults)
    stale = _stale(record["fingerprint"], sources.fingerprint, record["fingerprint"])
    return ("stale", stale) if stale else (GOOD, "")


def _judge_gate(record: dict[str, Any]) -> tuple[str, str] | None:
    """What is wrong with a record of the gate, or of its samples."""
    summary, whole = record["summary"], len(suite())
    if record["command"] == "gate-planted":
        found, planted = summary.get("regression", 0), summary.get("benchmarks", 0)
        lost = planted - found
        text = f"{lost} of {planted} planted slowdowns of {record['plant']:g}% were not found"
        return ("failed", text) if lost or not planted else None
    if summary.get("benchmarks", whole) < whole:
        return "incomplete", f"{summary['benchmarks']} of {whole} benchmarks were selected"
    if record["command"] == "gate-samples":
        return None if record.get("rates") else ("incomplete", "it has no rates")
    if summary.get("regression"):
        return "failed", f"{summary['regression']} benchmarks got slower"
    if doubts := summary.get("ambiguous", 0) + len(summary.get("invalid", ())):
        return "incomplete", f"{doubts} doubts: benchmarks not decided, peers too slow"
    return None


def outcomes_of(record: Mapping[str, Any]) -> list[Outcome]:
    """The outcomes of a record of `check`.

    Raises:
        ValueError: they are not well-formed, or the summary counts others.
    """
    if record["command"] != "check":
        raise ValueError(f"its command is {record['command']!r}, not 'check'")
    found = record.get("outcomes")
    if not isinstance(found, list):
        raise ValueError("the record lacks a list of outcomes")
    names = {item.name for item in fields(Outcome)}
    for place, outcome in enumerate(found):
        _demand_types(outcome, dict.fromkeys(_WORDS, (str,)), f"outcome {place}")
        if set(outcome) != names:
            raise ValueError(
                f"outcome {place} has keys {sorted(outcome)}, an outcome has {sorted(names)}"
            )
        if outcome["status"] not in _STATUSES:
            raise ValueError(f"status of outcome {place} is {outcome['status']!r}")
        if outcome["status"] == "unavailable" and not outcome["reason"]:
            raise ValueError(f"outcome {place} is unavailable without a reason")
    outcomes = [Outcome(**item) for item in found]
    twice = [key for key, times in Counter(item.key for item in outcomes).items() if times > 1]
    if twice:
        raise ValueError(f"{len(twice)} outcomes are there twice: {_few(map(' '.join, twice))}")
    counts, summary = summary_of(outcomes), record["summary"]
    for key, count in counts.items():
        if summary.get(key) != count:
            raise ValueError(f"its summary says {key} {summary.get(key)}, its outcomes say {count}")
    if not isinstance(summary.get("complete"), bool):
        raise ValueError("its summary does not say whether it is complete")
    return outcomes


def _selection(record: dict[str, Any]) -> Selection:
    """What a record of `check` was asked for.

    Raises:
        ValueError: it does not say.
    """
    selected: Any = record.get("selection")
    wanted: dict[str, tuple[type, ...]] = {
        key: (bool,) if key == "quick" else (list,) for key in selection_of(Selection())
    }
    _demand_types(selected, wanted, "the selection")
    extra = sorted(set(selected) - set(wanted))
    if extra:
        raise ValueError(f"the selection has {', '.join(extra)}, which no selection has")
    values: dict[str, Any] = {
        key: tuple(map(str, value)) if key != "quick" else value for key, value in selected.items()
    }
    return Selection(**values)


def _stale(recorded: Mapping[str, Any], today: Mapping[str, str], kernels: Iterable[str]) -> str:
    """Which of these kernels changed since, or are not recorded."""
    names = list(kernels)
    changed = [name for name in names if recorded.get(name) != today.get(name)]
    if not changed:
        return ""
    return f"{len(changed)} of {len(names)} kernels changed since: {_few(changed)}"


def _few(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
