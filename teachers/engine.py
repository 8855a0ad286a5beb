"""Local weights behind a queue, for the server of `serve.py` and for the teachers that live in this process.

What has gathered while the last batch ran is the next batch; one batch at a time runs in the thread of the engine's device.

    messages ── request() ──▶ Worker.draw  ── queue ──▶ draw_batch (the subclass) ──▶ text(), tokens()
    ids ─────── given() ────▶ Worker.score ── queue ──▶ score_batch (the subclass)
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, ClassVar

from omniopd.chat import ChatTemplate, first_line
from omniopd.errors import OmniError, TeacherError
from omniopd.sampling import Request
from omniopd.threads import DeviceThread
from omniopd.types import Finish, Message, Token
from teachers.scoring import Scores

GATHER_SECONDS = 0.01  # how long an idle engine waits for company before it starts a batch
BEFORE = 4  # prompt tokens that are decoded with a reply: some tokenizers drop the space that opens a text

CUT = "\ufffd"  # what bytes that complete no character are decoded as


@dataclass(frozen=True, slots=True)
class Drawn:
    """One text as token ids [T], the end token included where `finish` is "stop".

    `logprobs` [T] and `top` [T][K], the likeliest ids with their log-probs, best first, belong to temperature 1; both
    are empty where they were not asked for.
    """

    ids: tuple[int, ...]
    finish: Finish
    logprobs: tuple[float, ...] = ()
    top: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Given:
    """Tokens whose `ids[start:]` are to be scored; `top` and `whole` as in `scoring.Scoring`."""

    ids: tuple[int, ...]
    start: int
    top: int = 0
    whole: bool = False


class TooLong(ValueError):
    """The tokens don't fit into the model's context, or leave no room for an answer."""


class Engine(ABC):
    """A model with its tokenizer. A subclass says how a batch is drawn, and how one is scored if it can do that.

    Attributes:
        most_rows: draws and scored rows in one batch.
        written: tokens that are written behind given ones when these are scored.
        turn: held while the model computes; who lends its weights to another thread holds it there.
    """

    most_rows: ClassVar[int] = 1024
    written: ClassVar[int] = 0

    def __init__(self, chat: ChatTemplate, context: int, device: str | DeviceThread = "cpu") -> None:
        """`context` is how many tokens prompt and answer may have together, `device` the type of what it computes on, or
        the thread in which it does."""
        self.chat, self.context = chat, context
        self._thread = device if isinstance(device, DeviceThread) else DeviceThread(device)
        self.turn = threading.Lock()
        self._fresh_seed = time.time_ns()
        self._pieces: dict[int, str] = {}
        self._anchor = chat.encode("a")[0][-1:]

    @abstractmethod
    def draw_batch(self, requests: Sequence[Request]) -> list[list[Drawn]]:
        """The draws of each request, in order. Called in the thread of the engine's device, never twice at a time."""

    def score_batch(self, rows: Sequence[Given]) -> list[Scores]:
        """The scores of each row, in order; called as `draw_batch`."""
        raise NotImplementedError

    def close(self) -> None:
        """Wait for the batch that it may be drawing."""
        self._thread.close()

    def request(
        self,
        messages: Sequence[Message],
        *,
        open_turn: bool,
        draws: int,
        max_tokens: int,
        seed: int | None,
        temperature: float,
        top_p: float,
        top: int = 0,
    ) -> Request:
        """A chat as a request to draw from: a new assistant turn, or (`open_turn`) more of the last one.

        A limit that the context has no room for is lowered; without a seed one is taken that was not used before.

        Raises:
            TooLong: the context has no room for a single token.
            ValueError: the chat template refuses the messages.
        """
        ids = self.chat.ids(messages, open_turn=open_turn)
        if len(ids) >= self.context:
            raise TooLong(f"{len(ids)} tokens and an answer exceed the context of {self.context}")
        if seed is None:
            seed, self._fresh_seed = self._fresh_seed, self._fresh_seed + draws  # draw d has the seed `seed + d`
        limit = min(max_tokens, self.context - len(ids))
        return Request(ids, seed, limit, draws, temperature, top_p, top)

    def given(self, ids: Sequence[int], start: int, top: int, whole: bool) -> Given:
        """Tokens as a row to score.

        Raises:
            TooLong: the context has no room for them.
        """
        if len(ids) + self.written > self.context:
            raise TooLong(f"{len(ids)} tokens to score exceed the context of {self.context}")
        return Given(tuple(ids), start, top, whole)

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[Worker]:
        """The engine at work for the running event loop."""
        worker = Worker(self)
        task = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def run_batch(self, asked: Sequence[Request | Given]) -> list[Any]:
        """`draw_batch` and `score_batch` in that thread; what came of each, in order."""
        return await asyncio.wrap_future(self._thread.submit(self._batch, asked))

    def _batch(self, asked: Sequence[Request | Given]) -> list[Any]:
        requests = {place: one for place, one in enumerate(asked) if isinstance(one, Request)}
        rows = {place: one for place, one in enumerate(asked) if isinstance(one, Given)}
        found: dict[int, Any] = {}
        with self.turn:
            if requests:
                found |= zip(requests, self.draw_batch(list(requests.values())), strict=True)
            if rows:
                found |= zip(rows, self.score_batch(list(rows.values())), strict=True)
        return [found[place] for place in range(len(asked))]

    def text(self, request: Request, drawn: Drawn) -> str:
        """The drawn text as it reads after the prompt, without its end token, and without a character that was cut."""
        text = self._after(request, _visible(drawn))
        return text.rstrip(CUT) if drawn.finish == "length" else text

    def tokens(self, request: Request, drawn: Drawn) -> tuple[Token, ...]:
        """The tokens of that text; joined they spell it. A character belongs to the token that completes it."""
        ids, whole = _visible(drawn), self.text(request, drawn)
        texts = [self._piece(token) for token in ids]
        if "".join(texts) != whole:  # some tokens end inside a character
            ends = [len(self._after(request, ids[:end]).rstrip(CUT)) for end in range(1, len(ids))]
            ends = [0, *accumulate(ends, max), len(whole)]
            texts = [whole[start:end] for start, end in pairwise(ends)]
        tops = drawn.top or ((),) * len(ids)
        return tuple(
            Token(text, logprob, tuple((self._piece(other), logp) for other, logp in top if math.isfinite(logp)))
            for text, logprob, top in zip(texts, drawn.logprobs, tops, strict=False)  # the end token has no text
        )

    def _after(self, request: Request, ids: Sequence[int]) -> str:
        before = request.prompt_ids[-BEFORE:]
        return self.chat.decode([*before, *ids])[len(self.chat.decode(before)) :]

    def _piece(self, token: int) -> str:
        """The text of one token amid others; of a control token, its name."""
        if token not in self._pieces:
            decode = self.chat.tokenizer.decode
            opened = str(decode(self._anchor, clean_up_tokenization_spaces=False))
            pair = str(decode([*self._anchor, token], clean_up_tokenization_spaces=False))
            self._pieces[token] = pair[len(opened) :]
        return self._pieces[token]


