"""Audit rows as the viewer gets them: known keys, known types, no number that JSON can't hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omniopd.report.figures import reasons
from omniopd.report.folder import mapping
from omniopd.report.formats import number

# Any of these could end the element that holds the data, or (as line ends) the statement it once was part of.
# Escaped inside a JSON string they mean themselves. ASCII output escapes the rest, lone surrogates included.
_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def island(data: Any) -> str:
    """JSON that can stand inside a <script> element, whatever text it carries."""
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def rollout_record(row: Mapping[str, Any]) -> dict[str, Any]:
    """One rollout with its chunks."""
    return {
        "step": number(row.get("step")),
        "prompt_id": _string(row.get("prompt_id")),
        "prompt": [
            {key: _string(turn.get(key)) for key in ("role", "content")} for turn in _objects(row.get("prompt"))
        ],
        "text": _string(row.get("text")),
        "reference": None if row.get("reference") is None else _string(row["reference"]),
        "correct": row["correct"] if isinstance(row.get("correct"), bool) else None,
        "finish": _string(row.get("finish")),
        "chunks": [_chunk(chunk) for chunk in _objects(row.get("chunks"))],
    }


def score_range(records: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """The ends of the colour scale: 0 to 1, unless a score lies outside; around 0 where there are both signs."""
    scores = [chunk["score"] for record in records for chunk in record["chunks"] if chunk["score"] is not None]
    low, high = min(scores, default=0.0), max(scores, default=1.0)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    if low < 0 < high:
        return -max(-low, high), max(-low, high)
    return (low, high) if high > low else (low - 1.0, high + 1.0)


def _chunk(chunk: Mapping[str, Any]) -> dict[str, Any]:
    numbers = ("start", "end", "char_start", "char_end", "prefix_end", "entropy", "k", "n_eff", "score", "weight")
    return {
        **{key: number(chunk.get(key)) for key in numbers},
        "text": _string(chunk.get("text")),
        "values": [number(value) for value in _list(chunk.get("values"))],
        "tokens": [_string(token) for token in _list(chunk.get("tokens"))],
        "replies": [_reply(reply) for reply in _objects(chunk.get("replies"))],
        "rejected": dict(reasons(chunk.get("rejected"))),
        "dropped": None if chunk.get("dropped") is None else _string(chunk["dropped"]),
    }


def _reply(reply: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "text": _string(reply.get("text")),
        "finish": _string(reply.get("finish")),
        "score": number(reply.get("score")),
        "agreed": number(reply.get("agreed")),
    }


def _string(value: Any) -> str:
    return "" if value is None else str(value)


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [mapping(item) for item in _list(value)]
