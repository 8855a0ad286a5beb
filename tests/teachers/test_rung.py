"""The look behind `continuation: auto`, over replies written by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from omniopd.types import Message, Prompt, Usage
from teachers.asks import Ask, Choice, Manner
from teachers.ladder import Rung
from teachers.rung import COUNTED, LOOK_CALLS, Look, Unanswered, alike, choose, continuation, look, why_not
from teachers.wire import Completion, Outcome, RefusedRequest

PROMPT = Prompt("p", (Message("user", "Tell me of the sea."),))
ANSWER = "The sea is wide and blue, and nobody has ever seen both of its shores at once."
MANNER = Manner("teacher", "instruct", None, 1.0, 1.0)


class Teacher:
    """Answers by a function of the request; `asks` are the requests."""

    def __init__(self, say: Callable[[Ask], str | Outcome[Any]]) -> None:
        self.say, self.asks = say, list[Ask]()

    async def draw(self, ask: Ask, n: int, seed: int | None) -> Outcome[Completion]:
        self.asks.append(ask)
        said = self.say(ask)
        return said if isinstance(said, Outcome) else Outcome(1, Completion((Choice(said, "stop"),), usage=Usage()))

    def look(self, rung: Rung = "prefill", prompt: Prompt | None = PROMPT, manner: Manner = MANNER) -> Look:
        return asyncio.run(look(self.draw, manner, rung, prompt))


def literal(ask: Ask, answer: str = ANSWER) -> str:
    """A teacher that can't count, and goes on literally."""
    if ask.prefix == COUNTED:
        return " and so on"
    return answer[len(ask.prefix) :] if answer.startswith(ask.prefix) else "no idea"


def test_one_that_counts_on_is_proved_by_one_call() -> None:
    teacher = Teacher(lambda ask: " 5, 6, 7")
    seen = teacher.look()
    assert (seen.rung, seen.literal, len(teacher.asks)) == ("prefill", True, 1)
    assert teacher.asks[0].messages[-1] == Message("assistant", COUNTED)
    assert "' 5, 6, 7'" in seen.why


def test_one_that_counts_anew_has_started_over() -> None:
    teacher = Teacher(lambda ask: "1, 2, 3, 4, 5, 6")
    assert (teacher.look().literal, len(teacher.asks)) == (False, 1)


def test_one_that_can_t_count_is_asked_for_half_of_its_own_answer() -> None:
    teacher = Teacher(literal)
    seen = teacher.look()
    assert seen.literal is True
    counted, whole, half = teacher.asks
    assert len(teacher.asks) == LOOK_CALLS
    assert whole.rung == "answer"
    assert whole.messages == PROMPT.messages
    assert ANSWER.startswith(half.prefix)
    assert 0.3 * len(ANSWER) < len(half.prefix) <= 0.5 * len(ANSWER)
    assert ANSWER[len(half.prefix)] == " "  # never inside a word
    assert (counted.temperature, whole.temperature, half.temperature) == (1.0, 0.0, 0.0)


def test_one_that_starts_over_is_found_out_by_its_own_answer() -> None:
    seen = Teacher(lambda ask: "and so on" if ask.prefix == COUNTED else ANSWER).look()
    assert seen.literal is False
    assert seen.why.endswith("it started over")


def test_one_that_writes_something_else_is_not_proved() -> None:
    said = {COUNTED: "and so on", "": ANSWER}
    assert Teacher(lambda ask: said.get(ask.prefix, "Certainly! What about the sea?")).look().literal is False


@pytest.mark.parametrize("answer", ["Blue.", "", "ha " * 20, "unbrokenwordwithoutanyspaceinit"[:15]])
def test_an_answer_without_two_halves_tells_nothing(answer: str) -> None:
    seen = Teacher(lambda ask: literal(ask, answer)).look()
    assert seen.literal is None
    assert "no halves" in seen.why


