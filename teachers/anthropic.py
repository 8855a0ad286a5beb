"""Teachers that speak Anthropic's Messages format: `type: anthropic`.

One text per call, no seeds, no log-probs. Models up to 4.5 go on from an open assistant turn; later ones refuse it and get
`instruct`. `top_p` is not sent unless it is set: newer models refuse it beside a temperature, and the newest refuse both
(`temperature: null`).

The prompt cache is opt-in there, and finds a prefix only where a block ended: with `cache: true` long texts are cut into
blocks, at places that stay where they are when the text grows. Anthropic is taken to join blocks as they are. vLLM puts a
line break between them and caches without being asked: leave it off there.

Source: https://platform.claude.com/docs/en/api/messages
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from omniopd.registry import TEACHERS
from omniopd.types import Message, Usage
from teachers import errors
from teachers.asks import Ask, Choice
from teachers.backend import HttpBackend, estimate_tokens
from teachers.client import ApiTeacher
from teachers.errors import OPEN_TURN, Door, Refusal, refusal
from teachers.formats import count, not_stated, word
from teachers.wire import Call, Completion, HttpConfig, Malformed, Verdict

API_VERSION = "2023-06-01"
PIECE = 2000  # characters of a block: the API looks back over 20 blocks for one that it has seen
_BORDER = re.compile(r"(?<=\S)(?=\s)")  # before white space: no token spans it
_MARK = {"cache_control": {"type": "ephemeral"}}
_STATED = {"model", "messages", "system", "max_tokens", "temperature", "top_p", "stream"}
_FINISH: dict[str, Literal["stop", "length", "refusal"]] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "refusal": "refusal",
}
# Where the type says more than the status: an overload may come under any, 200 included.
_STATUS = {"overloaded_error": 529, "rate_limit_error": 429}
_REFUSALS = (
    Refusal("prefill", OPEN_TURN, "set teacher.continuation: instruct"),
    refusal("cache", r"cache_control", "set teacher.cache: false"),
    refusal("top_p", r"\btop_p\b", "set teacher.top_p: null, or teacher.temperature: null where only one is taken"),
    refusal("temperature", r"\btemperature\b", "set teacher.temperature to null or to what the model takes"),
    refusal("thinking", r"\bthinking\b", "set teacher.thinking: default, with room in teacher.thinking_tokens"),
)


class AnthropicConfig(HttpConfig):
    """Settings of `type: anthropic`. `cache` marks prompts for the provider's cache, where writing costs extra."""

    type: Literal["anthropic"] = "anthropic"
    base_url: str = "https://api.anthropic.com/v1"
    api_key_env: str | None = "ANTHROPIC_API_KEY"
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: Literal[False] = False
    seed: Literal[False] = False
    cache: bool = False

    @field_validator("logprobs")
    @classmethod
    def _none_given(cls, logprobs: int) -> int:
        if logprobs:
            raise ValueError("must be 0: the Messages API gives no log-probs")
        return logprobs

    @field_validator("extra_body")
    @classmethod
    def _nothing_stated(cls, extra: dict[str, Any]) -> dict[str, Any]:
        return not_stated(extra, _STATED)


