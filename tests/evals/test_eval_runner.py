"""The runner: batches, verdicts, the summary, and comparisons."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from evals.checking import is_right
from evals.runner import Evaluation, compare, evaluate
from omniopd.errors import ConfigError, DataError, RunError
from omniopd.types import Message, Prompt


class _Task:
    def __init__(self, n: int = 5, reference: bool = True) -> None:
        self.train: list[Prompt] = []
        self.heldout = [Prompt(f"p{k}", (Message("user", f"{k}+0?"),), str(k) if reference else None) for k in range(n)]

    def check(self, prompt: Prompt, text: str) -> bool:
        if prompt.reference is None:
            raise ConfigError("task.answer: needs an `answer` column")
        return is_right(prompt.reference, text)


def _even_right(prompts: Sequence[Prompt]) -> list[tuple[str, bool]]:
    numbers = [int(str(prompt.reference)) for prompt in prompts]
    return [(f"#### {k + k % 2}", k != 3) for k in numbers]


def test_an_evaluation() -> None:
    task, seen = _Task(), []
    result = evaluate(task, task.heldout, _even_right, 2, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert (result.accuracy, result.n, result.finished, result.mean_length) == (0.6, 5, 0.8, 6.0)
    assert result.correct == (True, False, True, False, True)
    assert result.ids == ("p0", "p1", "p2", "p3", "p4")
    assert result.ci95[0] < 0.6 < result.ci95[1]
    assert result.samples[3].text == "#### 4" and not result.samples[3].finished
    assert result == evaluate(task, task.heldout, _even_right, 64)


def test_what_can_not_be_decided_counts_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    task = _Task()
    monkeypatch.setattr(task, "check", lambda prompt, text: None if prompt.id == "p0" else True)
    result = evaluate(task, task.heldout, _even_right)
    assert result.correct == (False, True, True, True, True) and result.samples[0].correct is False


def test_json_and_back() -> None:
    task = _Task()
    result = evaluate(task, task.heldout, _even_right)
    assert Evaluation.from_json(json.loads(json.dumps(result.to_json()))) == result
    short = Evaluation.from_json(result.to_json(samples=2))
    assert len(short.samples) == 2 and short.correct == result.correct
    with pytest.raises(DataError, match="evaluation: not what `to_json` writes"):
        Evaluation.from_json({"accuracy": 1.0})


def test_a_task_without_answers_fails_before_anything_is_generated() -> None:
    task = _Task(reference=False)
    with pytest.raises(ConfigError, match="`answer` column"):
        evaluate(task, task.heldout, lambda prompts: pytest.fail("generated"))


def test_wrong_uses() -> None:
    task = _Task()
    with pytest.raises(DataError, match="no held-out prompts"):
        evaluate(task, [], _even_right)
    with pytest.raises(RunError, match="4 answers to 5 prompts"):
        evaluate(task, task.heldout, lambda prompts: _even_right(prompts)[1:])


def test_comparing_pairs_by_id() -> None:
    task = _Task(200)
    before = evaluate(task, task.heldout, _even_right)
    after = evaluate(task, task.heldout[::-1], lambda prompts: [(f"#### {p.reference}", True) for p in prompts])
    change = compare(before, after)
    assert change.mean == pytest.approx(0.5) and change.low < 0.5 < change.high
    assert compare(before, before).mean == 0
    other = evaluate(task, task.heldout[:150], _even_right)
    with pytest.raises(DataError, match="share 150 prompts of 200 before and 150 after"):
        compare(before, other)
