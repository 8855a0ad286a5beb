"""The queue in front of local weights: batches, errors, and what a drawn text reads like."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from omniopd.chat import ChatTemplate
from omniopd.errors import ConfigError, TeacherError
from omniopd.sampling import Request
from omniopd.types import Message
from teachers.engine import Drawn, Engine, Given, TooLong, Worker
from teachers.scoring import Scores

TEACHER = str(Path(__file__).resolve().parents[2] / "examples" / "demo" / "teacher")
END = 2  # the demo tokenizer's </s>
CHAT = ChatTemplate.load(TEACHER, "model")


class Scripted(Engine):
    """Draws the prompt's own ids; `hold` keeps the first batch from ending."""

    def __init__(self, fault: Callable[[list[list[Drawn]]], list[list[Drawn]]] = lambda drawn: drawn) -> None:
        super().__init__(CHAT, 64)
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.at_once = self.most_at_once = 0
        self.began, self.hold = threading.Event(), threading.Event()
        self.hold.set()
        self.fault = fault

    def draw_batch(self, requests: Sequence[Request]) -> list[list[Drawn]]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.batches.append([request.seed for request in requests])
        self.threads.add(threading.get_ident())
        self.began.set()
        assert self.hold.wait(10)
        time.sleep(0.01)
        self.at_once -= 1
        return self.fault([[Drawn(request.prompt_ids, "length")] * request.draws for request in requests])


def request(seed: int, draws: int = 1) -> Request:
    return Request((seed,), seed, 4, draws)


async def held(engine: Scripted, worker: Worker, later: Sequence[Request]) -> list[list[Drawn]]:
    """The first request begins a batch; the others arrive while it is drawn."""
    engine.hold.clear()
    first = asyncio.create_task(worker.draw(request(0)))
    await asyncio.to_thread(engine.began.wait, 10)
    others = [asyncio.create_task(worker.draw(one)) for one in later]
    await asyncio.sleep(0.05)
    assert engine.batches == [[0]]
    engine.hold.set()
    return await asyncio.gather(first, *others)


def test_what_gathers_while_a_batch_runs_is_the_next_batch() -> None:
    async def go(engine: Scripted) -> list[list[Drawn]]:
        async with engine.worker() as worker:
            return await held(engine, worker, [request(seed, draws=2) for seed in (1, 2, 3)])

    engine = Scripted()
    drawn = asyncio.run(go(engine))
    assert engine.batches == [[0], [1, 2, 3]]
    assert [[one.ids for one in draws] for draws in drawn] == [[(0,)], [(1,)] * 2, [(2,)] * 2, [(3,)] * 2]


def test_a_batch_ends_where_it_has_its_rows() -> None:
    async def go(engine: Scripted) -> None:
        async with engine.worker() as worker:
            await held(engine, worker, [request(seed, draws=3) for seed in (1, 2, 3, 4)])

    engine = Scripted()
    engine.most_rows = 5  # type: ignore[misc]
    asyncio.run(go(engine))
    assert engine.batches == [[0], [1, 2], [3, 4]]


def test_one_batch_at_a_time_in_a_thread_of_its_own() -> None:
    async def go(engine: Scripted) -> None:
        async with engine.worker() as one, engine.worker() as other:
            await asyncio.gather(one.draw(request(1)), other.draw(request(2)))

    engine = Scripted()
    asyncio.run(go(engine))
    asyncio.run(go(engine))  # another event loop
    assert sorted(engine.batches) == [[1], [1], [2], [2]]
    assert engine.most_at_once == 1
    assert len(engine.threads) == 1 and threading.get_ident() not in engine.threads


class Scoring(Scripted):
    """Scores each row with its own length."""

    def score_batch(self, rows: Sequence[Given]) -> list[Scores]:
        self.batches.append([-len(row.ids) for row in rows])
        return [Scores((-float(len(row.ids)),), ({},)) for row in rows]


def test_draws_and_scores_share_a_queue_and_come_back_to_who_asked() -> None:
    async def go(engine: Scripted) -> list[Any]:
        async with engine.worker() as worker:
            rows = [engine.given(tuple(range(length)), 1, 0, False) for length in (5, 3)]
            asked = [worker.score(rows[0]), worker.draw(request(1)), worker.score(rows[1]), worker.draw(request(2))]
            return list(await asyncio.gather(*asked))

    engine = Scoring()
    first, drawn, second, also = asyncio.run(go(engine))
    assert sorted(engine.batches) == [[-5, -3], [1, 2]]
    assert (first.logprobs, second.logprobs) == ((-5.0,), (-3.0,))
    assert (drawn[0].ids, also[0].ids) == ((1,), (2,))


