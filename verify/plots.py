"""Plots as inline SVG below their titles, for a `figure`: no script, no request, readable at any
width, described in words.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 28, 40
_NAME, _LONGEST = 28, 60
"""Characters that fit before a bar, and above it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One mark. group: what its colour says."""

    x: float
    y: float
    label: str
    group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A logarithmic axis from low to high over so many pixels that start at `start`."""

    low: float
    high: float
    start: float
    span: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + self.span * share

    def ticks(self) -> list[float]:
        """Powers of ten, and 2 and 5 times these where the axis is short."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        steps: tuple[float, ...] = (1, 2, 5) if last - first <= 2 else (1,)
        if self.high / self.low < 10:
            steps = (1, 1.5, 2, 3, 5, 7)
        values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        return [value for value in values if self.low <= value <= self.high * 1.0001]


def roofline(points: Sequence[Point], *, flops: float, bandwidth: float, title: str) -> str:
    """Operations per second over operations per byte, below the roof; x in FLOP/byte, y in TFLOP/s.

    flops: TFLOP/s of large products. bandwidth: TB/s of large copies.
    """
    xs = [point.x for point in points] + [flops / bandwidth]
    ys = [point.y for point in points] + [flops]
    height = 360
    x = Axis(low=min(xs) / 2, high=max(xs) * 2, start=_LEFT, span=float(WIDTH - _LEFT - _RIGHT))
    y = Axis(
        low=min(ys) / 2,
        high=max(ys) * 1.5,
        start=height - _BOTTOM,
        span=-float(height - _TOP - _BOTTOM),
    )
    corner = flops / bandwidth
    left = max(x.low, y.low / bandwidth)
    roof = f"M{x(left):.1f},{y(left * bandwidth):.1f} L{x(corner):.1f},{y(flops):.1f} "
    roof += f"L{x(x.high):.1f},{y(flops):.1f}"
    parts = [*_grid(x, y, height, "FLOP per byte", "TFLOP/s"), f'<path class="roof" d="{roof}"/>']
    parts += _marks(points, x, y)
    note = f"{len(points)} benchmarks under a roof of {flops:g} TFLOP/s and {bandwidth:g} TB/s"
    return _svg(parts, height, title, note) + _legend(points)


def bars(values: Mapping[str, float], *, title: str, unit: str, mark: float | None = None) -> str:
    """Horizontal bars by name, their values in a column behind them; `mark`: a line at this value.

    Names stand before the bars, or above them where one is too long for that.
    """
    if not values:
        return ""
    above = max(map(len, values)) > _NAME
    row, names = (44, 0) if above else (24, 200)
    height = row * len(values) + 30
    top = max([*values.values(), mark or 0.0, 1e-9]) * 1.08
    span = WIDTH - names - 64
    parts = []
    for place, (name, value) in enumerate(values.items()):
        y = place * row + (row - 20)
        wide = max(span * value / top, 1.0)
        shown = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
        where = f'x="0" y="{y - 6}"' if above else f'x="{names - 8}" y="{y + 13}" text-anchor="end"'
        parts.append(
            f"<text {where}>{escape(shown)}</text>"
            f'<rect class="bar" x="{names}" y="{y}" width="{wide:.1f}" height="16"/>'
            f'<text x="{WIDTH - 4}" y="{y + 13}" text-anchor="end">{value:.2f}{escape(unit)}</text>'
        )
    if mark is not None:
        x = names + span * mark / top
        reach = 19 if above else row
        parts += [
            f'<line class="roof" x1="{x:.1f}" x2="{x:.1f}" y1="{(place + 1) * row - reach - 2}" '
            f'y2="{(place + 1) * row - 2}"/>'
            for place in range(len(values))
        ]
        parts.append(
            f'<text x="{max(x, 12.0):.1f}" y="{height - 12}" text-anchor="middle">'
            f"{mark:g}{escape(unit)}</text>"
        )
    note = ", ".join(f"{name} {value:.2f}{unit}" for name, value in values.items())
    return _svg(parts, height, title, note)


def lines(series: Mapping[str, Sequence[tuple[str, float]]], *, title: str, unit: str) -> str:
    """Values over records, one line per name, which need not be in every record."""
    values = [value for line in series.values() for _, value in line]
    moments = sorted({moment for line in series.values() for moment, _ in line})
    if len(moments) < 2:
        return ""
    height = 280
    y = Axis(
        low=min(values) / 1.1,
        high=max(values) * 1.1,
        start=height - _BOTTOM,
        span=-float(height - _TOP - _BOTTOM),
    )
    step = (WIDTH - _LEFT - _RIGHT - 40) / (len(moments) - 1)
    places = {moment: _LEFT + 20 + step * place for place, moment in enumerate(moments)}
    parts = _levels(y, unit)
    for place, (name, line) in enumerate(series.items()):
        path = " ".join(
            f"{'L' if count else 'M'}{places[moment]:.1f},{y(value):.1f}"
            for count, (moment, value) in enumerate(line)
        )
        parts.append(f'<path class="line g{place % 8}" d="{path}"/>')
        for moment, value in line:
            parts.append(
                f'<circle class="g{place % 8}" cx="{places[moment]:.1f}" cy="{y(value):.1f}" r="4">'
                f"<title>{escape(name)} {escape(moment)}: {value:.3f}</title></circle>"
            )
    ends = (moments[0], moments[-1])
    shown = 10 if ends[0][:10] != ends[1][:10] else 16
    for moment in ends:
        anchor = "start" if moment == moments[0] else "end"
        parts.append(
            f'<text x="{places[moment]:.1f}" y="{height - 22}" text-anchor="{anchor}">'
            f"{escape(moment[:shown].replace('T', ' '))}</text>"
        )
    names = [Point(x=0, y=0, label="", group=name) for name in series]
    return _svg(parts, height, title, f"{len(moments)} records") + _legend(names)


def _grid(x: Axis, y: Axis, height: int, x_name: str, y_name: str) -> list[str]:
    parts = _levels(y, y_name)
    for tick in x.ticks():
        place = x(tick)
        parts.append(
            f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP}" '
            f'y2="{height - _BOTTOM}"/>'
            f'<text x="{place:.1f}" y="{height - 22}" text-anchor="middle">{tick:g}</text>'
        )
    parts.append(f'<text x="{WIDTH / 2}" y="{height - 4}" text-anchor="middle">{x_name}</text>')
    return parts


def _levels(y: Axis, name: str) -> list[str]:
    parts = [f'<text x="4" y="12">{escape(name)}</text>']
    for tick in y.ticks():
        place = y(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{place:.1f}" '
            f'y2="{place:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    return parts


def _marks(points: Sequence[Point], x: Axis, y: Axis) -> list[str]:
    groups = list(dict.fromkeys(point.group for point in points))
    return [
        f'<circle class="g{groups.index(point.group) % 8}" cx="{x(point.x):.1f}" '
        f'cy="{y(point.y):.1f}" r="5"><title>{escape(point.label)}</title></circle>'
        for point in points
    ]


def _legend(points: Sequence[Point]) -> str:
    groups = [group for group in dict.fromkeys(point.group for point in points) if group]
    items = "".join(
        f'<li><svg viewBox="0 0 12 12" class="key" aria-hidden="true">'
        f'<circle class="g{place % 8}" cx="6" cy="6" r="5"/></svg>{escape(group)}</li>'
        for place, group in enumerate(groups)
    )
    return f'<ul class="legend">{items}</ul>' if items else ""


def _svg(parts: Sequence[str], height: int, title: str, note: str) -> str:
    words = escape(f"{title}: {note}", quote=True)
    return (
        f"<figcaption>{escape(title)}</figcaption>"
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{words}">'
        + "".join(parts)
        + "</svg>"
    )
