"""How often the judge is wrong about right kernels, and what errors it sees."""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .common import add_common, count, package, prepare, source_directory

_GROUPS = 100_000
_DRAWS = 20
_INTERVAL = 10.0
_KERNEL = "kernel "
"""What keys of the tallies of kernels start with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_common(parser)
    parser.add_argument("--groups", type=count, default=_GROUPS, metavar="N", help="judge so many")
    parser.add_argument("--draws", type=count, default=_DRAWS, metavar="N", help="cases per fault")
    parser.add_argument("--no-kernels", action="store_true", help="simulated pipelines alone")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep what this record found")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the rates there, too")


def main(arguments: argparse.Namespace) -> int:
    """Count false alarms and detections; 1 on an alarm."""
    device = prepare(arguments.device)
    import torch

    from ..environment import environment
    from ..records import SCHEMA, fingerprints, write_json
    from ..specs import KERNELS

    torch.set_num_threads(1)
    start = time.monotonic()
    head = {
        "schema": SCHEMA,
        "command": "calibrate",
        "environment": environment(device),
        "seed": arguments.seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": fingerprints(source_directory(), KERNELS),
    }
    state = _resumed(arguments.resume, head)

    def write(*, complete: bool) -> dict[str, Any]:
        record = _record(head, state, seconds=time.monotonic() - start, complete=complete)
        for path in {arguments.json, arguments.resume} - {None}:
            write_json(path, record)
        return record

    complete = False
    try:
        _measure(arguments, device, state, write)
        complete = True
    finally:
        record = write(complete=complete)
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(markdown(record) + "\n")
    _print(Console(), record)
    return int(record["summary"]["alarms"] > 0)


def _measure(
    arguments: argparse.Namespace,
    device: Any,
    state: dict[str, dict[str, Any]],
    write: Callable[..., Any],
) -> None:
    """Fill in what `state` lacks: faults, kernels, then right results until there are enough."""
    from .. import calibrate
    from ..run import Selection
    from ..specs import KERNELS

    lib, written = package(), time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )

    def tally(key: str, run: Callable[[], Any]) -> None:
        if key not in state["tallies"]:
            state["tallies"][key] = {**asdict(run())}

    with Progress(*columns, console=Console(stderr=True)) as progress:

        def step(task: Any, done: int) -> None:
            nonlocal written
            progress.update(task, completed=done)
            if time.monotonic() - written > _INTERVAL:
                write(complete=False)
                written = time.monotonic()

        faults = [(name, draw) for draw in range(arguments.draws) for name in calibrate.FAULTS]
        task = progress.add_task("faults", total=len(faults))
        for done, (name, draw) in enumerate(faults, 1):
            if f"{name} {draw}" not in state["faults"]:
                found = calibrate.detected(name, arguments.seed + draw)
                state["faults"][f"{name} {draw}"] = found
            step(task, done)
        selection = Selection(cases=("smoke",), seed=arguments.seed)
        problems = () if arguments.no_kernels else selection.problems(lib, KERNELS, device)
        task = progress.add_task("kernels", total=len(problems))
        for done, problem in enumerate(problems, 1):
            words = (problem.spec.name, problem.case.name, problem.dtype, problem.mode)
            key = _KERNEL + " ".join(str(word) for word in words)
            tally(key, partial(calibrate.kernel_tally, lib, problem))
            step(task, done)
        task = progress.add_task("simulated", total=arguments.groups)
        seed = 10_000 * arguments.seed
        while _groups(state) < arguments.groups:
            tally(f"simulated {seed}", partial(calibrate.simulated_tally, seed))
            step(task, min(_groups(state), arguments.groups))
            seed += 1


def _resumed(path: Path | None, head: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a record found; of its kernels only where they and their machine are those of today."""
    empty: dict[str, dict[str, Any]] = {"tallies": {}, "faults": {}}
    if path is None or not path.is_file():
        return empty
    record = json.loads(path.read_text())
    if record["seed"] != head["seed"]:
        raise SystemExit(
            f"--resume: {path} has seed {record['seed']}, and --seed is {head['seed']}"
        )
    state = {key: record[key] for key in empty}
    if any(record[key] != head[key] for key in ("fingerprint", "environment")):
        tallies = state["tallies"].items()
        state["tallies"] = {key: item for key, item in tallies if not key.startswith(_KERNEL)}
    return state


def _groups(state: dict[str, dict[str, Any]]) -> int:
    return sum(item["groups"] for item in state["tallies"].values())


def _record(
    head: dict[str, Any], state: dict[str, dict[str, Any]], *, seconds: float, complete: bool
) -> dict[str, Any]:
    tallies = state["tallies"]
    alarms = [text for item in tallies.values() for text in item["alarms"]]
    kernels = sum(item["groups"] for key, item in tallies.items() if key.startswith(_KERNEL))
    summary = {
        "groups": _groups(state),
        "groups_of_kernels": kernels,
        "alarms": len(alarms),
        "worst": max((item["worst"] for item in tallies.values()), default=0.0),
        "complete": complete,
    }
    return {
        **head,
        "seconds": round(seconds, 3),
        "summary": summary,
        "alarms": alarms,
        "detection": detection(list(state["faults"].values())),
        **state,
    }


def detection(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per fault: cases, those seen, median effect and ratio, and the measure that saw it most."""
    rows = []
    for name in dict.fromkeys(item["fault"] for item in found):
        own = [item for item in found if item["fault"] == name]
        seen = [item for item in own if item["seen"]]
        measures = Counter(item["measure"] for item in seen)
        rows.append(
            {
                "fault": name,
                "cases": len(own),
                "seen": len(seen),
                "effect": statistics.median(item["effect"] for item in own),
                "ratio": statistics.median(item["ratio"] for item in own),
                "measure": measures.most_common(1)[0][0] if measures else "",
            }
        )
    return rows


def markdown(record: dict[str, Any]) -> str:
    """The rates, for a README: alarms in a sentence, detections as a table."""
    lines = [
        _alarms(record["summary"]),
        "",
        "| fault | change of the whole output | seen | by |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['fault']} | {row['effect']:.1e} | {row['seen']} of {row['cases']} | "
        f"{row['measure']} |"
        for row in record["detection"]
    ]
    return "\n".join(lines)


def _alarms(summary: Mapping[str, Any]) -> str:
    return (
        f"{summary['alarms']} alarms on {summary['groups']:,} groups of right results "
        f"({summary['groups_of_kernels']:,} of kernels); the largest error is "
        f"{summary['worst']:.2f} of its limit"
    )


def _print(console: Console, record: dict[str, Any]) -> None:
    table = Table(title="errors seen", title_justify="left")
    for name in ("fault", "effect", "seen", "error / limit", "by"):
        table.add_column(name, justify="left" if name in ("fault", "by") else "right")
    for row in record["detection"]:
        table.add_row(
            row["fault"],
            f"{row['effect']:.1e}",
            f"{row['seen']} of {row['cases']}",
            f"{row['ratio']:.3g}",
            row["measure"],
        )
    console.print(table)
    for text in record["alarms"]:
        console.print(Text(f"alarm: {text}", style="red"), soft_wrap=True)
    console.print(f"{_alarms(record['summary'])}; {record['seconds']:.0f} s")