def test_what_is_asked_at_once_is_one_batch_however_long_the_asking_takes() -> None:
    async def go(engine: Scripted) -> None:
        async def slowly(worker: Worker, seed: int) -> None:
            for _ in range(seed):  # one after another, as those who wait for their turn come
                await asyncio.sleep(0)
            time.sleep(0.004)  # as a look into the store takes
            await worker.draw(request(seed))

        async with engine.worker() as worker:
            await asyncio.gather(*(slowly(worker, seed) for seed in range(1, 30)))

    engine = Scripted()
    asyncio.run(go(engine))
    assert engine.batches == [list(range(1, 30))]


def test_rows_to_score_fit_into_the_context() -> None:
    engine = Scripted()
    assert engine.given((7,) * 64, 3, 0, False).start == 3
    with pytest.raises(TooLong, match="65 tokens to score exceed the context of 64"):
        engine.given((7,) * 65, 3, 0, False)


def too_few(drawn: list[list[Drawn]]) -> list[list[Drawn]]:
    return drawn[1:]


def breaks(drawn: list[list[Drawn]]) -> list[list[Drawn]]:
    raise RuntimeError("out of luck\nsecond line")


def ours(drawn: list[list[Drawn]]) -> list[list[Drawn]]:
    raise ConfigError("teacher.batch_tokens: lower it")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (breaks, "^the model failed to draw: out of luck$"),
        (ours, "^teacher.batch_tokens: lower it$"),
        (too_few, "the model failed to draw"),
    ],
)
def test_a_batch_that_fails_reaches_its_callers_and_the_next_is_drawn(fault: Callable[..., object], said: str) -> None:
    async def go(engine: Scripted) -> None:
        async with engine.worker() as worker:
            failed = await asyncio.gather(*(worker.draw(request(seed)) for seed in (1, 2)), return_exceptions=True)
            for error in failed:
                with pytest.raises(TeacherError, match=said):
                    raise error  # type: ignore[misc]
            engine.fault = lambda drawn: drawn
            assert (await worker.draw(request(3)))[0].ids == (3,)

    asyncio.run(go(Scripted(fault)))  # type: ignore[arg-type]


def test_who_stops_waiting_harms_nobody() -> None:
    async def go(engine: Scripted) -> None:
        async with engine.worker() as worker:
            engine.hold.clear()
            gone, there = (asyncio.create_task(worker.draw(request(seed))) for seed in (1, 2))
            await asyncio.to_thread(engine.began.wait, 10)
            gone.cancel()
            await asyncio.sleep(0)
            engine.hold.set()
            assert (await there)[0].ids == (2,)
            assert (await worker.draw(request(3)))[0].ids == (3,)

    asyncio.run(go(Scripted()))


def test_nobody_waits_for_a_worker_that_is_gone() -> None:
    async def go(engine: Scripted) -> list[object]:
        async with engine.worker() as worker:
            engine.hold.clear()
            drawing = asyncio.create_task(worker.draw(request(1)))
            await asyncio.to_thread(engine.began.wait, 10)
            queued = asyncio.create_task(worker.draw(request(2)))
            await asyncio.sleep(0.01)
        engine.hold.set()
        return list(await asyncio.wait_for(asyncio.gather(drawing, queued, return_exceptions=True), 5))

    assert [type(end) for end in asyncio.run(go(Scripted()))] == [asyncio.CancelledError] * 2


def chat_request(*contents: str, open_turn: bool = False, seed: int | None = 1, max_tokens: int = 8) -> Request:
    roles = ("user", "assistant")
    messages = [Message(roles[at % 2], text) for at, text in enumerate(contents)]  # type: ignore[arg-type]
    return Scripted().request(
        messages, open_turn=open_turn, draws=3, max_tokens=max_tokens, seed=seed, temperature=0.5, top_p=0.9, top=2
    )


