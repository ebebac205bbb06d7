"""Whether the kernels got slower than at another revision: pairs in one process, decided."""

import argparse
import fnmatch
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .common import PACKAGE, add_common, count, on_a_gpu, refuse_unused, separated, source_directory

_ROOT = Path(__file__).resolve().parent.parent.parent
_RECORDS = Path(__file__).resolve().parent.parent / "records"
_STYLES = {
    "regression": "bold red",
    "ambiguous": "yellow",
    "unmeasured": "yellow",
    "improvement": "green",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_common(parser)
    parser.add_argument(
        "--against", metavar="REV|DIR", help="what to compare with: a git revision or a directory"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="compare today's sources with themselves in 10 processes, and publish the rates",
    )
    parser.add_argument("--names", type=separated, default=(), metavar="GLOB,..", help="by name")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after so long (8)")
    parser.add_argument(
        "--processes", type=count, metavar="N", help="exactly so many processes of each benchmark"
    )
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep what this record has")
    parser.add_argument(
        "--accept",
        type=separated,
        default=(),
        metavar="A,B",
        help="peak_bytes, launches: what may grow",
    )
    parser.add_argument(
        "--plant", type=float, default=0.0, metavar="PERCENT", help="slow today's kernels by that"
    )
    parser.add_argument(
        "--write-slow-tree",
        type=Path,
        metavar="DIR",
        help="only write a revision there whose kernels are slower by --plant",
    )
    parser.add_argument(
        "--rates", type=Path, metavar="FILE", help="only compute the rates of stored samples"
    )
    parser.add_argument("--draws", type=count, default=2000, help="suites drawn for the rates")
    parser.add_argument("--list", action="store_true", help="only name the benchmarks")
    parser.add_argument(
        "--ahead",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile first, in several processes (GPU)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Run the gate; 1 a regression, 2 ambiguous or unmeasured, 0 neither.

    With --calibrate: 0 where every benchmark is in the rates and they are those that are promised,
    1 where they are not, 2 where something was not measured.
    """
    _refuse_unused(arguments)
    if arguments.rates:
        return _print_rates(arguments)
    if arguments.write_slow_tree:
        return _write_slow_tree(arguments)
    cases = selected(arguments, gpu=arguments.device != "cpu" and torch.cuda.is_available())
    if arguments.list:
        Console().print("\n".join(case.name for case in cases), markup=False, highlight=False)
        return 0
    chosen = bool(arguments.against) + arguments.calibrate
    if chosen > 1 or not (chosen or arguments.plant):
        raise SystemExit("gate needs --against REV-or-directory, or --calibrate")
    if arguments.calibrate and arguments.plant:
        raise SystemExit("--calibrate compares equal revisions: nothing can be planted in one")
    device = on_a_gpu("gate", arguments.device)
    from ..gate import EXACT, exit_status

    if unknown := [name for name in arguments.accept if name not in EXACT]:
        raise SystemExit(f"--accept: {', '.join(unknown)} is none of {', '.join(EXACT)}")
    with _trees(arguments, device) as trees:
        record = _run(arguments, cases, trees, device)
    print_gate(Console(width=200), record)
    if arguments.calibrate:
        return calibrated(record)
    return exit_status(record["summary"])


def _refuse_unused(arguments: argparse.Namespace) -> None:
    """Refuse options that have no meaning for what is asked for.

    Raises:
        SystemExit: there is one.
    """
    uses = {
        "rates": ("draws", "seed"),
        "write_slow_tree": ("plant",),
        "list": ("names",),
    }
    options = [*uses, "draws", "against", "calibrate", "names", "minutes", "processes", "resume"]
    options += ["accept", "plant", "ahead", "json", "seed"]
    for name, used in uses.items():
        if getattr(arguments, name):
            unused = [option for option in options if option not in (name, *used)]
            refuse_unused(f"--{name.replace('_', '-')}", arguments, add_arguments, unused)
    if not arguments.rates:
        refuse_unused("what computes no --rates", arguments, add_arguments, ("draws",))
    if arguments.calibrate:
        refuse_unused("--calibrate", arguments, add_arguments, ("accept",))


def calibrated(record: dict[str, Any]) -> int:
    """The exit status of a calibration."""
    from ..statistics import Rule

    rates, rule = record["rates"], Rule()
    if rates is None or rates["benchmarks"] < record["summary"]["benchmarks"]:
        return 2
    kept = rates["false_alarm_rate_at_most"] <= rule.false_alarms and rates["power"] >= rule.power
    return int(not kept)


def selected(arguments: argparse.Namespace, *, gpu: bool) -> tuple[Any, ...]:
    """The benchmarks that the options ask for, in order.

    Raises:
        SystemExit: nothing is left.
    """
    from ..gate_cases import suite, tiny_suite

    cases = suite() if gpu or arguments.list else tiny_suite()
    names = arguments.names
    kept = tuple(
        case for case in cases if not names or any(fnmatch.fnmatch(case.name, n) for n in names)
    )
    if not kept:
        raise SystemExit(f"--names: nothing of {len(cases)} benchmarks is called so")
    return kept


@contextmanager
def _trees(arguments: argparse.Namespace, device: torch.device) -> Iterator[Any]:
    """Both revisions, in a directory of their own while the gate runs.

    Raises:
        SystemExit: there is no such revision.
    """
    from ..gate_process import Trees, tree_of

    with tempfile.TemporaryDirectory(prefix="gate-") as scratch:
        today = str(source_directory())
        places = [Path(scratch) / name for name in ("base", "head")]
        try:
            base, head = (
                tree_of(against, _ROOT, place, package=PACKAGE)
                for against, place in zip((arguments.against or today, today), places, strict=True)
            )
        except ValueError as error:
            raise SystemExit(f"--against: {error}") from None
        yield Trees(
            base=base, head=head, device=str(device), seed=arguments.seed, plant=arguments.plant
        )


def _run(
    arguments: argparse.Namespace, cases: tuple[Any, ...], trees: Any, device: torch.device
) -> dict[str, Any]:
    from ..gate import Gate
    from ..gate_records import GateRecord, history_of
    from ..statistics import Rule

    console = Console(stderr=True)
    rule = Rule()
    if arguments.calibrate or arguments.processes:
        rule = replace(rule, stages=(arguments.processes or 10,))
    record = GateRecord.begin(
        arguments.json,
        trees,
        against=arguments.against or "itself",
        calibration=arguments.calibrate,
        package=source_directory(),
    )
    gate = Gate(
        cases=cases,
        visit=trees.visit,
        rule=rule,
        history={} if arguments.calibrate else history_of(_RECORDS, device),
        accept=arguments.accept,
        seconds=60 * arguments.minutes,
    )
    if arguments.resume:
        try:
            gate.found, text = record.take_up(arguments.resume)
        except ValueError as error:
            raise SystemExit(f"--resume: {error}") from None
        console.print(text, markup=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    try:
        with Progress(*columns, console=console) as progress:
            if arguments.ahead and device.type == "cuda":
                _ahead(progress, cases, trees, device)
            first = len(cases) * rule.stages[0]
            task = progress.add_task("pairs", total=first, completed=len(gate.found))
            for visit in gate.run():
                more = max(first, len(gate.found))
                text = f"process {visit.process}: {visit.name}"
                progress.update(task, description=text, advance=1, total=more)
                if visit.reason:
                    text = f"unmeasured: {visit.name}: {visit.reason}"
                    progress.console.print(text, style="red", markup=False)
                if len(gate.found) % len(cases) == 0:
                    record.write(gate)
    except BaseException:
        record.write(gate)
        raise
    return record.write(gate, last=True)


def _ahead(progress: Progress, cases: tuple[Any, ...], trees: Any, device: torch.device) -> None:
    from ..bench_ahead import compile_ahead

    task = progress.add_task("compiling ahead", total=None)
    for tree in trees.different():
        for name, _, error in compile_ahead(cases, device, tree=tree):
            progress.update(task, description=f"compiled ahead: {name}", advance=1)
            if error:
                progress.console.print(f"ahead: {name}: {error}", style="yellow", markup=False)


def print_gate(console: Console, record: dict[str, Any]) -> None:
    """Every benchmark with its decision, then the counts."""
    table = Table(title=f"against {record['against']}: time now over time before", width=200)
    table.add_column("benchmark", overflow="fold")
    for heading in ("before ms", "now ms", "change", "limit", "finds", "noise", "n"):
        table.add_column(heading, justify="right")
    table.add_column("decision")
    table.add_column("why", overflow="fold")
    for entry in record["benchmarks"]:
        table.add_row(*_row(entry), style=_STYLES.get(entry["decision"]))
    console.print(table)
    summary = record["summary"]
    counts = ", ".join(f"{summary[key]} {key}" for key in ("same", *_STYLES))
    console.print(f"{counts}; {record['seconds']:.0f} s", markup=False)
    for text in summary["invalid"]:
        console.print(f"invalid: {text}", style="yellow", markup=False)
    if record.get("rates"):
        from ..gate_records import line_of

        console.print(line_of(record["rates"]), markup=False)


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    bits = [f"{arm}: other bits in {', '.join(names)}" for arm, names in entry["bits"].items()]
    why = "; ".join([entry["reason"], *bits])
    if entry["ratio"] is None:
        return (entry["name"], "", "", "", "", "", "", "", entry["decision"], why)
    return (
        entry["name"],
        *(f"{value:.4f}" for value in entry["ms"]),
        f"{entry['ratio'] - 1:+.2%}",
        f"{entry['limit'] - 1:.2%}",
        f"{entry['sees'] - 1:.2%}",
        f"{entry['noise']:.2%}",
        str(entry["processes"]),
        entry["decision"],
        why,
    )


def _print_rates(arguments: argparse.Namespace) -> int:
    from ..gate_proof import prove
    from ..gate_records import line_of, visits_of
    from ..statistics import Rule

    try:
        for percent in (3, 5, 10):
            found = prove(
                visits_of(arguments.rates),
                Rule(),
                slowdown=percent / 100,
                draws=arguments.draws,
                seed=arguments.seed,
            )
            if percent == 5:
                status = int(not math.isfinite(found.power) or not _kept(found))
            Console().print(line_of(found.as_json()), markup=False, highlight=False)
    except ValueError as error:
        raise SystemExit(f"--rates: {error}") from None
    return status


def _kept(found: Any) -> bool:
    from ..gate_proof import kept
    from ..statistics import Rule

    return kept(found, Rule())


def _write_slow_tree(arguments: argparse.Namespace) -> int:
    from ..gate_plant import slow_tree

    try:
        tree = slow_tree(source_directory(), arguments.write_slow_tree, arguments.plant)
    except ValueError as error:
        raise SystemExit(f"--write-slow-tree: {error}") from None
    Console().print(f"{tree}: kernels slower by {arguments.plant:g}%", markup=False)
    return 0
