"""Live: a vLLM server that serves the demo's teacher, against the same weights in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from omniopd.chat import ChatTemplate
from omniopd.errors import TeacherError
from omniopd.store import Store
from omniopd.types import AnswerQuery, Chunk, ContinueQuery, Message, Prompt, ScoreQuery, TokenScores
from teachers.scoring import Scores
from teachers.transformers import TransformersConfig, TransformersTeacher
from teachers.vllm import VllmConfig, VllmTeacher

pytestmark = pytest.mark.contract

TEACHER = str(Path(__file__).parents[2] / "examples" / "demo" / "teacher")
PROMPT = Prompt("p", (Message("user", "Tom has 19 apples and gives 5 away. How many are left?"),))
PREFIX = "At the start Tom has 19 apples. He parts with"
UNSURE = "Tom has 19 apples and gives away 5, so 1"  # no text of the teacher's: it does not know how to go on
SCORED = 1e-3  # nats between a response's scores by the server and by the weights in this process
WRITTEN = ("19-5=14. #### 14", "19-5=14. #### 99 apples, zwei", "Ünïcödé 😀 </s> 5", UNSURE, "")
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


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersTeacher]:
    """The same weights in this process."""
    store = Store(tmp_path_factory.mktemp("local") / "answers.sqlite")
    teacher = TransformersTeacher(TransformersConfig(path=TEACHER), store)
    yield teacher
    asyncio.run(teacher.close())


def gather(teacher: VllmTeacher | TransformersTeacher, *queries: Any) -> list[Any]:
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
    again = scored(make(), ids, k)  # from the prefix cache, if the server has one
    assert (again.logprobs, again.top) == (scores.logprobs, scores.top)


def written(local: TransformersTeacher) -> list[str]:
    """Likely and unlikely responses: some as given, others sampled."""
    (answers,) = gather(local, AnswerQuery(PROMPT, 0, 8, 60, 11))
    assert len(set(texts(answers))) > 1
    return [*WRITTEN, *texts(answers)]


def responses(chat: ChatTemplate, written: list[str], top: int) -> list[ScoreQuery]:
    """They as the teacher's own tokens, each with the end of its turn."""
    digest = chat.vocabulary.digest
    rows = [(*chat.encode(text)[0], chat.end_of_turn) for text in written]
    return [
        ScoreQuery(PROMPT, row, ids, digest, text, True, top)
        for row, (ids, text) in enumerate(zip(rows, written, strict=True))
    ]


def apart(one: TokenScores, other: TokenScores) -> float:
    """The most that two scores of one response differ by, in nats; likeliest tokens are compared by id."""
    assert one.ids == other.ids and one.ends == other.ends
    gaps = [abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)]
    for mine, theirs in zip(one.top, other.top, strict=True):
        assert len(mine) == len(theirs) == one.query.top
        gaps += [abs(mine[token] - theirs[token]) for token in mine.keys() & theirs.keys()]
        least = min(*mine.values(), *theirs.values())  # a tie for the last place may fall either way
        gaps += [(mine | theirs)[token] - least for token in mine.keys() ^ theirs.keys()]
    return max(gaps)


@pytest.mark.parametrize("top", [0, 20])
def test_r16_a_served_teacher_scores_as_the_same_weights_in_this_process(
    make: Make, chat: ChatTemplate, local: TransformersTeacher, top: int
) -> None:
    queries = responses(chat, written(local), top)
    served = make(tokenizer=TEACHER)
    assert (served.capabilities.score, served.capabilities.topk) == (True, 20)
    assert served.capabilities.vocabulary == local.capabilities.vocabulary
    there, here = gather(served, *queries), gather(local, *queries)
    gaps = [apart(one, other) for one, other in zip(there, here, strict=True)]
    print(f"top {top}: {sum(len(one.ids) for one in there)} tokens, at most {max(gaps):.2e} nats apart")
    assert max(gaps) < SCORED
    assert [one.usage.prompt_tokens for one in there] == [one.usage.prompt_tokens for one in here]


def test_r6_a_response_is_scored_at_temperature_1(make: Make, chat: ChatTemplate, local: TransformersTeacher) -> None:
    queries = responses(chat, list(WRITTEN), 5)
    cool = make(tokenizer=TEACHER, temperature=0.7, top_p=0.5)
    assert max(map(apart, gather(cool, *queries), gather(local, *queries))) < SCORED


def test_r9_scores_are_the_same_again_and_after_a_shared_prefix(
    make: Make, chat: ChatTemplate, local: TransformersTeacher
) -> None:
    long = " ".join(["19-5=14."] * 20)
    queries = responses(chat, [long, f"{long} #### 14", f"{long} apples"], 3)
    here = gather(local, *queries)
    for teacher in (make(tokenizer=TEACHER), make(tokenizer=TEACHER)):  # stores of their own: asked anew
        for one, other in zip(queries, here, strict=True):  # one after another, so that the first is in the cache
            assert apart(gather(teacher, one)[0], other) < SCORED


def test_a_text_in_another_vocabulary_is_cut_alike(make: Make, chat: ChatTemplate, local: TransformersTeacher) -> None:
    foreign = [replace(query, vocabulary="another") for query in responses(chat, list(WRITTEN), 0)]
    there, here = gather(make(tokenizer=TEACHER), *foreign), gather(local, *foreign)
    assert max(map(apart, there, here)) < SCORED
    assert all(one.ids[-1] == chat.end_of_turn for one in there)


def test_a_response_that_is_too_long_to_score_is_a_counted_hole(make: Make, chat: ChatTemplate) -> None:
    (hole,) = gather(make(tokenizer=TEACHER), *responses(chat, ["5 " * 3000], 0))
    assert (hole.rejected, hole.ids) == ({"context_overflow": 1}, ())


def test_what_the_server_refuses_is_one_line_with_a_mend(make: Make) -> None:
    with pytest.raises(TeacherError, match=r"greater than max allowed: 20.*; set teacher\.logprobs"):
        gather(make(continuation="prefill", logprobs=50), going_on())
    with pytest.raises(TeacherError, match=r"greater than max allowed: 20.*; lower how many"):
        chat = ChatTemplate.load(TEACHER, "teacher")
        gather(make(tokenizer=TEACHER), *responses(chat, ["5"], 50))
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
