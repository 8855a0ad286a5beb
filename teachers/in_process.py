"""What the teachers in this process have in common: settings, fingerprint, and sessions over an `engine.Engine`.

A subclass of `InProcessBackend` says how its engine is loaded; see `transformers.py` and `vllm_local.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from transformers.utils import cached_file

from omniopd.chat import ChatTemplate
from omniopd.errors import TeacherError
from omniopd.ledger import Price
from omniopd.types import Capabilities, Usage
from teachers.asks import Ask, Choice, digest
from teachers.backend import offers_of
from teachers.client import ApiTeacher
from teachers.engine import Drawn, Engine, TooLong, Worker
from teachers.ladder import Rung
from teachers.scoring import Scores
from teachers.wire import Completion, Outcome, RefusedRequest, TeacherConfig

HEAD = 1 << 20  # bytes of a weight file that are read whole: a safetensors file opens with names and shapes
BLOCK, BLOCKS = 4096, 256  # and of the rest, spread evenly

# Set inside the template, so that they hold on every rung; names of Qwen3 and others, and of DeepSeek and Granite.
_NO_THINKING = "{%- set enable_thinking = false %}{%- set thinking = false %}"


class InProcessConfig(TeacherConfig):
    """The settings that every teacher in this process has.

    `path` is a model folder or hub id; `fingerprint` stands in for it, and for a look at its weights, in the teacher's
    fingerprint. `dtype: auto` takes the type that the weights are stored in. Temperature and top-p are always stated. All
    queries of a step are asked at once (`warm_cache: false`): there is no bill that a provider's prompt cache would lower.
    It costs nothing unless a `price` is set.
    """

    path: str = Field(min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    warm_cache: bool = False
    price: Price | None = Price()

    @property
    def model(self) -> str:
        """What plans and prices call it."""
        return self.path


class InProcessBackend:
    """A `wire.Backend` without a network.

    The prompt is rendered here, token by token as the model sees it, so that the rung `raw` is exact and needs no proof.
    `prefill` may be asked for by name and is the same; `instruct` shows the messages as any chat.

    Attributes:
        version: raise it with any change of what a query becomes.
    """

    version: ClassVar[int] = 1

    def __init__(self, config: InProcessConfig) -> None:
        """Load the model, so that one that does not load is known before a run starts.

        Raises:
            ConfigError: it does not load.
        """
        self.config = config
        self.chat = _chat_of(config)
        if config.thinking == "off":
            tokenizer = self.chat.tokenizer
            tokenizer.chat_template = _NO_THINKING + tokenizer.get_chat_template()
            self.chat = ChatTemplate(tokenizer)
        self.template = self.chat.digest
        self.rungs: tuple[Rung, ...] = ("raw",)
        self.place = config.path
        self.engine = self.load(self.chat)
        self._weights = None if config.fingerprint else weights_digest(config.path)
        self.fingerprint = f"{config.type}/{config.fingerprint or config.path}#{digest(self.record())[:16]}"

    @classmethod
    def promises(cls, config: InProcessConfig) -> Capabilities:
        """What a back end of these settings will offer; no weights are loaded.

        Raises:
            ConfigError: `teacher.path` has no tokenizer that loads.
        """
        return cls.capabilities(config, _chat_of(config))

    @classmethod
    def capabilities(cls, config: InProcessConfig, chat: ChatTemplate) -> Capabilities:
        """What these settings offer with this tokenizer."""
        return offers_of(chat, config, "raw", None)

    @property
    def offers(self) -> Capabilities:
        """What it can give beside text."""
        return self.capabilities(self.config, self.chat)

    def load(self, chat: ChatTemplate) -> Engine:
        """The engine that the config describes.

        Raises:
            ConfigError: it can't be had; the message names the field and the mend.
        """
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """What decides an answer: adapter, weights, their type, template, rung as configured, system text, sampling."""
        config = self.config
        return {
            "type": config.type,
            "adapter": self.version,
            "place": config.fingerprint or config.path,
            "weights": self._weights,
            "dtype": config.dtype,
            "chat_template": self.template,
            "continuation": "raw" if config.continuation == "auto" else config.continuation,
            "prefill": "token ids, as raw",
            "system": config.system,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "thinking": config.thinking,
        }

    @asynccontextmanager
    async def session(self) -> AsyncIterator[EngineSession]:
        """The engine at work for one gather."""
        async with self.engine.worker() as worker:
            yield EngineSession(self, worker)


class InProcessTeacher(ApiTeacher):
    """A `Teacher` in this process.

    It does not stream: it has the student's device, so that to ask early wins nothing; and what it is asked at once makes its
    batches, which have to be the same, rounding included, when a run repeats.
    """

    streams = False
    backend: InProcessBackend

    async def close(self) -> None:
        """End the engine."""
        self.backend.engine.close()


class EngineSession:
    """A `wire.Session` over an engine in this process."""

    def __init__(self, backend: InProcessBackend, worker: Worker) -> None:
        self._backend, self._worker = backend, worker

    async def draw(self, ask: Ask, n: int, seed: int | None) -> Outcome[Completion]:
        """See `wire.Session`; draw i is the one that a call for it alone, seeded with `seed + i`, would bring."""
        backend, engine = self._backend, self._backend.engine
        assert ask.temperature is not None and ask.top_p is not None  # see InProcessConfig
        try:
            request = engine.request(
                ask.messages,
                open_turn=ask.rung in ("raw", "prefill") and bool(ask.prefix),
                draws=n,
                max_tokens=ask.max_tokens,
                seed=seed,
                temperature=ask.temperature,
                top_p=ask.top_p,
                top=ask.logprobs,
            )
        except TooLong as error:
            return Outcome(0, None, "context_overflow", f"{backend.place}: {error}")
        except ValueError as error:
            raise RefusedRequest(f"teacher.path: the chat template of '{backend.place}' refuses it: {error}") from None
        drawn = await self._worker.draw(request)

        def choice(one: Drawn) -> Choice:
            tokens = engine.tokens(request, one) if ask.logprobs else ()
            return Choice(engine.text(request, one), one.finish, tokens=tokens)

        written = sum(len(one.ids) for one in drawn)
        usage = Usage(prompt_tokens=len(request.prompt_ids), completion_tokens=written)
        return Outcome(1, Completion(tuple(map(choice, drawn)), backend.place, usage))

    async def score(self, ids: Sequence[int], start: int, top: int, whole: bool) -> Outcome[Scores]:
        """See `scoring.Scoring`."""
        backend, offered = self._backend, self._backend.offers
        if not (offered.logits if whole else offered.score):
            what = "whole distributions of" if whole else "log-probs of"
            raise TeacherError(f"teacher.type: {backend.config.type} has no {what} given text; choose another type")
        try:
            row = backend.engine.given(ids, start, top, whole)
        except TooLong as error:
            return Outcome(0, None, "context_overflow", f"{backend.place}: {error}")
        scores = await self._worker.score(row)
        return Outcome(1, replace(scores, model=backend.place))


def _chat_of(config: InProcessConfig) -> ChatTemplate:
    return ChatTemplate.load(config.path, "teacher.path")


def weights_digest(path: str) -> str:
    """A hash that tells the weights of a model folder or hub id from others, cheap for large ones.

    Read are the configs, and of each weight file its name, its size, the opening megabyte and blocks spread over the rest:
    training moves nearly every number, so that the sample differs.
    """
    folder = Path(path)
    if not folder.is_dir():  # loaded before, hence in the cache
        folder = Path(str(cached_file(path, "config.json"))).parent
    sha = hashlib.sha256()
    for name in ("config.json", "generation_config.json", "adapter_config.json"):
        if (folder / name).is_file():
            sha.update(f"{name}\n".encode() + (folder / name).read_bytes())
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        size = file.stat().st_size
        sha.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as data:
            sha.update(data.read(HEAD))
            rest = size - data.tell()
            stride = max(BLOCK, rest // BLOCKS)
            for at in range(size - rest, size, stride):
                data.seek(at)
                sha.update(data.read(BLOCK))
    return sha.hexdigest()[:16]
