"""A back end behind HTTP. A subclass says how a request looks, how a reply is read, and what an error means."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Literal

import httpx

from omniopd.chat import ChatTemplate
from omniopd.errors import ConfigError, TeacherError
from omniopd.types import Capabilities, Message
from teachers.asks import Ask, digest, size
from teachers.ladder import Rung
from teachers.pace import shared_pace
from teachers.scoring import Scorer, Scores, scorer_of
from teachers.transport import Sender, Sleep, Transport
from teachers.wire import Call, Completion, HttpConfig, Outcome, TeacherConfig, Verdict, key_from_env


class HttpBackend:
    """What all back ends behind HTTP have in common.

    Attributes:
        version: of the adapter; raise it with any change of what it sends.
        key_header, key_scheme: the header that carries the key, and what stands before it.
        ladder: the rungs that the wire format has, best first; `raw` counts only where a tokenizer is configured.
    """

    version: ClassVar[int] = 1
    key_header: ClassVar[str] = "Authorization"
    key_scheme: ClassVar[str] = "Bearer "
    ladder: ClassVar[tuple[Rung, ...]] = ("prefill", "instruct")

    def __init__(
        self,
        config: HttpConfig,
        *,
        http: httpx.AsyncBaseTransport | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """Read the key from its environment variable; `http` and `sleep` are for tests.

        Raises:
            ConfigError: the variable is not set, or the rung that the config names can't be had.
        """
        self.config = config
        self.auth = key_from_env(config.api_key_env, self.key_header, self.key_scheme)
        self.base_url = self.place = config.base_url
        self.chat = _chat_of(config)
        self.template = self.chat.digest if self.chat else ""
        self.rungs = tuple(rung for rung in self.ladder if rung != "raw" or self.chat)
        if config.continuation == "raw" and "raw" not in self.rungs:
            mend = (
                "name the teacher's model folder or hub id in teacher.tokenizer"
                if "raw" in self.ladder
                else "choose prefill, instruct or auto"
            )
            raise ConfigError(f"teacher.continuation: raw renders the prompt here; {mend}")
        if config.continuation not in ("auto", *self.rungs):
            raise ConfigError(
                f"teacher.continuation: this server has no {config.continuation}; choose {', '.join(self.rungs)} or auto"
            )
        self.fingerprint = f"{config.type}/{config.model}@{config.place}#{digest(self.record())[:16]}"
        pace = shared_pace(
            (config.base_url, self.auth.account() if self.auth else "", config.model),
            concurrency=config.concurrency,
            rpm=config.rpm,
            tpm=config.tpm,
        )
        self._transport = Transport(
            self, pace, timeout_s=config.timeout_s, max_attempts=config.max_attempts, http=http, sleep=sleep
        )

    @classmethod
    def promises(cls, config: HttpConfig) -> Capabilities:
        """What a back end of these settings will offer; nothing is sent, and no key is read.

        Raises:
            ConfigError: `teacher.tokenizer` names none that loads.
        """
        return cls._offers(config, _chat_of(config))

    @property
    def offers(self) -> Capabilities:
        """What it can give beside text."""
        return self._offers(self.config, self.chat)

    @classmethod
    def most_top(cls, config: HttpConfig) -> int | None:
        """How many of the likeliest tokens it gives at each place of given text; None where it scores no given text."""
        return None

    @property
    def scorer(self) -> Scorer | None:
        """What has given tokens scored, if not the back end itself."""
        return None

    @classmethod
    def _offers(cls, config: HttpConfig, chat: ChatTemplate | None) -> Capabilities:
        return offers_of(chat, config, "instruct", cls.most_top(config))

    @property
    def model(self) -> str:
        """The model's name in requests."""
        return self.config.model

    def record(self) -> dict[str, Any]:
        """What decides an answer: adapter, address, model, rung as configured, system text, sampling, extra fields."""
        config = self.config
        return {
            "type": config.type,
            "adapter": self.version,
            "place": config.place,
            "model": config.model,
            "continuation": config.continuation,
            "system": config.system,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "thinking": config.thinking,
            "template": self.template,
            "extra_body": config.extra_body,
        }

    @asynccontextmanager
    async def session(self) -> AsyncIterator[HttpSession]:
        """Connections for one gather."""
        async with self._transport.session() as sender:
            yield HttpSession(self, sender)

    def request(self, ask: Ask, n: int, seed: int | None) -> Call:
        """The HTTP request for n draws, the first of them with this seed (None: no seed is sent)."""
        raise NotImplementedError

    def read(self, payload: Any, ask: Ask) -> Completion:
        """Read a reply of status 200.

        Raises:
            Malformed: the payload has another shape.
        """
        raise NotImplementedError

    def classify(self, status: int, payload: Any) -> Verdict | None:
        """The verdict on a reply, or None if it is no failure; `payload` is None where the body is no JSON."""
        raise NotImplementedError

    def shown_call(self, messages: Sequence[Message]) -> Call | None:
        """The request that makes the server show its rendering of a chat; None where it has no such thing."""
        return None

    def read_shown(self, payload: Any) -> str:
        """Read the rendering from its reply.

        Raises:
            Malformed: the payload has another shape.
        """
        raise NotImplementedError

    def scrub(self, text: str) -> str:
        """The text without the key."""
        return self.auth.scrub(text) if self.auth else text

    def raw_ids(self, ask: Ask) -> tuple[int, ...]:
        """A request of the rung `raw` as token ids, up to the end of the student's prefix."""
        assert self.chat is not None, "raw is among the rungs only where a tokenizer is configured"
        return self.chat.ids(ask.messages, open_turn=True)

    def raw_text(self, ask: Ask) -> str:
        """The same as text, for a server whose tokenizer writes the beginning-of-text token itself, if there is one."""
        assert self.chat is not None, "raw is among the rungs only where a tokenizer is configured"
        return self.chat.unopened(self.chat.text(ask.messages, open_turn=True))


