"""Live: a vLLM server that serves the demo's teacher, against the same weights in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from omniopd.chat import ChatTemplate
from omniopd.errors import TeacherError
from omniopd.store import Store
from omniopd.types import AnswerQuery, Chunk, ContinueQuery, Message, Prompt
from teachers.scoring import Scores
from teachers.vllm import VllmConfig, VllmTeacher

pytestmark = pytest.mark.contract

TEACHER = str(Path(__file__).parents[2] / "examples" / "demo" / "teacher")
PROMPT = Prompt("p", (Message("user", "Tom has 19 apples and gives 5 away. How many are left?"),))
PREFIX = "At the start Tom has 19 apples. He parts with"
UNSURE = "Tom has 19 apples and gives away 5, so 1"  # no text of the teacher's: it does not know how to go on
CLOSE = 2e-3  # nats: the served copy has its heads padded, and another kernel
Make = Callable[..., VllmTeacher]


@pytest.fixture
def make(vllm: str, tmp_path: Path) -> Make:
    """Builds teachers, each with a store of its own."""
    stores = (Store(tmp_path / f"{number}.sqlite") for number in range(99))

    def build(**settings: Any) -> VllmTeacher:
        known = {"base_url": f"{vllm}/v1", "model": "demo", "timeout_s": 120.0}
        return VllmTeacher(VllmConfig(**known | settings), next(stores))

    return build


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return ChatTemplate.load(TEACHER, "teacher")


@pytest.fixture(scope="module")
def dense() -> Callable[[tuple[int, ...]], torch.Tensor]:
    """Log-probs [T, V] in this process; row t is about the token after the first t + 1."""
    model = AutoModelForCausalLM.from_pretrained(TEACHER).eval()

    @torch.no_grad()
    def score(ids: tuple[int, ...]) -> torch.Tensor:
        return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)

    return score


def gather(teacher: VllmTeacher, *queries: Any) -> list[Any]:
    return asyncio.run(teacher.gather(list(queries)))


def going_on(n: int = 4, prefix: str = PREFIX, max_tokens: int = 12, seed: int = 1) -> ContinueQuery:
    return ContinueQuery(PROMPT, Chunk(0, 10, 18, prefix, " 5.", (3,) * 8), n, max_tokens, seed)


def texts(evidence: Any) -> list[str]:
    return [reply.text for reply in evidence.replies]


def test_raw_and_prefill_are_the_same_request_to_the_model(make: Make) -> None:
    raw, prefill = make(continuation="raw", tokenizer=TEACHER), make(continuation="prefill")
    (by_ids,), (by_chat,) = gather(raw, going_on(6, UNSURE)), gather(prefill, going_on(6, UNSURE))
    assert texts(by_ids) == texts(by_chat)
    assert len(set(texts(by_ids))) > 1
    assert by_ids.usage.prompt_tokens == by_chat.usage.prompt_tokens
    (again,) = gather(make(continuation="prefill"), going_on(6, UNSURE))
    (other,) = gather(prefill, going_on(6, UNSURE, seed=50))
    assert texts(again) == texts(by_chat)
    assert texts(other) != texts(by_chat)


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
    assert ids.count(chat.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("rung", ["raw", "prefill"])
def test_the_log_probs_at_the_anchor_are_the_models(make: Make, chat: ChatTemplate, dense: Any, rung: str) -> None:
    teacher = make(continuation=rung, tokenizer=TEACHER, logprobs=3, temperature=0.7)
    (evidence,) = gather(teacher, going_on(n=2))
    ids = chat.ids((*PROMPT.messages, Message("assistant", PREFIX)), open_turn=True)
    best = dense(ids)[-1].topk(3)
    for reply in evidence.replies:
        values = sorted((value for _, value in reply.tokens[0].top), reverse=True)[:3]
        assert values == pytest.approx(best.values.tolist(), abs=CLOSE)
        assert reply.text.startswith(reply.tokens[0].text)


def scored(teacher: VllmTeacher, ids: tuple[int, ...], k: int) -> Scores:
    async def ask() -> Any:
        backend: Any = teacher.backend
        async with backend.session() as session:
            return await session.sender.send(
                backend.score_call(ids, k), lambda payload: backend.read_scores(payload, ids, k)
            )

    value: Scores = asyncio.run(ask()).value
    return value


@pytest.mark.parametrize("k", [0, 1, 5])
def test_r1_r13_given_tokens_are_scored_as_in_process(make: Make, chat: ChatTemplate, dense: Any, k: int) -> None:
    # An unlikely text, so that given tokens are outside the top k.
    ids = chat.ids((*PROMPT.messages, Message("assistant", "19-5=14. #### 99 apples, zwei")), open_turn=True)
    scores, rows = scored(make(), ids, k), dense(ids)
    assert scores.logprobs[0] is None
    own = [rows[place - 1, ids[place]].item() for place in range(1, len(ids))]
    assert list(scores.logprobs[1:]) == pytest.approx(own, abs=CLOSE)
    for place in range(1, len(ids)):
        best = rows[place - 1].topk(k)
        assert sorted(scores.top[place].values(), reverse=True) == pytest.approx(best.values.tolist(), abs=CLOSE)
    assert k == 0 or any(one not in place for one, place in zip(ids[1:], scores.top[1:], strict=True))
    assert scored(make(), ids, k) == scores  # from the prefix cache, if the server has one


def test_what_the_server_refuses_is_one_line_with_a_mend(make: Make) -> None:
    with pytest.raises(TeacherError, match=r"greater than max allowed: 20.*; set teacher\.logprobs"):
        gather(make(continuation="prefill", logprobs=50), going_on())
    with pytest.raises(TeacherError, match=r"no model 'nope' at .*; correct teacher\.model"):
        gather(make(continuation="prefill", model="nope"), going_on())
    with pytest.raises(TeacherError, match=r"cannot be greater than max_model_len"):
        gather(make(continuation="prefill"), going_on(max_tokens=100_000))


def test_a_prompt_that_is_too_long_is_a_counted_hole(make: Make) -> None:
    (evidence,) = gather(make(continuation="raw", tokenizer=TEACHER), going_on(n=2, prefix=PREFIX + " 5" * 3000))
    assert evidence.rejected == {"context_overflow": 2}


def test_at_temperature_0_all_draws_are_one(make: Make) -> None:
    (evidence,) = gather(make(continuation="prefill", temperature=0.0, thinking="off"), going_on(n=2))
    assert len(evidence.replies) == 2
    assert len(set(texts(evidence))) == 1


def test_an_answer_ends_where_the_model_ends_it(make: Make) -> None:
    (answers,) = gather(make(temperature=0.0), AnswerQuery(PROMPT, 0, 1, 200, 3))
    assert [reply.finish for reply in answers.replies] == ["stop"]
