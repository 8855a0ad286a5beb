"""Prompts of one's own: columns, chats, ids, and what is held out."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from evals.tasks.jsonl import Jsonl
from omniopd.errors import ConfigError, DataError
from omniopd.registry import TASKS


def _file(path: Path, rows: list[Any], name: str = "data.jsonl") -> str:
    target = path / name
    target.write_text("\n".join(json.dumps(row) for row in rows))
    return str(target)


def _task(path: Path, rows: list[Any], **settings: Any) -> Jsonl:
    return Jsonl(Jsonl.Config(path=_file(path, rows), **settings))


def _error(path: Path, rows: list[Any], **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        _task(path, rows, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _rows(count: int, first: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"What is {n}+1?", "answer": str(n + 1)} for n in range(first, first + count)]


def test_prompts_and_answers(tmp_path: Path) -> None:
    assert TASKS.get("jsonl") is Jsonl
    task = _task(tmp_path, _rows(3), system="Be brief.")
    prompt = task.train[1]
    assert [(m.role, m.content) for m in prompt.messages] == [("system", "Be brief."), ("user", "What is 1+1?")]
    assert task.heldout == []
    assert task.check(prompt, r"\boxed{2}") and not task.check(prompt, r"\boxed{3}")


def test_answers_may_be_numbers_or_unknown(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": 3}, {"prompt": "b", "answer": 2.5}, {"prompt": "c", "answer": None}]
    task = _task(tmp_path, rows)
    assert [prompt.reference for prompt in task.train] == ["3", "2.5", None]
    with pytest.raises(ConfigError, match="evaluation needs an `answer` column"):
        task.check(task.train[2], "3")


def test_chats_up_to_the_last_question(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chat += [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    task = _task(tmp_path, [{"chat": chat}], messages="chat", answer=None, system="Be brief.")
    assert [message.content for message in task.train[0].messages] == ["Be brief.", "Hi", "Hello", "2+2?"]
    own = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "2+2?"}]
    task = _task(tmp_path, [{"chat": own}], messages="chat", answer=None, system="Be brief.")
    assert [message.content for message in task.train[0].messages] == ["Be long.", "2+2?"]


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ("Hi", "holds text, not a list of {role, content}"),
        ([], "asks nothing"),
        ([{"role": "system", "content": "x"}], "must end with a user turn"),
        ([{"role": "user"}], "has a turn 1 without text"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "has a turn 1 without text"),
        ([{"role": "tool", "content": "x"}], "has role 'tool' in turn 1; known: system, user, assistant"),
        ([{"role": ["user"], "content": "x"}], "has role ['user'] in turn 1"),
    ],
)
def test_malformed_chats(tmp_path: Path, chat: Any, said: str) -> None:
    message = _error(tmp_path, [{"chat": chat}], messages="chat", answer=None)
    assert "data.jsonl, line 1: column 'chat'" in message and said in message


def test_malformed_columns(tmp_path: Path) -> None:
    good = _rows(1)[0]
    message = _error(tmp_path, [good, {"promt": "x", "answer": "1"}])
    assert "line 2: no column 'prompt'; did you mean 'promt'? known: answer, promt" in message
    message = _error(tmp_path, [good, {"prompt": "x", "anser": "1"}])
    assert "line 2: no column 'answer'; did you mean 'anser'?" in message and "or to null" in message
    assert "column 'prompt' holds a number, not text" in _error(tmp_path, [{"prompt": 1, "answer": "1"}])
    assert "for chats set `messages: prompt`" in _error(tmp_path, [{"prompt": [], "answer": "1"}])
    assert "column 'answer' holds a list, not text or a number" in _error(tmp_path, [{"prompt": "x", "answer": []}])
    assert "holds true or false" in _error(tmp_path, [{"prompt": "x", "answer": True}])
    assert "column 'answer' is empty" in _error(tmp_path, [{"prompt": "x", "answer": " "}])


def test_ids_are_stable_and_unique(tmp_path: Path) -> None:
    rows = _rows(3)
    first = {p.messages[0].content: p.id for p in _task(tmp_path, rows).train}
    again = {p.messages[0].content: p.id for p in _task(tmp_path, [*_rows(2, 7), *rows[::-1]]).train}
    assert first.items() <= again.items()
    ids = [prompt.id for prompt in _task(tmp_path, [rows[0], rows[0], rows[0]]).train]
    assert len(set(ids)) == 3 and ids[1] == f"{ids[0]}-2"


def test_ids_of_a_column(tmp_path: Path) -> None:
    rows = [{**row, "key": n} for n, row in enumerate(_rows(3))]
    assert [prompt.id for prompt in _task(tmp_path, rows, id="key").train] == ["0", "1", "2"]
    rows[2]["key"] = 0
    message = _error(tmp_path, rows, id="key")
    assert "line 3: column 'key' repeats the id 0 of" in message and "data.jsonl, line 1; make ids unique" in message
    rows[2]["key"] = 0.5
    assert "not an id" in _error(tmp_path, rows, id="key")


def test_heldout_by_hash_is_disjoint_and_independent_of_the_order(tmp_path: Path) -> None:
    rows = _rows(40)
    task = _task(tmp_path, rows, heldout_size=10)
    turned = _task(tmp_path, rows[::-1], heldout_size=10, system="Be brief.")
    assert (len(task.train), len(task.heldout)) == (30, 10)
    assert {p.id for p in task.heldout} == {p.id for p in turned.heldout}
    assert not {p.messages for p in task.train} & {p.messages for p in task.heldout}
    more = _task(tmp_path, rows, heldout_size=20)
    assert {p.id for p in task.heldout} < {p.id for p in more.heldout}


def test_equal_prompts_stay_on_one_side(tmp_path: Path) -> None:
    task = _task(tmp_path, _rows(20) * 3, heldout_size=7)
    assert len(task.heldout) == 9 and len(task.train) == 51
    assert not {p.messages for p in task.train} & {p.messages for p in task.heldout}


def test_a_heldout_file_wins_over_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heldout = _file(tmp_path, _rows(4, first=8), "test.jsonl")
    with caplog.at_level(logging.WARNING):
        task = _task(tmp_path, _rows(10), heldout_path=heldout, train_size=5)
    assert (len(task.train), len(task.heldout)) == (5, 4)
    assert "2 prompts are also held out and left out of training" in caplog.text
    assert len(_task(tmp_path, _rows(10), heldout_path=heldout, heldout_size=2).heldout) == 2


def test_holding_out_everything(tmp_path: Path) -> None:
    assert "leaves none to train on" in _error(tmp_path, _rows(3), heldout_size=3)
    heldout = _file(tmp_path, _rows(3), "test.jsonl")
    assert "leaves none to train on" in _error(tmp_path, _rows(3), heldout_path=heldout)


def test_one_home_of_prompts() -> None:
    with pytest.raises(ValidationError, match="not both"):
        Jsonl.Config(path="a.jsonl", prompt="question", messages="chat")
    config = Jsonl.Config(path="a.jsonl", messages="chat")
    assert Jsonl.Config.model_validate(config.model_dump()) == config


def test_extras_travel_with_the_prompt_and_change_nothing_else(tmp_path: Path) -> None:
    held = [{"level": 3, "tags": ["a", "b"]}, "maths", None]
    rows = [{**row, "subject": value, "unused": 1} for row, value in zip(_rows(3), held, strict=True)]
    plain = _task(tmp_path, rows)
    task = _task(tmp_path, rows, extras=["subject"])
    assert [prompt.extras for prompt in plain.train] == [{}] * 3
    assert [prompt.extras for prompt in task.train] == [{"subject": value} for value in held]
    for prompt, other in zip(task.train, plain.train, strict=True):
        assert (prompt.id, prompt.messages, prompt.reference) == (other.id, other.messages, other.reference)
    both = _task(tmp_path, rows, extras=["unused", "subject"])
    assert both.train[1].extras == {"unused": 1, "subject": "maths"}


def test_extras_of_held_out_prompts(tmp_path: Path) -> None:
    rows = [{**row, "subject": number} for number, row in enumerate(_rows(10))]
    task = _task(tmp_path, rows, extras=["subject"], heldout_size=3)
    numbers = [prompt.extras["subject"] for prompt in (*task.train, *task.heldout)]
    assert sorted(numbers) == list(range(10))
    plain = _task(tmp_path, rows, heldout_size=3)
    assert [prompt.id for prompt in task.heldout] == [prompt.id for prompt in plain.heldout]


def test_extras_that_a_row_lacks(tmp_path: Path) -> None:
    rows = [{**row, "subject": "maths"} for row in _rows(2)] + _rows(1, first=2)
    message = _error(tmp_path, rows, extras=["subject"])
    assert "line 3: no column 'subject'; " in message and "known: answer, prompt" in message
    assert "did you mean 'subject'" in _error(tmp_path, rows, extras=["subjects"])
