"""Whether the committed records are there, whole and fresh."""

import argparse
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .common import add_json, package, prepare

RECORDS = Path(__file__).parent.parent / "records"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_json(parser)
    parser.add_argument(
        "--directory",
        type=Path,
        default=RECORDS,
        metavar="DIRECTORY",
        help="one directory per GPU in it; the committed records, unless stated",
    )
    parser.add_argument(
        "--release",
        action="store_true",
        help="records of every command must be complete and fresh, and checks full",
    )


def main(arguments: argparse.Namespace) -> int:
    """1 if a record is missing, malformed, incomplete, stale, or of something that failed."""
    prepare("cpu")
    from ..record_check import GOOD, Sources, inspect
    from ..records import write_json
    from ..specs import KERNELS

    sources = Sources.of(package(), KERNELS)
    verdicts = inspect(arguments.directory, sources, release=arguments.release)
    table = Table(title="records", title_justify="left")
    for column in ("record", "state", "age"):
        table.add_column(column, overflow="fold")
    for item in verdicts:
        style = "bold red" if item.fault else "green" if item.state == GOOD else "yellow"
        table.add_row(Text(item.record), Text(item.state, style=style), item.age)
    console = Console()
    console.print(table)
    console.print("commands that refresh them:")
    for item in verdicts:
        console.print(Text(f"  {item.refresh}"), soft_wrap=True)
    for item in verdicts:
        if item.reason:
            style = "red" if item.fault else "dim"
            text = f"{item.state}: {item.record}: {item.reason}"
            console.print(Text(text, style=style), soft_wrap=True)
    if arguments.json:
        listed = [{**asdict(item), "age": item.age} for item in verdicts]
        write_json(arguments.json, {"command": "records", "records": listed})
    return int(any(item.fault for item in verdicts))
