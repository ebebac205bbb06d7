"""What a record of `check` found that need not be found again."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from .record_check import outcomes_of, read_record
from .run import Outcome, ProblemName

_MACHINE = ("python", "torch", "triton", "cuda", "driver", "device")


def kept(
    file: Path, today: Mapping[str, Any], problems: Container[ProblemName]
) -> tuple[list[Outcome], float]:
    """The outcomes of a record that still hold, and the seconds that it took.

    Those are outcomes of `problems` whose kernel has the code of today's run, unless one of the
    problem's outcomes is a failure. today: the record of this run, so far.

    Raises:
        ValueError: the record is malformed, or of another seed, selection, version or GPU.
    """
    record = read_record(file)
    outcomes = outcomes_of(record)
    for part in ("seed", "selection"):
        if record.get(part) != today[part]:
            raise ValueError(_apart(part, record.get(part), today[part]))
    for name in _MACHINE:
        before, now = record["environment"].get(name), today["environment"].get(name)
        if before != now:
            raise ValueError(f"it was made with {name} {before}, and this run has {now}")
    code, code_today = record["fingerprint"], today["fingerprint"]
    wrong = {outcome.problem for outcome in outcomes if not outcome.ok}
    found = [
        outcome
        for outcome in outcomes
        if outcome.problem in problems
        and outcome.problem not in wrong
        and code.get(outcome.kernel) == code_today[outcome.kernel]
    ]
    return found, record["seconds"]


def _apart(part: str, before: Any, now: Any) -> str:
    """How the seed or the selection of a record differs from that of this run, and what to do."""
    pairs = {part: (before, now)}
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = [name for name in now if before.get(name) != now[name]]
        pairs = {name: (before.get(name), now[name]) for name in names}
    had = " ".join(_option(name, value) for name, (value, _) in pairs.items())
    has = " ".join(_option(name, value) for name, (_, value) in pairs.items())
    return f"it was made with {had}, and this run has {has}: state what it was made with"


def _option(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"no --{name}"
    if isinstance(value, list | tuple):
        return f"--{name} {','.join(map(str, value))}" if value else f"no --{name}"
    return f"--{name} {value}"
