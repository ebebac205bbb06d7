"""What a campaign did, as a record, as tables and as Markdown."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .coverage import DIMENSIONS, enough_to_reach_all, missing_paths
from .findings import Finding
from .fuzz import Campaign
from .records import SCHEMA, plain

REPLAY = "python -m verify replay"


def record(campaign: Campaign, fingerprint: Mapping[str, str], *, complete: bool) -> dict[str, Any]:
    """The record `fuzz.json`."""
    counts, coverage = campaign.counts, campaign.coverage
    seconds = round(counts.seconds, 3)
    started = datetime.now(UTC).timestamp() - seconds
    paths = coverage.by_path()
    return {
        "schema": SCHEMA,
        "command": "fuzz",
        "environment": campaign.environment,
        "seed": campaign.settings.seed,
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "fingerprint": dict(fingerprint),
        "summary": {
            "complete": complete,
            "cases": counts.launches,
            "cases_per_second": rate(campaign),
            "passed": counts.status["passed"],
            "unavailable": counts.status["unavailable"],
            "findings": len(campaign.findings),
            "restarts": counts.restarts,
            "not_drawn": counts.refused.total(),
            "features": coverage.total,
            "unreached_paths": missing_paths(campaign.pools, paths),
        },
        "settings": {
            "devices": list(campaign.settings.devices),
            "workers": campaign.settings.workers,
            "patience": campaign.settings.patience,
            "tree": campaign.settings.tree,
        },
        "coverage": coverage.by_dimension(),
        "paths": paths,
        "kernels": {name: dict(found) for name, found in sorted(counts.kernels.items())},
        "not_drawn": dict(counts.refused.most_common(20)),
        "findings": [
            plain(finding.as_json()) | {"file": finding.file_name}
            for finding in campaign.findings.values()
        ],
    }


def rate(campaign: Campaign) -> float:
    """Launches per second."""
    return round(campaign.counts.launches / max(campaign.counts.seconds, 1e-9), 2)


def progress(campaign: Campaign, left: float) -> RenderableType:
    """What is shown while a campaign runs."""
    counts = campaign.counts
    left_words = f"{left // 60:.0f}:{left % 60:02.0f} left" if left > 0 else "finishing"
    head = Text.assemble(
        (f"{counts.launches} cases", "bold"),
        f"  {rate(campaign):.1f}/s  {campaign.coverage.total} features  ",
        (
            f"{len(campaign.findings)} findings",
            "bold red" if campaign.findings else "green",
        ),
        f"  {counts.restarts} restarts  {left_words}",
    )
    lines = [Text(finding.line()[:200], style="red") for finding in _latest(campaign)]
    return Group(head, *lines)


def _latest(campaign: Campaign) -> list[Finding]:
    return list(campaign.findings.values())[-5:]


def print_summary(console: Console, campaign: Campaign) -> None:
    """Coverage by kernel and path, findings with the commands that replay them, and a closing
    line.
    """
    table = Table(title="different features reached", title_justify="left")
    table.add_column("kernel [path]")
    for column in ("launches", *DIMENSIONS):
        table.add_column(column, justify="right")
    paths = campaign.coverage.by_path()
    for name, row in paths.items():
        table.add_row(Text(name), *(str(row[column]) for column in ("launches", *DIMENSIONS)))
    console.print(table)
    missing = missing_paths(campaign.pools, paths)
    if enough_to_reach_all(campaign.counts.launches, len(paths) + len(missing)):
        for name in missing:
            console.print(Text(f"never reached: {name}", style="yellow"))
    elif missing:
        text = (
            f"{len(missing)} of {len(paths) + len(missing)} paths were not reached in so few cases"
        )
        console.print(Text(text, style="dim"))
    for reason, times in campaign.counts.refused.most_common(5):
        console.print(Text(f"not drawn, {times} times: {reason}", style="dim"), soft_wrap=True)
    for finding in campaign.findings.values():
        console.print(Text(finding.line(), style="red"), soft_wrap=True)
        console.print(Text(f"  {replay_command(campaign.directory, finding)}"), soft_wrap=True)
    counts = campaign.counts
    console.print(
        f"{counts.launches} cases in {counts.seconds:.0f} s ({rate(campaign):.1f}/s), "
        f"{len(campaign.findings)} findings, {counts.restarts} restarts"
    )


def replay_command(directory: Path, finding: Finding) -> str:
    """The command line that reruns a finding."""
    return f"{REPLAY} {directory / 'findings' / finding.file_name}"


def markdown(values: Mapping[str, Any], directory: Path) -> str:
    """A record as Markdown."""
    summary, environment = values["summary"], values["environment"]
    lines = [
        "# Fuzzing",
        "",
        f"{environment.get('device')}, torch {environment.get('torch')}, "
        f"Triton {environment.get('triton')}, seed {values['seed']}, started {values['started']}.",
        "",
        f"**{summary['cases']} cases in {values['seconds']:.0f} s "
        f"({summary['cases_per_second']}/s), {summary['findings']} findings**, "
        f"{summary['restarts']} restarts, {summary['features']} features"
        f"{'' if summary['complete'] else ', interrupted'}.",
        "",
        *_markdown_table(("kernel [path]", "launches", *DIMENSIONS), values["paths"]),
    ]
    if summary["unreached_paths"]:
        lines += ["", "Never reached: " + ", ".join(summary["unreached_paths"]) + "."]
    for finding in values["findings"]:
        reason = str(finding["outcome"].get("reason", "")).replace("`", "'")[:500]
        lines += [
            "",
            f"## {finding['kind']}: {finding['draw']['kernel']} [{finding['draw']['path']}]",
            "",
            f"Met {finding['times']} times. {reason}",
            "",
            f"    {REPLAY} {directory / 'findings' / finding['file']}",
        ]
    return "\n".join(lines) + "\n"


def _markdown_table(columns: Sequence[str], rows: Mapping[str, Mapping[str, int]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for name, row in rows.items():
        cells = [name.replace("|", "\\|"), *(str(row[column]) for column in columns[1:])]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
