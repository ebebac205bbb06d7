"""Everything, stage by stage, on a GPU that nobody has tried: one file to send back, one to
commit.
"""

import argparse
import importlib
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .common import (
    add_common,
    check_names,
    package,
    positive,
    prepare,
    refuse_unused,
    separated,
    source_directory,
)

_STYLES = {"passed": "green", "failed": "bold red", "unavailable": "yellow", "waiting": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_common(parser)
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("qualify"),
        help="records; stages that passed stay so",
    )
    parser.add_argument("--stages", type=separated, default=(), metavar="A,B", help="only these")
    parser.add_argument("--again", action="store_true", help="run stages that passed, too")
    parser.add_argument("--fuzz-minutes", type=positive, default=5.0)
    parser.add_argument("--tune-minutes", type=positive, default=8.0)
    parser.add_argument("--bench-minutes", type=positive, default=10.0)
    parser.add_argument(
        "--shared-memory",
        type=int,
        metavar="BYTES",
        help="say what a GPU of the same kind with so little could not do, and whether plans fit",
    )


def main(arguments: argparse.Namespace) -> int:
    """Run the stages; 1 if one failed or has more to do."""
    for name in ("fuzz", "tune", "bench"):
        if arguments.stages and name not in arguments.stages:
            which = f"--stages {','.join(arguments.stages)}"
            refuse_unused(which, arguments, add_arguments, (f"{name}_minutes",))
    device = prepare(arguments.device)
    from ..ahead import ARCHITECTURES
    from ..cli import COMMANDS
    from ..environment import environment, gpu_directory_name
    from ..qualify import STAGES, Budget, Qualification, shortcomings, stages_of
    from ..records import fingerprints, write_json
    from ..specs import KERNELS

    lib, console = package(), Console()
    facts = lib.Device.of(device)
    shown = {
        "capability": ".".join(map(str, facts.capability)) if device.type == "cuda" else "0.0",
        "shared_memory": facts.shared_memory,
    }
    limits = shortcomings(shown, shared_memory=arguments.shared_memory)
    if device.type != "cuda":
        limits = ["no GPU: everything runs in Triton's interpreter, and no time means anything"]
    if arguments.shared_memory:
        limits += too_large(arguments.shared_memory, facts.capability)
    directory = arguments.directory.resolve()
    budget = Budget(
        fuzz=arguments.fuzz_minutes, tune=arguments.tune_minutes, bench=arguments.bench_minutes
    )
    number = 10 * facts.capability[0] + facts.capability[1]
    stages = stages_of(
        directory,
        device=str(device),
        known=COMMANDS,
        budget=budget,
        seed=arguments.seed,
        architecture=number if number in ARCHITECTURES else None,
    )
    names = [stage.name for stage in stages]
    check_names("stages", arguments.stages, names)
    run = Qualification(
        directory,
        stages,
        environment(device),
        limits,
        [name for name in STAGES if name not in names],
        fingerprints(source_directory(), KERNELS),
        seed=arguments.seed,
        only=arguments.stages,
    )
    if not arguments.again:
        run.resume()
    for sentence in limits:
        console.print(Text(f"this GPU: {sentence}", style="yellow"), soft_wrap=True)
    run.run(lambda stage: console.rule(Text(f"{stage.name}: {stage.purpose}")))
    record = run.write(complete=True)
    if arguments.json:
        write_json(arguments.json, record)
    table = Table(title="stages", title_justify="left")
    for column in ("stage", "result", "seconds"):
        table.add_column(column)
    for result in run.results.values():
        style = _STYLES[result.status]
        table.add_row(result.name, Text(result.status, style=style), f"{result.seconds:.0f}")
    console.print(table)
    left = [stage["name"] for stage in record["stages"] if stage["status"] == "waiting"]
    if left:
        console.print(f"more to do: {', '.join(left)}; run this again", style="yellow")
    console.print(Text(f"send back {run.file}"), soft_wrap=True)
    plans = directory / "plans.json"
    if plans.is_file():
        place = f"scattermoe_lora/plans/{gpu_directory_name(str(run.environment['device']))}.json"
        console.print(Text(f"commit {plans} as {place}"), soft_wrap=True)
    return int(any(run.results[stage.name].status in ("failed", "waiting") for stage in run.asked))


def too_large(shared_memory: int, capability: tuple[int, int]) -> list[str]:
    """Plans that are offered for a GPU with so little shared memory, in bytes, and that do not
    fit, in sentences.
    """
    from ..run import dtype_name

    lib = package()
    module = importlib.import_module(f"{lib.__name__}.plan")
    small = lib.Device(
        name="emulated",
        capability=max(capability, (8, 6)),
        multiprocessors=64,
        shared_memory=shared_memory,
    )
    found = []
    for operation in lib.Operation:
        for dtype in (torch.bfloat16, torch.float32):
            for rows in (256, 65536):
                problem = lib.Problem(
                    operation, rows, 64, 2048, 1536, 16, dtype, lib.Precision.IEEE, "kn"
                )
                for plan in lib.candidates(problem, small):
                    needed = module.stage_bytes(plan.tile, dtype) * plan.tile.stages
                    if needed > shared_memory:
                        found.append(
                            f"{operation.value} of {dtype_name(dtype)} is offered {plan.tile}, "
                            f"which needs {needed} bytes of shared memory, and a block has "
                            f"{shared_memory}"
                        )
    return list(dict.fromkeys(found))
