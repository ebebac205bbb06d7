"""A journal: one JSON object a line, flushed before what it announces happens."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


class Journal:
    """Appends to a file; every line is with the operating system when `write` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_line(path)
        self._file: TextIO = path.open("a")

    def write(self, **values: Any) -> None:
        """Append one line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _end_line(path: Path) -> None:
    """Complete a last line that a killed process left half written: it becomes one that `read`
    skips.
    """
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal, without those that were cut short."""
    if not path.is_file():
        return
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def unfinished(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Draws that were launched and of which nothing more was heard, in order."""
    waiting: dict[int, dict[str, Any]] = {}
    for line in lines:
        if "launch" in line:
            waiting[line["launch"]] = line["draw"]
        elif "done" in line:
            waiting.pop(line["done"], None)
    return list(waiting.values())
