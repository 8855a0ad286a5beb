"""Teachers behind an SGLang server: its OpenAI-shaped chat route, and its own `/generate` for the rung `raw`.

A seed counts only on a server that was started with `--enable-deterministic-inference`, and there all draws of one request
share it, so that they are one text n times. Hence `n: false` by default; on `/generate` several draws are several requests
in one call, each with a seed of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from omniopd.registry import TEACHERS
from omniopd.types import Token, Usage
from teachers.asks import Ask, Choice
from teachers.client import ApiTeacher
from teachers.formats import word
from teachers.scoring import Scores, checked, reading
from teachers.served import STATED, ServedBackend, ServedConfig
from teachers.wire import Call, Completion, HttpConfig, Malformed

TOP = 1000  # the server sets no bound; replies grow with it


class SglangConfig(ServedConfig):
    """Settings of `type: sglang`. `n: true` or `auto` draws several texts per call; see the module for when not to."""

    stated: ClassVar[frozenset[str]] = STATED | {
        "repetition_penalty",
        "input_ids",
        "text",
        "sampling_params",
        "return_logprob",
        "logprob_start_len",
        "top_logprobs_num",
        "return_text_in_logprobs",
    }
    type: Literal["sglang"] = "sglang"
    base_url: str = "http://127.0.0.1:30000/v1"
    n: bool | Literal["auto"] = False


class SglangBackend(ServedBackend):
    """Requests and replies of both routes."""

    # Alone: with `add_generation_prompt: false`, which vLLM wants, some versions leave the assistant's header out.
    opened: ClassVar[Mapping[str, Any]] = {"continue_final_message": True}

    @classmethod
    def most_top(cls, config: HttpConfig) -> int | None:
        """See `HttpBackend`."""
        return TOP

    def raw_call(self, ask: Ask, n: int, seed: int | None) -> Call:
        """A batch of n equal prompts."""
        drawing = {"max_new_tokens": ask.max_tokens, **self.drawing(ask), "skip_special_tokens": True}
        seeds = [{} if seed is None else {"sampling_seed": seed + draw} for draw in range(n)]
        body: dict[str, Any] = {
            "input_ids": [list(self.raw_ids(ask))] * n,
            "sampling_params": [drawing | own for own in seeds],
        }
        if ask.logprobs:
            body |= {"return_logprob": True, "top_logprobs_num": ask.logprobs, "return_text_in_logprobs": True}
        return self.call(f"{self.root}/generate", body, ask, n)

    def read(self, payload: Any, ask: Ask) -> Completion:
        """Read a reply of status 200.

        Raises:
            Malformed: it has another shape.
        """
        if ask.rung != "raw":
            return super().read(payload, ask)
        replies = payload if isinstance(payload, list) else [payload]
        if not replies or not all(isinstance(reply, dict) and isinstance(reply.get("text"), str) for reply in replies):
            raise Malformed("a reply without text")
        metas = [meta if isinstance(meta := reply.get("meta_info"), dict) else {} for reply in replies]
        return Completion(
            choices=tuple(_choice(reply["text"], meta, ask) for reply, meta in zip(replies, metas, strict=True)),
            usage=_usage(metas),
            request_id=str(metas[0].get("id") or ""),
        )

    def score_call(self, ids: Sequence[int], k: int) -> Call:
        """See `Scorer`."""
        body = {
            "input_ids": list(ids),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0, "top_p": 1.0, **self.sampling},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": k,
        }
        return Call(f"{self.root}/generate", body | self.config.extra_body, len(ids))

    def read_scores(self, payload: Any, ids: Sequence[int], k: int) -> Scores:
        """See `Scorer`. An entry is log-prob, id, text; with each place come the ids that were scored."""
        with reading():
            meta = payload["meta_info"]
            own = meta.get("input_token_logprobs")
            if not own:
                raise Malformed("no input_token_logprobs: the endpoint ignores return_logprob")
            if [entry[1] for entry in own] != list(ids):
                raise Malformed(f"scores of other tokens than the {len(ids)} that were sent")
            places = meta["input_top_logprobs"] if k else [None] * len(ids)
            top = [{entry[1]: float(entry[0]) for entry in place or ()} for place in places]
            scores = checked(ids, [entry[0] for entry in own], top, k)
            return replace(scores, usage=_usage([meta]) or Usage(prompt_tokens=len(ids)), request_id=word(meta, "id"))


@TEACHERS.register("sglang")
class SglangTeacher(ApiTeacher):
    """A teacher behind an SGLang server."""

    Config = SglangConfig
    Backend = SglangBackend


def _choice(text: str, meta: Mapping[str, Any], ask: Ask) -> Choice:
    said = meta.get("finish_reason")
    reason = said if isinstance(said, dict) else {}
    kind = reason.get("type")
    tokens = _tokens(meta) if ask.logprobs else ()
    return Choice(text, "stop" if kind == "stop" else "length" if kind == "length" else "error", tokens=tokens)


def _tokens(meta: Mapping[str, Any]) -> tuple[Token, ...]:
    """The written tokens: entries of log-prob, id, text. None where the server gave none (the probe says so)."""
    own = meta.get("output_token_logprobs") or []
    top = meta.get("output_top_logprobs") or [None] * len(own)
    try:
        return tuple(
            Token(str(text), float(value), tuple((str(other), float(p)) for p, _, other in places or ()))
            for (value, _, text), places in zip(own, top, strict=True)
        )
    except (TypeError, ValueError):
        raise Malformed("log-probs in another shape") from None


def _usage(metas: Sequence[Mapping[str, Any]]) -> Usage | None:
    """The prompt counts once, as with `n` on the chat route."""
    if not isinstance(metas[0].get("prompt_tokens"), int):
        return None
    return Usage(
        prompt_tokens=metas[0]["prompt_tokens"],
        completion_tokens=sum(int(meta.get("completion_tokens") or 0) for meta in metas),
        cache_read_tokens=int(metas[0].get("cached_tokens") or 0),
    )
