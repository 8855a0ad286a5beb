"""`budget_usd` through the command line: a run stops before it has cost more, and goes on when it may."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from scripted import ScriptedTeacher, scripted

from omniopd.cli import main
from omniopd.store import Store

PRICE = {"prompt": 400.0, "completion": 1000.0}  # a call of 50 and 24 tokens: 4.4 cents
CALL_USD = 0.044
BUDGET = 0.9


@pytest.fixture
def priced(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "teacher": {**settings["teacher"], "price": PRICE}}


class Command:
    """`omniopd train` on one config, in this process."""

    def __init__(self, settings: dict[str, Any], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        place.mkdir(exist_ok=True)
        self.run, self._capsys = place / "run", capsys
        self._config = place / "config.yaml"
        self._config.write_text(yaml.safe_dump({**settings, "output": str(self.run)}))

    def __call__(self, *words: str) -> tuple[int, list[str]]:
        """The exit code, and our lines on stderr."""
        self._capsys.readouterr()
        code = main(["train", str(self._config), *words])
        return code, [line for line in self._capsys.readouterr().err.splitlines() if line.startswith("omniopd: ")]

    def stopped(self, *words: str) -> str:
        """The one line of a run that runs out of money."""
        code, lines = self(*words)
        assert code == 3
        assert len(lines) == 1
        return lines[0]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.run / "summary.json").read_text())

    @property
    def calls(self) -> list[dict[str, Any]]:
        store = Store(self.run / "answers.sqlite")
        try:
            return list(store.calls())
        finally:
            store.close()

    @property
    def weights(self) -> dict[str, Any]:
        return load_file(self.run / "student" / "model.safetensors")

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run / "checkpoints").iterdir())


def names(teacher: ScriptedTeacher) -> list[str]:
    return sorted(json.dumps(body, sort_keys=True) for body in teacher.bodies)


def test_a_run_stops_at_its_budget_and_goes_on_when_it_is_raised_as_if_it_had_never_stopped(
    priced: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Command(priced, tmp_path / "whole", capsys)
    assert whole() == (0, [])
    asked = names(teacher)
    teacher.bodies.clear()

    run = Command(priced, tmp_path / "stopped", capsys)
    line = run.stopped(f"budget_usd={BUDGET}")
    assert line.startswith("omniopd: budget_usd: 0.8")
    assert "of 0.9 dollars" in line and "--resume" in line
    spent = len(run.calls) * CALL_USD
    assert BUDGET - 0.15 < spent <= BUDGET  # what a call may cost at most is three times what it does
    assert all(sum_usd <= BUDGET for sum_usd in accumulate(call["cost_usd"] for call in run.calls))
    assert len(teacher.bodies) == len(run.calls) < len(asked)
    summary = run.summary
    assert summary["status"] == "out of budget"
    assert summary["teacher"]["spent_usd"] == pytest.approx(spent)
    assert summary["teacher"]["budget_usd"] == BUDGET
    assert 0 < summary["steps"] < 4
    assert run.checkpoints()[-1] == f"step-{summary['steps']:06d}"
    assert {call["price"] for call in run.calls} == {"teacher.price"}

    bought = names(teacher)
    for again in (f"budget_usd={BUDGET}", "budget_usd=0.5"):
        line = run.stopped(again, "--resume")
        assert line.startswith("omniopd: budget_usd: ") and "raise it" in line
        assert names(teacher) == bought
        assert run.summary == summary

    assert run("budget_usd=10", "--resume") == (0, [])
    assert names(teacher) == asked  # each call once, over both processes
    assert run.summary["status"] == "finished"
    assert run.summary["teacher"]["spent_usd"] == pytest.approx(len(asked) * CALL_USD)
    assert run.summary["teacher"]["spent_usd"] == whole.summary["teacher"]["spent_usd"]
    own, other = run.weights, whole.weights
    assert own.keys() == other.keys()
    assert all(own[name].equal(other[name]) for name in own)
    assert any(not own[name].equal(begun) for name, begun in load_file(_student(priced)).items() if name in own)


def _student(settings: dict[str, Any]) -> Path:
    return Path(settings["student"]["path"]) / "model.safetensors"


def test_the_budget_holds_for_the_teachers_own_accuracy_too(
    priced: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Command(priced, tmp_path / "place", capsys)
    # The steps cost 32 calls at most; the teacher's eight answers of up to 512 tokens no longer fit.
    run.stopped("budget_usd=1.6", "eval.teacher=true", "train.steps=4")
    assert run.summary["status"] == "out of budget"
    assert (run.summary["steps"], run.summary["teacher"]["spent_usd"] <= 1.6) == (4, True)
    assert "step-000004" in run.checkpoints()


def test_a_reply_that_uses_more_than_was_foreseen_is_foreseen_from_then_on(
    priced: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that puts a long text of its own before each prompt."""

    def wordy(body: dict[str, Any]) -> tuple[int, Any]:
        status, payload = scripted(body)
        return status, {**payload, "usage": {"prompt_tokens": 5000, "completion_tokens": 24}}

    teacher.answer = wordy  # 2.024 dollars a call
    run = Command(priced, tmp_path / "place", capsys)
    run.stopped("budget_usd=25", "teacher.concurrency=2")
    calls = run.calls
    assert len(calls) >= 4
    assert sum(call["cost_usd"] for call in calls) <= 25
    run.stopped("budget_usd=25", "--resume")  # a new process knows nothing of that text
    assert len(run.calls) == len(calls) == len(teacher.bodies)


