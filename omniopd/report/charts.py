"""Charts as inline SVG. Colours live in the style sheet (classes c0 to c5); gaps in the data are gaps in the line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from typing import Literal

from omniopd.report.formats import MISSING, compact

Values = Sequence[float | None]

WIDTH, HEIGHT = 480.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 14.0, 28.0, 46.0  # room for the larger type of narrow screens
MAX_POINTS = 240
MAX_BARS = 80
COLOURS = 6


@dataclass(frozen=True, slots=True)
class Line:
    """One series, aligned with its chart's `xs`; `low` and `high`, if given, are a band around it."""

    name: str
    values: Values
    low: Values = ()
    high: Values = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """Series over steps. `floor` and `ceiling` bound the y axis where the quantity has bounds.

    `level` is a named horizontal line. `total` says that the values are running totals.
    """

    title: str
    note: str
    unit: str
    xs: Sequence[float]
    lines: Sequence[Line]
    kind: Literal["line", "bars"] = "line"
    floor: float | None = None
    ceiling: float | None = None
    level: tuple[str, float] | None = None
    total: bool = False

    @property
    def empty(self) -> bool:
        """Is there not one number to draw?"""
        return all(value is None for line in self.lines for value in line.values)


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from data to the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where the value lies in the drawing."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def draw(chart: Chart) -> str:
    """The chart as a <figure>."""
    chart, size = _thin(chart)
    x, y = _x_scale(chart), _y_scale(chart)
    marks = _bars(chart, x, y) if chart.kind == "bars" else _lines(chart, x, y)
    body = [*_axes(chart, x, y), *marks, *_level(chart, y), *_hits(chart, x)]
    note = chart.note + (_thinned(chart, size) if size > 1 else "")
    return (
        f'<figure class="chart"><figcaption><h4>{escape(chart.title)}</h4><p>{escape(note)}</p></figcaption>'
        f"{_legend(chart)}"
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(_spoken(chart))}">'
        f"{''.join(body)}</svg></figure>"
    )


def ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Round numbers from low to high, about `target` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(target - 1, 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next((size * factor for factor in (1, 2, 2.5, 5) if size * factor >= raw * 0.999), size * 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Rounding removes what 3 * 0.1 adds.
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _thin(chart: Chart) -> tuple[Chart, int]:
    """Few enough points to draw: means of neighbouring steps, or the last of them where values are totals."""
    limit = MAX_BARS if chart.kind == "bars" else MAX_POINTS
    size = math.ceil(len(chart.xs) / limit)
    if size <= 1:
        return chart, 1
    lines = [
        replace(
            line,
            values=_merge(line.values, size, chart.total),
            low=_merge(line.low, size),
            high=_merge(line.high, size),
        )
        for line in chart.lines
    ]
    xs = [max(chart.xs[start : start + size]) for start in range(0, len(chart.xs), size)]
    return replace(chart, xs=xs, lines=lines), size


def _merge(values: Values, size: int, total: bool = False) -> list[float | None]:
    groups = ([v for v in values[start : start + size] if v is not None] for start in range(0, len(values), size))
    return [(group[-1] if total else sum(group) / len(group)) if group else None for group in groups]


def _thinned(chart: Chart, size: int) -> str:
    return f" One point in {size} is drawn." if chart.total else f" Each mark is the mean of {size}."


def _x_scale(chart: Chart) -> Scale:
    low, high = min(chart.xs), max(chart.xs)
    if low == 1 and chart.kind == "line":
        low = 0.0  # so that charts with and without the evaluation at step 0 line up
    half = _step(chart.xs) / 2 if chart.kind == "bars" or low == high else 0.0
    return Scale(low - half, high + half, LEFT, WIDTH - RIGHT)


def _y_scale(chart: Chart) -> Scale:
    """Round ends around the data; a bound holds unless the data break it (an estimated KL can be negative)."""
    least, most = low, high = _bounds(chart)
    if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-200):
        room = 0.1 * abs(low) or 1.0
        low, high = low - room, high + room
    grid = ticks(low, high)
    step = grid[1] - grid[0] if len(grid) > 1 else high - low
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    floor = 0.0 if chart.kind == "bars" else chart.floor
    if floor is not None and least >= floor:
        low = max(low, floor)
    if chart.ceiling is not None and most <= chart.ceiling:
        high = min(high, chart.ceiling)
    return Scale(low, high, HEIGHT - BOTTOM, TOP)


def _bounds(chart: Chart) -> tuple[float, float]:
    if chart.kind == "bars":
        return 0.0, max(
            sum(v or 0.0 for v in column) for column in zip(*(li.values for li in chart.lines), strict=True)
        )
    found = [v for line in chart.lines for part in (line.values, line.low, line.high) for v in part if v is not None]
    if chart.level:
        found.append(chart.level[1])
    if chart.floor is not None and chart.ceiling is None:
        found.append(chart.floor)  # a quantity with a natural zero is shown from zero
    return min(found), max(found)


def _step(xs: Sequence[float]) -> float:
    """The smallest distance between two steps."""
    return min((b - a for a, b in pairwise(xs) if b > a), default=1.0)


def _axes(chart: Chart, x: Scale, y: Scale) -> Iterator[str]:
    grid = ticks(y.low, y.high)
    digits = _digits(grid)
    for value in grid:
        at = y(value)
        yield f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{at:.1f}" y2="{at:.1f}"/>'
        label = compact(value, digits)
        yield f'<text class="tick" x="{LEFT - 7:g}" y="{at:.1f}" dy="0.35em" text-anchor="end">{label}</text>'
    base = HEIGHT - BOTTOM
    yield f'<line class="axis" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{base:g}" y2="{base:g}"/>'
    for value in ticks(x.low, x.high, 6):
        if value == int(value):
            at, label = x(value), compact(value, 4)
            yield f'<text class="tick" x="{at:.1f}" y="{base + 19:g}" text-anchor="middle">{label}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text class="label" x="{middle:g}" y="{HEIGHT - 6:g}" text-anchor="middle">step</text>'
    yield f'<text class="label" x="2" y="14">{escape(chart.unit)}</text>'


def _digits(grid: Sequence[float]) -> int:
    """How many significant digits tell neighbouring ticks apart."""
    if len(grid) < 2:
        return 3
    largest, step = max(abs(grid[0]), abs(grid[-1])), grid[1] - grid[0]
    return max(3, math.floor(math.log10(largest)) - math.floor(math.log10(step)) + 2)


def _segments(xs: Sequence[float], ys: Values) -> Iterator[list[tuple[float, float]]]:
    """The unbroken stretches of a series."""
    stretch: list[tuple[float, float]] = []
    for x, y in zip(xs, ys, strict=True):
        if y is not None:
            stretch.append((x, y))
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def _lines(chart: Chart, x: Scale, y: Scale) -> Iterator[str]:
    for index, line in enumerate(chart.lines):
        yield from _band(chart.xs, line, f"c{index % COLOURS}", x, y)
    few = len(chart.xs) <= 24
    for index, line in enumerate(chart.lines):
        for stretch in _segments(chart.xs, line.values):
            path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in stretch)
            if len(stretch) > 1:
                yield f'<polyline class="line c{index % COLOURS}" points="{path}"/>'
            if few or len(stretch) == 1:
                yield from (
                    f'<circle class="dot c{index % COLOURS}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"/>'
                    for a, b in stretch
                )


