"""A log-log plot as a standalone SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 560, 400
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 76, 56
COLOURS = ("#1b4f91", "#c62f2f", "#3c7d3c")


def slope(points: Points) -> float:
    """Exponent b of the power law y = a x^b, by least squares on the logarithms."""
    xs, ys = ([math.log(value) for value in axis] for axis in zip(*points, strict=True))
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - x_mean) ** 2 for x in xs)


def loglog(title: str, x_name: str, y_name: str, series: Mapping[str, Points]) -> str:
    """Lines through measured points; the legend gives each line's slope."""
    xs = sorted({x for points in series.values() for x, _ in points})
    ys = [y for points in series.values() for _, y in points]
    marks = _round_values(min(ys), max(ys))
    x = _scale(xs[0], xs[-1], LEFT, WIDTH - RIGHT)
    y = _scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="#222" role="img" aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="26" font-size="16" font-weight="600">{escape(title)}</text>',
    ]
    for value in marks:
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}" stroke="#e4e4e4"/>',
            f'<text x="{LEFT - 10}" y="{y(value) + 5}" text-anchor="end">{value:g}</text>',
        ]
    for value in xs:
        parts.append(f'<text x="{x(value)}" y="{HEIGHT - BOTTOM + 22}" text-anchor="middle">{_short(value)}</text>')
    parts += [
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_name)}</text>',
        f'<text transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_name)}</text>",
    ]
    for index, (name, points) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{x(a)},{y(b)}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(a)}" cy="{y(b)}" r="3.5" fill="{colour}"/>' for a, b in points]
        parts.append(
            f'<g transform="translate({LEFT + 200 * index} 54)"><path d="M0,-4H18" stroke="{colour}" stroke-width="2.5"/>'
            f'<text x="25">{escape(name)}, slope {slope(points):.2f}</text></g>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = math.log(high / low) or 1.0
    return lambda value: round(start + math.log(value / low) / span * (end - start), 1)


def _round_values(least: float, most: float) -> list[float]:
    """1, 2 and 5 times powers of ten around the data, or the powers alone where that would crowd the axis."""
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    values = [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in factors]
    low = max(value for value in values if value <= least)
    return [value for value in values if low <= value <= min(v for v in values if v >= most)]


def _short(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"
