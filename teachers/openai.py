"""Teachers that speak OpenAI's chat-completions format: OpenAI itself, and every server and provider that copies it.

`prefill_style` is how an open assistant turn is marked: `vllm` (vLLM, SGLang, our own server) by
`add_generation_prompt: false` with `continue_final_message: true`, `prefix` (DeepSeek's beta route, Mistral) and
`partial` (Kimi) by a flag on the last message, `plain` (llama.cpp) by nothing.

A server may fill sampling fields that a request leaves out from the model's own defaults (vLLM does, top-k included):
every request states temperature, top-p and the token limit; for vLLM add `extra_body: {top_k: -1}`.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
from pydantic import Field, field_validator

from omniopd.registry import TEACHERS
from omniopd.store import Store
from teachers.asks import Ask, Choice, digest
from teachers.client import ApiTeacher
from teachers.openai_errors import verdict
from teachers.transport import Sleep, is_loopback
from teachers.wire import ApiConfig, Completion, KeyAuth, Malformed, Verdict, key_from_env

ADAPTER_VERSION = 1

_STATED = {"model", "messages", "temperature", "top_p", "n", "seed", "max_tokens", "max_completion_tokens", "stream"}
_STATED |= {"add_generation_prompt", "continue_final_message"}
_FINISH: dict[str, Literal["stop", "length", "filtered"]] = {
    "stop": "stop",
    "eos": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    "content_filter": "filtered",
}


class OpenAIConfig(ApiConfig):
    """Settings of `type: openai`. The key is read from the environment variable that `api_key_env` names; null: none.

    `fingerprint` names the weights where the address does not (a server that moves, two servers behind one address):
    it stands in for host and path in the teacher's fingerprint, which otherwise leave out the port of this machine's
    own servers. `seed: false` and `max_tokens_field` are for models that refuse the usual fields. `extra_body` is sent
    with every request, and kept in the store: no secrets in it.
    """

    type: Literal["openai"] = "openai"
    base_url: str = "https://api.openai.com/v1"
    model: str = Field(min_length=1)
    api_key_env: str | None = "OPENAI_API_KEY"
    prefill_style: Literal["vllm", "prefix", "partial", "plain"] = "vllm"
    seed: bool = True
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra_body: dict[str, Any] = Field(default_factory=dict)
    fingerprint: str | None = None

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an http or https address, such as http://127.0.0.1:8000/v1")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError("must hold no user, password or query: keys come from the variable in api_key_env")
        parts.port  # noqa: B018 (raises ValueError where the port is no number)
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise ValueError("must be the NAME (in capitals) of an environment variable that holds the key, not a key")
        return name

    @field_validator("extra_body")
    @classmethod
    def _nothing_stated(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(_STATED & extra.keys()):
            raise ValueError(f"must not hold {', '.join(taken)}: every request states it from its own setting")
        return extra


class OpenAIBackend:
    """Requests and replies in OpenAI's format."""

    def __init__(self, config: OpenAIConfig) -> None:
        """Read the key from its environment variable.

        Raises:
            ConfigError: the variable is not set.
        """
        self._config = config
        self.url = f"{config.base_url}/chat/completions"
        self.auth: KeyAuth | None = key_from_env(config.api_key_env)
        self.fingerprint = f"openai/{config.model}@{self._place()}#{digest(self.record())[:16]}"

    def record(self) -> dict[str, Any]:
        """What decides an answer: adapter, address, model, rung as configured, system text, sampling, extra fields."""
        config = self._config
        return {
            "type": config.type,
            "adapter": ADAPTER_VERSION,
            "place": self._place(),
            "model": config.model,
            "continuation": config.continuation,
            "prefill_style": config.prefill_style,
            "system": config.system,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "extra_body": config.extra_body,
        }

    def body(self, ask: Ask, n: int, seed: int) -> dict[str, Any]:
        """The JSON of a request."""
        config = self._config
        messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in ask.messages]
        body: dict[str, Any] = {
            "model": config.model,
            "messages": messages,
            "temperature": ask.temperature,
            "top_p": ask.top_p,
            config.max_tokens_field: ask.max_tokens,
        }
        if n > 1:
            body["n"] = n
        if config.seed:
            body["seed"] = seed
        if ask.rung == "prefill":
            if config.prefill_style == "vllm":
                body |= {"add_generation_prompt": False, "continue_final_message": True}
            elif config.prefill_style != "plain":
                messages[-1][config.prefill_style] = True
        return body | config.extra_body

    def parse(self, payload: Any) -> Completion:
        """Read a reply of status 200.

        Raises:
            Malformed: no choices, or not in OpenAI's shape.
        """
        choices = payload.get("choices") if isinstance(payload, dict) else None
        if not isinstance(choices, list) or not choices:
            raise Malformed("no choices")
        usage = payload.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        details = usage.get("completion_tokens_details")
        thought = _count(details, "reasoning_tokens") > 0
        model = payload.get("model")
        return Completion(
            choices=tuple(_choice(choice, thought) for choice in choices),
            model=model if isinstance(model, str) else "",
            prompt_tokens=_count(usage, "prompt_tokens"),
            completion_tokens=_count(usage, "completion_tokens"),
        )

    def classify(self, status: int, payload: Any) -> Verdict | None:
        """The verdict on a reply, from the table in `openai_errors`."""
        return verdict(status, payload, self.url, self._config.model, self._config.api_key_env)

    def scrub(self, text: str) -> str:
        """The text without the key."""
        return self.auth.scrub(text) if self.auth else text

    def _place(self) -> str:
        if self._config.fingerprint is not None:
            return self._config.fingerprint
        parts = urlsplit(self._config.base_url)
        if is_loopback(parts.hostname):  # a local server takes another port with each run
            return f"localhost{parts.path}"
        return f"{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"


@TEACHERS.register("openai")
class OpenAITeacher(ApiTeacher):
    """A teacher behind an OpenAI-shaped chat API: text only."""

    Config = OpenAIConfig

    def __init__(
        self,
        config: OpenAIConfig,
        store: Store,
        *,
        http: httpx.AsyncBaseTransport | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """Ready to gather; `http` and `sleep` are for tests.

        Raises:
            ConfigError: the environment variable of the key is not set.
        """
        super().__init__(OpenAIBackend(config), config, store, http=http, sleep=sleep)


def _choice(choice: Any, thought: bool) -> Choice:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise Malformed("a choice without a message")
    text = _text(message.get("content"))
    hidden = thought or any(message.get(name) for name in ("reasoning_content", "reasoning"))
    if message.get("refusal"):
        return Choice(text, "refusal", hidden)
    finish = choice.get("finish_reason")
    # No stated end is an end by accident.
    return Choice(text, _FINISH.get(finish, "error") if isinstance(finish, str) else "error", hidden)


def _text(content: Any) -> str:
    """Visible text: a string, or (Mistral) a list of parts of which those of type text count."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        parts = [part.get("text") for part in content if part.get("type") == "text"]
        return "".join(part for part in parts if isinstance(part, str))
    raise Malformed("content that is no text")


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value > 0 else 0
