"""What needs no GPU to be measured, against committed baselines, in which any difference counts.

kernels: registers, spills, shared memory and instructions of the plans of every architecture, by
Triton version. footprint: launches and allocated bytes of every benchmark case.
"""

import argparse
import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..children import cores, pool
from .common import PACKAGE, add_json, count, refuse_unused

_INTERVAL = 10.0
_ACCEPT = "`python -m verify compile --accept`"
PARTS = ("kernels", "footprint")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_json(parser)
    parser.add_argument("--arch", type=int, nargs="+", default=(), metavar="N", help="80 90 ...")
    parser.add_argument("--operations", nargs="+", default=(), metavar="NAME")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=(), help="both, unless operations are named"
    )
    parser.add_argument(
        "--full", action="store_true", help="every candidate plan; hours, see --resume and --jobs"
    )
    parser.add_argument("--accept", action="store_true", help="make what was found the baseline")
    parser.add_argument(
        "--baseline", type=Path, metavar="FILE", help="of kernels, in place of ours"
    )
    parser.add_argument("--footprint", type=Path, metavar="FILE", help="of footprints, likewise")
    parser.add_argument(
        "--no-baseline", action="store_true", help="only what is demanded of every kernel"
    )
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep what this record found")
    parser.add_argument("--jobs", type=count, default=0, metavar="N", help="processes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What to compare with: values by key, from a file. whole: whether everything in it is looked
    at.
    """

    path: Path
    values: Mapping[str, Any]
    whole: bool

    def gone(self, outcomes: Mapping[str, Any]) -> list[str]:
        """What it holds and nobody makes any more, a sentence each."""
        left = self.values.keys() - outcomes.keys() if self.whole else ()
        return [f"{key}: is in the baseline and no longer made" for key in sorted(left)]

    def accepted(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the file that `found` makes of it."""
        return dict(sorted((found if self.whole else {**self.values, **found}).items()))


def main(arguments: argparse.Namespace) -> int:
    """Compile, count and compare; 1 on a difference or a broken demand, or without a baseline."""
    parts = _parts(arguments)
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off"):
        raise SystemExit("TRITON_INTERPRET is set, and an interpreting Triton cannot compile")
    from ..ahead import ARCHITECTURES
    from ..environment import environment
    from ..records import SCHEMA, fingerprints, write_json
    from ..specs import KERNELS

    unknown = [number for number in arguments.arch if number not in ARCHITECTURES]
    if unknown:
        raise SystemExit(f"--arch: {unknown} are none of {list(ARCHITECTURES)}")
    numbers = arguments.arch or tuple(ARCHITECTURES)
    wanted = _wanted(arguments, numbers) if "kernels" in parts else []
    counted = numbers if "footprint" in parts else ()
    start, head = time.monotonic(), _head(SCHEMA, environment("cpu"))
    head["fingerprint"] = fingerprints(_sources(), KERNELS)
    baselines = _baselines(arguments, parts)
    missing = [baseline.path for baseline in baselines.values() if not baseline.values]
    if missing and not arguments.accept:
        raise SystemExit(
            f"there is no baseline {missing[0]} for this Triton: --no-baseline does without one, "
            f"{_ACCEPT} writes it"
        )
    outcomes = _resumed(arguments.resume, head, wanted, baselines.get("kernels"), arguments)

    def write(*, complete: bool) -> dict[str, Any]:
        found = list(outcomes.values())
        record = _record(head, found, seconds=time.monotonic() - start, complete=complete)
        for target in {arguments.json, arguments.resume} - {None}:
            write_json(target, record)
        return record

    complete = False
    try:
        if wanted:
            _compile(wanted, outcomes, baselines.get("kernels"), arguments, write)
        if counted:
            outcomes.update(_footprints(counted, baselines.get("footprint"), arguments))
        complete = all(job.key in outcomes for job in wanted)
    finally:
        record = write(complete=complete)
    problems = [text for baseline in baselines.values() for text in baseline.gone(outcomes)]
    if arguments.accept:
        _accept(baselines, record)
    _print(Console(), record, problems, baselines, accepted=arguments.accept)
    failed = record["summary"]["failed"] + len(problems)
    return int(record["summary"]["errors"] + (0 if arguments.accept else failed) > 0)


def _parts(arguments: argparse.Namespace) -> tuple[str, ...]:
    """What is asked for.

    Raises:
        SystemExit: options contradict each other, or are of what is not asked for.
    """
    if arguments.accept and arguments.no_baseline:
        raise SystemExit("--accept writes the baseline that --no-baseline does without")
    if arguments.accept and arguments.full and not arguments.baseline:
        raise SystemExit("--full --accept: name another file by --baseline than the one of CI")
    parts = tuple(arguments.parts) or (PARTS if not arguments.operations else PARTS[:1])
    if "kernels" not in parts:
        unused = ("operations", "full", "baseline", "resume")
        refuse_unused("--parts footprint", arguments, add_arguments, unused)
    if "footprint" not in parts:
        refuse_unused("compiling kernels alone", arguments, add_arguments, ("footprint",))
    if arguments.no_baseline:
        refuse_unused("--no-baseline", arguments, add_arguments, ("baseline", "footprint"))
    return parts


def _wanted(arguments: argparse.Namespace, numbers: Iterable[int]) -> list[Any]:
    from ..compile_check import jobs

    wanted = [
        job
        for job in jobs(numbers, full=arguments.full)
        if not arguments.operations or job.operation in arguments.operations
    ]
    if not wanted:
        names = dict.fromkeys(job.operation for job in jobs(numbers, full=True))
        raise SystemExit(
            f"--operations: {', '.join(arguments.operations)} is none of {', '.join(names)}"
        )
    return wanted


def _baselines(arguments: argparse.Namespace, parts: Iterable[str]) -> dict[str, Baseline]:
    from .. import compile_check, footprint

    if arguments.no_baseline:
        return {}
    whole = not arguments.arch and not arguments.operations
    kernels = arguments.baseline or compile_check.baseline_path()
    footprints = arguments.footprint or footprint.baseline_path()
    found = {
        "kernels": Baseline(path=kernels, values=compile_check.read_baseline(kernels), whole=whole),
        "footprint": Baseline(
            path=footprints, values=footprint.read_baseline(footprints), whole=whole
        ),
    }
    return {part: found[part] for part in parts}


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


def _resumed(
    path: Path | None,
    head: Mapping[str, Any],
    wanted: Iterable[Any],
    baseline: Baseline | None,
    arguments: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """What a record found right of these sources, compiled by this Triton, and what is said of it
    now: baselines and limits may be others.
    """
    if path is None or not path.is_file():
        return {}
    record = json.loads(path.read_text())
    before, now = record["environment"].get("triton"), head["environment"].get("triton")
    if record["fingerprint"] != head["fingerprint"] or before != now:
        return {}
    right = {item["job"]: item for item in record["outcomes"] if item["status"] == "passed"}
    return {
        job.key: _judged(job, right[job.key]["kernels"], [], baseline, arguments)
        for job in wanted
        if job.key in right
    }


def _compile(
    wanted: list[Any],
    outcomes: dict[str, dict[str, Any]],
    baseline: Baseline | None,
    arguments: argparse.Namespace,
    write: Any,
) -> None:
    """Compile what has no outcome yet, in processes of their own."""
    open_jobs = [job for job in wanted if job.key not in outcomes]
    processes = min(arguments.jobs or cores(), max(len(open_jobs), 1))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    written = time.monotonic()
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        pool(processes) as executor,
    ):
        task = progress.add_task("compiling", total=len(open_jobs))
        waiting = {executor.submit(_one, job): job for job in open_jobs}
        for done in as_completed(waiting):
            job = waiting[done]
            outcomes[job.key] = _outcome(job, done, baseline, arguments)
            progress.advance(task)
            if time.monotonic() - written > _INTERVAL:
                write(complete=False)
                written = time.monotonic()


def _one(job: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """In a worker: the kernels of a job, and what is demanded of them in vain."""
    import warnings

    from ..compile_check import compile_job
    from ..compile_demands import demands

    warnings.simplefilter("ignore")
    found = compile_job(job)
    problems = [f"{job.key}: {item.kernel} {text}" for item in found for text in demands(job, item)]
    return [item.as_json() for item in found], problems


def _footprints(
    numbers: Iterable[int], baseline: Baseline | None, arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Outcomes of every benchmark case, an architecture per process."""
    processes = arguments.jobs or cores()
    console = Console(stderr=True)
    found: dict[str, dict[str, Any]] = {}
    with (
        console.status("counting launches and bytes"),
        pool(processes) as executor,
    ):
        for answers in executor.map(_count, numbers):
            for answer in answers:
                found[answer["job"]] = _compared(answer, baseline, accept=arguments.accept)
    return found


def _count(number: int) -> list[dict[str, Any]]:
    """In a worker: the footprint of every benchmark case on an architecture."""
    import importlib
    import warnings

    from ..ahead import ARCHITECTURES
    from ..footprint import cases, footprint_of, key_of

    warnings.simplefilter("ignore")
    lib, architecture = importlib.import_module(PACKAGE), ARCHITECTURES[number]
    answers = []
    for case in cases():
        head = {"job": key_of(architecture, case), "architecture": number, "operation": case.kind}
        found: dict[str, Any]
        try:
            found = {"footprint": footprint_of(lib, case, architecture).as_json()}
        except Exception as error:  # noqa: BLE001 - becomes an outcome
            found = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
        answers.append({**head, **found})
    return answers


def _compared(answer: dict[str, Any], baseline: Baseline | None, *, accept: bool) -> dict[str, Any]:
    from ..footprint import differences

    if "error" in answer:
        reason = answer.pop("error")
        return {**answer, "status": "error", "reason": reason, "kernels": []}
    problems = []
    if baseline is not None and baseline.values and not accept:
        base = baseline.values.get(answer["job"])
        problems = [f"{answer['job']}: is not in the baseline"]
        if base is not None:
            problems = differences(answer["job"], answer["footprint"], base)
    status = "failed" if problems else "passed"
    return {**answer, "status": status, "reason": "; ".join(problems), "kernels": []}


def _head_of(job: Any) -> dict[str, Any]:
    return {"job": job.key, "architecture": job.architecture, "operation": job.operation}


def _outcome(
    job: Any, done: Any, baseline: Baseline | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    error = done.exception()
    if error is not None:
        words = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        return {**_head_of(job), "status": "error", "reason": words, "kernels": []}
    kernels, problems = done.result()
    return _judged(job, kernels, problems, baseline, arguments)


def _judged(
    job: Any,
    kernels: list[dict[str, Any]],
    problems: list[str],
    baseline: Baseline | None,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """The outcome of a job that compiled; what --full adds to the baseline is held to the demands
    alone. problems: of other demands than those on resources.
    """
    from ..compile_demands import differences, over_limits

    known = {} if baseline is None or arguments.accept else baseline.values
    base = known.get(job.key)
    found = [*problems, *over_limits(job, kernels)]
    if base is not None:
        found += differences(job, kernels, base)
    elif known and (arguments.baseline or not arguments.full):
        found.append(f"{job.key}: is not in the baseline")
    status = "failed" if found else "passed"
    return {**_head_of(job), "status": status, "reason": "; ".join(found), "kernels": kernels}


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


def _accept(baselines: Mapping[str, Baseline], record: dict[str, Any]) -> None:
    from ..footprint import baseline_of
    from ..records import write_json

    items = record["outcomes"]
    if "kernels" in baselines:
        found = {item["job"]: item["kernels"] for item in items if item["kernels"]}
        baseline = baselines["kernels"]
        triton = record["environment"].get("triton")
        write_json(baseline.path, {"triton": triton, "kernels": baseline.accepted(found)})
    if "footprint" in baselines:
        found = {item["job"]: item["footprint"] for item in items if "footprint" in item}
        baseline = baselines["footprint"]
        write_json(baseline.path, baseline_of(baseline.accepted(found)))


def _print(
    console: Console,
    record: dict[str, Any],
    problems: list[str],
    baselines: Mapping[str, Baseline],
    *,
    accepted: bool,
) -> None:
    table = Table(title="compiled kernels", title_justify="left")
    titles = ("kernels", "most registers", "most shared memory", "on a stack", "most stack")
    for name in ("architecture", *titles):
        table.add_column(name, justify="left" if name == "architecture" else "right")
    numbers = dict.fromkeys(item["architecture"] for item in record["outcomes"] if item["kernels"])
    for number in numbers:
        own = [k for o in record["outcomes"] if o["architecture"] == number for k in o["kernels"]]
        table.add_row(
            f"sm_{number}",
            str(len(own)),
            str(max((k["registers"] for k in own), default=0)),
            str(max((k["shared"] for k in own), default=0)),
            str(sum(k["stack"] > 0 for k in own)),
            str(max((k["stack"] for k in own), default=0)),
        )
    if numbers:
        console.print(table)
    sentences = [
        sentence
        for item in record["outcomes"]
        if item["status"] != "passed"
        for sentence in (_together(item) if item["status"] == "failed" else [_error(item)])
    ]
    for sentence in (*_by_architecture(sentences), *([] if accepted else problems)):
        console.print(Text(sentence, style="red"), soft_wrap=True)
    counted = sum("footprint" in item for item in record["outcomes"])
    for baseline in baselines.values():
        verb = "written to" if accepted else "compared with"
        console.print(f"{verb} {baseline.path}", soft_wrap=True)
    summary = record["summary"]
    console.print(
        f"{summary['compiled']} kernels compiled, {counted} footprints counted, "
        f"{summary['failed']} differ or break a demand, {summary['errors']} errors, "
        f"{record['seconds']:.0f} s",
        soft_wrap=True,
    )
    if not accepted and (summary["failed"] or problems):
        console.print(f"if this is meant: {_ACCEPT}", soft_wrap=True)


def _together(item: dict[str, Any]) -> list[str]:
    return item["reason"].split("; ")


def _error(item: dict[str, Any]) -> str:
    return f"{item['job']}: {item['reason']}"


def _by_architecture(sentences: Iterable[str]) -> list[str]:
    """Sentences that differ in their first word alone, the architecture, as one."""
    found: dict[str, list[str]] = {}
    for sentence in sentences:
        architecture, _, rest = sentence.partition(" ")
        found.setdefault(rest, []).append(architecture)
    return [f"{', '.join(names)} {rest}" for rest, names in found.items()]
