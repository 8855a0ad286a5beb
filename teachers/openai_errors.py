"""What an error of an OpenAI-shaped API means: one table, no sleeping. See the reactions in `transport.py`.

Sources: OpenAI's error list, vLLM's and FastAPI's error bodies, DeepSeek's and OpenRouter's error pages.
"""

from __future__ import annotations

import re
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
}
_FILTER = {"content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation"}
_OVERFLOW = re.compile(
    r"context_length_exceeded|maximum context length|context window|prompt is too long|input is too long"
    r"|longer than the maximum|exceeds? the (?:model'?s )?(?:maximum|context)",
    re.IGNORECASE,
)
_PASSING = {408, 409, 425}  # 5xx too
_OPEN_TURN = re.compile(
    r"continue_final_message|add_generation_prompt|prefill|(?:last|final) message|assistant message|end with a user",
    re.IGNORECASE,
)
_MENDS = {
    "max_tokens": "set teacher.max_tokens_field: max_completion_tokens",
    "max_completion_tokens": "set teacher.max_tokens_field: max_tokens",
    "n": "set teacher.n: false",
    "seed": "set teacher.seed: false",
    "temperature": "set teacher.temperature to what the model takes, or pick another model",
    "top_p": "set teacher.top_p to what the model takes, or pick another model",
    "model": "correct teacher.model",
}


@dataclass(frozen=True, slots=True)
class _Said:
    """What an error body says: its codes and types, the parameter it names, its message."""

    codes: frozenset[str]
    param: str
    message: str


def verdict(status: int, payload: Any, url: str, model: str, key_env: str | None) -> Verdict | None:
    """The verdict on a reply, or None for a reply of status 200 without an error inside."""
    inside = payload.get("error") if isinstance(payload, dict) else None
    if status == 200:
        if not inside or payload.get("choices"):
            return None
        code = inside.get("code") if isinstance(inside, dict) else None
        # OpenRouter: the upstream's error, with its status as the code, inside a 200.
        status = code if isinstance(code, int) and code >= 400 else 500
    said = _read(payload)
    where = f"{url} (HTTP {status}{': ' + said.message if said.message else ''})"
    if status == 402 or said.codes & _MONEY:
        return Verdict("stop", f"no money left at {where}; top up the account, then resume")
    if said.codes & _FILTER:
        return Verdict("drop", f"filtered by {where}", "filtered")
    if status == 413 or (status in (400, 422) and _OVERFLOW.search(f"{' '.join(said.codes)} {said.message}")):
        return Verdict("drop", f"too long for the teacher's context: {where}", "context_overflow")
    if status in (401, 403):
        mend = (
            f"set the environment variable {key_env} to a key that may use model '{model}'"
            if key_env
            else "name the environment variable that holds its key in teacher.api_key_env"
        )
        return Verdict("ask", f"the key was refused by {where}; {mend}")
    if status == 404:
        return Verdict("ask", f"no model '{model}' at {where}; correct teacher.model or teacher.base_url")
    if status == 429:
        return Verdict("throttle", f"rate limit of {where}")
    if status in _PASSING or status >= 500:
        return Verdict("retry", f"fault at {where}")
    if status in (400, 422):
        return Verdict("downgrade", f"the request was refused by {where}; {_mend(said)}")
    return Verdict("ask", f"unexpected reply of {where}; correct teacher.base_url")


def _mend(said: _Said) -> str:
    if said.param in _MENDS:
        return _MENDS[said.param]
    if _OPEN_TURN.search(f"{said.param} {said.message}"):
        return "set teacher.continuation: instruct, or another teacher.prefill_style"
    named = [name for name in _MENDS if len(name) > 1 and re.search(rf"\b{name}\b", said.message)]
    return _MENDS[named[0]] if named else "correct the settings of the teacher"


def _read(payload: Any) -> _Said:
    if not isinstance(payload, dict):
        return _Said(frozenset(), "", "")
    error = payload.get("error") or payload.get("detail") or payload
    if not isinstance(error, dict):
        return _Said(frozenset(), "", str(error)[:200])
    inner = error.get("innererror")  # Azure names the filter there
    codes = [error.get("code"), error.get("type"), inner.get("code") if isinstance(inner, dict) else None]
    message = error.get("message")
    return _Said(
        codes=frozenset(code for code in codes if isinstance(code, str)),
        param=str(error.get("param") or ""),
        message=" ".join(message.split())[:200] if isinstance(message, str) else "",
    )
