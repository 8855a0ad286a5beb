"""Live: vLLM in this process against the library `transformers` in this process, on the same random weights.

Skipped where the package is not installed. The model is tiny but for its heads: vLLM's kernels take none under 32 wide.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from omniopd.store import Store
from omniopd.types import AnswerQuery, Chunk, ContinueQuery, Message, Prompt, ScoreQuery
from teachers.asks import Ask, Choice
from teachers.transformers import TransformersConfig, TransformersTeacher
from teachers.vllm_local import VllmLocalConfig, VllmLocalTeacher

pytestmark = [pytest.mark.contract, pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")]

PROMPT = Prompt("p", (Message("user", "What is 12 + 7?"),))
CLOSE = 1e-4  # nats: another kernel
Teacher = VllmLocalTeacher | TransformersTeacher


def going_on(prefix: str = "The answer", n: int = 4, max_tokens: int = 12, seed: int = 70) -> ContinueQuery:
    return ContinueQuery(PROMPT, Chunk(0, 3, 5, prefix, " AUDITED", (8, 8)), n, max_tokens, seed)


@pytest.fixture(scope="module")
def pair(
    tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VllmLocalTeacher, TransformersTeacher]]:
    """The same weights behind both."""
    path = str(tiny_folder("byte_level", "qwen3", head_dim=32))
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        config = VllmLocalConfig(path=path, logprobs=5, enforce_eager=True, gpu_memory_utilization=0.2)
        vllm = VllmLocalTeacher(config, Store(folder / "vllm.sqlite"))
        yield vllm, TransformersTeacher(TransformersConfig(path=path, logprobs=5), Store(folder / "own.sqlite"))
        asyncio.run(vllm.close())


def choices(teacher: Teacher, ask: Ask, n: int, seed: int = 70) -> tuple[Choice, ...]:
    async def go() -> Any:
        async with teacher.backend.session() as session:
            return (await session.draw(ask, n, seed)).value

    return tuple(asyncio.run(go()).choices)


def greedy(teacher: Teacher, query: Any) -> Ask:
    return replace(teacher.manner.ask(query), temperature=0.0)


def test_greedy_texts_are_the_models_own(pair: tuple[Teacher, Teacher]) -> None:
    prefixes = ["The answer", "So Tom has", "caf\u00e9", "x<|end|>y", "1 2 3"]
    for query in [*map(going_on, prefixes), AnswerQuery(PROMPT, 0, 4, 40, 1)]:
        there, here = (choices(teacher, greedy(teacher, query), 2) for teacher in pair)
        assert [(choice.text, choice.finish) for choice in there] == [(choice.text, choice.finish) for choice in here]
        assert there[0].text


def test_logprobs_are_those_of_temperature_one(pair: tuple[Teacher, Teacher]) -> None:
    for temperature in (0.0, 0.5):  # a hot or cold sampler must not move them
        there, here = (replace(teacher.manner.ask(going_on()), temperature=0.0) for teacher in pair)
        (own,) = choices(pair[1], here, 1)
        (seen,) = choices(pair[0], replace(there, temperature=temperature, top_p=0.01), 1)
        assert seen.text == own.text  # so small a nucleus holds the likeliest alone
        assert "".join(token.text for token in seen.tokens) == seen.text
        for one, other in zip(seen.tokens, own.tokens, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=CLOSE)
            assert len(one.top) == 5
            assert [text for text, _ in one.top] == [text for text, _ in other.top]
            assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=CLOSE)


def test_draw_i_is_the_draw_alone_with_seed_plus_i(pair: tuple[Teacher, Teacher]) -> None:
    ask = pair[0].manner.ask(going_on())
    together = [choice.text for choice in choices(pair[0], ask, 5)]
    assert together == [choices(pair[0], ask, 1, 70 + i)[0].text for i in range(5)]
    assert len(set(together)) == 5
    assert [choice.text for choice in choices(pair[0], ask, 5, 500)] != together


def test_first_tokens_come_as_often_as_the_model_says(pair: tuple[Teacher, Teacher]) -> None:
    draws = 3000
    (own,) = choices(pair[1], greedy(pair[1], going_on(max_tokens=1)), 1)
    drawn = choices(pair[0], pair[0].manner.ask(going_on(max_tokens=1)), draws)
    seen = Counter("<|end|>" if choice.finish == "stop" else choice.text for choice in drawn)
    told = {text: math.exp(logp) for text, logp in own.tokens[0].top if "\ufffd" not in text}
    assert len(told) > 2
    for text, p in told.items():  # five standard deviations
        assert seen[text] / draws == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / draws))


def test_a_gather_is_drawn_once_and_kept(pair: tuple[Teacher, Teacher]) -> None:
    query = going_on(n=3, max_tokens=7)
    (first,), (second,) = (asyncio.run(pair[0].gather([query])) for _ in range(2))
    assert len(first.replies) + sum(first.rejected.values()) == 3
    assert (first.replies, first.rejected) == (second.replies, second.rejected)
    assert (first.usage.calls, second.usage.calls, second.usage.cached_calls) == (1, 0, 1)
    prompt_ids = pair[0].backend.chat.ids([*PROMPT.messages, Message("assistant", "The answer")], open_turn=True)
    assert first.usage.prompt_tokens == len(prompt_ids)
    assert 3 <= first.usage.completion_tokens <= 21


@pytest.mark.parametrize("top", [0, 20])
def test_given_text_is_scored_as_by_the_library(pair: tuple[Teacher, Teacher], top: int) -> None:
    chat = pair[1].backend.chat
    texts = ("The answer is 12 + 7 = 19.", "caf\u00e9 \U0001f600", "x<|end|>y", "1 2 3")
    queries = [
        ScoreQuery(PROMPT, row, (*chat.encode(text)[0], chat.end_of_turn), chat.vocabulary.digest, text, True, top)
        for row, text in enumerate(texts)
    ]
    there, here = (asyncio.run(teacher.gather(queries)) for teacher in pair)
    for one, other in zip(there, here, strict=True):
        assert one.ids == other.ids
        assert list(one.logprobs) == pytest.approx(list(other.logprobs), abs=CLOSE)
        assert [len(place) for place in one.top] == [top] * len(one.top)
        for mine, theirs in zip(one.top, other.top, strict=True):
            assert list(mine.values()) == pytest.approx(list(theirs.values()), abs=CLOSE)
            assert all(mine[token] == pytest.approx(theirs[token], abs=CLOSE) for token in mine.keys() & theirs.keys())
    assert pair[0].capabilities.vocabulary == pair[1].capabilities.vocabulary
    assert (pair[0].capabilities.topk, pair[0].capabilities.logits) == (100, False)
