"""Plans of every architecture, compiled without a GPU, against this Triton version's baseline."""

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .common import PACKAGE

_INTERVAL = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    parser.add_argument("--device", help="ignored: nothing is run")
    parser.add_argument("--seed", type=int, default=0, help="ignored: nothing is drawn")
    parser.add_argument("--arch", type=int, nargs="+", default=(), metavar="N", help="80 90 ...")
    parser.add_argument("--operations", nargs="+", default=(), metavar="NAME")
    parser.add_argument(
        "--full", action="store_true", help="every candidate plan, not only those used"
    )
    parser.add_argument("--accept", action="store_true", help="make what was found the baseline")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="compare with this one")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep what this record found")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="processes")


def main(arguments: argparse.Namespace) -> int:
    """Compile and compare; 1 on a difference or a broken demand."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off"):
        raise SystemExit("TRITON_INTERPRET is set, and an interpreting Triton cannot compile")
    from ..ahead import ARCHITECTURES
    from ..compile_check import baseline_path, jobs, read_baseline
    from ..environment import environment
    from ..records import SCHEMA, fingerprints, write_json
    from ..specs import KERNELS

    unknown = [number for number in arguments.arch if number not in ARCHITECTURES]
    if unknown:
        raise SystemExit(f"--arch: {unknown} are none of {list(ARCHITECTURES)}")
    numbers = arguments.arch or tuple(ARCHITECTURES)
    wanted = [
        job
        for job in jobs(numbers, full=arguments.full)
        if not arguments.operations or job.operation in arguments.operations
    ]
    if not wanted:
        raise SystemExit(f"--operations: {', '.join(arguments.operations)} selects nothing")
    start, head = time.monotonic(), _head(SCHEMA, environment("cpu"))
    head["fingerprint"] = fingerprints(_sources(), KERNELS)
    path = arguments.baseline or baseline_path()
    baseline, outcomes = read_baseline(path), _resumed(arguments.resume, head["fingerprint"])

    def write(*, complete: bool) -> dict[str, Any]:
        found = [outcomes[job.key] for job in wanted if job.key in outcomes]
        record = _record(head, found, seconds=time.monotonic() - start, complete=complete)
        for target in {arguments.json, arguments.resume} - {None}:
            write_json(target, record)
        return record

    try:
        _compile(wanted, outcomes, baseline, arguments, write)
    finally:
        record = write(complete=all(job.key in outcomes for job in wanted))
    if arguments.accept:
        _accept(path, baseline, record)
    _print(Console(), record, path, accepted=arguments.accept)
    summary = record["summary"]
    return int(summary["failed"] + summary["errors"] > 0 and not arguments.accept)


def _sources() -> Path:
    import importlib

    return Path(importlib.import_module(PACKAGE).__path__[0])


def _head(schema: int, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": schema,
        "command": "compile",
        "environment": facts,
        "seed": 0,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _resumed(path: Path | None, fingerprint: dict[str, str]) -> dict[str, dict[str, Any]]:
    if path is None or not path.is_file():
        return {}
    record = json.loads(path.read_text())
    if record["fingerprint"] != fingerprint:
        return {}
    return {item["job"]: item for item in record["outcomes"] if item["status"] != "error"}


def _compile(
    wanted: list[Any],
    outcomes: dict[str, dict[str, Any]],
    baseline: Any,
    arguments: argparse.Namespace,
    write: Any,
) -> None:
    """Compile what has no outcome yet, in processes of their own."""
    open_jobs = [job for job in wanted if job.key not in outcomes]
    processes = min(arguments.jobs or os.cpu_count() or 1, max(len(open_jobs), 1))
    context = multiprocessing.get_context("spawn")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    written = time.monotonic()
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(max_workers=processes, mp_context=context) as pool,
    ):
        task = progress.add_task("compiling", total=len(open_jobs))
        waiting = {pool.submit(_one, job): job for job in open_jobs}
        try:
            for done in as_completed(waiting):
                job = waiting[done]
                outcomes[job.key] = _outcome(job, done, baseline, accept=arguments.accept)
                progress.advance(task)
                if time.monotonic() - written > _INTERVAL:
                    write(complete=False)
                    written = time.monotonic()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one(job: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """In a worker: the kernels of a job, and what is demanded of them in vain."""
    import warnings

    from ..compile_check import compile_job, demands

    warnings.simplefilter("ignore")
    found = compile_job(job)
    problems = [f"{job.key}: {item.kernel} {text}" for item in found for text in demands(job, item)]
    return [item.as_json() for item in found], problems


def _outcome(job: Any, done: Any, baseline: Any, *, accept: bool) -> dict[str, Any]:
    from ..compile_check import differences

    head = {"job": job.key, "architecture": job.architecture, "operation": job.operation}
    error = done.exception()
    if error is not None:
        words = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        return {**head, "status": "error", "reason": words, "kernels": []}
    kernels, problems = done.result()
    base = baseline.get(job.key)
    if not accept:
        if base is not None:
            problems = [*problems, *differences(job, kernels, base)]
        elif baseline:
            problems = [*problems, f"{job.key}: is not in the baseline"]
        else:
            spilled = [item["kernel"] for item in kernels if item["stack"]]
            problems = [*problems, *(f"{job.key}: {name} uses a stack" for name in spilled)]
    status = "failed" if problems else "passed"
    return {**head, "status": status, "reason": "; ".join(problems), "kernels": kernels}


def _record(
    head: dict[str, Any], outcomes: list[dict[str, Any]], *, seconds: float, complete: bool
) -> dict[str, Any]:
    counts = {
        name: sum(item["status"] == status for item in outcomes)
        for name, status in (("passed", "passed"), ("failed", "failed"), ("errors", "error"))
    }
    compiled = sum(len(item["kernels"]) for item in outcomes)
    summary = {**counts, "total": len(outcomes), "compiled": compiled, "complete": complete}
    return {**head, "seconds": round(seconds, 3), "summary": summary, "outcomes": outcomes}


def _accept(path: Path, baseline: Any, record: dict[str, Any]) -> None:
    from ..records import write_json

    found = {item["job"]: item["kernels"] for item in record["outcomes"] if item["kernels"]}
    kernels = dict(sorted({**baseline, **found}.items()))
    write_json(path, {"triton": record["environment"].get("triton"), "kernels": kernels})


def _print(console: Console, record: dict[str, Any], path: Path, *, accepted: bool) -> None:
    table = Table(title="compiled kernels", title_justify="left")
    for name in ("architecture", "kernels", "most registers", "most shared memory", "on a stack"):
        table.add_column(name, justify="left" if name == "architecture" else "right")
    numbers = dict.fromkeys(item["architecture"] for item in record["outcomes"])
    for number in numbers:
        own = [k for o in record["outcomes"] if o["architecture"] == number for k in o["kernels"]]
        table.add_row(
            f"sm_{number}",
            str(len(own)),
            str(max((k["registers"] for k in own), default=0)),
            str(max((k["shared"] for k in own), default=0)),
            str(sum(k["stack"] > 0 for k in own)),
        )
    console.print(table)
    for item in record["outcomes"]:
        if item["status"] != "passed":
            text = f"{item['status']}: {item['job']}: {item['reason']}"
            console.print(Text(text, style="red"), soft_wrap=True)
    verb = "written to" if accepted else "compared with" if path.is_file() else "no baseline at"
    console.print(f"{verb} {path}; {record['summary']}, {record['seconds']:.0f} s")
