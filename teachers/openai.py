"""Teachers that speak OpenAI's chat-completions format: OpenAI itself, and every server and provider that copies it.

`preset` names a provider (see `presets.py`) and so the defaults of the other settings; without one, a `base_url` of one's
own is `generic`. The rung `raw` uses the completion route beside the chat route, where the provider has one.

A server may fill sampling fields that a request leaves out from the model's own defaults (vLLM does, top-k included):
every request states temperature, top-p and the token limit. For vLLM and SGLang use their own types.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from omniopd.registry import TEACHERS
from omniopd.types import Token
from teachers.asks import Ask, Choice
from teachers.backend import HttpBackend, estimate_tokens
from teachers.client import ApiTeacher
from teachers.formats import not_stated, read_usage, word
from teachers.ladder import Rung
from teachers.openai_errors import verdict
from teachers.presets import PRESETS, PrefillStyle
from teachers.scoring import ECHO_TOP, EchoScorer, Scorer
from teachers.wire import Call, Completion, HttpConfig, Malformed, Verdict

_STATED = {"model", "messages", "prompt", "temperature", "top_p", "n", "seed", "max_tokens", "max_completion_tokens"}
_STATED |= {"add_generation_prompt", "continue_final_message", "stream", "logprobs", "top_logprobs"}
_FINISH: dict[str, Literal["stop", "length", "filtered"]] = {
    "stop": "stop",
    "eos": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "max_tokens": "length",
    "content_filter": "filtered",
}


class OpenAIConfig(HttpConfig):
    """Settings of `type: openai`, and what they are by default under a preset.

    `max_tokens_field` is for models that refuse the usual one; `seed_field` for providers that call it otherwise.
    """

    type: Literal["openai"] = "openai"
    preset: Literal["generic", "openai", "openrouter", "together", "fireworks", "deepseek", "mistral", "kimi"] = (
        "openai"
    )
    base_url: str = ""
    api_key_env: str | None = None
    prefill_style: PrefillStyle = "none"
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    seed_field: str = Field(default="seed", min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _by_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        name = data.get("preset") or ("generic" if data.get("base_url") else "openai")
        preset = PRESETS.get(name) if isinstance(name, str) else None
        if preset is None:  # the field's own check says which names there are
            return data
        defaults = ("base_url", "api_key_env", "prefill_style", "max_tokens_field", "seed_field", "n", "seed")
        return {"preset": name, **{field: getattr(preset, field) for field in defaults}, **data}

    @field_validator("extra_body")
    @classmethod
    def _nothing_stated(cls, extra: dict[str, Any]) -> dict[str, Any]:
        return not_stated(extra, _STATED)


class OpenAIBackend(HttpBackend):
    """Requests and replies in OpenAI's format."""

    config: OpenAIConfig
    version = 2

    @property
    def ladder(self) -> tuple[Rung, ...]:  # type: ignore[override]
        """The rungs that the preset has."""
        raw: tuple[Rung, ...] = ("raw",) if PRESETS[self.config.preset].completions else ()
        prefill: tuple[Rung, ...] = ("prefill",) if self.config.prefill_style != "none" else ()
        return (*raw, *prefill, "instruct")

    @classmethod
    def most_top(cls, config: HttpConfig) -> int | None:
        """Presets with a completion route may echo; whether they do, the probe says."""
        assert isinstance(config, OpenAIConfig)
        return ECHO_TOP if PRESETS[config.preset].completions else None

    @property
    def scorer(self) -> Scorer | None:
        """See `HttpBackend`; text that is echoed is named by ids only with the tokenizer at hand."""
        return EchoScorer(self.config, self.chat) if self.chat and "raw" in self.rungs else None

    @property
    def repeats_prefix(self) -> bool:
        """Whether a reply may say the prefix again, as Mistral's; elsewhere one that does so has started over."""
        return self.config.prefill_style == "prefix"

    def record(self) -> dict[str, Any]:
        """See `HttpBackend.record`."""
        return super().record() | {"preset": self.config.preset, "prefill_style": self.config.prefill_style}

    def request(self, ask: Ask, n: int, seed: int | None) -> Call:
        """The HTTP request for n draws."""
        config = self.config
        body: dict[str, Any] = {"model": config.model, config.max_tokens_field: ask.max_tokens}
        body |= {
            name: value for name, value in (("temperature", ask.temperature), ("top_p", ask.top_p)) if value is not None
        }
        if n > 1:
            body["n"] = n
        if seed is not None:
            body[config.seed_field] = seed
        tokens = estimate_tokens([message.content for message in ask.messages]) + n * ask.max_tokens
        if ask.rung == "raw":
            body |= {"prompt": self.raw_prompt(ask)} | ({"logprobs": ask.logprobs} if ask.logprobs else {})
            return Call(f"{config.base_url}/completions", body | config.extra_body, tokens)
        messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.content} for turn in ask.messages]
        body["messages"] = messages
        if ask.logprobs:
            body |= {"logprobs": True, "top_logprobs": ask.logprobs}
        if config.thinking == "off":
            body |= PRESETS[config.preset].no_thinking
        if ask.rung == "prefill":
            if config.prefill_style == "vllm":
                body |= {"add_generation_prompt": False, "continue_final_message": True}
            elif config.prefill_style in ("prefix", "partial"):
                messages[-1][config.prefill_style] = True
        return Call(f"{config.base_url}/chat/completions", body | config.extra_body, tokens)

    def raw_prompt(self, ask: Ask) -> Any:
        """What the completion route gets: text; a server that takes token ids overrides this."""
        return self.raw_text(ask)

    def read(self, payload: Any, ask: Ask) -> Completion:
        """Read a reply of status 200.

        Raises:
            Malformed: no choices, or not in OpenAI's shape.
        """
        choices = payload.get("choices") if isinstance(payload, dict) else None
        if not isinstance(choices, list) or not choices:
            raise Malformed("no choices")
        usage = read_usage(payload.get("usage"))
        thought = usage is not None and usage.reasoning_tokens > 0
        said_again = ask.rung == "prefill" and self.repeats_prefix
        return Completion(
            choices=tuple(_choice(choice, thought, ask, said_again) for choice in choices),
            model=word(payload, "model"),
            usage=usage,
            request_id=word(payload, "id"),
        )

    def classify(self, status: int, payload: Any) -> Verdict | None:
        """The verdict on a reply, from the table in `openai_errors`."""
        return verdict(status, payload, self.base_url, self.config.model, self.config.api_key_env)


