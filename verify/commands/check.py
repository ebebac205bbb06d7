"""Every kernel, path, case and dtype against the truth."""

import argparse
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..children import cores
from .common import (
    Pulse,
    add_common,
    add_selection,
    check_names,
    count,
    package,
    prepare,
    source_directory,
)

if TYPE_CHECKING:
    from ..records import Recorder
    from ..run import Problem

_PER_GPU = 8
"""Processes beside one GPU: each has a context of some hundred megabytes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_common(parser)
    add_selection(parser)
    parser.add_argument(
        "--workers",
        type=count,
        metavar="N",
        help=f"processes; one per core, on a GPU at most {_PER_GPU}",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="keep what this record of the same selection and machine found right of kernels that "
        "are as they were",
    )
    parser.add_argument(
        "--failures",
        type=Path,
        metavar="DIR",
        help="write failures there, for replay; beside the record, or into a temporary directory",
    )
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--quick", action="store_true", help="small cases, each in one dtype (default on a CPU)"
    )
    depth.add_argument(
        "--full", action="store_true", help="every plan, case and dtype (default on a GPU)"
    )


class Replays:
    """Where failures are written, and the commands that rerun them, by the keys of outcomes."""

    def __init__(self, directory: Path | None, device: torch.device) -> None:
        self.commands: dict[tuple[str, ...], str] = {}
        self._directory, self._device = directory, device

    @property
    def directory(self) -> Path:
        """The one that was stated, or a temporary one, made when it is first needed."""
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="verify-failures-"))
        return self._directory

    def keep(self, key: tuple[str, ...], file: Path) -> str:
        """The command that reruns a file, kept for the report."""
        words = ["python", "-m", "verify", "replay", str(file), "--device", str(self._device)]
        self.commands[key] = shlex.join(words)
        return self.commands[key]


def _processes(device: torch.device) -> int:
    return cores() if device.type == "cpu" else min(cores(), _PER_GPU)


def _place(arguments: argparse.Namespace) -> Path | None:
    if arguments.failures is not None or arguments.json is None:
        return arguments.failures
    return arguments.json.parent / "failures"


def main(arguments: argparse.Namespace) -> int:
    """Run the checks; 1 if any failed or could not be done, or a path was never run on a GPU."""
    device = prepare(arguments.device)
    from ..environment import environment
    from ..findings import write_failure
    from ..inputs import DTYPES, MODES
    from ..parallel import checked
    from ..records import Recorder, fingerprints, judges, selection_of
    from ..report import failure_line, print_report
    from ..run import Selection
    from ..specs import KERNELS

    lib = package()
    cases = [case for spec in KERNELS for case in spec.cases]
    check_names("kernels", arguments.kernels, (spec.name for spec in KERNELS))
    names = [case.name for case in cases] + sorted({tag for case in cases for tag in case.tags})
    check_names("cases", arguments.cases, names)
    check_names("dtypes", arguments.dtypes, DTYPES)
    check_names("modes", arguments.modes, MODES)
    quick = arguments.quick or (device.type == "cpu" and not arguments.full)
    selection = Selection(
        kernels=arguments.kernels,
        paths=arguments.paths,
        cases=arguments.cases,
        dtypes=arguments.dtypes,
        modes=arguments.modes,
        quick=quick,
        seed=arguments.seed,
    )
    problems = selection.problems(lib, KERNELS, device)
    workers = arguments.workers or _processes(device)
    facts = environment(device)
    recorder = Recorder(
        arguments.json,
        command="check",
        environment=facts,
        seed=arguments.seed,
        fingerprint=fingerprints(source_directory(), KERNELS),
        judge=judges(KERNELS),
        selection=selection_of(selection),
    )
    console, start = Console(stderr=True), time.monotonic()
    if arguments.resume:
        problems = _open(problems, arguments.resume, recorder, console)
    if device.type == "cpu":
        # The interpreter's arrays are small: threads only cost.
        torch.set_num_threads(1)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    complete, replays, pulse = False, Replays(_place(arguments), device), Pulse(console)
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("checking", total=len(problems))
            for problem, outcomes in checked(problems, selection, workers=workers):
                for outcome in outcomes:
                    recorder.add(outcome)
                    if not outcome.ok:
                        file = write_failure(replays.directory, outcome, problem, environment=facts)
                        line = failure_line(outcome, replays.keep(outcome.key, file))
                        progress.console.print(line, style="red", markup=False, soft_wrap=True)
                name = f"{problem.spec.name} {problem.case.name}"
                progress.update(task, description=name, advance=1)
                pulse(f"{progress.tasks[0].completed:.0f} of {len(problems)} problems checked")
        complete = True
    finally:
        if recorder.outcomes:
            _write(recorder, console, complete=complete)
    if not recorder.outcomes:
        raise SystemExit("nothing was selected: no kernel has these cases, dtypes, modes and paths")
    print_report(
        Console(),
        recorder.outcomes,
        seconds=time.monotonic() - start,
        replays=replays.commands,
    )
    wrong = any(not outcome.ok for outcome in recorder.outcomes)
    return int(_absent(selection, recorder.outcomes, device, console) or wrong)


def _write(recorder: "Recorder", console: Console, *, complete: bool) -> None:
    """Write the record; where the run was ended, say how it is gone on with."""
    recorder.write(complete=complete)
    if not complete:
        text = "nothing of this run is kept; with --json FILE, --resume FILE goes on with it"
        if recorder.path is not None:
            text = f"the same options and --resume {recorder.path} go on"
        console.print(text, markup=False, soft_wrap=True)


def _open(
    problems: Sequence["Problem"], file: Path, recorder: "Recorder", console: Console
) -> tuple["Problem", ...]:
    """The problems that a record leaves open, all if there is none; what it says of the others is
    taken over, which is told.
    """
    from ..resume import kept

    if not file.is_file():
        text = f"there is no {file} to go on with: everything is checked"
        console.print(text, markup=False, soft_wrap=True)
        return tuple(problems)
    names = {problem.name for problem in problems}
    try:
        outcomes, seconds = kept(file, recorder.record(complete=False), names)
    except ValueError as error:
        raise SystemExit(f"--resume: {file}: {error}") from None
    recorder.resume(outcomes, seconds)
    done = {outcome.problem for outcome in outcomes}
    left = tuple(problem for problem in problems if problem.name not in done)
    text = f"{len(problems) - len(left)} of {len(problems)} problems are taken over from {file}"
    console.print(text, markup=False, soft_wrap=True)
    return left


def _absent(
    selection: Any, outcomes: Sequence[Any], device: torch.device, console: Console
) -> bool:
    """Whether a run on a GPU left a path out altogether, which is told."""
    from ..report import never_run

    narrowed = selection.cases or selection.dtypes or selection.modes or selection.paths
    absent = {} if narrowed or device.type == "cpu" else never_run(outcomes)
    for name, reason in absent.items():
        console.print(f"{name} was never run: {reason}", style="red", markup=False)
    return bool(absent)