class Worker:
    """The queue in front of an engine while one event loop lasts."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queue: asyncio.Queue[tuple[Request | Given, asyncio.Future[Any]]] = asyncio.Queue()

    async def draw(self, request: Request) -> list[Drawn]:
        """The draws of one request, which shares its batch with others.

        Raises:
            TeacherError: drawing the batch failed.
        """
        drawn: list[Drawn] = await self._ask(request)
        return drawn

    async def score(self, row: Given) -> Scores:
        """The scores of one row, which shares its batch with others.

        Raises:
            TeacherError: scoring the batch failed.
        """
        scores: Scores = await self._ask(row)
        return scores

    async def _ask(self, asked: Request | Given) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        await self._queue.put((asked, answer))
        return await answer

    async def run(self) -> None:
        """Serve the queue until cancelled."""
        batch: list[tuple[Request | Given, asyncio.Future[Any]]] = []
        try:
            while True:
                batch = [await self._queue.get()]
                await self._company()
                while not self._queue.empty() and sum(_rows(one) for one, _ in batch) < self._engine.most_rows:
                    batch.append(self._queue.get_nowait())
                await self._answer(batch)
        finally:  # nobody waits for a worker that is gone
            while not self._queue.empty():
                batch.append(self._queue.get_nowait())
            for _, answer in batch:
                answer.cancel()

    async def _company(self) -> None:
        """Wait until nothing more comes: what a gather asks at once is one batch, however long it takes to ask, so that
        the same gather has the same batches, and with them the same rounding, when a run repeats it."""
        before = -1
        while before < self._queue.qsize() < self._engine.most_rows:
            before = self._queue.qsize()
            await asyncio.sleep(GATHER_SECONDS)

    async def _answer(self, batch: Sequence[tuple[Request | Given, asyncio.Future[Any]]]) -> None:
        try:
            found = await self._engine.run_batch([asked for asked, _ in batch])
        except Exception as error:  # one bad batch must not end the worker
            doing = "draw" if isinstance(batch[0][0], Request) else "score"
            said = str(error) if isinstance(error, OmniError) else f"the model failed to {doing}: {first_line(error)}"
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(TeacherError(said))
            return
        for (_, answer), one in zip(batch, found, strict=True):
            if not answer.done():  # who asked may be gone
                answer.set_result(one)


def _rows(asked: Request | Given) -> int:
    return asked.draws if isinstance(asked, Request) else 1


def _visible(drawn: Drawn) -> tuple[int, ...]:
    return drawn.ids[:-1] if drawn.finish == "stop" else drawn.ids
