"""The run report: escaping, runs that stopped early, holes in the numbers, and the charts."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from omniopd.errors import RunError
from omniopd.report import write_report
from omniopd.report.charts import MAX_BARS, MAX_POINTS, Chart, Line, draw, ticks
from omniopd.report.folder import MAX_ROLLOUTS, read_run
from omniopd.report.formats import compact, count, duration, money, number, percent, points
from omniopd.report.records import island, rollout_record, score_range
from omniopd.report.verdict import course, evaluations, sentence
from tests.browser.sample_run import ASTRAL, HOSTILE, write_run

NAN = float("nan")
ODD: tuple[Any, ...] = (
    None,
    [],
    [None],
    "text",
    3,
    -5,
    NAN,
    math.inf,
    1e308,
    {},
    {"reason": None},
    [{"replies": [None, 1]}],
)


def page_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="audit-data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def chart(*values: float | None, **options: Any) -> Chart:
    xs = [float(step) for step in range(1, len(values) + 1)]
    return Chart("Title", "Note.", "unit", xs, [Line("line", values)], **options)


def svg_of(figure: str) -> ElementTree.Element:
    found = ElementTree.fromstring(figure).find("svg")
    assert found is not None
    return found


def count_lines(folder: Path, wanted: int) -> None:
    """Repeat the one audit row of the folder until there are `wanted`, each of a step of its own."""
    row = json.loads((folder / "audits.jsonl").read_text().splitlines()[0])
    lines = [json.dumps({**row, "step": step}) for step in range(wanted)]
    (folder / "audits.jsonl").write_text("\n".join(lines) + "\n")


# ---- the file


def test_one_file_of_its_own(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert (
        "url(" not in page and "@import" not in page and "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    )
    assert [path.name for path in (tmp_path / "run").glob("report*")] == ["report.html"]


def test_policy_allows_only_our_own_style_and_script(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy and policy[1].startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy[1]
    assert " style=" not in page and not re.search(
        r"\son[a-z]+=", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    )


def test_same_folder_same_page(tmp_path: Path) -> None:
    assert page_of(write_run(tmp_path / "run")) == page_of(tmp_path / "run")


def test_key_numbers_and_verdict(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    for text in ("Accuracy rose from", "+19.1 to +31.6", "5,760", "and 660 from the store", "42.3", "712k parameters"):
        assert text in page
    assert "of it waiting for the teacher" in page and ">waiting for the teacher<" in page
    for title in (
        "Accuracy",
        "Loss",
        "KL to the reference",
        "Coverage",
        "Dropped",
        "Teacher tokens",
        "Cost",
        "Time",
        "Lag",
    ):
        assert f"<h4>{title}</h4>" in page


def test_a_run_of_an_earlier_version_without_lag_and_waits(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps({key: row[key] for key in row if key not in ("lag", "seconds_wait")}) for row in rows]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({key: summary[key] for key in summary if key != "wait_share"}))
    page = page_of(run)
    assert "of it waiting" not in page and "<h4>Lag</h4>" not in page and ">waiting for the teacher<" in page
    rows = [{**row, "lag": {"0": 32}} for row in rows if "lag" in row]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "<h4>Lag</h4>" not in page_of(run)  # nothing lags: nothing to see


# ---- escaping


def test_island_survives_any_text() -> None:
    texts = [HOSTILE, "</script>", "<!--<script>", "\u2028\u2029", ASTRAL, "\ud800", "\x00", "]]>&lt;"]
    written = island(texts)
    assert not set("<>&\u2028\u2029") & set(written) and written.isascii()
    assert json.loads(written) == texts


def test_hostile_text_is_data_everywhere(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", hostile=True))
    assert page.count("<script") == 2 and page.count("</script") == 2 and "<img" not in page
    assert data_of(page)["rollouts"][0]["text"].endswith(HOSTILE)


def test_hostile_folder_name(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "<b onclick=alert(1)> & $name ${csp}"))
    assert "<b onclick" not in page and "&lt;b onclick=alert(1)&gt; &amp; $name ${csp}" in page


def test_lone_surrogates_are_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").write_text(r'{"method": "\ud83d", "drops": {"\udc00": 2}}')
    assert "Method" in page_of(folder)


# ---- runs that stopped early


def test_missing_folder_and_metrics_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"absent: no such run folder$"):
        write_report(tmp_path / "absent")
    with pytest.raises(RunError, match=r"metrics\.jsonl is missing"):
        write_report(tmp_path)


def test_metrics_alone_are_enough(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for name in ("summary.json", "audits.jsonl", "config.yaml", "manifest.json"):
        (folder / name).unlink()
    page = page_of(folder)
    assert (
        "the latest evaluation, at step 50 on 300 prompts, gives" in page
        and "No summary.json" in page
        and "kept no audited rollouts" in page
    )
    assert "5,760" in page, "the calls are summed over the steps"


def test_empty_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    page = page_of(tmp_path)
    assert "no evaluation" in page and "No step has been recorded" in page and "no steps to draw" in page


def test_any_summary_key_may_be_missing_or_odd(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4)
    whole = json.loads((folder / "summary.json").read_text())
    for key in whole:
        for value in ODD:
            (folder / "summary.json").write_text(json.dumps({**whole, key: value}))
            write_report(folder)
        (folder / "summary.json").write_text(json.dumps({name: whole[name] for name in whole if name != key}))
        write_report(folder)


def test_any_metric_may_be_missing_or_odd(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for key in rows[1]:
        for value in ODD:
            (folder / "metrics.jsonl").write_text("".join(json.dumps({**row, key: value}) + "\n" for row in rows))
            write_report(folder)


def test_any_audit_key_may_be_missing_or_odd() -> None:
    whole = {"step": 1, "prompt": [], "text": "abc", "chunks": [{"replies": [{"text": "a"}]}]}
    for key in (*whole, "reference", "correct", "finish"):
        for value in ODD:
            island(rollout_record({**whole, key: value}))


def test_torn_lines_are_counted_not_fatal(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=3, rollouts=2)
    for name in ("metrics.jsonl", "audits.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 4, "loss": 0.')
    page = page_of(folder)
    assert "1 unreadable line(s) of metrics.jsonl" in page and "1 unreadable line(s) of audits.jsonl" in page


def test_broken_summary_names_the_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").write_text("{")
    with pytest.raises(RunError, match=r"summary\.json is not JSON"):
        write_report(folder)


def test_repeated_steps_of_a_resumed_run_count_once(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 9}\n{"step": 2, "loss": 3}\n')
    assert [row["loss"] for row in read_run(tmp_path).metrics] == [1, 3]


def test_unfinished_status_is_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=5)
    (folder / "summary.json").write_text('{"status": "interrupted"}')
    assert "not finished: interrupted after step 5" in page_of(folder)


def test_many_audits_are_thinned_evenly(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rollouts=1)
    count_lines(folder, 3 * MAX_ROLLOUTS)
    page = page_of(folder)
    steps = [rollout["step"] for rollout in data_of(page)["rollouts"]]
    assert len(steps) == MAX_ROLLOUTS and (steps[0], steps[-1]) == (0, 3 * MAX_ROLLOUTS - 1)
    assert f"{MAX_ROLLOUTS} of the 1,200" in page and "800 left out" in page


def test_large_audits_are_capped_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", rollouts=1)
    count_lines(folder, 50)
    size = (folder / "audits.jsonl").stat().st_size
    monkeypatch.setattr("omniopd.report.folder.MAX_AUDIT_BYTES", size // 5)
    assert len(read_run(folder).rollouts) == 10


def test_unwritable_folder_is_one_of_our_errors(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "report.html").mkdir()
    with pytest.raises(RunError, match=r"report\.html: can't be written"):
        write_report(folder)
    shutil.rmtree(folder)


# ---- numbers and words


def test_numbers_as_text() -> None:
    space, minus = "\N{NO-BREAK SPACE}", "\N{MINUS SIGN}"
    assert [number(value) for value in (1, 0.5, NAN, math.inf, None, "1", True, 10**400)] == [1, 0.5, *[None] * 6]
    assert (count(12345), compact(12345), compact(-0.00012)) == ("12,345", "12.3k", f"{minus}0.00012")
    assert (percent(0.5034), percent(NAN)) == (f"50.3{space}%", "–")
    assert (points(0.254), points(-0.1), points(-1e-9)) == ("+25.4", f"{minus}10.0", "+0.0")
    assert (money(0), money(0.00213), money(1234.5)) == ("$0.00", "$0.0021", "$1,234.50")
    assert [duration(value) for value in (3.21, 216, 7265)] == [
        f"3.2{space}s",
        f"3{space}min 36{space}s",
        f"2{space}h 1{space}min",
    ]


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ({"mean": 0.2, "low": 0.1, "high": 0.3}, "Accuracy rose from"),
        ({"mean": -0.2, "low": -0.3, "high": -0.1}, "Accuracy fell from"),
        ({"mean": 0.2, "low": -0.1, "high": 0.5}, "no clear change"),
        ({}, "no interval known"),
    ],
)
def test_verdict_claims_no_more_than_the_interval(difference: dict[str, float], words: str) -> None:
    evals = {"before": {"accuracy": 0.5, "ci95": [0.4, 0.6]}, "after": {"accuracy": 0.7}, "difference": difference}
    text = sentence(evaluations({"eval": evals}), ())
    assert words in text and "(40.0 to 60.0)" in text


def test_course_holds_the_evaluations_of_both_files() -> None:
    summary = {"steps": 20, "eval": {"before": {"accuracy": 0.1}, "after": {"accuracy": 0.3}}}
    rows: list[dict[str, Any]] = [{"step": 10, "eval": {"accuracy": 0.2}}, {"step": 11}, {"step": 20, "loss": 1}]
    assert [(step, entry["accuracy"]) for step, entry in course(summary, rows)] == [(0, 0.1), (10, 0.2), (20, 0.3)]


def test_score_range() -> None:
    def records(*scores: float | None) -> list[dict[str, Any]]:
        return [{"chunks": [{"score": score} for score in scores]}]

    assert score_range([]) == score_range(records(None)) == score_range(records(0.2, 0.9)) == (0.0, 1.0)
    assert score_range(records(-1, 3)) == (-3, 3)
    assert score_range(records(2, 5)) == (2, 5)
    assert score_range(records(7)) == (6, 8)


# ---- charts


def test_gaps_stay_gaps() -> None:
    body = svg_of(draw(chart(1, 2, None, 4, 5, None, 7)))
    lines = [line.attrib["points"].split() for line in body.iter("polyline")]
    assert [len(line) for line in lines] == [2, 2], "a lone point is a dot, not a line"
    assert len(list(body.iter("circle"))) == 5


def test_nan_in_a_run_is_a_gap(tmp_path: Path) -> None:
    rows = [{"step": step, "kl": NAN if step == 3 else 0.1 * step} for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(tmp_path)
    assert page.count("<polyline") == 2
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)


def test_hover_titles_say_every_value() -> None:
    lines = [Line("student", [50, None], [44, None], [56, None]), Line("other", [1, 2])]
    titles = [title.text for title in svg_of(draw(Chart("T", "", "%", [0, 10], lines))).iter("title")]
    assert titles == ["step 0\nstudent: 50 (44 to 56)\nother: 1", "step 10\nstudent: –\nother: 2"]


@pytest.mark.parametrize("options", [{}, {"floor": 0.0}, {"floor": 0.0, "ceiling": 100.0}, {"kind": "bars"}])
@pytest.mark.parametrize(
    "values", [[0], [0, 0], [100, 100], [1e-13, 2e-13], [5e-324, 0], [99.9999, 100], [1e299, 3], [1e6] * 3]
)
def test_any_range_can_be_drawn(values: list[float], options: dict[str, Any]) -> None:
    drawing = svg_of(draw(chart(*values, **options)))
    assert "nan" not in ElementTree.tostring(drawing, encoding="unicode").replace("unit", "")


def test_data_beyond_a_bound_are_still_drawn() -> None:
    labels = [text.text for text in svg_of(draw(chart(-5, 120, floor=0.0, ceiling=100.0))).iter("text")]
    assert "−50" in labels
    assert "150" in labels


def test_marks_stay_inside_the_drawing() -> None:
    body = svg_of(draw(chart(*[math.sin(step) for step in range(50)])))
    _, _, width, height = map(float, body.attrib["viewBox"].split())
    spots = [
        tuple(map(float, spot.split(","))) for line in body.iter("polyline") for spot in line.attrib["points"].split()
    ]
    assert all(0 <= x <= width and 0 <= y <= height for x, y in spots)


def test_stacked_bars_add_up() -> None:
    lines = [Line("a", [1.0, 2.0]), Line("b", [3.0, None])]
    bars = [
        bar
        for bar in svg_of(draw(Chart("T", "", "n", [1, 2], lines, kind="bars"))).iter("rect")
        if "bar" in bar.get("class", "")
    ]
    first, second = bars[0], bars[1]
    assert float(second.attrib["height"]) == pytest.approx(3 * float(first.attrib["height"]), rel=0.05)
    assert float(second.attrib["y"]) + float(second.attrib["height"]) == pytest.approx(float(first.attrib["y"]), abs=1)


def test_long_runs_are_thinned_and_say_so() -> None:
    line, bars = (draw(chart(*range(1, 10_001), kind=kind)) for kind in ("line", "bars"))
    assert "Each mark is the mean of 42." in line
    assert len(list(svg_of(line).iter("title"))) <= MAX_POINTS and len(list(svg_of(bars).iter("title"))) <= MAX_BARS
    total = svg_of(draw(chart(*range(1, 10_001), total=True)))
    assert [title.text for title in total.iter("title")][-1] == "step 10,000\nline: 10,000"


def test_chart_names_are_escaped() -> None:
    figure = draw(Chart(HOSTILE, HOSTILE, HOSTILE, [1], [Line(HOSTILE, [1]), Line("b", [2])], level=(HOSTILE, 1)))
    assert "<script" not in figure and "<img" not in figure


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 100) == [0, 25, 50, 75, 100]
    assert ticks(0.31, 0.97) == [0.4, 0.6, 0.8]
    assert ticks(3, 3) == [3]


# ---- colours


def _contrast(one: str, two: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_have_contrast_in_both_modes(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    roots = [
        dict(re.findall(r"--(\w[\w-]*): (#\w{6});", root)) for root in re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    ]
    assert len(roots) == 2
    for colours in roots:
        for paper in ("paper", "raised"):
            assert min(_contrast(colours[paper], colours[ink]) for ink in ("ink", "soft", "accent")) >= 4.5
        assert min(_contrast(colours["chunk-ink"], colours[f"s{index}"]) for index in range(5)) >= 4.5
        assert min(_contrast(colours["paper"], colours[f"c{index}"]) for index in range(6)) >= 3
        assert _contrast(colours["warn"], colours["ink"]) >= 4.5 and _contrast(colours["agree"], colours["ink"]) >= 4.5
