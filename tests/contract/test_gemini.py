"""Live: the generateContent route of LiteLLM's proxy. It gives one candidate per call, no seeds and no log-probs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import servers

from omniopd.errors import TeacherError
from omniopd.store import Store
from omniopd.types import AnswerQuery, Chunk, ContinueQuery, Message, Prompt
from teachers.gemini import GeminiConfig, GeminiTeacher

PROMPT = Prompt("p", (Message("user", "Tom has 19 apples and gives 5 away. How many are left?"),))
PREFIX = "At the start Tom has 19 apples. He parts with 5, and 19 minus 5"
Make = Callable[..., GeminiTeacher]


@pytest.fixture
def make(litellm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Builds teachers of the proxy; the same store all the time."""
    monkeypatch.setenv("OMNI_CONTRACT_KEY", servers.LITELLM_KEY)
    store = Store(tmp_path / "answers.sqlite")

    def build(**settings: Any) -> GeminiTeacher:
        known = {"base_url": f"{litellm}/v1beta", "model": servers.MODEL, "api_key_env": "OMNI_CONTRACT_KEY"}
        return GeminiTeacher(GeminiConfig(**known | settings), store)

    yield build
    store.close()


def gather(teacher: GeminiTeacher, *queries: Any) -> list[Any]:
    return asyncio.run(teacher.gather(list(queries)))


def going_on(n: int = 1, max_tokens: int = 16, prompt: Prompt = PROMPT, row: int = 0, seed: int = 1) -> ContinueQuery:
    return ContinueQuery(prompt, Chunk(row, 10, 18, PREFIX, " is 14.", (7,) * 8), n, max_tokens, seed)


def test_auto_finds_that_an_open_turn_is_gone_on_with(make: Make) -> None:
    teacher = make()
    (evidence,) = gather(teacher, going_on(n=3))
    assert teacher.capabilities.continuation == "prefill"
    assert [reply.text.split()[1] for reply in evidence.replies] == ["14."] * 3  # "is 14.", "leaves 14."


def test_candidates_that_are_not_given_are_asked_for_one_by_one(make: Make) -> None:
    teacher = make(continuation="prefill")
    (evidence,) = gather(teacher, going_on(n=4, max_tokens=3))
    assert len(evidence.replies) == evidence.usage.calls == 4
    assert [reply.finish for reply in evidence.replies] == ["length"] * 4
    assert evidence.usage.completion_tokens == 12
    (next_one,) = gather(teacher, going_on(n=1, max_tokens=3, seed=100))
    assert evidence.usage.prompt_tokens == 4 * next_one.usage.prompt_tokens


def test_an_answer_a_system_text_and_no_thinking(make: Make) -> None:
    query = AnswerQuery(PROMPT, 0, 1, 100, 1)
    (plain,) = gather(make(temperature=0.0, thinking="off"), query)
    (brief,) = gather(make(temperature=0.0, system="Answer in equations only."), query)
    assert plain.replies[0].finish == brief.replies[0].finish == "stop"
    assert brief.replies[0].text.startswith("19-5=14")
    assert brief.usage.prompt_tokens > plain.usage.prompt_tokens
    assert brief.usage.completion_tokens < plain.usage.completion_tokens


def test_logprobs_that_are_not_given_leave_the_text(make: Make) -> None:
    (evidence,) = gather(make(continuation="prefill", logprobs=3), going_on())
    assert [(bool(reply.text), reply.tokens) for reply in evidence.replies] == [(True, ())]


def test_every_draw_of_instruct_is_accounted_for(make: Make) -> None:
    (evidence,) = gather(make(continuation="instruct"), going_on(n=3))
    assert len(evidence.replies) + sum(evidence.rejected.values()) == 3
    assert not {"error", "refusal", "filtered"} & evidence.rejected.keys()


def test_a_prompt_that_is_too_long_is_a_hole(make: Make) -> None:
    long = Prompt("long", (Message("user", "How many apples? " * 1000),))
    evidence = gather(make(continuation="prefill"), going_on(), going_on(prompt=long, row=1))
    assert [one.rejected for one in evidence] == [{}, {"context_overflow": 1}]
    assert evidence[1].usage.calls == 1


@pytest.mark.parametrize(
    ("settings", "limit", "words"),
    [
        ({"model": "nope"}, 16, "teacher.model"),
        ({}, 5000, "teacher.thinking_tokens"),
        ({"extra_body": {"generationConfig": {"stopSequences": 7}}}, 16, "correct the settings of the teacher"),
    ],
)
def test_what_the_user_must_mend_is_said_at_once(make: Make, settings: Any, limit: int, words: str) -> None:
    with pytest.raises(TeacherError) as error:
        gather(make(continuation="prefill", **settings), going_on(max_tokens=limit))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_key_names_its_variable(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNI_CONTRACT_KEY", "sk-wrong-key-of-somebody")
    with pytest.raises(TeacherError, match="OMNI_CONTRACT_KEY") as error:
        gather(make(continuation="prefill"), going_on())
    assert "sk-wrong" not in str(error.value)
