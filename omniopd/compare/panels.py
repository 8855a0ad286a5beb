"""Small multiples: a panel for each method, all with the same axes, the baseline in grey in each of them.

A method that spends many times as much as most has a longer axis of its own, so that the others can be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean, median
from typing import Any

from omniopd.compare.results import teacher_tokens
from omniopd.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, ticks
from omniopd.report.formats import compact, percent

FAR = 3.0  # times the median of what the methods spend: beyond it a panel has its own axis
Point = tuple[float, float]  # what was spent, accuracy
STYLES = {"baseline": "base", "": "c0", "shuffled": "c1", "length": "c2"}
KEYS = {"baseline": "baseline", "": "the method", "shuffled": "shuffled", "length": "baseline of the same length"}


@dataclass(frozen=True, slots=True)
class Curve:
    """The mean over seeds, and each seed's own. `style` is a class of the style sheet."""

    name: str
    style: str
    mean: Sequence[Point]
    each: Sequence[Sequence[Point]]


def amount(entry: Mapping[str, Any], against: str) -> float:
    """How far along an evaluation is: its step, or what was spent until then."""
    return teacher_tokens(entry) if against == "teacher_tokens" else float(entry[against])


def panels(found: Mapping[str, Any], against: str, unit: str) -> str:
    """A panel for each method that has begun, accuracy over `against`; "" where that is 0 throughout."""
    variants = found["variants"]
    baseline = _curve(variants[0], against, "baseline")
    methods = [one for one in variants[1:] if not one["control"]]
    drawn = [
        [_curve(one, against, one["control"]) for one in variants if method["label"] in (one["label"], one["of"])]
        for method in methods
    ]
    everything = [point for curve in [baseline, *(c for panel in drawn for c in panel)] for point in _points(curve)]
    if not everything or max(x for x, _ in everything) <= 0:
        return ""
    ends = [end for panel in drawn if (end := _end(panel))]
    most = max((end for end in ends if end <= FAR * median(ends)), default=0.0)
    most = max(most, _end([baseline]))
    y = _heights([y for _, y in everything])
    shown = [
        (method["label"], curves) for method, curves in zip(methods, drawn, strict=True) if any(map(_points, curves))
    ]
    figures = [
        _panel(label, [baseline, *curves], Scale(0.0, max(most, _end(curves)), LEFT, WIDTH - RIGHT), y, unit)
        for label, curves in shown
    ]
    if not figures:  # of the baseline alone
        figures = [_panel(baseline.name, [baseline], Scale(0.0, most, LEFT, WIDTH - RIGHT), y, unit)]
    return f'<div class="panels">{"".join(figures)}</div>'


def _curve(variant: Mapping[str, Any], against: str, kind: str) -> Curve:
    each = [
        [(amount(at, against), at["accuracy"]) for at in run["course"] if at["accuracy"] is not None]
        for run in variant["runs"]
    ]
    return Curve(variant["label"], STYLES[kind], mean_curve(each), each)


def mean_curve(each: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean of the curves at each evaluation, as far as all of them reach."""
    return [(fmean(x for x, _ in points), fmean(y for _, y in points)) for points in zip(*each, strict=False)]


def _end(curves: Sequence[Curve]) -> float:
    """How far along the curves reach."""
    return max((x for curve in curves for x, _ in _points(curve)), default=0.0)


def _points(curve: Curve) -> list[Point]:
    return [*curve.mean, *(point for one in curve.each for point in one)]


def _heights(values: Sequence[float]) -> Scale:
    grid = ticks(min(values), max(values))
    step = grid[1] - grid[0] if len(grid) > 1 else 0.05
    return Scale(max(0.0, grid[0] - step), min(1.0, grid[-1] + step), HEIGHT - BOTTOM, TOP)


def _panel(label: str, curves: Sequence[Curve], x: Scale, y: Scale, unit: str) -> str:
    spoken = "; ".join(f"{curve.name} {percent(curve.mean[-1][1])}" for curve in curves if curve.mean)
    body = [*_axes(x, y, unit), *(line for curve in curves for line in _draw(curve, x, y))]
    return (
        f'<figure class="chart"><figcaption><h4>{escape(label)}</h4></figcaption>'
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(f"Accuracy by {unit}: {spoken}")}">'
        f"<title>{escape(spoken)}</title>{''.join(body)}</svg></figure>"
    )


def _axes(x: Scale, y: Scale, unit: str) -> Iterator[str]:
    base = HEIGHT - BOTTOM
    for value in ticks(y.low, y.high):
        at = y(value)
        yield f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text class="tick" x="{LEFT - 7:g}" y="{at:.1f}" dy="0.35em" text-anchor="end">{100 * value:g}</text>'
    yield f'<line class="axis" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{base:g}" y2="{base:g}"/>'
    for value in ticks(x.low, x.high):
        yield f'<text class="tick" x="{x(value):.1f}" y="{base + 19:g}" text-anchor="middle">{compact(value)}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text class="label" x="{middle:g}" y="{HEIGHT - 6:g}" text-anchor="middle">{escape(unit)}</text>'
    yield '<text class="label" x="2" y="14">%</text>'


def _draw(curve: Curve, x: Scale, y: Scale) -> Iterator[str]:
    """Each seed's line thin, the mean's thick."""
    for one in curve.each if len(curve.each) > 1 else ():
        yield f'<polyline class="line seed {curve.style}" points="{_path(one, x, y)}"/>'
    yield f'<polyline class="line mean {curve.style}" points="{_path(curve.mean, x, y)}"/>'
    for a, b in curve.mean:
        yield f'<circle class="dot {curve.style}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"/>'


def _path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)


def legend(baseline: str, controls: Sequence[str]) -> str:
    """What the lines of every panel are."""
    shown = ["baseline", "", *dict.fromkeys(controls)]
    names = {**KEYS, "baseline": baseline}
    keys = (
        f'<li><svg viewBox="0 0 22 12" aria-hidden="true"><line class="line mean {STYLES[kind]}" x1="0" x2="22" y1="6" '
        f'y2="6"/></svg>{escape(names[kind])}</li>'
        for kind in shown
    )
    return f'<ul class="legend">{"".join(keys)}</ul>'
