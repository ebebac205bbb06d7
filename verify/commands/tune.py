"""Search the plans of this GPU and write them as a table."""

import argparse
import importlib
import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .common import (
    add_device,
    add_json,
    amount,
    check_names,
    count,
    dtypes,
    integers,
    package,
    positive,
    prepare,
    separated,
    source_directory,
)

if TYPE_CHECKING:
    from ..tune import Finding, Target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_json(parser)
    add_device(parser)
    parser.add_argument(
        "--models",
        type=separated,
        default=(),
        metavar="A,B",
        help="built-in names or configurations; without a GPU `tiny`, unless stated",
    )
    parser.add_argument(
        "--tokens",
        type=integers,
        default=(),
        metavar="T,T",
        help="2048,8192, or 24 without a GPU, unless stated",
    )
    parser.add_argument("--ranks", type=integers, default=(16,), metavar="R,R", help="16")
    parser.add_argument(
        "--dtypes", type=dtypes, default=("bfloat16",), metavar="A,B", help="bfloat16"
    )
    parser.add_argument("--rounds", type=count, default=7, help="samples per candidate")
    parser.add_argument(
        "--jobs", type=amount, default=12, help="processes that compile ahead, or 0"
    )
    parser.add_argument("--minutes", type=positive, default=8.0, help="stop searching after that")
    parser.add_argument(
        "--table", type=Path, help="where to write (default: the own table of this GPU)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Search, print what was found, write the table; 1 if a candidate was wrong.

    Raises:
        SystemExit: an option names nothing that is known, or there is no GPU and no --table.
    """
    device = prepare(arguments.device)
    from ..environment import environment
    from ..records import SCHEMA, fingerprints
    from ..specs import KERNELS
    from ..tune import Trial, clock_for, compile_ahead, search, settle

    lib = package()
    plan_table = importlib.import_module(f"{lib.__name__}.plan_table")
    start = time.monotonic()
    console = Console(stderr=True)
    gpu = device.type == "cuda"
    if not (gpu or arguments.table):
        raise SystemExit(
            "tune times plans on a GPU, and there is none in use; --table FILE tries the search in "
            "Triton's interpreter, whose times say nothing of a GPU"
        )
    wanted = _targets(arguments, gpu=gpu)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "command": "tune",
        "environment": environment(device),
        "seed": 0,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": fingerprints(source_directory(), KERNELS),
        "plans": [],
    }
    if arguments.jobs and gpu:
        for failure in compile_ahead(wanted, device, arguments.jobs):
            console.print(f"does not run: {failure}", markup=False)
    facts = lib.Device.of(device)
    findings: list[Finding] = []
    clock = clock_for(device)
    with Progress(console=console, transient=True) as progress:
        for target in progress.track(wanted, description="tune"):
            if time.monotonic() - start > 60 * arguments.minutes:
                console.print(f"stopped after {arguments.minutes} minutes at {target.name}")
                break
            findings.append(search(Trial(lib, target, device), clock, arguments.rounds))
            _keep(arguments.json, record, findings, plan_table)
    complete = len(findings) == len(wanted)
    findings = settle(findings)
    plans = {finding.bucket: finding.plan for finding in findings}
    path = arguments.table or plan_table.tuned_path(facts)
    plan_table.write_table(path, facts, plans)
    wrong = [line for finding in findings for line in finding.wrong]
    ratios = [math.log(finding.heuristic_ms / finding.ms) for finding in findings]
    mean = math.exp(sum(ratios) / max(1, len(ratios)))
    record["seconds"] = round(time.monotonic() - start, 3)
    record["summary"] = {
        "tuned": len(plans),
        "wrong": len(wrong),
        "heuristic_over_tuned": mean,
        "complete": complete,
    }
    _keep(arguments.json, record, findings, plan_table)
    _print(findings, Console())
    for line in wrong:
        console.print(f"wrong: {line}", markup=False)
    console.print(f"{len(plans)} plans in {path}; heuristic / tuned = {mean:.3f}", markup=False)
    return 1 if wrong else 0


def _targets(arguments: argparse.Namespace, *, gpu: bool) -> "list[Target]":
    """What is to be tuned.

    Raises:
        SystemExit: an option names nothing that is known.
    """
    from ..bench_cases import BUILT_IN, shape_of
    from ..inputs import DTYPES
    from ..tune import targets

    check_names("dtypes", arguments.dtypes, DTYPES)
    models = arguments.models or (BUILT_IN if gpu else ("tiny",))
    try:
        for name in models:
            shape_of(name)
    except ValueError as error:
        raise SystemExit(f"--models: {error}") from None
    return targets(
        models,
        arguments.tokens or ((2048, 8192) if gpu else (24,)),
        arguments.ranks,
        [DTYPES[name] for name in arguments.dtypes],
    )


def _keep(
    file: Path | None,
    record: dict[str, Any],
    findings: "Sequence[Finding]",
    plan_table: ModuleType,
) -> None:
    """Put what was found into the record, and write it if a file is named."""
    from ..records import write_json

    record["plans"] = [_entry(finding, plan_table) for finding in findings]
    if file:
        write_json(file, record)


def _entry(finding: "Finding", plan_table: ModuleType) -> dict[str, Any]:
    """What a record says of a bucket."""
    return {
        "name": finding.target.name,
        "bucket": finding.bucket,
        "plan": plan_table.plan_entry(finding.plan),
        "ms": finding.ms,
        "heuristic_ms": finding.heuristic_ms,
        "tried": finding.tried,
        "wrong": list(finding.wrong),
    }


def _print(findings: "Sequence[Finding]", console: Console) -> None:
    table = Table("problem", "tuned ms", "heuristic ms", "candidates", "plan")
    for finding in findings:
        tile = finding.plan.tile
        knobs = f"{tile.block_m}x{tile.block_n}x{tile.block_k} w{tile.warps} s{tile.stages}"
        table.add_row(
            finding.target.name,
            f"{finding.ms:.4f}",
            f"{finding.heuristic_ms:.4f}",
            str(finding.tried),
            f"{finding.plan.path.value} {knobs}",
        )
    console.print(table)