class AnthropicBackend(HttpBackend):
    """Requests and replies in the Messages format."""

    config: AnthropicConfig
    key_header = "x-api-key"
    key_scheme = ""

    def record(self) -> dict[str, Any]:
        """See `HttpBackend.record`."""
        return super().record() | {"cache": self.config.cache}

    def request(self, ask: Ask, n: int, seed: int | None) -> Call:
        """The HTTP request for one draw: there is no n and no seed."""
        config = self.config
        system = "\n\n".join(turn.content for turn in ask.messages if turn.role == "system")
        turns = [turn for turn in ask.messages if turn.role != "system"]
        body: dict[str, Any] = {
            "model": config.model,
            "max_tokens": ask.max_tokens,
            "messages": _marked(turns) if config.cache else [_turn(turn, turn.content) for turn in turns],
        }
        if system:
            body["system"] = [_block(system) | _MARK] if config.cache else system
        sampling = {"temperature": ask.temperature, "top_p": ask.top_p}
        body |= {name: value for name, value in sampling.items() if value is not None}
        if config.thinking == "off":
            body["thinking"] = {"type": "disabled"}
        tokens = estimate_tokens([message.content for message in ask.messages]) + ask.max_tokens
        return Call(f"{config.base_url}/messages", body | config.extra_body, tokens, {"anthropic-version": API_VERSION})

    def read(self, payload: Any, ask: Ask) -> Completion:
        """Read a reply of status 200.

        Raises:
            Malformed: not in the shape of a message.
        """
        blocks = payload.get("content") if isinstance(payload, dict) else None
        if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
            raise Malformed("no content")
        texts = [block for block in blocks if block.get("type") == "text"]
        if not all(isinstance(block.get("text"), str) for block in texts):
            raise Malformed("a text block without text")
        usage = read_usage(payload.get("usage"))
        thought = any(block.get("type") in ("thinking", "redacted_thinking") for block in blocks)
        return Completion(
            choices=(
                Choice(
                    "".join(block["text"] for block in texts),
                    _FINISH.get(str(payload.get("stop_reason")), "error"),
                    thought or (usage is not None and usage.reasoning_tokens > 0),
                ),
            ),
            model=word(payload, "model"),
            usage=usage,
            request_id=word(payload, "id"),
        )

    def classify(self, status: int, payload: Any) -> Verdict | None:
        """The verdict on a reply, from the table in `errors`."""
        if status == 200 and not (isinstance(payload, dict) and payload.get("type") == "error"):
            return None
        said = errors.read(payload)
        typed = [known for kind, known in _STATUS.items() if kind in said.codes]
        status = typed[0] if typed else 500 if status == 200 else status
        return errors.verdict(status, said, Door(self.base_url, self.config.model, self.config.api_key_env), _REFUSALS)


@TEACHERS.register("anthropic")
class AnthropicTeacher(ApiTeacher):
    """A teacher behind the Messages API: text alone."""

    Config = AnthropicConfig
    Backend = AnthropicBackend


def read_usage(usage: Any) -> Usage | None:
    """The token counts of a message, where `input_tokens` is only what no cache served or took up; None if absent."""
    if not isinstance(usage, dict) or not isinstance(usage.get("input_tokens"), int):
        return None
    read, written = count(usage, "cache_read_input_tokens"), count(usage, "cache_creation_input_tokens")
    return Usage(
        prompt_tokens=count(usage, "input_tokens") + read + written,
        completion_tokens=count(usage, "output_tokens"),
        cache_read_tokens=read,
        cache_write_tokens=written,
        reasoning_tokens=count(usage.get("output_tokens_details"), "thinking_tokens"),
    )


def pieces(text: str) -> list[str]:
    """A text in blocks of `PIECE` characters or a little more. All but the last stay the same when the text grows."""
    borders = [0]
    while (border := _BORDER.search(text, borders[-1] + PIECE)) and text[border.start() :].strip():
        borders.append(border.start())
    return [text[start:end] for start, end in zip(borders, [*borders[1:], len(text)], strict=True)]


def _marked(turns: list[Message]) -> list[dict[str, Any]]:
    """The turns with marks for the cache: on the turn before the last, which all chunks of a rollout share; on the last
    whole piece, which a longer prefix has too; and at the end, for further draws from the same prefix. With the system
    text's that makes four, as many as a request may have."""
    blocks = [[_block(turn.content)] for turn in turns[:-1]] + [[_block(piece) for piece in pieces(turns[-1].content)]]
    for block in [*(before[-1] for before in blocks[-2:-1]), *blocks[-1][-2:]]:
        block |= _MARK
    return [_turn(turn, content) for turn, content in zip(turns, blocks, strict=True)]


def _turn(turn: Message, content: Any) -> dict[str, Any]:
    return {"role": turn.role, "content": content}


def _block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
