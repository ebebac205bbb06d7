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
            raise ValueError(f"it has {part} {record.get(part)}, and this run {today[part]}")
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
