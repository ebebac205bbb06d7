"""Power of the judge: wrong kernels, and which of them it sees."""

import argparse
import json
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..children import cores
from .common import (
    add_common,
    amount,
    check_names,
    count,
    prepare,
    refuse_unused,
    separated,
    source_directory,
)

_FAST_PER_KERNEL = 0
_FAST_CHECKS = 30
_SECONDS = {"cpu": 30.0, "cuda": 120.0}
_INTERVAL = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_common(parser)
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--fast",
        dest="full",
        action="store_false",
        default=False,
        help="those made by hand, and of each function --per-kernel others (default)",
    )
    depth.add_argument("--full", action="store_true", help="every mutant")
    parser.add_argument(
        "--kernels", type=separated, default=(), metavar="A,B", help="functions, or specs by name"
    )
    parser.add_argument(
        "--per-kernel", type=amount, default=_FAST_PER_KERNEL, metavar="N", help="seeded sample"
    )
    parser.add_argument(
        "--checks", type=amount, metavar="N", help="give up on a generated mutant after N checks"
    )
    parser.add_argument("--jobs", type=count, default=0, metavar="N", help="processes")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep what this record found")


def main(arguments: argparse.Namespace) -> int:
    """Try the mutants; 1 if one survives."""
    if arguments.full:
        refuse_unused("--full", arguments, add_arguments, ("per_kernel", "seed"))
    device = prepare(arguments.device)
    from ..environment import environment
    from ..mutants import as_json, by_hand, generated, known_verdicts, sample, stale, try_all
    from ..mutation_trials import SPECS, Verdict
    from ..records import SCHEMA, fingerprints

    package, console, start = source_directory(), Console(stderr=True), time.monotonic()
    specs = list(SPECS.values())
    every = [*by_hand(package, specs, device.type), *generated(package, specs)]
    outdated = stale(package, specs)
    for text in outdated:
        console.print(f"stale: {text}", style="red", markup=False)
    check_names("kernels", arguments.kernels, (candidate.kernel for candidate in every))
    if arguments.kernels:
        every = [candidate for candidate in every if candidate.kernel in arguments.kernels]
    chosen = (
        every
        if arguments.full
        else sample(every, per_kernel=arguments.per_kernel, seed=arguments.seed)
    )
    verdicts: dict[str, Verdict] = {}
    if arguments.resume and arguments.resume.is_file():
        verdicts = known_verdicts(json.loads(arguments.resume.read_text())["mutants"], chosen)
    open_ones = [c for c in chosen if not c.equivalent and c.id not in verdicts]
    head = {
        "schema": SCHEMA,
        "command": "mutants",
        "environment": environment(device),
        "seed": arguments.seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": fingerprints(package, specs),
    }
    written = [start]

    def write(*, complete: bool) -> dict[str, Any]:
        tried = [c for c in chosen if c.equivalent or c.id in verdicts]
        entries = [as_json(candidate, verdicts.get(candidate.id)) for candidate in tried]
        record = _record(head, entries, seconds=time.monotonic() - start, complete=complete)
        for path in {arguments.json, arguments.resume} - {None}:
            from ..records import write_json

            write_json(path, record)
        written[0] = time.monotonic()
        return record

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    complete = False
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("mutants", total=len(open_ones))

            def found(verdict: Verdict) -> None:
                verdicts[verdict.id] = verdict
                if verdict.status == "survived":
                    progress.console.print(f"survived: {verdict.id}", style="red", markup=False)
                progress.advance(task)
                if time.monotonic() - written[0] > _INTERVAL:
                    write(complete=False)

            try_all(
                [c.task(0 if c.by_hand else _limit(arguments)) for c in open_ones],
                jobs=arguments.jobs or cores(),
                device=str(device),
                seconds=_SECONDS[device.type],
                found=found,
            )
        _prove([c for c in open_ones if verdicts[c.id].status == "survived"], verdicts, console)
        complete = True
    finally:
        record = write(complete=complete)
    _print(Console(), record)
    return int(_failed(record, console) or bool(outdated))


def _failed(record: dict[str, Any], console: Console) -> bool:
    """Whether a mutant survived, or the checks do not run here: then every mutant is invalid."""
    summary = record["summary"]
    if summary["invalid"] <= summary["killed"]:
        return bool(summary["survived"])
    first = next(entry for entry in record["mutants"] if entry["status"] == "invalid")
    console.print(
        f"{summary['invalid']} mutants are invalid and {summary['killed']} are killed: "
        f"the checks do not run here ({first['reason']})",
        style="red",
        markup=False,
    )
    return True


def _limit(arguments: argparse.Namespace) -> int:
    """Checks per mutant, 0 for all."""
    if arguments.checks is not None:
        return arguments.checks
    return 0 if arguments.full else _FAST_CHECKS


def _prove(survivors: list[Any], verdicts: dict[str, Any], console: Console) -> None:
    """Compile what survived: the same code is equivalent, what does not compile counts nowhere."""
    from ..mutants import SAME_CODE
    from ..mutation_proof import prove

    if not survivors:
        return
    console.print(f"compiling {len(survivors)} survivors")
    wanted = [{"id": c.id, "file": c.file, "source": c.source, "line": c.line} for c in survivors]
    statuses = {"same": "equivalent", "does not compile": "invalid"}
    reasons = {
        "same": SAME_CODE,
        "does not compile": "accepted by the interpreter, refused by the compiler",
    }
    for name, answer in prove(wanted).items():
        if answer in statuses:
            verdicts[name] = replace(
                verdicts[name], status=statuses[answer], reason=reasons[answer]
            )


def _record(
    head: dict[str, Any], entries: list[dict[str, Any]], *, seconds: float, complete: bool
) -> dict[str, Any]:
    from ..mutants import STATUSES, scores

    counts = {status: sum(entry["status"] == status for entry in entries) for status in STATUSES}
    total = counts["killed"] + counts["survived"]
    return {
        **head,
        "seconds": round(seconds, 3),
        "summary": {**counts, "total": total, "complete": complete},
        "killed": counts["killed"],
        "total": total,
        "scores": scores(entries),
        "mutants": entries,
    }


def _print(console: Console, record: dict[str, Any]) -> None:
    for entry in record["mutants"]:
        if entry["status"] == "survived":
            console.print(Text(f"survived: {entry['id']} ({entry['what']})", style="bold red"))
            console.print(Text(entry["diff"]))
    table = Table(title="mutants killed", title_justify="left")
    for name in ("kernel", "killed", "total", "equivalent", "invalid"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for kernel, score in record["scores"].items():
        table.add_row(kernel, *(str(score[name]) for name in list(score)))
    console.print(table)
    summary = record["summary"]
    console.print(
        f"{summary['killed']} of {summary['total']} killed, {summary['survived']} survived, "
        f"{summary['equivalent']} equivalent, {summary['invalid']} invalid, "
        f"{record['seconds']:.0f} s"
    )
