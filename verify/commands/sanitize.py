"""Kernels under compute-sanitizer: memory, races, uninitialised reads, barriers."""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..children import cores
from .common import (
    add_device,
    add_json,
    check_names,
    count,
    package,
    positive,
    prepare,
    separated,
    source_directory,
)

if TYPE_CHECKING:
    from ..records import Recorder
    from ..run import Outcome
    from ..sanitize import Job

_CANNOT = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_json(parser)
    add_device(parser)
    parser.add_argument(
        "--kernels", type=separated, default=(), metavar="A,B", help="names of kernels"
    )
    parser.add_argument(
        "--tools", type=separated, default=(), metavar="A,B", help="all, unless stated"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what --json FILE already has, but for launches that did not end",
    )
    parser.add_argument("--minutes", type=positive, help="start no batch after so long")
    parser.add_argument("--batch", type=count, default=100, help="launches per process")
    parser.add_argument(
        "--workers", type=count, metavar="N", help="processes; one per two cores, at most 8"
    )
    parser.add_argument("--tree", type=Path, metavar="DIR", help="another copy of the package")


def _prepared(arguments: argparse.Namespace) -> torch.device:
    if arguments.resume and not arguments.json:
        raise SystemExit("--resume keeps what --json FILE has, and there is no --json")
    return prepare(arguments.device)


def _known(
    record: Mapping[str, Any], recorder: "Recorder", jobs: Sequence["Job"]
) -> list["Outcome"]:
    """What a record of the same sources says of these jobs, but for those that did not end."""
    from ..run import Outcome

    if record.get("fingerprint") != recorder.record(complete=False)["fingerprint"]:
        return []
    outcomes = [Outcome(**values) for values in record["outcomes"]]
    wanted = {job.key for job in jobs}
    return [found for found in outcomes if found.key in wanted and found.status != "error"]


def main(arguments: argparse.Namespace) -> int:
    """1 if a tool reports something, 2 if nothing can be run here."""
    device = _prepared(arguments)
    from ..environment import environment
    from ..fuzz_worker import is_fixed, plan_pool
    from ..records import Recorder, fingerprints
    from ..run import Outcome
    from ..sanitize import TOOLS, Sanitizer, jobs_of, open_jobs, tool_path, unavailable
    from ..specs import KERNELS

    check_names("kernels", arguments.kernels, (spec.name for spec in KERNELS))
    check_names("tools", arguments.tools, TOOLS)
    named = arguments.kernels
    kernels = [spec for spec in KERNELS if not named or spec.name in named]
    tree = arguments.tree.resolve() if arguments.tree else source_directory()
    recorder = Recorder(
        arguments.json,
        command="sanitize",
        environment=environment(device),
        seed=0,
        fingerprint=fingerprints(tree, kernels),
    )
    console, tool = Console(), tool_path()
    reason = unavailable(device, tool)
    tools = arguments.tools or TOOLS
    if reason or tool is None:
        for spec in kernels:
            for name in tools:
                recorder.add(
                    Outcome(
                        kernel=spec.name, path="", plan="", case="", dtype="", mode=name,
                        status="unavailable", reason=reason,
                    )
                )  # fmt: skip
        recorder.write(complete=True)
        console.print(Text(f"unavailable: {reason}", style="yellow"), soft_wrap=True)
        return _CANNOT
    pools = {spec.name: plan_pool(package(), spec, device, most=0) for spec in kernels}
    fixed = [spec.name for spec in kernels if is_fixed(spec, device)]
    jobs = jobs_of(kernels, pools, fixed, tools)
    if arguments.resume and arguments.json.is_file():
        recorder.outcomes += _known(json.loads(arguments.json.read_text()), recorder, jobs)
    waiting = open_jobs(jobs, recorder.outcomes)
    sanitizer = Sanitizer(
        path=tool,
        device=str(device),
        tree=str(tree) if arguments.tree else "",
        batch=arguments.batch,
        processes=arguments.workers or min(8, max(1, cores() // 2)),
    )
    end = time.monotonic() + 60 * (arguments.minutes or 1e6)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    complete = False
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("sanitizing", total=len(waiting))
            for outcome in sanitizer.run(waiting):
                recorder.add(outcome)
                progress.advance(task)
                if not outcome.ok:
                    progress.console.print(str(outcome), style="red", markup=False)
                if time.monotonic() > end:
                    break
            else:
                complete = True
    finally:
        recorder.write(complete=complete)
    wrong = [outcome for outcome in recorder.outcomes if not outcome.ok]
    console.print(f"{len(recorder.outcomes)} launches watched, {len(wrong)} with errors")
    for outcome in wrong:
        console.print(Text(f"{outcome} (plan {outcome.plan})", style="red"), soft_wrap=True)
    return int(bool(wrong))
