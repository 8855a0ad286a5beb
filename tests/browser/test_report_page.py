"""The report in a real browser: it loads quietly, fits, reads by mouse and keyboard, and runs nothing it was given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omniopd.report import write_report
from tests.browser.sample_run import HOSTILE, write_run

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "run")).as_uri()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "hostile", hostile=True)).as_uri()


def visit(browser: Any, url: str, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
    """Open the page; what earlier pages logged is forgotten."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(url)


def requested(browser: Any) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def find(browser: Any, selector: str) -> list[Any]:
    found: list[Any] = browser.find_elements("css selector", selector)
    return found


def text_of(browser: Any, selector: str) -> str:
    return str(browser.execute_script("return document.querySelector(arguments[0]).textContent", selector))


def choose(browser: Any, index: int) -> dict[str, Any]:
    """Show the rollout at that place; what the file says about it."""
    browser.execute_script(
        "while (!document.getElementById('previous').disabled) document.getElementById('previous').click()"
    )
    for _ in range(index):
        browser.execute_script("document.getElementById('next').click()")
    record: dict[str, Any] = json.loads(text_of(browser, "#audit-data"))["rollouts"][index]
    return record


def point_at(browser: Any, element: Any) -> None:
    from selenium.webdriver import ActionChains

    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    ActionChains(browser).move_to_element(element).perform()


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


