"""What an error of a teacher's API means: one table for all formats, no sleeping. See the reactions in `transport.py`.

A format has its errors read here (the formats' names don't clash), changes the status where it says something in a way of
its own, and names by `Refusal`s the settings that its servers may refuse.

Sources: the error pages of OpenAI, Anthropic, Google, DeepSeek, Moonshot and OpenRouter; what vLLM, FastAPI and LiteLLM
answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from teachers.wire import Verdict

_MONEY = {
    "insufficient_quota",
    "credit_balance_exhausted",
    "organization_spend_limit_exceeded",
    "project_spend_limit_exceeded",
    "organization_usage_limit_exceeded",
    "billing_hard_limit_reached",
    "exceeded_current_quota_error",  # Moonshot
    "billing_error",  # Anthropic
    "enforced_spend_limit_reached",
}
_MONEY_WORDS = re.compile(
    r"credit balance is too low|specified API usage limits|spend(?:ing)? (?:limit|cap)\b|prepayment credits"
    r"|Key limit exceeded|insufficient (?:balance|credits|funds)",
    re.IGNORECASE,
)
_IN_FLIGHT = "openrouter_in_flight_budget"  # a 402 that passes when fewer calls are under way
_FILTER = {"content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation", "flagged_input"}
_FILTER_WORDS = re.compile(r"blocked by content filtering", re.IGNORECASE)
_BAD_KEY = {"invalid_api_key", "API_KEY_INVALID", "no_db_connection"}  # LiteLLM looks up a key that it doesn't know
_BAD_MODEL_WORDS = re.compile(r"Invalid model name", re.IGNORECASE)
_OVERFLOW = re.compile(
    r"context_length_exceeded|maximum context length|context window|context limit|ContextWindowExceeded|prompt is too long"
    r"|input is too long|longer than the (?:maximum|model's context)"
    r"|exceeds? the (?:model'?s )?(?:maximum|(?:available )?context)",
    re.IGNORECASE,
)
_BAD_PROMPT = re.compile(
    r"trailing whitespace|non-whitespace text|must (?:be|have) non-empty|must not be empty|contents is not specified",
    re.IGNORECASE,
)
_TOO_MANY_TOKENS = re.compile(
    r"max_model_len|at most \d+ completion tokens|maximum allowed number of output tokens"
    r"|max_?output_?tokens.*(?:must be|range|within)",
    re.IGNORECASE,
)
_PASSING = {408, 409, 425, 499}  # 5xx too

OPEN_TURN = re.compile(
    r"continue_final_message|add_generation_prompt|prefill|(?:last|final) (?:message|role)|assistant['\"`]? message"
    r"|ends? with a user|ending with a model|['\"](?:prefix|partial)['\"]",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Said:
    """What an error's body says: its codes, types and reasons, the parameter it names, its message."""

    codes: frozenset[str] = frozenset()
    param: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Door:
    """Where a call goes: the address, the model, and the variable that holds the key (None: no key)."""

    url: str
    model: str
    key_env: str | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A setting that a server may refuse: the words by which it does, and the mend. `param` as in `wire.Verdict`."""

    param: str
    words: re.Pattern[str]
    mend: str


def refusal(param: str, words: str, mend: str) -> Refusal:
    """A `Refusal` from a pattern that ignores case."""
    return Refusal(param, re.compile(words, re.IGNORECASE), mend)


def read(payload: Any) -> Said:
    """Read an error in OpenAI's, Anthropic's or Google's shape, or one of FastAPI's; it may be anything."""
    if isinstance(payload, list) and payload:  # Google wraps some errors
        payload = payload[0]
    if not isinstance(payload, dict):
        return Said()
    error = payload.get("error") or payload.get("detail") or payload
    if not isinstance(error, dict):
        return Said(message=" ".join(str(error).split())[:1000])
    more = [error.get(name) for name in ("details", "innererror", "metadata")]  # Anthropic; Azure; OpenRouter
    more += more[0] if isinstance(more[0], list) else []  # Google
    holders = [error, *(holder for holder in more if isinstance(holder, dict))]
    names = ("code", "type", "status", "reason", "error_code", "limit_source")
    codes = [holder.get(name) for holder in holders for name in names]
    codes += ["flagged_input" for holder in holders if "flagged_input" in holder]  # OpenRouter's moderation
    message = error.get("message")
    return Said(
        codes=frozenset(code for code in codes if isinstance(code, str)),
        param=str(error.get("param") or ""),
        message=" ".join(message.split())[:1000] if isinstance(message, str) else "",
    )


def place(door: Door, status: int, said: Said) -> str:
    """Where it happened and what was said, for messages."""
    return f"{door.url} (HTTP {status}{': ' + said.message[:200] if said.message else ''})"


def verdict(status: int, said: Said, door: Door, refusals: Sequence[Refusal], wait_s: float = 0.0) -> Verdict:
    """The verdict on a failed reply. `refusals` are tried in order; `wait_s` is what the body asks to wait."""
    where = place(door, status, said)
    bad_request = status in (400, 422)
    words = f"{' '.join(sorted(said.codes))} {said.message}"
    if status == 402 and _IN_FLIGHT in said.codes:
        return Verdict("throttle", f"too many calls under way at {where}", wait_s=wait_s)
    if status == 402 or said.codes & _MONEY or (status in (400, 403, 429) and _MONEY_WORDS.search(said.message)):
        return Verdict("stop", f"no money left at {where}; top up the account, then resume")
    if said.codes & _FILTER or (bad_request and _FILTER_WORDS.search(said.message)):
        return Verdict("drop", f"filtered by {where}", "filtered")
    if status == 413 or (bad_request and _OVERFLOW.search(words)):
        return Verdict("drop", f"too long for the teacher's context: {where}", "context_overflow")
    if status in (401, 403) or (bad_request and said.codes & _BAD_KEY):
        mend = (
            f"set the environment variable {door.key_env} to a key that may use model '{door.model}'"
            if door.key_env
            else "name the environment variable that holds its key in teacher.api_key_env"
        )
        return Verdict("ask", f"the key was refused by {where}; {mend}")
    if status == 404 or (bad_request and _BAD_MODEL_WORDS.search(said.message)):
        return Verdict("ask", f"no model '{door.model}' at {where}; correct teacher.model or teacher.base_url")
    if status == 429:
        return Verdict("throttle", f"rate limit of {where}", wait_s=wait_s)
    if status in _PASSING or status >= 500:
        return Verdict("retry", f"fault at {where}", wait_s=wait_s)
    if bad_request and _BAD_PROMPT.search(said.message):  # another prompt may pass
        return Verdict("drop", f"this prompt was refused by {where}")
    if bad_request and _TOO_MANY_TOKENS.search(said.message):
        mend = "lower teacher.thinking_tokens or the length that the method asks for"
        return Verdict("ask", f"longer texts are asked for than the model writes: {where}; {mend}")
    if bad_request:
        refused = _refused(said, refusals) or Refusal("", OPEN_TURN, "correct the settings of the teacher")
        return Verdict("downgrade", f"the request was refused by {where}; {refused.mend}", param=refused.param)
    return Verdict("ask", f"unexpected reply of {where}; correct teacher.base_url")


def _refused(said: Said, refusals: Sequence[Refusal]) -> Refusal | None:
    """The parameter that the server names, else the first one that its message mentions."""
    texts = [text for text in (said.param, said.message) if text]
    return next((one for text in texts for one in refusals if one.words.search(text)), None)
