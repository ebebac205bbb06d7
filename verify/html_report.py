"""Records as one page: HTML without script or request, and Markdown for a job summary."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .gate_records import line_of
from .plots import Point, bars, lines, roofline
from .report_records import Found, Page, Section, Source
from .report_tiles import counted, decisions_of, stale_kernels, tiles_of

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
_NAMED = 3
"""Kernels that are named where they are stale; more are counted."""


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
        tiles=tuple(tiles_of(found, fingerprint)),
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


def _where(found: Found, fingerprint: Mapping[str, str], now: datetime) -> Section:
    newest = [
        source
        for command in sorted({source.command for source in found.sources})
        for source in found.newest(command)
    ]
    changed = [
        f"{source.name}: {', '.join(stale)}"
        for source in newest
        if len(stale := stale_kernels(source, fingerprint)) > _NAMED
    ]
    environments = [
        f"{source.name}\n"
        + "\n".join(f"  {key}: {value}" for key, value in source.values["environment"].items())
        for source in sorted(found.sources, key=lambda item: item.name)
    ]
    return Section(
        id="where",
        title="What was checked where",
        intro="The newest record of each name on each machine. Stale: the code of these kernels "
        "has changed since.",
        columns=("machine", "record", "result", "made", "age", "sources"),
        rows=tuple(_where_row(source, fingerprint, now) for source in newest),
        folds=(
            *((("kernels that have changed", "\n\n".join(changed)),) if changed else ()),
            *((("environments", "\n\n".join(environments)),) if environments else ()),
        ),
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
    recorded, stale = source.values.get("fingerprint") or {}, stale_kernels(source, fingerprint)
    named = ", ".join(stale) if len(stale) <= _NAMED else f"{len(stale)} of {len(recorded)} kernels"
    sources = f"stale: {named}" if stale else "current" if recorded else "-"
    try:
        days = (now - datetime.fromisoformat(source.started)).days
        age = counted(days, "day")
    except (TypeError, ValueError):
        age = "unknown"
    made = source.started[:16].replace("T", " ")
    return (source.machine, source.stem, ", ".join(shown), made, age, sources)


def _ratios(found: Found) -> Section:
    plots, rows = [], []
    for machine, sources in found.by_machine("check").items():
        outcomes = [outcome for source in sources for outcome in source.values["outcomes"]]
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
            rows.append((machine, kernel, path, dtype, str(len(ratios)), middle, top, str(wrong)))
        title = f"worst error over its limit, {machine}"
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
        intro=f"{len(rows)} in all." if rows else "",
        columns=("status", "kernel", "path", "case", "dtype", "mode", "reason"),
        rows=tuple(rows[:_MOST]),
        nothing="None." if found.of("check") else "Nothing recorded.",
    )


def _mutants(found: Found) -> Section:
    plots, rows, folds = [], [], []
    for source in found.newest("mutants"):
        scores = source.values["scores"]
        shares = {
            kernel: 100 * score["killed"] / score["total"]
            for kernel, score in scores.items()
            if score["killed"] < score["total"]
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
        intro="Kernels broken on purpose: how many of them the checks notice. Only those of which "
        "one survived are drawn.",
        plots=tuple(plot for plot in plots if plot),
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
    for machine, entries in found.benchmarks().items():
        points, roofs = [], []
        for entry in entries:
            detail = entry.get("detail") or {}
            rate, moved = detail.get("tflops"), detail.get("gb_per_s")
            if rate and moved:
                label = f"{entry['name']}: {rate:.0f} TFLOP/s, {moved:.0f} GB/s"
                points.append(Point(x=1e3 * rate / moved, y=rate, label=label, group=entry["kind"]))
                roofs.append((1e3 * rate / moved, rate * entry["ms"] / entry["floor_ms"]))
            rows.append(_bench_row(machine, entry))
        if points:
            flops = max(roof for _, roof in roofs)
            slope = max(roof / intensity for intensity, roof in roofs)
            title = f"roofline, {machine}"
            plots.append(
                roofline(points, flops=round(flops), bandwidth=round(slope, 2), title=title)
            )
        plots += _by_rank(machine, entries)
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


def _by_rank(machine: str, entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """A plot of the times of each benchmark that differs from others in its rank alone, if it has
    at least three ranks.
    """
    groups: dict[str, dict[int, float]] = {}
    for entry in entries:
        rank, words = entry.get("R"), str(entry["name"]).split(".")
        name = ".".join(word for word in words if word != f"r{rank}")
        if rank and name != entry["name"]:
            groups.setdefault(name, {})[rank] = entry["ms"]
    return [
        bars(
            {f"rank {rank}": times[rank] for rank in sorted(times)},
            title=f"{name} by rank, {machine}",
            unit=" ms",
        )
        for name, times in groups.items()
        if len(times) > 2
    ]


def _bench_row(machine: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    ms, floor, peak = entry["ms"], entry["floor_ms"], entry.get("peak_bytes")
    return (
        machine,
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
    for machine, entries in found.benchmarks().items():
        ratios: dict[str, list[float]] = {}
        for entry in entries:
            for name, peer in (entry.get("peers") or {}).items():
                times = peer["ms"] / entry["ms"]
                ratios.setdefault(name, []).append(times)
                rows.append(
                    (
                        machine,
                        str(entry["name"]),
                        name,
                        f"{entry['ms']:.3f}",
                        f"{peer['ms']:.3f}",
                        f"{times:.2f}",
                    )
                )
        means = {name: statistics.geometric_mean(values) for name, values in ratios.items()}
        title = f"times faster than peers, geometric mean, {machine}"
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
    for machine in sorted({source.machine for source in found.of("bench")}):
        kinds: dict[str, dict[str, dict[str, float]]] = {}
        for source in reversed(found.of("bench")):
            for entry in source.values["benchmarks"]:
                if source.machine == machine and entry["floor_ms"]:
                    moments = kinds.setdefault(entry["kind"], {})
                    values = moments.setdefault(source.started, {})
                    values[entry["name"]] = entry["ms"] / entry["floor_ms"]
        series = {kind: _means(moments) for kind, moments in sorted(kinds.items())}
        series = {kind: line for kind, line in series.items() if len(line) > 1}
        plots.append(lines(series, title=f"times the floor, {machine}", unit="times floor"))
    return Section(
        id="history",
        title="History of benchmarks",
        intro="Geometric mean over those benchmarks of a kind that all of its records have; lower "
        "is better.",
        plots=tuple(plot for plot in plots if plot),
    )


def _means(moments: Mapping[str, Mapping[str, float]]) -> list[tuple[str, float]]:
    """Moment -> name -> value, as means over the names that every moment has; none if none is."""
    common = sorted(set.intersection(*(set(values) for values in moments.values())))
    return [
        (moment, statistics.geometric_mean(values[name] for name in common))
        for moment, values in moments.items()
        if common
    ]


def _gate(found: Found) -> Section:
    rows = []
    planted = found.newest("gate-planted")
    for source in (*found.newest("gate"), *planted):
        for entry in decisions_of(source):
            ratio = entry.get("ratio")
            rows.append(
                (
                    source.machine,
                    source.stem,
                    str(entry.get("name", "")),
                    str(entry.get("decision", entry.get("status", ""))),
                    f"{ratio:.3f}" if isinstance(ratio, float) else "-",
                    str(entry.get("reason", "")),
                )
            )
    sentences = [_planted(source) for source in planted]
    for source in found.newest("gate-samples"):
        rates = source.values.get("rates")
        known = line_of(rates) if rates else "not known yet"
        sentences.append(f"Rates on {source.machine}: {known}.")
    return Section(
        id="gate",
        title="Gate decisions",
        intro=" ".join(sentences),
        columns=("machine", "record", "benchmark", "decision", "head / base", "reason"),
        rows=tuple(rows),
        command=_REFRESH["gate"],
    )


def _planted(source: Source) -> str:
    """What became of slowdowns that were planted on purpose, in a sentence."""
    summary = source.values["summary"]
    return (
        f"Of {summary.get('benchmarks', 0)} slowdowns of {source.values.get('plant', 0):g}% that "
        f"were planted, {summary.get('regression', 0)} were found."
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
