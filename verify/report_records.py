"""Records as they are read for the report, and what its page is made of."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NEEDED = ("schema", "command", "environment", "started", "summary")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One record that was read. name: where from, as it is shown."""

    name: str
    values: Mapping[str, Any]

    @property
    def command(self) -> str:
        """What wrote it."""
        return str(self.values["command"])

    @property
    def stem(self) -> str:
        """The name of its file without directory and ending."""
        return Path(self.name).stem

    @property
    def machine(self) -> str:
        """Its device, told apart from the interpreter."""
        environment = self.values["environment"]
        words = " (interpreter)" if environment.get("interpreted") else ""
        return f"{environment.get('device')}{words}"

    @property
    def started(self) -> str:
        """When it was made, as text that sorts."""
        return str(self.values["started"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Records, and what could not be read as one: (name, why)."""

    sources: tuple[Source, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()

    def of(self, command: str) -> list[Source]:
        """The records of a command, newest first."""
        mine = [source for source in self.sources if source.command == command]
        return sorted(mine, key=lambda source: source.started, reverse=True)

    def newest(self, command: str) -> list[Source]:
        """The newest record of a command on each machine, of those with one file name."""
        kept = {(source.machine, source.stem): source for source in reversed(self.of(command))}
        return [kept[key] for key in sorted(kept)]

    def by_machine(self, command: str) -> dict[str, list[Source]]:
        """The newest records of a command, together by machine, oldest first."""
        found: dict[str, list[Source]] = {}
        for source in sorted(self.newest(command), key=lambda source: source.started):
            found.setdefault(source.machine, []).append(source)
        return found

    def benchmarks(self) -> dict[str, list[Mapping[str, Any]]]:
        """The newest entry of every benchmark, by machine."""
        return {
            machine: list(
                {
                    str(entry["name"]): entry
                    for source in sources
                    for entry in source.values["benchmarks"]
                }.values()
            )
            for machine, sources in self.by_machine("bench").items()
        }


def collect(paths: Iterable[Path]) -> Found:
    """Read the records in files, and in directories and below."""
    sources, refused = [], []
    for path in paths:
        base = path if path.is_dir() else path.parent
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            name = file.relative_to(base).as_posix()
            try:
                values = json.loads(file.read_text())
                missing = [key for key in _NEEDED if key not in values]
            except (OSError, ValueError, TypeError) as error:
                refused.append((name, f"{type(error).__name__}: {error}"))
                continue
            if missing == list(_NEEDED) or values.get("command") in ("finding", "replay"):
                continue
            if missing:
                refused.append((name, f"it has no {', '.join(missing)}"))
            else:
                sources.append(Source(name=name, values=values))
    return Found(sources=tuple(sources), refused=tuple(refused))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One number at the head of the page. state: good, bad or none."""

    title: str
    value: str
    note: str = ""
    state: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A table with a heading, plots above it, and folded details below: (title, text).

    nothing: what is said where there is none of it.
    """

    id: str
    title: str
    intro: str = ""
    plots: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    folds: tuple[tuple[str, str], ...] = ()
    command: str = ""
    nothing: str = "Nothing recorded."

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.rows or self.plots or self.folds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """All that the templates show."""

    title: str
    made: str
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]
    refused: tuple[tuple[str, str], ...] = field(default=())

    @property
    def good(self) -> bool:
        """Whether no tile is bad."""
        return all(tile.state != "bad" for tile in self.tiles)
