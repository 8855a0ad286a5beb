"""Teachers behind a vLLM server.

The rung `raw` sends token ids, rendered here: the server adds no second BOS to them and reads no control token out of a
student's text. `prefill` leaves the rendering to the server's own chat template.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from omniopd.registry import TEACHERS
from teachers.asks import Ask
from teachers.client import ApiTeacher
from teachers.errors import Refusal, refusal
from teachers.scoring import RULED_OUT, Scores, checked, reading, told
from teachers.served import REFUSALS, STATED, ServedBackend, ServedConfig
from teachers.wire import Call, HttpConfig, Malformed

FEWER = "lower how many likeliest tokens the method asks for, or start the server with a larger --max-logprobs"


class VllmConfig(ServedConfig):
    """Settings of `type: vllm`.

    `max_logprobs` is what the server was started with (`--max-logprobs`): it refuses `logprobs`, and likeliest tokens of
    given text, above it.
    """

    stated: ClassVar[frozenset[str]] = STATED | {"repetition_penalty", "prompt_logprobs"}
    type: Literal["vllm"] = "vllm"
    base_url: str = "http://127.0.0.1:8000/v1"
    max_logprobs: int = Field(default=20, ge=0)


class VllmBackend(ServedBackend):
    """vLLM's OpenAI-shaped routes, and the log-probs of given tokens (`prompt_logprobs`)."""

    opened: ClassVar[Mapping[str, Any]] = {"add_generation_prompt": False, "continue_final_message": True}

    refusals: ClassVar[tuple[Refusal, ...]] = (
        refusal("prompt_logprobs", r"prompt[_ ]logprobs", FEWER),
        *REFUSALS,
    )

    @classmethod
    def most_top(cls, config: HttpConfig) -> int | None:
        """See `HttpBackend`."""
        assert isinstance(config, VllmConfig)
        return config.max_logprobs

    def raw_prompt(self, ask: Ask) -> list[int]:
        """Token ids."""
        return list(self.raw_ids(ask))

    def score_call(self, ids: Sequence[int], k: int) -> Call:
        """See `Scorer`."""
        body = {"model": self.model, "prompt": list(ids), "max_tokens": 1, "temperature": 1.0, "top_p": 1.0}
        body |= {**self.sampling, "prompt_logprobs": k, **self.config.extra_body}
        return Call(f"{self.base_url}/completions", body, len(ids) + 1)

    def read_scores(self, payload: Any, ids: Sequence[int], k: int) -> Scores:
        """See `Scorer`. A place maps ids, as text, to k entries, or k + 1 where the given one is none of the likeliest."""
        with reading():
            places = payload["choices"][0].get("prompt_logprobs")
            if not places:
                raise Malformed("no prompt_logprobs: the endpoint ignores the field")
            said = [{int(one): value_of(entry) for one, entry in (place or {}).items()} for place in places]
            scores = checked(ids, [place.get(own) for place, own in zip(said, ids, strict=False)], said, k)
        return told(scores, payload, ids)


def value_of(entry: Mapping[str, Any]) -> Any:
    """The log-prob of an entry; the server says -9999 where the model says -inf."""
    value = entry["logprob"]
    return -math.inf if isinstance(value, int | float) and value <= RULED_OUT else value


@TEACHERS.register("vllm")
class VllmTeacher(ApiTeacher):
    """A teacher behind a vLLM server."""

    Config = VllmConfig
    Backend = VllmBackend
