"""A small Qwen3-MoE trained on real text, ours against transformers' eager experts."""

import argparse
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from .common import add_common, check_names, count, prepare, source_directory

_KERNELS = ("experts_mlp", "dequantize_four_bit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_common(parser)
    parser.add_argument("--steps", type=count, help="300 on a GPU and 30 on a CPU, unless stated")
    parser.add_argument(
        "--arms", default="lora,nf4", metavar="A,B", help="lora: 16-bit experts; nf4: packed ones"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves there")


def main(arguments: argparse.Namespace) -> int:
    """Train, judge, record; 1 if a criterion failed, 2 if a package is missing."""
    device = prepare(arguments.device)
    import torch

    from ..captured import Unavailable
    from ..environment import environment
    from ..records import SCHEMA, fingerprints, write_json
    from ..specs import KERNELS
    from ..train import Training
    from ..train_models import ARMS, Settings
    from ..train_plot import plot

    arms = tuple(word for word in arguments.arms.split(",") if word)
    check_names("arms", arms, ARMS)
    try:
        settings = Settings.of(device, arguments.steps)
    except ValueError as error:
        raise SystemExit(f"--steps: {error}") from None
    console, start = Console(stderr=True), time.monotonic()
    training = Training(settings=settings, arms=arms, device=device, seed=arguments.seed)
    head: dict[str, Any] = {
        "schema": SCHEMA,
        "command": "train",
        "environment": environment(device),
        "seed": arguments.seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": fingerprints(
            source_directory(), [spec for spec in KERNELS if spec.name in _KERNELS]
        ),
    }
    if device.type == "cpu":
        # Tensors are small: more threads only wait for each other.
        torch.set_num_threads(1)
    try:
        _train(training, console)
    except Unavailable as error:
        console.print(str(error), style="red", markup=False)
        return 2
    finally:
        if arguments.json:
            seconds = round(time.monotonic() - start, 3)
            write_json(arguments.json, {**head, "seconds": seconds, **training.as_json()})
    if arguments.plot:
        try:
            plot(training, arguments.plot)
        except Unavailable as error:
            console.print(str(error), style="red", markup=False)
            return 2
    found = training.findings()
    for finding in found:
        style = "green" if finding.passed else "bold red"
        word = "passed" if finding.passed else "failed"
        Console().print(Text(f"{word}: ", style=style) + Text(finding.text), soft_wrap=True)
    return int(not all(finding.passed for finding in found))


def _train(training: Any, console: Console) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[tuple[str, str], Any] = {}
        for found in training.run():
            key = (found.arm, found.run.value)
            if key not in tasks:
                name = f"{found.arm}: {found.run.value}"
                tasks[key] = progress.add_task(name, total=training.settings.steps, loss="")
            progress.update(tasks[key], completed=found.step, loss=f"loss {found.loss:.3f}")
