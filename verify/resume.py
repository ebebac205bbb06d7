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

    Those are outcomes of `problems` whose kernel has the code and the judge of today's run, unless
    one of the problem's outcomes is a failure. today: the record of this run, so far.

    Raises:
        ValueError: the record is malformed, or of another seed, selection, version or GPU.
    """
    record = read_record(file)
    outcomes = outcomes_of(record)
    had, has = _asked(record), _asked(today)
    if apart := [name for name in {**had, **has} if had.get(name) != has.get(name)]:
        before, now = (
            " ".join(_option(name, asked.get(name)) for name in apart) for asked in (had, has)
        )
        raise ValueError(
            f"it was made with {before}, and this run has {now}: state what it was made with"
        )
    for name in _MACHINE:
        before, now = record["environment"].get(name), today["environment"].get(name)
        if before != now:
            raise ValueError(f"it was made with {name} {before}, and this run has {now}")

    def hashes(values: Mapping[str, Any], kernel: str) -> tuple[Any, Any]:
        return values["fingerprint"].get(kernel), values.get("judge", {}).get(kernel)

    wrong = {outcome.problem for outcome in outcomes if not outcome.ok}
    found = [
        outcome
        for outcome in outcomes
        if outcome.problem in problems
        and outcome.problem not in wrong
        and hashes(record, outcome.kernel) == hashes(today, outcome.kernel)
    ]
    return found, record["seconds"]


def _asked(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was asked for, by the names of its options."""
    return {"seed": record.get("seed"), **(record.get("selection") or {})}


def _option(name: str, value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
    if text is None or text is False or text == "":
        return f"no --{name}"
    return f"--{name}" if text is True else f"--{name} {text}"
