"""Teachers behind an Ollama server, by its native routes.

`/api/chat` goes on from a last assistant message where the model's renderer leaves that turn open; whether it does, only a
look can tell (`continuation: auto`). The rung `raw` sends text, rendered here, past all templates (`/api/generate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from omniopd.registry import TEACHERS
from omniopd.types import Usage
from teachers.asks import Ask, Choice
from teachers.client import ApiTeacher
from teachers.openai import chat_tokens
from teachers.served import STATED, ServedBackend, ServedConfig, turns
from teachers.wire import Call, Completion, Malformed, Verdict

_FINISH: dict[Any, Literal["stop", "length"]] = {"stop": "stop", "length": "length", "limit": "length"}


class OllamaConfig(ServedConfig):
    """Settings of `type: ollama`. `num_ctx` is the context that the model is loaded with, in tokens.

    Longer prompts are refused and counted (`context_overflow`). Versions before 0.12.5 cut them off without a word: choose
    `num_ctx` large enough there. A server loads the model anew for each `num_ctx` that it is asked for.
    """

    stated: ClassVar[frozenset[str]] = STATED | {"options", "raw", "system", "template", "think", "truncate", "shift"}
    under: ClassVar[str] = ""
    type: Literal["ollama"] = "ollama"
    base_url: str = "http://127.0.0.1:11434"
    n: bool | Literal["auto"] = False
    num_ctx: int = Field(default=8192, ge=256)


class OllamaBackend(ServedBackend):
    """Requests and replies in Ollama's own format. A call draws one text."""

    config: OllamaConfig
    sampling: ClassVar[Mapping[str, Any]] = {
        "top_k": 0,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }

    def record(self) -> dict[str, Any]:
        """See `HttpBackend.record`."""
        return super().record() | {"num_ctx": self.config.num_ctx}

    def raw_call(self, ask: Ask, n: int, seed: int | None) -> Call:
        """Text past the model's template. A server that thinks this may be thought would take it out of the text."""
        body = self.body(ask, n, seed) | {"prompt": self.raw_text(ask), "raw": True, "think": False}
        return self.call(f"{self.root}/api/generate", body, ask, 1)

    def chat_call(self, ask: Ask, n: int, seed: int | None) -> Call:
        """Messages; a last one of the assistant is the open turn."""
        body = self.body(ask, n, seed) | {"messages": turns(ask.messages)}
        if self.config.thinking == "off":
            body["think"] = False
        return self.call(f"{self.root}/api/chat", body, ask, 1)

    def body(self, ask: Ask, n: int, seed: int | None) -> dict[str, Any]:
        """What both routes are told. Neither may cut a long prompt, nor drop its beginning while it writes."""
        options = self.drawing(ask) | {"num_predict": ask.max_tokens, "num_ctx": self.config.num_ctx}
        if seed is not None:
            options["seed"] = seed
        body: dict[str, Any] = {
            "model": self.model,
            "stream": False,
            "truncate": False,
            "shift": False,
            "options": options,
        }
        if ask.logprobs:
            body |= {"logprobs": True, "top_logprobs": ask.logprobs}
        return body

    def read(self, payload: Any, ask: Ask) -> Completion:
        """Read a reply of status 200.

        Raises:
            Malformed: there is no text, or log-probs of another shape.
        """
        said = payload if isinstance(payload, dict) else {}
        inner = said.get("message")
        message = said if ask.rung == "raw" else inner if isinstance(inner, dict) else {}
        text = message.get("response" if ask.rung == "raw" else "content")
        if not isinstance(text, str):
            raise Malformed("a reply without text")
        choice = Choice(
            text,
            _FINISH.get(said.get("done_reason"), "error"),
            hidden_reasoning=bool(message.get("thinking")),
            tokens=chat_tokens({"content": said.get("logprobs")}) if ask.logprobs else (),
        )
        return Completion((choice,), str(said.get("model") or ""), _usage(said))

    def classify(self, status: int, payload: Any) -> Verdict | None:
        """The verdict on a reply; 503 is Ollama's word for too many calls at once."""
        return super().classify(429 if status == 503 else status, payload)


@TEACHERS.register("ollama")
class OllamaTeacher(ApiTeacher):
    """A teacher behind an Ollama server."""

    Config = OllamaConfig
    Backend = OllamaBackend


def _usage(said: dict[str, Any]) -> Usage | None:
    """A count of zero is left out of the reply."""
    prompt, written = said.get("prompt_eval_count", 0), said.get("eval_count", 0)
    return Usage(prompt_tokens=prompt, completion_tokens=written) if isinstance(prompt, int) and written else None