def _band(xs: Sequence[float], line: Line, colour: str, x: Scale, y: Scale) -> Iterator[str]:
    if not line.low or not line.high:
        return
    both = [None if a is None or b is None else a for a, b in zip(line.low, line.high, strict=True)]
    tops = {at: high for at, high in zip(xs, line.high, strict=True) if high is not None}
    for stretch in _segments(xs, both):
        if len(stretch) == 1:
            (at, low), high = stretch[0], tops[stretch[0][0]]
            ends = f'y1="{y(low):.1f}" y2="{y(high):.1f}"'
            yield f'<line class="whisker {colour}" x1="{x(at):.1f}" x2="{x(at):.1f}" {ends}/>'
            continue
        around = [*stretch, *((at, tops[at]) for at, _ in reversed(stretch))]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in around)
        yield f'<polygon class="band {colour}" points="{path}"/>'


def _bars(chart: Chart, x: Scale, y: Scale) -> Iterator[str]:
    width = max((x(_step(chart.xs)) - x(0)) * 0.82, 1.0)
    width = min(width, 40.0)
    for column, at in enumerate(chart.xs):
        base = 0.0
        for index, line in enumerate(chart.lines):
            value = line.values[column]
            if not value or value < 0:
                continue
            # The hair between stacked bars tells them apart without colour.
            top, height = y(base + value), max(y(base) - y(base + value) - 0.7, 0.3)
            base += value
            yield (
                f'<rect class="bar c{index % COLOURS}" x="{x(at) - width / 2:.1f}" y="{top:.1f}"'
                f' width="{width:.1f}" height="{height:.1f}"/>'
            )


def _level(chart: Chart, y: Scale) -> Iterator[str]:
    if chart.level:
        at = y(chart.level[1])
        yield f'<line class="level" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{at:.1f}" y2="{at:.1f}"/>'


def _hits(chart: Chart, x: Scale) -> Iterator[str]:
    """Invisible columns, one a step, whose titles say the values there."""
    edges = [LEFT, *(x((a + b) / 2) for a, b in pairwise(chart.xs)), WIDTH - RIGHT]
    for column, at in enumerate(chart.xs):
        left, right = edges[column], edges[column + 1]
        yield (
            f'<g class="hit"><title>{escape(_reading(chart, column))}</title>'
            f'<rect x="{left:.1f}" y="{TOP:g}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM:g}"/>'
            f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{TOP:g}" y2="{HEIGHT - BOTTOM:g}"/></g>'
        )


def _reading(chart: Chart, column: int) -> str:
    rows = [f"step {chart.xs[column]:,.0f}"]
    for line in chart.lines:
        text = _exact(line.values[column])
        if line.low and line.high and line.low[column] is not None:
            text += f" ({_exact(line.low[column])} to {_exact(line.high[column])})"
        rows.append(f"{line.name}: {text}")
    return "\n".join(rows)


def _exact(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def _legend(chart: Chart) -> str:
    if len(chart.lines) < 2 and not chart.level:
        return ""
    shape = "bar" if chart.kind == "bars" else "line"
    items = [(f"{shape} c{index % COLOURS}", line.name) for index, line in enumerate(chart.lines)]
    if chart.level:
        items.append(("level", f"{chart.level[0]} {chart.level[1]:.3g}"))
    keys = "".join(f"<li>{_key(shape)}{escape(name)}</li>" for shape, name in items)
    return f'<ul class="legend">{keys}</ul>'


def _key(shape: str) -> str:
    mark = (
        f'<rect class="{shape}" x="4" y="1" width="14" height="10"/>'
        if shape.startswith("bar")
        else f'<line class="{shape}" x1="0" x2="22" y1="6" y2="6"/>'
    )
    return f'<svg viewBox="0 0 22 12" aria-hidden="true">{mark}</svg>'


def _spoken(chart: Chart) -> str:
    """The chart in one sentence, for those who don't see it."""
    parts = []
    for line in chart.lines:
        known = [(at, value) for at, value in zip(chart.xs, line.values, strict=True) if value is not None]
        if known:
            (first, a), (last, b) = known[0], known[-1]
            parts.append(f"{line.name} {compact(a)} at step {first:g}, {compact(b)} at step {last:g}")
    return f"{chart.title} ({chart.unit}): {'; '.join(parts)}"