@TEACHERS.register("openai")
class OpenAITeacher(ApiTeacher):
    """A teacher behind an OpenAI-shaped chat API: text, and log-probs of what it writes where the provider gives them."""

    Config = OpenAIConfig
    Backend = OpenAIBackend


def _choice(choice: Any, thought: bool, ask: Ask, said_again: bool) -> Choice:
    if not isinstance(choice, dict):
        raise Malformed("a choice that is no object")
    # No stated end is an end by accident.
    ended: Literal["stop", "length", "filtered", "error"] = _FINISH.get(word(choice, "finish_reason"), "error")
    if ask.rung == "raw":
        text = choice.get("text")
        if not isinstance(text, str):
            raise Malformed("a choice without text")
        return Choice(text, ended, thought, _completion_tokens(choice.get("logprobs")) if ask.logprobs else ())
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Malformed("a choice without a message")
    text = _text(message.get("content"))
    if said_again and ask.prefix and text.startswith(ask.prefix):
        text = text[len(ask.prefix) :]
    hidden = thought or any(message.get(name) for name in ("reasoning_content", "reasoning"))
    if message.get("refusal"):
        return Choice(text, "refusal", hidden)
    return Choice(text, ended, hidden, chat_tokens(choice.get("logprobs")) if ask.logprobs else ())


def chat_tokens(logprobs: Any) -> tuple[Token, ...]:
    """Tokens with log-probs as the chat route gives them; none where it gives none (the probe says so)."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    try:
        return tuple(
            Token(
                str(token["token"]),
                float(token["logprob"]),
                tuple((str(other["token"]), float(other["logprob"])) for other in token.get("top_logprobs") or ()),
            )
            for token in content or ()
        )
    except (KeyError, TypeError, ValueError):
        raise Malformed("log-probs in another shape") from None


def _completion_tokens(logprobs: Any) -> tuple[Token, ...]:
    """The same as the completion route gives them: parallel lists."""
    if not isinstance(logprobs, dict):
        return ()
    try:
        texts, own = logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []
        top = logprobs.get("top_logprobs") or [{}] * len(texts)
        return tuple(
            Token(str(text), float(p), tuple((str(t), float(q)) for t, q in (others or {}).items()))
            for text, p, others in zip(texts, own, top, strict=True)
        )
    except (TypeError, ValueError, AttributeError):
        raise Malformed("log-probs in another shape") from None


def _text(content: Any) -> str:
    """Visible text: a string, or (Mistral) a list of parts of which those of type text count."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        parts = [part.get("text") for part in content if part.get("type") == "text"]
        return "".join(part for part in parts if isinstance(part, str))
    raise Malformed("content that is no text")
