"""Small multiples: which axis a panel has."""

from __future__ import annotations

import re
from typing import Any

from omniopd.compare.panels import panels
from omniopd.report.charts import RIGHT, WIDTH


def variant(label: str, spent: float) -> dict[str, Any]:
    course = [{"step": step, "accuracy": 0.4, "seconds": spent * step / 2} for step in (0, 1, 2)]
    return {"label": label, "control": "", "of": "", "runs": [{"course": course}]}


def ends(spent: list[float]) -> list[float]:
    """Where the method's curve ends in each panel, in units of the drawing; the first is the baseline's."""
    found = {"variants": [variant(f"m{i}", each) for i, each in enumerate(spent)]}
    figures = panels(found, "seconds", "s").split("<figure")[1:]
    return [float(re.findall(r'class="dot c0" cx="([\d.]+)"', figure)[-1]) for figure in figures]


def test_panels_share_an_axis() -> None:
    one, other, longest = ends([10, 10, 20, 25])
    assert one < other < longest


def test_one_that_spends_many_times_as_much_has_an_axis_of_its_own() -> None:
    few, more, many = ends([10, 10, 20, 1000])
    assert (few, more) == tuple(ends([10, 10, 20]))  # as if it were not there
    assert many == more  # the whole width, as that of the longest of the others


def test_a_baseline_that_spends_most_is_drawn_whole() -> None:
    figure = panels({"variants": [variant("base", 1000), variant("a", 10), variant("b", 12)]}, "seconds", "s")
    places = [float(at) for at in re.findall(r'class="dot base" cx="([\d.]+)"', figure)]
    assert max(places) <= WIDTH - RIGHT and len(set(places)) == 3
    assert max(places) > max(float(at) for at in re.findall(r'class="dot c0" cx="([\d.]+)"', figure))