def test_without_a_prompt_only_counting_is_asked() -> None:
    teacher = Teacher(literal)
    assert (teacher.look(prompt=None).literal, len(teacher.asks)) == (False, 1)


def test_a_refused_rung_is_not_proved_but_a_refused_setting_is_said() -> None:
    def refuse(param: str) -> Callable[[Ask], str]:
        def say(ask: Ask) -> str:
            raise RefusedRequest(f"no {param}", param)

        return say

    for param in ("", "prefill"):
        seen = Teacher(refuse(param)).look()
        assert (seen.literal, seen.why) == (False, f"refused: no {param}")
    for param in ("temperature", "logprobs", "max_tokens", "model"):
        with pytest.raises(RefusedRequest, match=f"no {param}"):
            Teacher(refuse(param)).look()


def test_one_that_refuses_temperature_0_gives_no_way_to_tell() -> None:
    def say(ask: Ask) -> str:
        if ask.temperature == 0:
            raise RefusedRequest("must be above 0", "temperature")
        return literal(ask)

    seen = Teacher(say).look()
    assert seen.literal is None
    assert "temperature 0 is refused" in seen.why


def test_no_temperature_is_sent_where_none_is_configured() -> None:
    teacher = Teacher(literal)
    teacher.look(manner=Manner("teacher", "instruct", None, None, None))
    assert {ask.temperature for ask in teacher.asks} == {None}


def test_a_filtered_question_tells_nothing_and_a_silent_server_ends_the_look() -> None:
    seen = Teacher(lambda ask: Outcome(1, None, "filtered", "flagged")).look()
    assert (seen.literal, seen.why) == (None, "no answer (filtered)")
    with pytest.raises(Unanswered, match="HTTP 500.*teacher.continuation"):
        Teacher(lambda ask: Outcome(6, None, "error", "HTTP 500")).look()


def test_the_best_rung_that_is_proved_is_chosen_and_the_last_is_not_asked() -> None:
    backend: Any = SimpleNamespace(rungs=("raw", "prefill", "instruct"))

    def chosen(teacher: Teacher) -> tuple[str, list[str]]:
        rung, looks = asyncio.run(choose(teacher.draw, backend, MANNER, PROMPT))
        return rung, [seen.rung for seen in looks]

    assert chosen(Teacher(lambda ask: " 5")) == ("raw", ["raw"])
    assert chosen(Teacher(lambda ask: " 5" if ask.rung == "prefill" else "1, 2, 3, 4, 5")) == (
        "prefill",
        ["raw", "prefill"],
    )
    nowhere = Teacher(lambda ask: "1, 2, 3, 4, 5")
    assert chosen(nowhere) == ("instruct", ["raw", "prefill"])
    assert "instruct" not in {ask.rung for ask in nowhere.asks}


def test_an_instructed_reply_is_read_behind_its_echo() -> None:
    assert continuation("1, 2, 3, 4, 5, 6", COUNTED, "instruct") == " 5, 6"
    assert continuation("<think>Hm.</think>1, 2, 3, 4, 5", COUNTED, "instruct") == " 5"
    assert continuation("Sure! 5, 6", COUNTED, "instruct") == ""
    assert continuation("1, 2, 3, 4, 5", COUNTED, "prefill") == "1, 2, 3, 4, 5"


def test_likeness_is_over_equal_length_and_nothing_is_like_nothing() -> None:
    assert alike("The sea is wide", "The sea is wide and blue")
    assert alike("The sea is wide and blue", "The sea is vide and blue")
    assert not alike("The sea is wide", "Nobody has seen it")
    assert not alike("", "The sea")
    assert not alike("", "")


def test_why_not_names_the_looks_that_failed() -> None:
    looks = [Look("raw", False, "it started over"), Look("prefill", None, "no halves"), Look("instruct", True, "fine")]
    assert why_not(looks) == "raw: it started over; prefill: no halves"
