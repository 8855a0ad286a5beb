"""Teachers behind a vLLM server.

The rung `raw` sends token ids, rendered here: the server adds no second BOS to them and reads no control token out of a
student's text. `prefill` leaves the rendering to the server's own chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from omniopd.registry import TEACHERS
from teachers.asks import Ask
from teachers.client import ApiTeacher
from teachers.scoring import Scores, checked, reading
from teachers.served import STATED, ServedBackend, ServedConfig
from teachers.wire import Call, Malformed


class VllmConfig(ServedConfig):
    """Settings of `type: vllm`. `logprobs` above the server's `--max-logprobs` (20) is refused."""

    stated: ClassVar[frozenset[str]] = STATED | {"repetition_penalty", "prompt_logprobs"}
    type: Literal["vllm"] = "vllm"
    base_url: str = "http://127.0.0.1:8000/v1"


class VllmBackend(ServedBackend):
    """vLLM's OpenAI-shaped routes, and the log-probs of given tokens (`prompt_logprobs`)."""

    opened: ClassVar[Mapping[str, Any]] = {"add_generation_prompt": False, "continue_final_message": True}

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
            said = [{int(one): entry["logprob"] for one, entry in (place or {}).items()} for place in places]
            return checked(ids, [place.get(own) for place, own in zip(said, ids, strict=False)], said, k)


@TEACHERS.register("vllm")
class VllmTeacher(ApiTeacher):
    """A teacher behind a vLLM server."""

    Config = VllmConfig
    Backend = VllmBackend
