"""The page of a comparison in a real browser: quiet, fitting, its panels on one scale."""

from __future__ import annotations

from typing import Any

import pytest

from omniopd.compare.page import write_page
from tests.browser.sample_run import HOSTILE
from tests.browser.test_report_page import CHROMIUM, DRIVER, browser, find, requested, visit

__all__ = ["browser"]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed"),
]


def variant(label: str, gain: float, control: str = "", of: str = "", cost: float = 1e5) -> dict[str, Any]:
    course = [
        {
            "step": step,
            "accuracy": 0.5 + gain * step / 40,
            "n": 300,
            "seconds": 2.5 * step,
            "student_tokens": 900.0 * step,
            "teacher_read": cost * step / 40,
            "teacher_written": 0.0,
        }
        for step in (0, 10, 20, 30, 40)
    ]
    spent = {
        "seconds": 93.0,
        "student_tokens": 35_000.0,
        "trained_tokens": 28_000.0,
        "teacher_read": cost,
        "teacher_written": 0.0,
    }
    each = {"status": "finished", "course": course, "correct": {"before": "10" * 150, "after": "1" * 180 + "0" * 120}}
    found = {"mean": gain, "low": gain - 0.03, "high": gain + 0.03, "each": [gain] * 3, "problems": 300}
    return {
        "label": label, "control": control, "of": of, "settings": {"method": {"name": "opd"}}, "refused": "",
        "finished": 3, "before": 0.5, "after": 0.5 + gain, "spent": spent, "against": found, "over_control": None,
        "runs": [{"seed": seed, **each} for seed in range(3)],
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    refused = {**variant(f"refused {HOSTILE}", 0.0), "refused": HOSTILE, "finished": 0, "runs": [], "against": None}
    found = {
        "config": f"compare.yaml {HOSTILE}", "output": "out", "seeds": [0, 1, 2], "baseline": "opd", "steps": 40,
        "problems": 300, "on_the_way": 150, "whole": True,
        "variants": [
            {**variant("opd", 0.1), "against": None},
            variant("fire", 0.2, cost=3e5),
            variant("fire (shuffled)", 0.12, "shuffled", "fire"),
            variant("fire (length)", 0.05, "length", "fire"),
            variant(HOSTILE, -0.1),
            refused,
        ],
        "pairs": [
            {"label": "fire", "than": "opd", "mean": 0.1, "low": 0.07, "high": 0.13},
            {"label": HOSTILE, "than": "opd", "mean": -0.2, "low": -0.41, "high": 0.01},
            {"label": HOSTILE, "than": "fire", "mean": -0.3, "low": -0.33, "high": -0.27},
        ],
    }  # fmt: skip
    path = tmp_path_factory.mktemp("compare") / "compare.html"
    write_page(found, path)
    return path.as_uri()


def test_loads_without_errors_or_requests(browser: Any, page: str) -> None:
    visit(browser, page)
    assert browser.get_log("browser") == []
    assert [found for found in requested(browser) if not found.startswith("data:")] == [page]
    assert browser.title != "owned"
    assert len(find(browser, ".wide table:not(.pairs) tbody tr")) == 6
    assert len(find(browser, "figure")) == 8  # two methods, by steps, seconds, the student's tokens and the teacher's


def test_each_method_against_each_other_is_a_table_with_the_best_first(browser: Any, page: str) -> None:
    visit(browser, page)
    rows = [[cell.text for cell in row.find_elements("css selector", "td")] for row in find(browser, ".pairs tbody tr")]
    assert rows == [["", "+10.0", "+30.0"], ["−10.0", "", "+20.0"], ["−30.0", "−20.0", ""]]
    kinds = [cell.get_attribute("class") for cell in find(browser, ".pairs tbody td") if cell.text]
    assert kinds == ["above", "above", "below", "level", "below", "level"]
    (fire,) = [cell for cell in find(browser, ".pairs td") if cell.text == "+10.0"]
    assert fire.get_attribute("title") == "fire less opd: +10.0 (+7.0 to +13.0)"


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_sideways_scrolling(browser: Any, page: str, width: int) -> None:
    visit(browser, page, width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_panels_have_one_scale_and_the_baseline_in_each(browser: Any, page: str) -> None:
    visit(browser, page)
    figures = find(browser, "figure")
    ticks = [[tick.text for tick in panel.find_elements("css selector", ".tick")] for panel in figures]
    lines = [
        [one.get_attribute("points") for one in panel.find_elements("css selector", ".mean.base")] for panel in figures
    ]
    for first in range(0, len(figures), 2):  # of each axis, both methods
        assert ticks[first] == ticks[first + 1]
        assert lines[first] == lines[first + 1] and len(lines[first]) == 1
    assert len({tuple(found) for found in ticks}) == 4
    units = [panel.find_element("css selector", ".label").text for panel in figures[::2]]
    assert units == ["steps", "seconds", "tokens that the student wrote", "tokens that the teacher read and wrote"]
