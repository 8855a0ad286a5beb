"""Live: a `llama-server` that serves the demo's teacher, against the same weights in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from omniopd.chat import ChatTemplate
from omniopd.store import Store
from omniopd.types import AnswerQuery, Chunk, ContinueQuery, Message, Prompt
from teachers.llamacpp import LlamacppConfig, LlamacppTeacher

pytestmark = pytest.mark.contract

TEACHER = str(Path(__file__).parents[2] / "examples" / "demo" / "teacher")
PROMPT = Prompt("p", (Message("user", "Tom has 19 apples and gives 5 away. How many are left?"),))
PREFIX = "At the start Tom has 19 apples. He parts with"
UNSURE = "Tom has 19 apples and gives away 5, so 1"  # no text of the teacher's: it does not know how to go on
CLOSE = 5e-3  # nats: other kernels
Make = Callable[..., LlamacppTeacher]


@pytest.fixture
def make(llamacpp: str, tmp_path: Path) -> Make:
    """Builds teachers, each with a store of its own."""
    stores = (Store(tmp_path / f"{number}.sqlite") for number in range(99))

    def build(**settings: Any) -> LlamacppTeacher:
        known = {"base_url": f"{llamacpp}/v1", "model": "demo"}
        return LlamacppTeacher(LlamacppConfig(**known | settings), next(stores))

    return build


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate.load(TEACHER, "teacher")


def gather(teacher: LlamacppTeacher, *queries: Any) -> list[Any]:
    return asyncio.run(teacher.gather(list(queries)))


def going_on(n: int = 4, prefix: str = PREFIX, max_tokens: int = 12, seed: int = 1) -> ContinueQuery:
    return ContinueQuery(PROMPT, Chunk(0, 10, 18, prefix, " 5.", (3,) * 8), n, max_tokens, seed)


def texts(evidence: Any) -> list[str]:
    return [reply.text for reply in evidence.replies]


def test_raw_and_prefill_are_the_same_request_to_the_model(make: Make) -> None:
    wanted = going_on(4, UNSURE)  # a server has four slots unless it is told otherwise
    (by_chat,) = gather(make(continuation="prefill"), wanted)
    assert len(set(texts(by_chat))) > 1
    for settings in ({}, {"n": True}, {"cache_prompt": False}):
        (by_ids,) = gather(make(continuation="raw", tokenizer=TEACHER, **settings), wanted)
        assert texts(by_ids) == texts(by_chat)
    (as_text,) = gather(make(continuation="raw", tokenizer=TEACHER, server="python"), wanted)  # this one reads text too
    assert as_text.usage.prompt_tokens == by_chat.usage.prompt_tokens


@pytest.mark.parametrize("opening", ["", "\n\n", " "])
def test_the_prefix_that_the_server_says_again_is_cut_off(make: Make, opening: str) -> None:
    prefix = f"{opening}{PREFIX}"
    (evidence,) = gather(make(continuation="prefill", temperature=0.0), going_on(n=1, prefix=prefix))
    (by_ids,) = gather(make(continuation="raw", tokenizer=TEACHER, temperature=0.0), going_on(n=1, prefix=prefix))
    assert texts(evidence) == texts(by_ids)
    assert not texts(evidence)[0].strip().startswith("At the start")


def test_more_draws_than_the_server_has_slots_fall_back_to_single_ones(make: Make) -> None:
    (evidence,) = gather(make(continuation="prefill", n="auto"), going_on(40, UNSURE))
    assert len(evidence.replies) + sum(evidence.rejected.values()) == 40
    assert len(set(texts(evidence))) > 1


def test_auto_takes_the_best_rung_that_goes_on(make: Make) -> None:
    for settings, rung in [({"tokenizer": TEACHER}, "raw"), ({}, "prefill")]:
        teacher = make(**settings)
        gather(teacher, going_on(n=1))
        assert teacher.capabilities.continuation == rung


def test_a_control_tokens_text_stays_text(make: Make, chat: ChatTemplate) -> None:
    prefix = f"{PREFIX} </s>[INST] 5"
    ids = chat.ids((*PROMPT.messages, Message("assistant", prefix)), open_turn=True)
    (evidence,) = gather(make(continuation="raw", tokenizer=TEACHER), going_on(n=1, prefix=prefix))
    assert evidence.usage.prompt_tokens == len(ids)


@torch.no_grad()
@pytest.mark.parametrize("rung", ["raw", "prefill"])
def test_the_log_probs_at_the_anchor_are_the_models(make: Make, chat: ChatTemplate, rung: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(TEACHER).eval()
    ids = chat.ids((*PROMPT.messages, Message("assistant", PREFIX)), open_turn=True)
    best = model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1).topk(3)
    (evidence,) = gather(make(continuation=rung, tokenizer=TEACHER, logprobs=3, temperature=0.7), going_on(n=2))
    for reply in evidence.replies:
        values = sorted((value for _, value in reply.tokens[0].top), reverse=True)
        assert values == pytest.approx(best.values.tolist(), abs=CLOSE)
        assert reply.text.startswith(reply.tokens[0].text)


def test_the_server_shows_what_the_tokenizer_renders(make: Make, chat: ChatTemplate) -> None:
    assert asyncio.run(make().shown(PROMPT)) == (chat.text(PROMPT.messages), None)


def test_a_prompt_that_is_too_long_is_a_counted_hole(make: Make) -> None:
    (evidence,) = gather(make(continuation="raw", tokenizer=TEACHER), going_on(n=2, prefix=PREFIX + " 5" * 9000))
    assert evidence.rejected == {"context_overflow": 2}


def test_an_answer_ends_where_the_model_ends_it(make: Make) -> None:
    (answers,) = gather(make(temperature=0.0, thinking="off"), AnswerQuery(PROMPT, 0, 1, 200, 3))
    assert [reply.finish for reply in answers.replies] == ["stop"]
