"""Teachers behind llama.cpp: its own `llama-server`, or the Python server of llama-cpp-python.

`llama-server` takes token ids on the completion route, and goes on from a last assistant message by itself, so the rung
`prefill` needs nothing more; its reply opens with that message. llama-cpp-python takes text only, and closes every turn: it
has no `prefill`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from omniopd.registry import TEACHERS
from omniopd.types import Message
from teachers import errors
from teachers.asks import Ask
from teachers.client import ApiTeacher
from teachers.errors import Refusal, refusal
from teachers.ladder import Rung
from teachers.openai import chat_tokens
from teachers.served import STATED, ServedBackend, ServedConfig, turns
from teachers.wire import Call, Completion, Malformed, Verdict

_REFUSED = re.compile(r"^\d+ validation errors?\b|logits_all=False")


class LlamacppConfig(ServedConfig):
    """Settings of `type: llamacpp`.

    `server` is `native` (`llama-server`) or `python` (llama-cpp-python's). `cache_prompt` lets the native one keep the
    prompt that came before: nested prefixes are much cheaper, but log-probs and draws may differ a little from those of a
    fresh prompt. `n: true` draws several texts per call, as many as the native server has slots (`--parallel`).
    """

    stated: ClassVar[frozenset[str]] = STATED | {"repeat_penalty", "samplers", "cache_prompt", "n_predict", "n_probs"}
    type: Literal["llamacpp"] = "llamacpp"
    base_url: str = "http://127.0.0.1:8080/v1"
    n: bool | Literal["auto"] = False
    server: Literal["native", "python"] = "native"
    cache_prompt: bool = True


class LlamacppBackend(ServedBackend):
    """Requests and replies of both servers."""

    config: LlamacppConfig
    refusals: ClassVar[tuple[Refusal, ...]] = (
        refusal("server", r"validation error.*'prompt'", "set teacher.server: python"),
        *ServedBackend.refusals,
    )
    sampling: ClassVar[Mapping[str, Any]] = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
    no_thinking: ClassVar[Mapping[str, Any]] = {"chat_template_kwargs": {"enable_thinking": False}}

    @property
    def repeats_prefix(self) -> bool:  # type: ignore[override]
        """The native server says it again; versions of 2025 do not."""
        return self.config.server == "native"

    @property
    def ladder(self) -> tuple[Rung, ...]:  # type: ignore[override]
        """The rungs that the server has."""
        return ("raw", "prefill", "instruct") if self.config.server == "native" else ("raw", "instruct")

    def record(self) -> dict[str, Any]:
        """See `HttpBackend.record`."""
        return super().record() | {"server": self.config.server, "cache_prompt": self.config.cache_prompt}

    def drawing(self, ask: Ask) -> dict[str, Any]:
        """The distribution to draw from; the native server is told which samplers to run, so that no other one does."""
        if self.config.server == "python":
            return super().drawing(ask)
        return super().drawing(ask) | {"samplers": ["temperature", "top_p"], "cache_prompt": self.config.cache_prompt}

    def raw_prompt(self, ask: Ask) -> Any:
        """Token ids where the server takes them."""
        return list(self.raw_ids(ask)) if self.config.server == "native" else self.raw_text(ask)

    def read(self, payload: Any, ask: Ask) -> Completion:
        """Read a reply of status 200.

        Raises:
            Malformed: it has another shape.
        """
        completion = super().read(payload, ask)
        if len(completion.choices) > 1:  # the native server counts the first text only
            completion = replace(completion, usage=None)
        if ask.rung != "raw" or self.config.server == "python":
            return completion
        # On the completion route too, the native server gives log-probs in the chat route's shape.
        tokens = [chat_tokens(choice.get("logprobs")) if ask.logprobs else () for choice in payload["choices"]]
        choices = zip(completion.choices, tokens, strict=True)
        return replace(completion, choices=tuple(replace(choice, tokens=own) for choice, own in choices))

    def classify(self, status: int, payload: Any) -> Verdict | None:
        """The verdict on a reply."""
        if status == 500 and _REFUSED.search(errors.read(payload).message):
            status = 400  # llama-cpp-python's refusals: they won't do at the next try either
        return super().classify(status, payload)

    def shown_call(self, messages: Sequence[Message]) -> Call | None:
        """The native server shows what it makes of a chat."""
        if self.config.server == "python":
            return None
        return Call(f"{self.root}/apply-template", {"messages": turns(messages)})

    def read_shown(self, payload: Any) -> str:
        """Read it.

        Raises:
            Malformed: there is no prompt.
        """
        prompt = payload.get("prompt") if isinstance(payload, dict) else None
        if not isinstance(prompt, str):
            raise Malformed("no prompt")
        return prompt


@TEACHERS.register("llamacpp")
class LlamacppTeacher(ApiTeacher):
    """A teacher behind llama.cpp."""

    Config = LlamacppConfig
    Backend = LlamacppBackend
