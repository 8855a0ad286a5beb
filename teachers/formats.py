"""Small pieces that the formats of several providers share: checking `extra_body`, reading words and counts."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from omniopd.types import Usage


def not_stated(extra: dict[str, Any], stated: Set[str]) -> dict[str, Any]:
    """Extra fields of a request, checked.

    Raises:
        ValueError: one of them is stated by every request.
    """
    if taken := sorted(stated & extra.keys()):
        raise ValueError(f"must not hold {', '.join(taken)}: every request states it from its own setting")
    return extra


def count(holder: Any, name: str) -> int:
    """A number of tokens; 0 where there is none."""
    value = holder.get(name) if isinstance(holder, dict) else None
    return value if isinstance(value, int) and value > 0 else 0


def word(holder: Any, name: str) -> str:
    """A text, or "" where there is none."""
    value = holder.get(name) if isinstance(holder, dict) else None
    return value if isinstance(value, str) else ""


def read_usage(usage: Any) -> Usage | None:
    """Token counts in OpenAI's format, where `prompt_tokens` includes what the cache served; None if absent."""
    if not isinstance(usage, dict) or not isinstance(usage.get("prompt_tokens"), int):
        return None
    return Usage(
        prompt_tokens=count(usage, "prompt_tokens"),
        completion_tokens=count(usage, "completion_tokens"),
        # DeepSeek counts the cache beside the details.
        cache_read_tokens=count(usage.get("prompt_tokens_details"), "cached_tokens")
        or count(usage, "prompt_cache_hit_tokens"),
        cache_write_tokens=count(usage.get("prompt_tokens_details"), "cache_write_tokens"),
        reasoning_tokens=count(usage.get("completion_tokens_details"), "reasoning_tokens"),
    )
