"""What the servers that one runs oneself have in common: OpenAI's format, with more fields than OpenAI has.

Such a server fills sampling fields that a request leaves out from the model's own defaults (`generation_config.json`, GGUF
metadata, a Modelfile), which may cut the distribution off at 20 tokens or punish repetition. Every request states them all
(trap R15), so that what is drawn is what the model says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from urllib.parse import urlsplit

from pydantic import field_validator

from omniopd.types import Message
from teachers import openai_errors
from teachers.asks import Ask
from teachers.backend import HttpBackend, estimate_tokens
from teachers.errors import OPEN_TURN, Refusal
from teachers.formats import not_stated
from teachers.ladder import Rung
from teachers.openai import OpenAIBackend
from teachers.scoring import Scorer
from teachers.wire import Call, HttpConfig, Verdict

STATED = frozenset(
    {"model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stream"}
    | {"logprobs", "top_logprobs", "add_generation_prompt", "continue_final_message"}
)
REFUSALS = (
    Refusal("prefill", OPEN_TURN, "set teacher.continuation: instruct, or raw with teacher.tokenizer"),
    *(one for one in openai_errors.REFUSALS if one.param not in ("prefill", "max_tokens", "max_completion_tokens")),
)


class ServedConfig(HttpConfig):
    """The settings of a server of one's own. It needs no key unless `api_key_env` names one.

    A `base_url` that is a server's bare address gets `under`, the path that the server's routes stand under.
    """

    stated: ClassVar[frozenset[str]] = STATED
    under: ClassVar[str] = "/v1"
    api_key_env: str | None = None

    @field_validator("base_url")
    @classmethod
    def _routes(cls, url: str) -> str:
        return url if urlsplit(url).path else f"{url}{cls.under}"

    @field_validator("extra_body")
    @classmethod
    def _nothing_stated(cls, extra: dict[str, Any]) -> dict[str, Any]:
        return not_stated(extra, cls.stated)


class ServedBackend(OpenAIBackend):
    """Requests in the format of such a server.

    Attributes:
        refusals: the settings that the server may refuse, with their mends.
        sampling: fields of every request that leave the model's distribution as it is.
        opened: fields that mark the last message as an assistant turn to go on from.
        no_thinking: fields that switch hidden reasoning off. Templates don't agree on the name of their switch.
    """

    config: ServedConfig  # type: ignore[assignment]
    version = 1
    ladder: ClassVar[tuple[Rung, ...]] = ("raw", "prefill", "instruct")
    repeats_prefix: ClassVar[bool] = False
    refusals: ClassVar[tuple[Refusal, ...]] = REFUSALS
    sampling: ClassVar[Mapping[str, Any]] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    opened: ClassVar[Mapping[str, Any]] = {}
    no_thinking: ClassVar[Mapping[str, Any]] = {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}

    @classmethod
    def most_top(cls, config: HttpConfig) -> int | None:
        """None: a server whose way to score given tokens is known has it in its own class."""
        return None

    @property
    def scorer(self) -> Scorer | None:
        """See `most_top`."""
        return None

    @property
    def root(self) -> str:
        """The server's address without the version that the OpenAI-shaped routes stand under."""
        return self.base_url.removesuffix("/v1")

    def record(self) -> dict[str, Any]:
        """See `HttpBackend.record`."""
        return HttpBackend.record(self)

    def request(self, ask: Ask, n: int, seed: int | None) -> Call:
        """The HTTP request for n draws; for one where all would be the same."""
        if ask.temperature == 0:
            n = 1  # vLLM refuses more
        return self.raw_call(ask, n, seed) if ask.rung == "raw" else self.chat_call(ask, n, seed)

    def raw_call(self, ask: Ask, n: int, seed: int | None) -> Call:
        """A request of the rung `raw`: on the completion route, unless a subclass knows a better one."""
        body = self.body(ask, n, seed) | {"prompt": self.raw_prompt(ask)}
        if ask.logprobs:
            body["logprobs"] = ask.logprobs
        return self.call(f"{self.base_url}/completions", body, ask, n)

    def chat_call(self, ask: Ask, n: int, seed: int | None) -> Call:
        """A request of every other rung, on the chat route."""
        body = self.body(ask, n, seed) | {"messages": turns(ask.messages)}
        if ask.logprobs:
            body |= {"logprobs": True, "top_logprobs": ask.logprobs}
        if self.config.thinking == "off":
            body |= self.no_thinking
        if ask.rung == "prefill":
            body |= self.opened
        return self.call(f"{self.base_url}/chat/completions", body, ask, n)

    def body(self, ask: Ask, n: int, seed: int | None) -> dict[str, Any]:
        """What both routes are told: the model and how to draw."""
        body: dict[str, Any] = {"model": self.model, "max_tokens": ask.max_tokens, **self.drawing(ask)}
        if n > 1:
            body["n"] = n
        if seed is not None:
            body["seed"] = seed
        return body

    def drawing(self, ask: Ask) -> dict[str, Any]:
        """The distribution to draw from."""
        asked = {"temperature": ask.temperature, "top_p": ask.top_p}
        return {name: value for name, value in asked.items() if value is not None} | dict(self.sampling)

    def call(self, url: str, body: Mapping[str, Any], ask: Ask, n: int) -> Call:
        """The request with the config's own fields."""
        tokens = estimate_tokens([message.content for message in ask.messages]) + n * ask.max_tokens
        return Call(url, {**body, **self.config.extra_body}, tokens)

    def classify(self, status: int, payload: Any) -> Verdict | None:
        """The verdict on a reply."""
        return openai_errors.verdict(
            status, payload, self.base_url, self.model, self.config.api_key_env, refusals=self.refusals
        )


def turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """A chat as these servers take it."""
    return [{"role": turn.role, "content": turn.content} for turn in messages]
