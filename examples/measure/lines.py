"""Panels of lines as one standalone SVG: the mean over seeds, and a band from the lowest to the highest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

Point = tuple[float, Sequence[float]]  # x, and a y in percent per seed

WIDTH, HEIGHT = 460, 360
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 34, 46
COLOURS = ("#1b4f91", "#c62f2f", "#3c7d3c", "#b7791f", "#6b46a3", "#0e7c86", "#8a5a44", "#555555", "#d0589c")


def panels(title: str, drawn: Sequence[tuple[str, str, Mapping[str, Sequence[Point]]]]) -> str:
    """Panels side by side, each (title, name of the x axis, points of each series); one legend for all."""
    names = list(dict.fromkeys(name for _, _, series in drawn for name in series))
    pen = {  # what comes after the last colour is dashed
        name: f'stroke="{COLOURS[i % len(COLOURS)]}"' + ' stroke-dasharray="6 4"' * (i >= len(COLOURS))
        for i, name in enumerate(names)
    }
    rows = (len(names) + 3) // 4
    width, height = WIDTH * len(drawn), HEIGHT + 22 * rows
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="#222" role="img" aria-label="{escape(title)}">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for place, (heading, x_name, series) in enumerate(drawn):
        parts += [f'<g transform="translate({WIDTH * place} 0)">', *_panel(heading, x_name, series, pen), "</g>"]
    for place, name in enumerate(names):
        x, y = LEFT + width / 4 * (place % 4), HEIGHT + 10 + 22 * (place // 4)
        parts.append(f'<path d="M{x},{y}h22" {pen[name]} stroke-width="3"/>')
        parts.append(f'<text x="{x + 28}" y="{y + 5}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(heading: str, x_name: str, series: Mapping[str, Sequence[Point]], pen: Mapping[str, str]) -> Iterator[str]:
    right = max(x for points in series.values() for x, _ in points)
    top = max(10.0, max(y for points in series.values() for _, ys in points for y in ys))
    top = 10 * -(-top // 10)

    def at(x: float, y: float) -> str:
        return (
            f"{LEFT + x / right * (WIDTH - LEFT - RIGHT):.1f},{HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM):.1f}"
        )

    yield f'<text x="{LEFT}" y="20" font-weight="600">{escape(heading)}</text>'
    for tick in range(0, int(top) + 1, 10):
        x, y = at(0, tick).split(",")
        yield f'<path d="M{x},{y}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>'
        yield f'<text x="{LEFT - 8}" y="{float(y) + 4}" text-anchor="end">{tick} %</text>'
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = at(share * right, 0).split(",")
        yield f'<text x="{x}" y="{float(y) + 18}" text-anchor="middle">{share * right:,.4g}</text>'
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_name)}</text>'
    for name, points in series.items():
        band = [at(x, max(ys)) for x, ys in points] + [at(x, min(ys)) for x, ys in reversed(points)]
        fill = pen[name].split('"')[1]
        yield f'<polygon points="{" ".join(band)}" fill="{fill}" opacity="0.12"/>'
        line = " ".join(at(x, sum(ys) / len(ys)) for x, ys in points)
        yield f'<polyline points="{line}" fill="none" {pen[name]} stroke-width="2"/>'