@pytest.mark.parametrize("prices", [None, {"date": "2026-11-01", "models": {"another*": {"prompt": 1}}}])
def test_a_budget_without_a_price_is_refused(
    prices: Any, settings: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["budget_usd=1"]
    if prices:
        (tmp_path / "prices.yaml").write_text(yaml.safe_dump(prices))
        words.append(f"prices={tmp_path / 'prices.yaml'}")
    code, lines = Command(settings, tmp_path / "place", capsys)(*words)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("omniopd: budget_usd: no price is known for the teacher's model 'scripted'")
    assert "teacher.price" in lines[0]
    assert not teacher.bodies


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("date: 2026-11-01\nmodels: {m: {prompt: -2}}", "models.m.prompt"),
        ("models: [", "not YAML"),
        (None, "No such file"),
    ],
)
def test_a_bad_price_file_is_one_line(
    text: str | None, said: str, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prices.yaml"
    if text is not None:
        path.write_text(text)
    code, lines = Command(settings, tmp_path / "place", capsys)(f"prices={path}")
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"omniopd: prices: {path}: ") and said in lines[0]


@pytest.mark.parametrize("budget", ["0", "-1", "much", ".nan"])
def test_a_budget_is_a_number_above_0(
    budget: str, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = Command(settings, tmp_path / "place", capsys)(f"budget_usd={budget}")
    assert code == 2
    assert len(lines) == 1 and "budget_usd: " in lines[0]


def test_prices_are_found_by_pattern_dated_in_the_books_and_count_cached_tokens(
    settings: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cached(body: dict[str, Any]) -> tuple[int, Any]:
        status, payload = scripted(body)
        details = {"cached_tokens": 30, "cache_write_tokens": 15}
        return status, {**payload, "usage": {**payload["usage"], "prompt_tokens_details": details}}

    teacher.answer = cached
    models = {
        "*": {"prompt": 1e6},
        "script*": {"prompt": 100, "completion": 1000, "cache_read": 10, "cache_write": 125},
    }
    (tmp_path / "prices.yaml").write_text(yaml.safe_dump({"date": "2026-11-01", "models": models}))
    words = [f"prices={tmp_path / 'prices.yaml'}", "train.steps=1", "eval.problems=0"]
    run = Command(settings, tmp_path / "listed", capsys)
    assert run(*words, "budget_usd=5") == (0, [])
    each = (5 * 100 + 30 * 10 + 15 * 125 + 24 * 1000) / 1e6
    assert {(call["price"], round(call["cost_usd"], 9)) for call in run.calls} == {("prices of 2026-11-01", each)}
    assert run.summary["teacher"]["cost_usd"] == pytest.approx(each * len(run.calls))
    assert run.summary["teacher"]["cache_read_tokens"] == 30 * len(run.calls)
    own = Command(settings, tmp_path / "own", capsys)
    assert own(*words, "teacher.price={prompt: 200}") == (0, [])
    assert {(call["price"], round(call["cost_usd"], 9)) for call in own.calls} == {("teacher.price", 0.01)}
