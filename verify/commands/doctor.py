"""Versions and devices, and what is known to be wrong with them."""

import argparse
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .common import add_device, add_json, prepare

_STYLES = {"good": "green", "note": "yellow", "bad": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_json(parser)
    add_device(parser)


def main(arguments: argparse.Namespace) -> int:
    """1 if something is known to be wrong."""
    from ..doctor import diagnose, gather
    from ..environment import environment
    from ..records import SCHEMA, write_json

    if arguments.device:
        prepare(arguments.device)
    facts = gather()
    found = diagnose(facts)
    table = Table(title="environment", title_justify="left", show_lines=False)
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for item in found:
        status = Text(item.status, style=_STYLES[item.status])
        table.add_row(status, Text(item.subject), Text(item.found), Text(item.advice))
    console = Console()
    console.print(table)
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    console.print(Text(f"python {facts.python}, {versions}", style="dim"), soft_wrap=True)
    device = arguments.device or ("cuda" if facts.gpus else "cpu")
    if arguments.json:
        counts = {status: sum(item.status == status for item in found) for status in _STYLES}
        record = {
            "schema": SCHEMA,
            "command": "doctor",
            "environment": environment(device),
            "seed": 0,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "fingerprint": {},
            "summary": {**counts, "complete": True},
            "found": [item.as_json() for item in found],
        }
        write_json(arguments.json, record)
    return int(any(item.status == "bad" for item in found))
