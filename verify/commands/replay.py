"""Findings of `fuzz` and failures of `check`, rerun exactly."""

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from .common import add_device, add_json, positive, prepare

_CANNOT = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_json(parser)
    add_device(parser)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what to rerun")
    parser.add_argument(
        "--tree",
        type=Path,
        metavar="DIR",
        help="directory of the package to run; the one of the finding, unless stated",
    )
    parser.add_argument(
        "--patience", type=positive, default=30.0, help="seconds until it counts as hung"
    )


def main(arguments: argparse.Namespace) -> int:
    """0 if nothing fails any more, 1 while something does, 2 if something could not be rerun."""
    device = prepare(arguments.device)
    from ..findings import Finding, read
    from ..records import write_json
    from ..replay import replayed

    console, status, answers = Console(), 0, []
    for file in arguments.files:
        try:
            finding: Finding = read(file)
            tree = str(arguments.tree.resolve()) if arguments.tree else finding.tree
            console.print(Text(f"{file.name}: {finding.line()}"), soft_wrap=True)
            with tempfile.TemporaryDirectory() as scratch:
                answer = replayed(
                    finding,
                    device=str(device),
                    tree=tree,
                    patience=arguments.patience,
                    directory=Path(scratch),
                )
        except (ValueError, RuntimeError) as error:
            console.print(Text(f"cannot be rerun: {error}", style="bold red"), soft_wrap=True)
            status = _CANNOT
            continue
        failing = bool(answer.kind)
        words = f"still fails, {answer.kind}" if failing else f"{answer.outcome['status']} now"
        reason = f": {answer.outcome['reason']}" if answer.outcome.get("reason") else ""
        style = "bold red" if failing else "green"
        console.print(Text(f"{words}: {answer.draw}{reason}", style=style), soft_wrap=True)
        answers.append({"file": file.name, "kind": answer.kind, "outcome": dict(answer.outcome)})
        status = status or int(failing)
    if arguments.json:
        write_json(arguments.json, {"command": "replay", "answers": answers})
    return status