def test_a_request_is_the_chat_as_the_model_sees_it() -> None:
    asked = chat_request("12?", "It is", open_turn=True)
    assert CHAT.tokenizer.decode(list(asked.prompt_ids)) == "<s>[INST]12?[/INST]It is"
    assert (asked.seed, asked.draws, asked.max_new_tokens) == (1, 3, 8)
    assert (asked.temperature, asked.top_p, asked.top) == (0.5, 0.9, 2)
    closed = chat_request("12?", "It is", "So?")
    assert CHAT.tokenizer.decode(list(closed.prompt_ids)) == "<s>[INST]12?[/INST]It is</s>[INST]So?[/INST]"


def test_the_text_of_a_control_token_stays_text() -> None:
    asked = chat_request("x[/INST]", "It is</s>", open_turn=True)
    assert CHAT.tokenizer.decode(list(asked.prompt_ids)) == "<s>[INST]x[/INST][/INST]It is</s>"
    assert [token for token in asked.prompt_ids if token < 6] == [1, 4, 5]  # those of the template alone


def test_a_limit_without_room_is_lowered_and_a_prompt_without_room_is_too_long() -> None:
    room = 64 - len(chat_request("x").prompt_ids)
    assert chat_request("x", max_tokens=1000).max_new_tokens == room
    fits = "x" * room
    assert chat_request(fits).max_new_tokens == 1
    with pytest.raises(TooLong, match="64 tokens and an answer exceed the context of 64"):
        chat_request(fits + "x")


def test_without_a_seed_no_draw_is_repeated() -> None:
    engine, used = Scripted(), set[int]()
    for draws in (3, 1, 5):
        asked = engine.request(
            [Message("user", "x")], open_turn=False, draws=draws, max_tokens=8, seed=None, temperature=1.0, top_p=1.0
        )
        used |= {asked.seed + draw for draw in range(draws)}
    assert len(used) == 9


@pytest.mark.parametrize("text", [" 19-5=14.", "caf\u00e9 \U0001f600!", "\U0001f600", "", "\n\n x"])
def test_a_drawn_text_and_its_tokens_spell_the_same(text: str) -> None:
    ids = tuple(CHAT.encode(text)[0])
    drawn = Drawn(
        (*ids, END), "stop", (-0.5,) * len(ids) + (-9.0,), (((ids[0] if ids else 7, -0.5),),) * (len(ids) + 1)
    )
    asked, engine = chat_request("x", "It is", open_turn=True), Scripted()
    tokens = engine.tokens(asked, drawn)
    assert engine.text(asked, drawn) == text
    assert "".join(token.text for token in tokens) == text
    assert [token.logprob for token in tokens] == [-0.5] * len(ids)  # the end token is none of the text's
    assert not any("\ufffd" in token.text for token in tokens)


def test_an_end_token_is_no_text_even_where_it_has_one() -> None:
    ids, end = tuple(CHAT.encode(" 14")[0]), CHAT.encode("#")[0][0]
    assert Scripted().text(chat_request("x"), Drawn((*ids, end), "stop")) == " 14"
    assert Scripted().text(chat_request("x"), Drawn((*ids, end), "length")) == " 14#"


def test_a_character_that_the_limit_cut_is_no_text() -> None:
    ids = tuple(CHAT.encode("x\U0001f600")[0][:-1])
    engine, asked = Scripted(), chat_request("x")
    assert engine.text(asked, Drawn(ids, "length")) == "x"
    tokens = engine.tokens(asked, Drawn(ids, "length", (-1.0,) * len(ids)))
    assert [token.text for token in tokens] == ["x", "", "", ""]
    assert all(token.top == () for token in tokens)
    assert engine.text(asked, Drawn((*ids, END), "stop")).rstrip("\ufffd") == "x"  # the model's own doing
    assert engine.text(asked, Drawn((*ids, END), "stop")) != "x"


def test_alternatives_keep_their_space_and_control_tokens_their_name() -> None:
    ids = tuple(CHAT.encode(" 1")[0])
    top = ((356, -0.1), (END, -2.5), (4, float("-inf")))
    token = Scripted().tokens(chat_request("x"), Drawn(ids, "length", (-0.1,) * len(ids), (top,) * len(ids)))[0]
    assert token.text == " "
    assert token.top == ((" ", -0.1), ("</s>", -2.5))  # an impossible one is none
