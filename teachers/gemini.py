"""Teachers that speak Google's generateContent format: `type: gemini`.

Models up to 3.5 go on from an open model turn; later ones refuse it and get `instruct`. Few models give log-probs, and
several texts per call (at most 8) only older ones. Thinking is on by default and is paid out of the token limit:
`thinking: off` sends a budget of 0, and models that know only levels take them from `thinking_config`, such as
`{thinkingLevel: minimal}`.

Source: https://ai.google.dev/api/generate-content
"""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import quote

from pydantic import Field, field_validator

from omniopd.registry import TEACHERS
from omniopd.types import Token, Usage
from teachers import errors
from teachers.asks import Ask, Choice
from teachers.backend import HttpBackend, estimate_tokens
from teachers.client import ApiTeacher
from teachers.errors import OPEN_TURN, Door, Refusal, refusal
from teachers.formats import count, not_stated, word
from teachers.wire import Call, Completion, HttpConfig, Malformed, Verdict

MOST_CANDIDATES = 8
SEEDS = 2**31  # the API's seeds have 31 bits
_STATED = {"contents", "systemInstruction", "generationConfig"}
_STATED_CONFIG = {"maxOutputTokens", "temperature", "topP", "candidateCount", "seed", "responseLogprobs", "logprobs"}
_STATED_CONFIG |= {"thinkingConfig"}
_FINISH: dict[str, Literal["stop", "length", "filtered"]] = {"STOP": "stop", "MAX_TOKENS": "length"}
_FINISH |= dict.fromkeys(("SAFETY", "RECITATION", "PROHIBITED_CONTENT", "BLOCKLIST", "SPII", "LANGUAGE"), "filtered")
_DAILY = re.compile(r"per_?day", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)s")
_REFUSALS = (
    Refusal("prefill", OPEN_TURN, "set teacher.continuation: instruct"),
    refusal("n", r"candidate_?count|multiple candidates", "set teacher.n: false"),
    refusal("logprobs", r"logprobs", "set teacher.logprobs to what the model gives, or to 0"),
    refusal(
        "thinking",
        r"thinking",
        "set teacher.thinking_config to what the model takes (null: its default), with room in teacher.thinking_tokens",
    ),
    refusal("system", r"(?:system|developer)[ _]?instruction", "remove teacher.system, or pick another model"),
    refusal("seed", r"\bseed\b", "set teacher.seed: false"),
    refusal("temperature", r"temperature", "set teacher.temperature to null or to what the model takes"),
    refusal("top_p", r"\btop_?p\b", "set teacher.top_p to null or to what the model takes"),
)


class GeminiConfig(HttpConfig):
    """Settings of `type: gemini`. `thinking_config` is sent as it is; `extra_body` may add to `generationConfig`."""

    type: Literal["gemini"] = "gemini"
    base_url: str = "https://generativelanguage.googleapis.com/v1beta"
    api_key_env: str | None = "GEMINI_API_KEY"
    logprobs: int = Field(default=0, ge=0, le=20)
    thinking_config: dict[str, Any] | None = None

    @field_validator("extra_body")
    @classmethod
    def _nothing_stated(cls, extra: dict[str, Any]) -> dict[str, Any]:
        more = extra.get("generationConfig", {})
        if not isinstance(more, dict):
            raise ValueError("generationConfig must hold fields with their values")
        not_stated(more, _STATED_CONFIG)
        not_stated(extra, _STATED - {"generationConfig"})
        return extra


class GeminiBackend(HttpBackend):
    """Requests and replies in Google's format."""

    config: GeminiConfig
    key_header = "x-goog-api-key"  # the form `?key=` would put it into every log of addresses
    key_scheme = ""

    def record(self) -> dict[str, Any]:
        """See `HttpBackend.record`."""
        return super().record() | {"thinking_config": self.config.thinking_config}

    def request(self, ask: Ask, n: int, seed: int | None) -> Call:
        """The HTTP request for n draws, or for as many as one call may bring."""
        config, n = self.config, min(n, MOST_CANDIDATES)
        generation: dict[str, Any] = {"maxOutputTokens": ask.max_tokens}
        sampling = {"temperature": ask.temperature, "topP": ask.top_p}
        generation |= {name: value for name, value in sampling.items() if value is not None}
        if n > 1:
            generation["candidateCount"] = n
        if seed is not None:
            generation["seed"] = seed % SEEDS
        if ask.logprobs:
            generation |= {"responseLogprobs": True, "logprobs": ask.logprobs}
        if config.thinking_config is not None:
            generation["thinkingConfig"] = config.thinking_config
        elif config.thinking == "off":
            generation["thinkingConfig"] = {"thinkingBudget": 0}
        system = "\n\n".join(turn.content for turn in ask.messages if turn.role == "system")
        body: dict[str, Any] = {
            "contents": [
                {"role": "model" if turn.role == "assistant" else "user", "parts": [{"text": turn.content}]}
                for turn in ask.messages
                if turn.role != "system"
            ]
        }
        if system:
            body["systemInstruction"] = {"parts": [{"text": system}]}
        body |= config.extra_body
        body["generationConfig"] = generation | config.extra_body.get("generationConfig", {})
        tokens = estimate_tokens([message.content for message in ask.messages]) + n * ask.max_tokens
        model = quote(config.model.removeprefix("models/"))
        return Call(f"{config.base_url}/models/{model}:generateContent", body, tokens)

    def read(self, payload: Any, ask: Ask) -> Completion:
        """Read a reply of status 200.

        Raises:
            Malformed: no candidates, or not in Google's shape.
        """
        candidates = payload.get("candidates") if isinstance(payload, dict) else None
        if not isinstance(candidates, list) or not candidates:
            raise Malformed("no candidates")
        usage = read_usage(payload.get("usageMetadata"))
        thought = usage is not None and usage.reasoning_tokens > 0
        return Completion(
            choices=tuple(_choice(candidate, thought, ask) for candidate in candidates),
            model=word(payload, "modelVersion"),
            usage=usage,
            request_id=word(payload, "responseId"),
        )

    def classify(self, status: int, payload: Any) -> Verdict | None:
        """The verdict on a reply, from the table in `errors`, and a prompt that was filtered."""
        if status == 200:
            return self._blocked(payload)
        said, door = errors.read(payload), Door(self.base_url, self.config.model, self.config.api_key_env)
        if status in (429, 503) and "RESOURCE_EXHAUSTED" in said.codes:
            status = 429
        elif status >= 500 and "litellm.BadRequestError" in said.message:  # the proxy's own fault hides the real one
            status = 400
        where = errors.place(door, status, said)
        if status == 429 and any(_DAILY.search(quota) for quota in _quotas(payload)):
            return Verdict("stop", f"the quota of this day is used up at {where}; resume tomorrow")
        if status == 400 and "FAILED_PRECONDITION" in said.codes:
            return Verdict("ask", f"the account may not use {where}; see to its region and its billing")
        return errors.verdict(status, said, door, _REFUSALS, wait_s=_retry_delay_s(payload))

    def _blocked(self, payload: Any) -> Verdict | None:
        feedback = payload.get("promptFeedback") if isinstance(payload, dict) else None
        reason = word(feedback, "blockReason")
        if not reason or payload.get("candidates"):
            return None
        return Verdict("drop", f"prompt filtered by {self.base_url} ({reason})", "filtered")


