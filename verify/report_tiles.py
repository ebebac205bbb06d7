"""The numbers at the head of the report: what a person looks at first."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .gate_cases import suite
from .qualify import STAGES
from .report_records import Found, Source, Tile


def tiles_of(found: Found, fingerprint: Mapping[str, str]) -> Iterable[Tile]:
    """What a person looks at first; green where it was made of today's sources alone."""
    makers = {
        "check": ("checks", _check_tile),
        "mutants": ("mutants killed", _mutants_tile),
        "fuzz": ("fuzzed", _fuzz_tile),
        "sanitize": ("sanitizer", _sanitize_tile),
        "gate": ("speed gate", _gate_tile),
        "qualify": ("qualified", _qualify_tile),
    }
    for command, (what, maker) in makers.items():
        for source in found.newest(command):
            which = "" if source.stem == command else f" ({source.stem})"
            value, note, state = maker(source)
            if source.values["summary"].get("complete") is False:
                note, state = f"{note}, incomplete", "none" if state == "good" else state
            if state == "good" and stale_kernels(source, fingerprint):
                note, state = f"{note}, of older sources", "none"
            title = f"{what} on {source.machine}{which}"
            yield Tile(title=title, value=value, note=note, state=state)


def _check_tile(source: Source) -> tuple[str, str, str]:
    summary = source.values["summary"]
    wrong = summary["failed"] + summary["errors"]
    note = f"{wrong} failed" if wrong else "all passed"
    return str(summary["passed"]), note, "bad" if wrong else "good"


def _mutants_tile(source: Source) -> tuple[str, str, str]:
    summary = source.values["summary"]
    survived = summary["survived"]
    value = f"{summary['killed']} of {summary['total']}"
    return value, f"{survived} survived", "bad" if survived else "good"


def _fuzz_tile(source: Source) -> tuple[str, str, str]:
    summary = source.values["summary"]
    findings = summary["findings"]
    state = "bad" if findings else "good"
    return f"{summary['cases']} cases", counted(findings, "finding"), state


def _sanitize_tile(source: Source) -> tuple[str, str, str]:
    summary = source.values["summary"]
    wrong = summary["failed"] + summary["errors"]
    state = "bad" if wrong else "good" if summary["passed"] else "none"
    return f"{summary['passed']} clean", f"{wrong} with errors", state


def _gate_tile(source: Source) -> tuple[str, str, str]:
    decisions = [str(entry.get("decision")) for entry in decisions_of(source)]
    regressed = decisions.count("regression")
    unsure = decisions.count("ambiguous") + decisions.count("unmeasured")
    invalid = len(source.values["summary"].get("invalid", ()))
    whole = len(decisions) >= len(suite())
    words = [f"{len(decisions)} of {len(suite())} benchmarks"]
    words += [f"{unsure} not decided"] if unsure else []
    words += [f"{invalid} measured beside a peer that was too slow"] if invalid else []
    sure = whole and not unsure and not invalid
    state = "bad" if regressed else "good" if sure else "none"
    return counted(regressed, "regression"), ", ".join(words), state


def _qualify_tile(source: Source) -> tuple[str, str, str]:
    summary, stages = source.values["summary"], max(len(STAGES), len(source.values["stages"]))
    failed = summary["failed"]
    state = "bad" if failed else "good" if summary["passed"] == stages else "none"
    return f"{summary['passed']} of {stages} stages", f"{failed} failed", state


def counted(count: int, what: str) -> str:
    """A count with its noun, in the plural where it is not one."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def stale_kernels(source: Source, fingerprint: Mapping[str, str]) -> list[str]:
    """Kernels whose code has changed since a record; one of checks is of those that it checked."""
    recorded = source.values.get("fingerprint") or {}
    found = [name for name, digest in recorded.items() if fingerprint.get(name, digest) != digest]
    if source.command != "check":
        return found
    checked = {item["kernel"] for item in source.values.get("outcomes", ())}
    return [name for name in found if name in checked]


def decisions_of(source: Source) -> Sequence[Mapping[str, Any]]:
    """What a record says of each benchmark."""
    for key in ("decisions", "benchmarks", "outcomes"):
        if isinstance(source.values.get(key), list):
            return source.values[key]
    return ()
