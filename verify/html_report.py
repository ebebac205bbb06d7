"""Records as one page: HTML without script or request, and Markdown for a job summary."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .plots import Point, bars, lines, roofline
from .report_records import Found, Page, Section, Source, Tile

_TEMPLATES = Path(__file__).parent / "templates"
_REFRESH = {
    "check": "python -m verify check --full",
    "mutants": "python -m verify mutants --full",
    "bench": "python -m verify bench",
    "gate": "python -m verify gate --against main",
    "fuzz": "python -m verify fuzz --minutes 20",
    "sanitize": "python -m verify sanitize",
    "calibrate": "python -m verify calibrate",
}
_MOST = 200
"""Failures that are shown one by one."""


def page_of(found: Found, *, fingerprint: Mapping[str, str], now: datetime | None = None) -> Page:
    """What to show of records. fingerprint: kernel -> hash of today's sources."""
    now = now or datetime.now(UTC)
    sections = (
        _where(found, fingerprint, now),
        _ratios(found),
        _failures(found),
        _mutants(found),
        _rates(found),
        _roofs(found),
        _peers(found),
        _history(found),
        _gate(found),
        _fuzz(found),
        _sanitize(found),
    )
    return Page(
        title="scattermoe_lora: what is verified",
        made=now.isoformat(timespec="minutes"),
        tiles=tuple(_tiles(found)),
        sections=tuple(_of_one_machine(section) for section in sections),
        refused=found.refused,
    )


def _of_one_machine(section: Section) -> Section:
    """Without the column of machines, if all rows are of one."""
    machines = {row[0] for row in section.rows}
    if section.columns[:1] != ("machine",) or len(machines) != 1:
        return section
    words = f"{section.intro} On {machines.pop()}.".strip()
    rows = tuple(row[1:] for row in section.rows)
    return replace(section, columns=section.columns[1:], rows=rows, intro=words)