class HttpSession:
    """A `wire.Session` over HTTP."""

    def __init__(self, backend: HttpBackend, sender: Sender) -> None:
        self._backend, self.sender = backend, sender

    async def draw(self, ask: Ask, n: int, seed: int | None) -> Outcome[Completion]:
        """See `wire.Session`."""
        return await self.send(self.request(ask, n, seed), ask)

    def request(self, ask: Ask, n: int, seed: int | None) -> Call:
        """The request that `draw` would send."""
        return self._backend.request(ask, n, seed)

    async def send(self, call: Call, ask: Ask) -> Outcome[Completion]:
        """Send a request of one's own making, read as the answer to `ask`."""
        return await self.sender.send(call, lambda payload: self._backend.read(payload, ask))

    async def score(self, ids: Sequence[int], start: int, top: int, whole: bool) -> Outcome[Scores]:
        """See `scoring.Scoring`."""
        scorer = scorer_of(self._backend)
        if scorer is None or whole:
            what = "whole distributions of" if whole else "log-probs of"
            raise TeacherError(
                f"teacher.type: {self._backend.config.type} has no {what} given text; choose another type"
            )
        return await self.sender.send(
            scorer.score_call(ids, top), lambda payload: scorer.read_scores(payload, ids, top).since(start)
        )

    def quit(self) -> None:
        """See `wire.Quits`."""
        self.sender.quit()

    async def shown(self, messages: Sequence[Message]) -> str | None:
        """The prompt as the server's model gets it, control tokens included; None where the server does not tell."""
        call = self._backend.shown_call(messages)
        if call is None:
            return None
        return (await self.sender.send(call, self._backend.read_shown)).value


def estimate_tokens(texts: Sequence[str]) -> int:
    """Tokens of some texts, from above for most tokenizers: one for every two bytes."""
    return size(texts) // 2


def offers_of(
    chat: ChatTemplate | None, config: TeacherConfig, rung: Literal["raw", "instruct"], top: int | None
) -> Capabilities:
    """What a teacher offers whose model scores given tokens with the `top` likeliest at each place (None: it does not).

    It takes the tokenizer to have text scored: a teacher without one scores nothing, nor does one whose tokens can't be laid
    over a text.
    """
    scores = top is not None and chat is not None and not chat.vocabulary.lossy
    return Capabilities(
        continuation=rung,
        score=scores,
        topk=top if scores and top is not None else 0,
        gen_logprobs=config.logprobs,
        vocabulary=chat.vocabulary.digest if chat else "",
    )


def _chat_of(config: HttpConfig) -> ChatTemplate | None:
    return ChatTemplate.load(config.tokenizer, "teacher.tokenizer") if config.tokenizer else None
