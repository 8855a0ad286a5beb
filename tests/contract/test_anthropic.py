"""Live: the Messages route of vLLM, and of LiteLLM in front of it."""

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
from teachers.anthropic import AnthropicConfig, AnthropicTeacher

PROMPT = Prompt("p", (Message("user", "Tom has 19 apples and gives 5 away. How many are left?"),))
PREFIX = "At the start Tom has 19 apples. He parts with 5, and 19 minus 5"
Make = Callable[..., AnthropicTeacher]


@pytest.fixture(params=["vllm", "litellm"])
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Builds teachers of one server; the same store all the time."""
    monkeypatch.setenv("OMNI_CONTRACT_KEY", servers.LITELLM_KEY)
    store = Store(tmp_path / "answers.sqlite")
    root = request.getfixturevalue(request.param)

    def build(**settings: Any) -> AnthropicTeacher:
        known = {"base_url": f"{root}/v1", "model": servers.MODEL, "api_key_env": "OMNI_CONTRACT_KEY"}
        return AnthropicTeacher(AnthropicConfig(**known | settings), store)

    yield build
    store.close()


def gather(teacher: AnthropicTeacher, *queries: Any) -> list[Any]:
    return asyncio.run(teacher.gather(list(queries)))


def going_on(
    n: int = 1, max_tokens: int = 16, prompt: Prompt = PROMPT, prefix: str = PREFIX, row: int = 0
) -> ContinueQuery:
    return ContinueQuery(prompt, Chunk(row, 10, 18, PREFIX, " is 14.", (7,) * 8), n, max_tokens, 1)


def test_auto_finds_that_an_open_turn_is_gone_on_with(make: Make) -> None:
    teacher = make()
    (evidence,) = gather(teacher, going_on(n=3))
    assert teacher.capabilities.continuation == "prefill"
    assert [reply.text.split()[1] for reply in evidence.replies] == ["14."] * 3  # "is 14.", "leaves 14."
    assert {reply.finish for reply in evidence.replies} <= {"stop", "length"}


def test_the_token_limit_is_kept_to_the_token(make: Make) -> None:
    (evidence,) = gather(make(continuation="prefill", temperature=0.0), going_on(n=2, max_tokens=3))
    assert [reply.finish for reply in evidence.replies] == ["length", "length"]
    assert evidence.usage.completion_tokens == 6
    assert evidence.usage.calls == 2


def test_input_is_counted_whole_whether_cached_or_not(make: Make) -> None:
    teacher = make(continuation="prefill")
    (one,) = gather(teacher, going_on(n=1, max_tokens=4))
    (more,) = gather(teacher, going_on(n=4, max_tokens=5))
    assert more.usage.cache_read_tokens > 0
    assert more.usage.prompt_tokens == 4 * one.usage.prompt_tokens


def test_an_answer_and_a_system_text(make: Make) -> None:
    query = AnswerQuery(PROMPT, 0, 1, 100, 1)
    (plain,) = gather(make(temperature=0.0, thinking="off"), query)
    (brief,) = gather(make(temperature=0.0, system="Answer in equations only."), query)
    assert plain.replies[0].finish == brief.replies[0].finish == "stop"
    assert brief.replies[0].text.startswith("19-5=14")
    assert brief.usage.prompt_tokens > plain.usage.prompt_tokens
    assert brief.usage.completion_tokens < plain.usage.completion_tokens


def test_marks_for_the_cache_change_nothing_else(make: Make) -> None:
    settings = {"continuation": "prefill", "temperature": 0.0, "system": "Answer in equations only."}
    (usual,) = gather(make(**settings), going_on())
    (marked,) = gather(make(cache=True, **settings), going_on())
    assert marked.replies == usual.replies
    assert marked.usage.calls == 1
    assert marked.usage.prompt_tokens == usual.usage.prompt_tokens


def test_every_draw_of_instruct_is_accounted_for(make: Make) -> None:
    (evidence,) = gather(make(continuation="instruct"), going_on(n=3))
    assert len(evidence.replies) + sum(evidence.rejected.values()) == 3
    assert not {"error", "refusal", "filtered"} & evidence.rejected.keys()


def test_a_prompt_that_is_too_long_is_a_hole(make: Make) -> None:
    long = Prompt("long", (Message("user", "How many apples? " * 1000),))
    teacher = make(continuation="prefill")
    evidence = gather(teacher, going_on(), going_on(prompt=long, row=1))
    assert [one.rejected for one in evidence] == [{}, {"context_overflow": 1}]
    assert evidence[1].usage.calls == 1


@pytest.mark.parametrize(
    ("settings", "limit", "words"),
    [
        ({"model": "nope"}, 16, "teacher.model"),
        ({}, 5000, "teacher.thinking_tokens"),
        ({"extra_body": {"stop_sequences": 7}}, 16, "correct the settings of the teacher"),
    ],
)
def test_what_the_user_must_mend_is_said_at_once(make: Make, settings: Any, limit: int, words: str) -> None:
    with pytest.raises(TeacherError) as error:
        gather(make(continuation="prefill", **settings), going_on(max_tokens=limit))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_key_names_its_variable(litellm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNI_CONTRACT_KEY", "sk-wrong-key-of-somebody")
    settings = {"base_url": f"{litellm}/v1", "model": servers.MODEL, "api_key_env": "OMNI_CONTRACT_KEY"}
    config = AnthropicConfig(**settings, continuation="prefill")
    with pytest.raises(TeacherError, match="OMNI_CONTRACT_KEY") as error:
        gather(AnthropicTeacher(config, Store(tmp_path / "answers.sqlite")), going_on())
    assert "sk-wrong" not in str(error.value)