def render(page: Page, template: str) -> str:
    """A page by a template of the package, `report.html` or `report.md`.

    Raises:
        RuntimeError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise RuntimeError("the report needs jinja2: pip install jinja2") from error
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=template.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return templates.get_template(template).render(page=page)


def _tiles(found: Found) -> Iterable[Tile]:
    for source in found.newest("check"):
        summary = source.values["summary"]
        wrong = summary["failed"] + summary["errors"]
        note = f"{wrong} failed" if wrong else "all passed"
        yield Tile(
            title=f"checks on {source.machine}",
            value=str(summary["passed"]),
            note=note + ("" if summary.get("complete", True) else ", incomplete"),
            state="bad" if wrong else "good",
        )
    for source in found.newest("mutants"):
        summary = source.values["summary"]
        yield Tile(
            title=f"mutants killed, {source.machine}",
            value=f"{summary['killed']} of {summary['total']}",
            note=f"{summary['survived']} survived",
            state="bad" if summary["survived"] else "good",
        )
    for source in found.newest("fuzz"):
        summary = source.values["summary"]
        yield Tile(
            title=f"fuzzed on {source.machine}",
            value=f"{summary['cases']} cases",
            note=f"{summary['findings']} findings",
            state="bad" if summary["findings"] else "good",
        )
    for source in found.newest("sanitize"):
        summary = source.values["summary"]
        wrong = summary["failed"] + summary["errors"]
        yield Tile(
            title=f"sanitizer on {source.machine}",
            value=f"{summary['passed']} clean",
            note=f"{wrong} with errors",
            state="bad" if wrong else "good" if summary["passed"] else "none",
        )
    for source in found.newest("gate"):
        regressed = [entry for entry in _decisions(source) if entry.get("decision") == "regression"]
        yield Tile(
            title=f"speed gate on {source.machine}",
            value=f"{len(regressed)} regressions",
            note=f"{len(_decisions(source))} benchmarks",
            state="bad" if regressed else "good",
        )


def _where(found: Found, fingerprint: Mapping[str, str], now: datetime) -> Section:
    rows = []
    for command in sorted({source.command for source in found.sources}):
        for source in found.newest(command):
            rows.append(_where_row(source, fingerprint, now))
    environments = [
        f"{source.name}\n"
        + "\n".join(f"  {key}: {value}" for key, value in source.values["environment"].items())
        for source in sorted(found.sources, key=lambda item: item.name)
    ]
    return Section(
        id="where",
        title="What was checked where",
        intro="The newest record of each command on each machine. Stale: the code of these "
        "kernels has changed since.",
        columns=("command", "machine", "result", "made", "age", "sources"),
        rows=tuple(rows),
        folds=(("environments", "\n\n".join(environments)),) if environments else (),
    )


def _where_row(source: Source, fingerprint: Mapping[str, str], now: datetime) -> tuple[str, ...]:
    summary = source.values["summary"]
    shown = [
        f"{value} {name.replace('_', ' ')}"
        for name, value in summary.items()
        if isinstance(value, int) and not isinstance(value, bool)
    ]
    if summary.get("complete") is False:
        shown.append("incomplete")
    recorded = source.values.get("fingerprint") or {}
    stale = [name for name, digest in recorded.items() if fingerprint.get(name, digest) != digest]
    sources = f"stale: {', '.join(stale)}" if stale else "current" if recorded else "-"
    try:
        days = (now - datetime.fromisoformat(source.started)).days
        age = f"{days} days" if days != 1 else "1 day"
    except (TypeError, ValueError):
        age = "unknown"
    made = source.started[:16].replace("T", " ")
    return (source.command, source.machine, ", ".join(shown), made, age, sources)


def _ratios(found: Found) -> Section:
    plots, rows = [], []
    for source in found.newest("check"):
        outcomes = source.values["outcomes"]
        worst: dict[str, float] = {}
        groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
        for outcome in outcomes:
            groups.setdefault((outcome["kernel"], outcome["path"], outcome["dtype"]), []).append(
                outcome
            )
        for (kernel, path, dtype), mine in sorted(groups.items()):
            ratios = [
                o["ratio"] for o in mine if o["status"] == "passed" and o["ratio"] is not None
            ]
            wrong = sum(o["status"] in ("failed", "error") for o in mine)
            if ratios:
                name = f"{kernel} {dtype}"
                worst[name] = max(worst.get(name, 0.0), *ratios)
            middle = f"{statistics.median(ratios):.2f}" if ratios else "-"
            top = f"{max(ratios):.2f}" if ratios else "-"
            rows.append(
                (source.machine, kernel, path, dtype, str(len(ratios)), middle, top, str(wrong))
            )
        title = f"worst error over its limit, {source.machine}"
        plots.append(bars(worst, title=title, unit="", mark=1.0))
    return Section(
        id="errors",
        title="Errors by kernel and dtype",
        intro="Each bar is the worst error of all checks that passed, over the limit derived for "
        "it; at 1 a check fails.",
        plots=tuple(plot for plot in plots if plot),
        columns=("machine", "kernel", "path", "dtype", "passed", "median", "worst", "failed"),
        rows=tuple(rows),
        command=_REFRESH["check"],
    )


def _failures(found: Found) -> Section:
    rows = [
        tuple(
            str(outcome[key])
            for key in ("status", "kernel", "path", "case", "dtype", "mode", "reason")
        )
        for source in found.newest("check")
        for outcome in source.values["outcomes"]
        if outcome["status"] in ("failed", "error")
    ]
    return Section(
        id="failures",
        title="Checks that failed",
        intro=f"{len(rows)} in all." if rows else "None.",
        columns=("status", "kernel", "path", "case", "dtype", "mode", "reason"),
        rows=tuple(rows[:_MOST]),
    )


def _mutants(found: Found) -> Section:
    plots, rows, folds = [], [], []
    for source in found.newest("mutants"):
        scores = source.values["scores"]
        shares = {
            kernel: 100 * score["killed"] / max(score["total"], 1)
            for kernel, score in scores.items()
        }
        plots.append(bars(shares, title=f"mutants killed, {source.machine}", unit="%"))
        for kernel, score in scores.items():
            rows.append((source.machine, kernel, *(str(score[k]) for k in sorted(score))))
        folds += [
            (f"survived: {entry['id']} ({entry['what']})", str(entry["diff"]))
            for entry in source.values["mutants"]
            if entry["status"] == "survived"
        ]
    return Section(
        id="mutants",
        title="Mutation score",
        intro="Kernels broken on purpose: how many of them the checks notice.",
        plots=tuple(plots),
        columns=("machine", "kernel", "equivalent", "invalid", "killed", "total"),
        rows=tuple(rows),
        folds=tuple(folds),
        command=_REFRESH["mutants"],
    )


def _rates(found: Found) -> Section:
    rows = [
        (source.machine, name, str(value))
        for source in found.newest("calibrate")
        for name, value in source.values["summary"].items()
        if not isinstance(value, Mapping | list)
    ]
    return Section(
        id="rates",
        title="Error rates of the judge",
        columns=("machine", "what", "value"),
        rows=tuple(rows),
        command=_REFRESH["calibrate"],
    )


def _roofs(found: Found) -> Section:
    plots, rows = [], []
    for source in found.newest("bench"):
        points, roofs = [], []
        for entry in source.values["benchmarks"]:
            detail = entry.get("detail") or {}
            rate, moved = detail.get("tflops"), detail.get("gb_per_s")
            if rate and moved:
                label = f"{entry['name']}: {rate:.0f} TFLOP/s, {moved:.0f} GB/s"
                points.append(Point(x=1e3 * rate / moved, y=rate, label=label, group=entry["kind"]))
                roofs.append((1e3 * rate / moved, rate * entry["ms"] / entry["floor_ms"]))
            rows.append(_bench_row(source, entry))
        if points:
            flops = max(roof for _, roof in roofs)
            slope = max(roof / intensity for intensity, roof in roofs)
            title = f"roofline, {source.machine}"
            plots.append(
                roofline(points, flops=round(flops), bandwidth=round(slope, 2), title=title)
            )
    return Section(
        id="speed",
        title="Speed against the floor",
        intro="Floor: operations at the rate of large products, or bytes at that of large copies, "
        "whichever takes longer, every operand once.",
        plots=tuple(plots),
        columns=("machine", "benchmark", "path", "ms", "floor", "times floor", "MB", "launches"),
        rows=tuple(rows),
        command=_REFRESH["bench"],
    )


def _bench_row(source: Source, entry: Mapping[str, Any]) -> tuple[str, ...]:
    ms, floor, peak = entry["ms"], entry["floor_ms"], entry.get("peak_bytes")
    return (
        source.machine,
        str(entry["name"]),
        str(entry.get("path", "")),
        f"{ms:.3f}",
        f"{floor:.3f}",
        f"{ms / floor:.2f}" if floor else "-",
        "-" if peak is None else f"{peak / 1e6:.0f}",
        str(entry.get("launches") if entry.get("launches") is not None else "-"),
    )


def _peers(found: Found) -> Section:
    plots, rows = [], []
    for source in found.newest("bench"):
        ratios: dict[str, list[float]] = {}
        for entry in source.values["benchmarks"]:
            for name, peer in (entry.get("peers") or {}).items():
                times = peer["ms"] / entry["ms"]
                ratios.setdefault(name, []).append(times)
                rows.append(
                    (
                        source.machine,
                        str(entry["name"]),
                        name,
                        f"{entry['ms']:.3f}",
                        f"{peer['ms']:.3f}",
                        f"{times:.2f}",
                    )
                )
        means = {name: statistics.geometric_mean(values) for name, values in ratios.items()}
        title = f"times faster than peers, geometric mean, {source.machine}"
        plots.append(bars(means, title=title, unit="x", mark=1.0 if means else None))
    return Section(
        id="peers",
        title="Speed against peers",
        plots=tuple(plot for plot in plots if plot),
        columns=("machine", "benchmark", "peer", "ours, ms", "peer, ms", "times"),
        rows=tuple(rows),
    )


def _history(found: Found) -> Section:
    plots = []
    machines = {source.machine for source in found.of("bench")}
    for machine in sorted(machines):
        mine = [source for source in reversed(found.of("bench")) if source.machine == machine]
        series: dict[str, list[tuple[str, float]]] = {}
        for source in mine:
            kinds: dict[str, list[float]] = {}
            for entry in source.values["benchmarks"]:
                if entry["floor_ms"]:
                    kinds.setdefault(entry["kind"], []).append(entry["ms"] / entry["floor_ms"])
            for kind, values in sorted(kinds.items()):
                mean = statistics.geometric_mean(values)
                series.setdefault(kind, []).append((source.started, mean))
        plots.append(lines(series, title=f"times the floor, {machine}", unit="times floor"))
    return Section(
        id="history",
        title="History of benchmarks",
        intro="Geometric mean over the benchmarks of a kind; lower is better.",
        plots=tuple(plot for plot in plots if plot),
    )


def _decisions(source: Source) -> Sequence[Mapping[str, Any]]:
    for key in ("decisions", "benchmarks", "outcomes"):
        if isinstance(source.values.get(key), list):
            return source.values[key]
    return ()


def _gate(found: Found) -> Section:
    rows = []
    for source in found.newest("gate"):
        for entry in _decisions(source):
            ratio = entry.get("ratio")
            rows.append(
                (
                    source.machine,
                    str(entry.get("name", "")),
                    str(entry.get("decision", entry.get("status", ""))),
                    f"{ratio:.3f}" if isinstance(ratio, float) else "-",
                    str(entry.get("reason", "")),
                )
            )
    return Section(
        id="gate",
        title="Gate decisions",
        columns=("machine", "benchmark", "decision", "head / base", "reason"),
        rows=tuple(rows),
        command=_REFRESH["gate"],
    )


def _fuzz(found: Found) -> Section:
    rows, folds = [], []
    for source in found.newest("fuzz"):
        for name, row in source.values["paths"].items():
            rows.append((source.machine, name, *(str(value) for value in row.values())))
        for finding in source.values["findings"]:
            draw, outcome = finding["draw"], finding["outcome"]
            text = (
                f"{outcome.get('reason', '')}\n\nplan {draw['label']}, {draw['dtype']}, "
                f"{draw['mode']}, met {finding['times']} times\n\n"
                f"python -m verify replay {finding.get('file', 'FILE')}"
            )
            folds.append((f"{finding['kind']}: {draw['kernel']} [{draw['path']}]", text))
    columns = (
        tuple(next(iter(found.newest("fuzz")[0].values["paths"].values()), {})) if rows else ()
    )
    return Section(
        id="fuzz",
        title="Fuzzing",
        intro="Launches that nobody listed, and how many different features of each sort they "
        "reached. Findings are folded below.",
        columns=("machine", "kernel [path]", *columns),
        rows=tuple(rows),
        folds=tuple(folds),
        command=_REFRESH["fuzz"],
    )


def _sanitize(found: Found) -> Section:
    rows = []
    for source in found.newest("sanitize"):
        counts: dict[tuple[str, str], dict[str, int]] = {}
        for outcome in source.values["outcomes"]:
            key = (str(outcome.get("mode", "")), outcome["kernel"])
            tally = counts.setdefault(key, {})
            tally[outcome["status"]] = tally.get(outcome["status"], 0) + 1
        for (tool, kernel), tally in counts.items():
            words = ", ".join(f"{count} {status}" for status, count in sorted(tally.items()))
            rows.append((source.machine, tool, kernel, words))
    return Section(
        id="sanitize",
        title="compute-sanitizer",
        columns=("machine", "tool", "kernel", "launches"),
        rows=tuple(rows),
        command=_REFRESH["sanitize"],
    )
