"""Kernels on launches that nobody listed, for a time or until stopped."""

import argparse
import contextlib
import json
import random
import time
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live

from ..children import cores
from .common import (
    Pulse,
    add_device,
    add_json,
    amount,
    check_names,
    count,
    positive,
    prepare,
    separated,
    source_directory,
)

_FOREVER = 10.0**9
_PER_GPU, _BYTES_EACH = 12, 6 * 2**30
"""Workers of one GPU, where it has so many bytes for each and four processors for every three: 12
made 15 launches a second on an H100 with 16 processors.
"""


def usual_workers(processors: int, memory: int) -> int:
    """Workers for a GPU of so many bytes that has so many processors to itself."""
    return max(1, min(_PER_GPU, 3 * processors // 4, memory // _BYTES_EACH))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_json(parser)
    add_device(parser)
    parser.add_argument("--seed", type=int, help="0, unless stated")
    time_given = parser.add_mutually_exclusive_group()
    time_given.add_argument(
        "--seconds", type=positive, help="how long; until stopped, unless stated"
    )
    time_given.add_argument("--minutes", type=positive, help="the same in minutes")
    parser.add_argument(
        "--kernels", type=separated, default=(), metavar="A,B", help="names of kernels"
    )
    parser.add_argument(
        "--enough", type=amount, default=0, metavar="N", help="stop after so many findings"
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--directory", type=Path, metavar="DIR", help="a new directory for journals and findings"
    )
    place.add_argument("--resume", type=Path, metavar="DIR", help="go on with the campaign there")
    parser.add_argument(
        "--tree",
        type=Path,
        metavar="DIR",
        help="another copy of the package to run: the directory that holds its ops",
    )
    parser.add_argument(
        "--workers", type=count, help="processes per GPU (at most 12), or on the CPU (1)"
    )
    parser.add_argument(
        "--memory",
        type=positive,
        metavar="GIB",
        help="of each GPU for launches at a time; what is free at the start, unless stated",
    )
    parser.add_argument(
        "--patience",
        type=positive,
        help="seconds after which a launch, or compiling a kernel, counts as hung (30)",
    )
    parser.add_argument(
        "--shrink-seconds", type=positive, help="how long each finding is shrunk (60)"
    )
    parser.add_argument(
        "--sanitize",
        type=amount,
        default=0,
        metavar="N",
        help="afterwards, run N of the kept launches under compute-sanitizer",
    )


def main(arguments: argparse.Namespace) -> int:
    """Run a campaign; 1 if there are findings, or a long one did not reach every path."""
    device = prepare(arguments.device)
    from ..coverage import enough_to_reach_all
    from ..fuzz import Campaign
    from ..fuzz_summary import markdown, print_summary, progress, record
    from ..records import fingerprints, write_json
    from ..specs import KERNELS

    check_names("kernels", arguments.kernels, (spec.name for spec in KERNELS))
    directory, settings = _settings(arguments, device)
    tree = Path(settings.tree) if settings.tree else source_directory()
    if absent := [spec.source for spec in KERNELS if not (tree / spec.source).is_file()]:
        raise SystemExit(f"--tree: {tree} holds no {absent[0]}, so it is no copy of the package")
    if arguments.sanitize:
        _sanitizer(settings, device)
    campaign = Campaign(directory, settings, {spec.name: spec for spec in KERNELS})
    write_json(directory / "campaign.json", asdict(settings))
    names = set(settings.kernels) or {spec.name for spec in KERNELS}
    fingerprint = fingerprints(tree, (spec for spec in KERNELS if spec.name in names))
    seconds = arguments.seconds or 60 * (arguments.minutes or 0) or _FOREVER
    end, complete = time.monotonic() + seconds, False
    console = Console(stderr=True)
    pulse = Pulse(console)
    console.print(f"journals and findings in {directory}", highlight=False)
    try:
        with (
            contextlib.closing(campaign.run(seconds, enough=arguments.enough)) as running,
            Live(console=console, refresh_per_second=2, transient=True) as live,
        ):
            for _ in running:
                left = end - time.monotonic()
                shown = progress(campaign, left if seconds < _FOREVER else 0.0)
                live.update(shown)
                pulse(shown)
        complete = True
    except KeyboardInterrupt:
        console.print(f"interrupted; go on with --resume {directory}", highlight=False)
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    finally:
        values = record(campaign, fingerprint, complete=complete)
        if arguments.sanitize and complete:
            values["sanitized"] = _sanitized(campaign, arguments.sanitize, device, console)
        for path in {directory / "fuzz.json", arguments.json or directory / "fuzz.json"}:
            write_json(path, values)
        (directory / "fuzz.md").write_text(markdown(values, directory))
    print_summary(Console(), campaign)
    if not campaign.counts.launches:
        console.print("no launch came to its end: give it more time")
    wrong = [entry for entry in values.get("sanitized", ()) if entry["status"] != "passed"]
    unreached, launches = values["summary"]["unreached_paths"], campaign.counts.launches
    starved = unreached and enough_to_reach_all(launches, len(values["paths"]) + len(unreached))
    return int(bool(campaign.findings or wrong or starved) or not launches)


def _sanitized(
    campaign: Any, count: int, device: torch.device, console: Console
) -> list[dict[str, Any]]:
    """Outcomes under memcheck of so many of the kept launches."""
    from ..sanitize import EVERY_PLAN, Job

    kept = random.Random(campaign.settings.seed).sample(
        campaign.kept, min(count, len(campaign.kept))
    )
    sanitizer = _sanitizer(campaign.settings, device)
    outcomes = list(sanitizer.run([Job(tool=EVERY_PLAN, draw=draw) for draw in kept]))
    wrong = [outcome for outcome in outcomes if not outcome.ok]
    for outcome in wrong:
        console.print(str(outcome), style="red", markup=False)
    console.print(f"{len(outcomes)} launches under {EVERY_PLAN}, {len(wrong)} with errors")
    return [outcome.as_json() for outcome in outcomes]


def _sanitizer(settings: Any, device: torch.device) -> Any:
    from ..sanitize import Sanitizer, tool_path, unavailable

    tool = tool_path()
    reason = unavailable(device, tool)
    if reason or tool is None:
        raise SystemExit(f"--sanitize: {reason}")
    return Sanitizer(path=tool, device=str(device), tree=settings.tree)


def _settings(arguments: argparse.Namespace, device: torch.device) -> tuple[Path, Any]:
    """Of a new campaign, or those of the one to be resumed, with what may change of them.

    Raises:
        SystemExit: there is a campaign already, or none to resume, or it is another one; or memory
            of a GPU is stated for a CPU.
    """
    if arguments.memory and device.type != "cuda":
        raise SystemExit(f"--memory is that of a GPU, and the device is {device}")
    from ..fuzz import Settings

    stated = {
        "workers": arguments.workers,
        "patience": arguments.patience,
        "shrink_seconds": arguments.shrink_seconds,
        "memory": arguments.memory and int(arguments.memory * 2**30),
    }
    changed = {name: value for name, value in stated.items() if value is not None}
    if arguments.resume is not None:
        file = arguments.resume / "campaign.json"
        if not file.is_file():
            raise SystemExit(f"--resume: there is no campaign in {arguments.resume}")
        values = json.loads(file.read_text())
        values |= {name: tuple(values[name]) for name in ("devices", "kernels")}
        _refuse_another(arguments, values, device)
        return arguments.resume, replace(Settings(**values), **changed)
    directory = arguments.directory or Path(f"fuzz-{datetime.now():%Y%m%d-%H%M%S}")
    if (directory / "campaign.json").exists():
        raise SystemExit(f"there is a campaign in {directory}; go on with --resume {directory}")
    devices = _devices(device)
    workers = 1
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        workers = usual_workers(cores() // len(devices), changed.get("memory", memory))
    return directory, Settings(
        devices=devices,
        seed=arguments.seed or 0,
        kernels=arguments.kernels,
        tree=_tree(arguments),
        **{"workers": workers, **changed},
    )


def _refuse_another(
    arguments: argparse.Namespace, values: dict[str, Any], device: torch.device
) -> None:
    """Refuse options that would make a resumed campaign another one.

    Raises:
        SystemExit: there is one.
    """
    stated = {
        "devices": _devices(device) if arguments.device else None,
        "seed": arguments.seed,
        "kernels": arguments.kernels or None,
        "tree": _tree(arguments) or None,
    }
    for name, value in stated.items():
        if value not in (None, values[name]):
            raise SystemExit(
                f"--resume: the campaign in {arguments.resume} has {name} "
                f"{_shown(values[name])}, and {_shown(value)} is asked for"
            )


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value) or "of every name"
    return str(value) or "of this package"


def _devices(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return ("cpu",)
    indices = range(torch.cuda.device_count()) if device.index is None else [device.index]
    return tuple(f"cuda:{index}" for index in indices)


def _tree(arguments: argparse.Namespace) -> str:
    return str(arguments.tree.resolve()) if arguments.tree else ""
