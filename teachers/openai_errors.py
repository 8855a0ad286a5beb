"""What an error of an OpenAI-shaped API means: what is this shape's own. The table is in `errors.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from teachers import errors
from teachers.errors import OPEN_TURN, Door, Refusal, refusal
from teachers.wire import Verdict

REFUSALS = (
    Refusal("prefill", OPEN_TURN, "set teacher.continuation: instruct, or another teacher.prefill_style"),
    refusal("logprobs", r"logprobs", "set teacher.logprobs to what the model gives, or to 0"),
    refusal("max_tokens", r"\bmax_tokens\b", "set teacher.max_tokens_field: max_completion_tokens"),
    refusal("max_completion_tokens", r"\bmax_completion_tokens\b", "set teacher.max_tokens_field: max_tokens"),
    refusal("n", r"(?:^|\.)n$|['\"`]n['\"`]|\bn must be\b", "set teacher.n: false"),  # a letter alone says too little
    refusal("seed", r"\b(?:random_)?seed\b", "set teacher.seed: false"),
    refusal("temperature", r"\btemperature\b", "set teacher.temperature to null or to what the model takes"),
    refusal("top_p", r"\btop_p\b", "set teacher.top_p to null or to what the model takes"),
    refusal(
        "thinking",
        r"reasoning_effort|chat_template_kwargs|\bthinking\b|\breasoning\b",
        "set teacher.thinking: default, with room in teacher.thinking_tokens",
    ),
    refusal("model", r"^model$|model (?:not found|does not exist)", "correct teacher.model"),
)


def verdict(
    status: int, payload: Any, url: str, model: str, key_env: str | None, refusals: Sequence[Refusal] = REFUSALS
) -> Verdict | None:
    """The verdict on a reply, or None for a reply of status 200 without an error inside."""
    inside = payload.get("error") if isinstance(payload, dict) else None
    if status == 200:
        if not inside or payload.get("choices"):
            return None
        code = inside.get("code") if isinstance(inside, dict) else None
        # OpenRouter: the upstream's error, with its status as the code, inside a 200.
        status = code if isinstance(code, int) and code >= 400 else 500
    return errors.verdict(status, errors.read(payload), Door(url, model, key_env), refusals)