@TEACHERS.register("gemini")
class GeminiTeacher(ApiTeacher):
    """A teacher behind generateContent: text, and log-probs of what it writes where the model gives them."""

    Config = GeminiConfig
    Backend = GeminiBackend


def read_usage(usage: Any) -> Usage | None:
    """The token counts of a reply, in which `promptTokenCount` includes what the cache served; None if absent."""
    if not isinstance(usage, dict) or not isinstance(usage.get("promptTokenCount"), int):
        return None
    prompt, written = count(usage, "promptTokenCount"), count(usage, "candidatesTokenCount")
    thought = count(usage, "thoughtsTokenCount")
    # Thoughts come on top of the candidates, are billed like them, and are in the total; some servers count them in.
    counted_in = thought <= written and prompt + written == count(usage, "totalTokenCount")
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=written if counted_in else written + thought,
        cache_read_tokens=count(usage, "cachedContentTokenCount"),
        reasoning_tokens=thought,
    )


def _choice(candidate: Any, thought: bool, ask: Ask) -> Choice:
    if not isinstance(candidate, dict):
        raise Malformed("a candidate that is no object")
    content = candidate.get("content")  # absent where the text was filtered, without parts where all of it was thought
    parts = (content.get("parts") or []) if isinstance(content, dict) else []
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise Malformed("content that is no text")
    text = "".join(word(part, "text") for part in parts if not part.get("thought"))
    return Choice(
        text,
        _FINISH.get(word(candidate, "finishReason"), "error"),
        thought or any(part.get("thought") for part in parts),
        _tokens(candidate.get("logprobsResult"), text) if ask.logprobs else (),
    )


def _tokens(result: Any, text: str) -> tuple[Token, ...]:
    """The tokens of a text with their log-probs; none where they don't spell it (the probe says so)."""
    if not isinstance(result, dict):
        return ()
    tokens, spelt = [], ""
    try:
        chosen = result.get("chosenCandidates") or []
        top = result.get("topCandidates") or [{}] * len(chosen)
        for own, others in zip(map(_pair, chosen), top, strict=True):
            if own is None or spelt == text:  # what follows the text is no text: the end of the turn
                break
            pairs = map(_pair, others.get("candidates") or ())
            tokens.append(Token(*own, tuple(pair for pair in pairs if pair is not None)))
            spelt += own[0]
    except (AttributeError, TypeError, ValueError):
        raise Malformed("log-probs in another shape") from None
    return tuple(tokens) if spelt == text else ()


def _pair(token: Any) -> tuple[str, float] | None:
    """A token and its log-prob; None where it has none, which is not the same as 0."""
    value = token.get("logProbability")
    return None if value is None else (word(token, "token"), float(value))


def _details(payload: Any) -> list[dict[str, Any]]:
    """The details of Google's errors."""
    if isinstance(payload, list) and payload:
        payload = payload[0]
    error = payload.get("error") if isinstance(payload, dict) else None
    details = error.get("details") if isinstance(error, dict) else None
    return [detail for detail in details if isinstance(detail, dict)] if isinstance(details, list) else []


def _quotas(payload: Any) -> list[str]:
    """The names of the quotas that an error says are used up."""
    lists = [detail.get("violations") for detail in _details(payload)]
    named = [violation for violations in lists if isinstance(violations, list) for violation in violations]
    return [word(violation, key) for violation in named for key in ("quotaId", "quotaMetric")]


def _retry_delay_s(payload: Any) -> float:
    """The wait that an error asks for; 0 where it asks for none."""
    matches = [_DURATION.fullmatch(word(detail, "retryDelay")) for detail in _details(payload)]
    return max((float(match[1]) for match in matches if match), default=0.0)