@pytest.mark.parametrize("which", ["page", "hostile"])
def test_loads_without_errors_or_requests(browser: Any, which: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(which)
    visit(browser, url)
    assert find(browser, ".chunk")
    assert browser.get_log("browser") == []
    assert [found for found in requested(browser) if not found.startswith("data:")] == [url]


def test_light_and_dark(browser: Any, page: str) -> None:
    def paper() -> list[int]:
        colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        return [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]

    visit(browser, page, scheme="light")
    assert min(paper()) > 230
    visit(browser, page, scheme="dark")
    assert max(paper()) < 50
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script("return getComputedStyle(document.body).color") == "rgb(30, 34, 39)", "paper is light"


@pytest.mark.parametrize("which", ["page", "hostile"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_no_sideways_scrolling(browser: Any, which: str, width: int, request: pytest.FixtureRequest) -> None:
    visit(browser, request.getfixturevalue(which), width=width)
    browser.execute_script("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_chunks_cut_the_text_by_code_points(browser: Any, page: str) -> None:
    visit(browser, page)
    record = choose(browser, 1)
    assert record["text"].startswith("🧮🤔")
    assert text_of(browser, ".said p") == record["text"], "marking chunks neither loses nor repeats a character"
    marked = [chunk.get_attribute("textContent") for chunk in find(browser, ".chunk")]
    assert marked == ["24 eggs", " 24-9=16"]


def test_hover_shows_the_continuations(browser: Any, page: str) -> None:
    visit(browser, page)
    record = choose(browser, 2)
    for place, chunk in enumerate(find(browser, ".chunk")):
        point_at(browser, chunk)
        shown = [reply.get_attribute("textContent") for reply in find(browser, ".replies .text")]
        wanted = record["chunks"][place]
        assert set(shown) == {reply["text"] for reply in wanted["replies"]}
        assert text_of(browser, ".panel h3").startswith(f"Chunk {place + 1} of")


def test_agreed_part_score_and_values_are_shown(browser: Any, page: str) -> None:
    visit(browser, page)
    record = choose(browser, 1)
    chunk = find(browser, ".chunk")[1]
    point_at(browser, chunk)
    wanted = record["chunks"][1]
    assert chunk.get_attribute("data-score") == f"{wanted['score']:.2f}"
    marks = {mark.get_attribute("textContent") for mark in find(browser, ".replies mark")}
    agreed = {"".join(wanted["tokens"][: int(reply["agreed"])]) for reply in wanted["replies"]}
    assert marks == agreed - {""}
    values = [value.get_attribute("textContent").replace("−", "-") for value in find(browser, ".tokens span")]
    assert values == [f"{value:.3f}" for value in wanted["values"]]


def test_keyboard_reaches_chunks_and_holds_one(browser: Any, page: str) -> None:
    from selenium.webdriver import Keys

    visit(browser, page)
    choose(browser, 1)
    browser.execute_script("document.getElementById('next').focus()")
    press(browser, Keys.TAB)
    assert text_of(browser, ".panel h3").startswith("Chunk 1")
    press(browser, Keys.TAB)
    assert text_of(browser, ".panel h3").startswith("Chunk 2")
    outline = browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    press(browser, Keys.ENTER)
    first, second = find(browser, ".chunk")
    assert second.get_attribute("aria-pressed") == "true"
    point_at(browser, first)
    assert text_of(browser, ".panel h3").startswith("Chunk 2"), "a held chunk stays under the mouse's way"
    press(browser, Keys.ESCAPE)
    assert second.get_attribute("aria-pressed") == "false"


def test_click_holds_and_lets_go(browser: Any, page: str) -> None:
    visit(browser, page)
    choose(browser, 1)
    first, second = find(browser, ".chunk")
    states = []
    for chunk in (first, second, second):
        point_at(browser, chunk)
        chunk.click()
        states.append([node.get_attribute("aria-pressed") for node in (first, second)])
    assert states == [["true", "false"], ["false", "true"], ["false", "false"]]


def test_choosers_walk_through_the_rollouts(browser: Any, page: str) -> None:
    from selenium.webdriver.support.ui import Select

    visit(browser, page)
    record = choose(browser, 3)
    assert Select(find(browser, "#step")[0]).first_selected_option.text == f"{record['step']:.0f}"
    Select(find(browser, "#step")[0]).select_by_index(0)
    assert "train/100" in Select(find(browser, "#rollout")[0]).first_selected_option.text
    assert not find(browser, "#previous")[0].is_enabled() and find(browser, "#next")[0].is_enabled()


def test_chunk_and_panel_are_seen_together_on_a_phone(browser: Any, page: str) -> None:
    visit(browser, page, width=360, height=740)
    choose(browser, 1)
    browser.execute_script("document.querySelectorAll('.chunk')[1].focus()")
    chunk, panel = (
        browser.execute_script("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", selector)
        for selector in (".chunk.shown", ".panel")
    )
    assert chunk["top"] >= 0 and chunk["bottom"] <= panel["top"] and panel["bottom"] <= 741


def test_injected_markup_is_only_text(browser: Any, hostile: str) -> None:
    visit(browser, hostile)
    title = browser.title
    for index in range(3):
        choose(browser, index)
        for chunk in find(browser, ".chunk"):
            point_at(browser, chunk)
    assert HOSTILE in text_of(browser, ".said p") and HOSTILE in text_of(browser, ".panel")
    assert not find(browser, "main script, img") and browser.title == title
    assert browser.get_log("browser") == []


def test_policy_stops_what_would_slip_through(browser: Any, page: str) -> None:
    visit(browser, page)
    browser.execute_script(
        "document.body.insertAdjacentHTML('beforeend', '<b onclick=\"document.title = 1\" id=slip>x</b>')"
    )
    browser.execute_script("document.getElementById('slip').click()")
    assert browser.title != "1"


def test_scored_responses_show_every_token_in_the_colour_of_its_value(browser: Any, tmp_path: Path) -> None:
    tokens, values = ["<b>a", " 😀", "", " c"], [-2.5, 0.1, None, 1.9]
    chunk = {"start": 0, "end": 4, "char_start": 0, "char_end": 8, "prefix_end": 0, "text": "".join(tokens)}
    chunk |= {
        "tokens": tokens,
        "values": values,
        "score": -0.2,
        "weight": -0.1,
        "rejected": {"missing": 1},
        "replies": [],
    }
    audit = {"step": 1, "prompt_id": "p", "text": chunk["text"], "finish": "stop", "chunks": [chunk]}
    folder = write_run(tmp_path / "run")
    (folder / "audits.jsonl").write_text(json.dumps(audit) + "\n", encoding="utf-8")
    visit(browser, write_report(folder).as_uri())
    for place in (".said .chunk > span", ".panel .own > span"):
        shown = find(browser, place)
        assert [token.get_attribute("class") for token in shown] == ["s0", "s2", "unheard", "s4"]
        assert [token.get_attribute("title") for token in shown] == ["−2.500", "0.100", "–", "1.900"]
        assert [token.get_property("textContent") for token in shown] == tokens
    panel = text_of(browser, ".panel")
    assert "continuations" not in panel
    assert "Tokens without a signal: missing (1)" in panel
    assert [item.text.split("\n")[1] for item in find(browser, ".tokens li")] == ["−2.500", "0.100", "–", "1.900"]
    assert "more likely" in text_of(browser, ".scale")
    assert browser.get_log("browser") == []
