"""Times against the floor and the peers; only of what is right."""

import argparse
import fnmatch
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..bench import Bench, Deadline, Entry
from ..bench_ahead import compile_ahead
from ..bench_cases import BUILT_IN, DTYPES, KINDS, ROUTINGS, BenchCase, Grid, targets
from ..bench_report import print_benchmarks
from ..peers import PEERS
from ..timing import Effort, clock_of
from .common import (
    add_common,
    check_names,
    dtypes,
    integers,
    on_a_gpu,
    package,
    refuse_unused,
    separated,
    source_directory,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_common(parser)
    parser.add_argument(
        "--models",
        type=separated,
        default=(),
        metavar="A,B",
        help=f"{', '.join(BUILT_IN)}, tiny, or directories or names of transformers configurations",
    )
    parser.add_argument("--kinds", type=separated, default=(), metavar="A,B", help=", ".join(KINDS))
    parser.add_argument("--T", type=integers, default=(), metavar="N,M", help="tokens")
    parser.add_argument("--rank", type=integers, default=(), metavar="N,M")
    parser.add_argument(
        "--routing", type=separated, default=(), metavar="A,B", help="|".join(ROUTINGS)
    )
    parser.add_argument("--dtypes", type=dtypes, default=(), metavar="A,B")
    parser.add_argument("--names", type=separated, default=(), metavar="GLOB,..", help="by name")
    parser.add_argument(
        "--full",
        action="store_true",
        help="the product of all tokens, ranks and routings that are not stated",
    )
    parser.add_argument("--list", action="store_true", help="only name what would be timed")
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="measure beside peers"
    )
    parser.add_argument("--resume", action="store_true", help="keep what --json FILE already has")
    parser.add_argument("--minutes", type=float, help="stop after so long; --resume goes on")
    parser.add_argument("--quick", action="store_true", help="a fifth of the samples")
    parser.add_argument(
        "--ahead",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile first, in several processes (GPU)",
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="first calls of layers in fresh processes with an empty compile cache",
    )


def main(arguments: argparse.Namespace) -> int:
    """Run the benchmarks; 1 if any gave wrong results or none, 2 if time ran out."""
    _refuse_unused(arguments)
    cases = selected(arguments, gpu=arguments.device != "cpu" and torch.cuda.is_available())
    if arguments.list:
        Console().print("\n".join(case.name for case in cases), markup=False, highlight=False)
        return 0
    device = on_a_gpu("bench", arguments.device)
    if arguments.cold and device.type != "cuda":
        raise SystemExit(f"--cold times compilations for a GPU, and the device is {device}")
    from ..bench_records import BenchRecord

    console = Console(stderr=True)
    record = BenchRecord.start(
        arguments.json, cases, package=source_directory(), device=device, seed=arguments.seed
    )
    if arguments.resume:
        console.print(_taken_up(record), markup=False)
    waiting = [case for case in cases if case.name not in record.names]
    deadline = Deadline(None if arguments.minutes is None else 60 * arguments.minutes)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    effort = Effort(budget_ms=50.0, least=11, most=30) if arguments.quick else Effort()
    with Progress(*columns, console=console) as progress:
        if arguments.ahead and device.type == "cuda" and waiting:
            task = progress.add_task("compiling ahead", total=None)
            for name, _, error in compile_ahead(waiting, device):
                progress.update(task, description=f"compiled ahead: {name}", advance=1)
                if error:
                    progress.console.print(f"ahead: {name}: {error}", style="yellow", markup=False)
        bench = Bench(
            lib=package(),
            device=device,
            clock=clock_of(device),
            effort=effort,
            peers=tuple(PEERS) if arguments.peers else (),
            seed=arguments.seed,
        ).ready(case.dtype for case in cases)
        record.head["ceilings"] = {
            name: {"flops": peak.flops, "bytes_per_s": peak.bandwidth}
            for name, peak in bench.peaks.items()
        }
        task = progress.add_task("timing", total=len(cases), completed=len(cases) - len(waiting))
        for found in bench.run(_until(deadline, waiting)):
            progress.update(task, description=found.case.name, advance=1)
            if isinstance(found, Entry):
                record.entries.append(found.as_json())
                progress.console.print(_line(found), markup=False, highlight=False)
            else:
                record.failures.append(found.as_json())
                text = f"{found.status}: {found.case.name}: {found.reason}"
                progress.console.print(text, style="red", markup=False)
            record.write()
        if arguments.cold and device.type == "cuda" and not deadline.passed:
            record.add_cold(progress.console)
    whole = record.write(last=True)
    print_benchmarks(Console(width=220), whole)
    if not whole["summary"]["complete"]:
        measured = len(record.entries) + len(record.failures)
        console.print(f"{measured} of {len(cases)} measured: run again with --resume")
        return 2
    return int(bool(record.failures))


def _refuse_unused(arguments: argparse.Namespace) -> None:
    if arguments.list:
        unused = ("json", "seed", "resume", "minutes", "quick", "cold", "peers", "ahead")
        refuse_unused("--list", arguments, add_arguments, unused)
    if arguments.resume and not arguments.json:
        raise SystemExit("--resume keeps what --json FILE has, and there is no --json")


def _taken_up(record: Any) -> str:
    try:
        return record.take_up()
    except ValueError as error:
        raise SystemExit(f"--resume: {error}") from None


def _until(deadline: Deadline, cases: Iterable[BenchCase]) -> Iterator[BenchCase]:
    for case in cases:
        if deadline.passed:
            return
        yield case


def _line(entry: Entry) -> str:
    peers = ", ".join(f"{name} {peer.ms:.3f}" for name, peer in entry.peers.items())
    over = entry.ms / entry.floor_ms
    return f"{entry.case.name}: {entry.ms:.3f} ms, {over:.2f} x floor" + (peers and f"; {peers}")


def selected(arguments: argparse.Namespace, *, gpu: bool) -> tuple[BenchCase, ...]:
    """The cases that the options ask for, in order.

    Raises:
        SystemExit: an option names nothing that is known, or nothing is left.
    """
    check_names("kinds", arguments.kinds, KINDS)
    check_names("routing", arguments.routing, ROUTINGS)
    check_names("dtypes", arguments.dtypes, DTYPES)
    models = arguments.models or (BUILT_IN if gpu else ("tiny",))
    stated = {
        "tokens": arguments.T,
        "ranks": arguments.rank,
        "routings": arguments.routing,
        "dtypes": arguments.dtypes,
    }
    narrowed = {name: values for name, values in stated.items() if values}
    usual = {
        "tokens": (2048,) if gpu else (24,),
        "ranks": (16,) if gpu else (8,),
        "routings": ("balanced",),
    }
    try:
        if arguments.full:
            cases = Grid(models=models, **narrowed).cases()
        elif narrowed or not gpu:
            cases = Grid(models=models, **{**usual, **narrowed}).cases()
        else:
            cases = targets(models)
    except ValueError as error:
        raise SystemExit(f"--models: {error}") from None
    kept = tuple(
        case
        for case in cases
        if (not arguments.kinds or case.kind in arguments.kinds)
        and (
            not arguments.names or any(fnmatch.fnmatch(case.name, item) for item in arguments.names)
        )
    )
    if not kept:
        raise SystemExit("nothing was selected")
    return kept
