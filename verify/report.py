"""Outcomes as text: one table, and one line per failure that a person can act on."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .run import Outcome

_STYLES = {"passed": "green", "failed": "bold red", "error": "bold red", "unavailable": "dim"}


def results_table(outcomes: Sequence[Outcome]) -> Table:
    """Kernel x path by dtype: the worst ratio of error to limit, and how many checks."""
    dtypes = list(dict.fromkeys(outcome.dtype for outcome in outcomes))
    table = Table(title="worst error over its limit (1 is the limit)", title_justify="left")
    table.add_column("kernel")
    table.add_column("path")
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
    table.add_column("checks", justify="right")
    rows = dict.fromkeys((outcome.kernel, outcome.path) for outcome in outcomes if outcome.path)
    for kernel, path in rows:
        mine = [o for o in outcomes if (o.kernel, o.path) == (kernel, path)]
        cells = [_cell([o for o in mine if o.dtype == dtype]) for dtype in dtypes]
        checked = sum(outcome.status != "unavailable" for outcome in mine)
        table.add_row(kernel, path, *cells, str(checked))
    return table


def _cell(outcomes: Sequence[Outcome]) -> Text:
    if not outcomes:
        return Text("-", style="dim")
    for status in ("error", "failed"):
        found = [outcome for outcome in outcomes if outcome.status == status]
        if found:
            return Text(f"{len(found)} {status}", style=_STYLES[status])
    ratios = [outcome.ratio for outcome in outcomes if outcome.ratio is not None]
    if not ratios:
        return Text("n/a", style=_STYLES["unavailable"])
    return Text(f"{max(ratios):.2f}", style=_STYLES["passed"])


def failure_line(outcome: Outcome, replay: str = "") -> str:
    """An outcome that needs attention in one line, with the command that reruns it."""
    words = f"{outcome} (plan {outcome.plan})"
    return f"{words}; rerun: {replay}" if replay else words


def print_report(
    console: Console,
    outcomes: Sequence[Outcome],
    *,
    seconds: float,
    replays: Mapping[tuple[str, ...], str] = MappingProxyType({}),
) -> None:
    """The table, the failures and a closing line. replays: commands by the keys of outcomes."""
    console.print(results_table(outcomes))
    failures = [outcome for outcome in outcomes if not outcome.ok]
    for line in (failure_line(outcome, replays.get(outcome.key, "")) for outcome in failures):
        console.print(Text(line, style="red"), soft_wrap=True)
    unavailable = [outcome for outcome in outcomes if outcome.status == "unavailable"]
    for reason in dict.fromkeys(outcome.reason for outcome in unavailable):
        mine = [o for o in unavailable if o.reason == reason]
        names = dict.fromkeys(f"{o.kernel} [{o.path}]" if o.path else o.kernel for o in mine)
        text = f"not run ({len(mine)}): {', '.join(names)}: {reason}"
        console.print(Text(text, style="dim"), soft_wrap=True)
    failed = sum(not outcome.ok for outcome in outcomes)
    passed = sum(outcome.status == "passed" for outcome in outcomes)
    verdict = f"{failed} failed" if failed else "all passed"
    console.print(f"{passed} checks passed, {verdict}, {seconds:.0f} s")


def never_run(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """Paths of which every launch was unavailable, as "kernel [path]" -> the first reason."""
    reasons: dict[str, str] = {}
    run: set[str] = set()
    for outcome in outcomes:
        name = f"{outcome.kernel} [{outcome.path}]"
        if outcome.status == "unavailable":
            reasons.setdefault(name, outcome.reason)
        else:
            run.add(name)
    return {name: reason for name, reason in reasons.items() if name not in run}
