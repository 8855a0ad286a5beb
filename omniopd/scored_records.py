"""Scored responses as JSON records for the report: the same shape as audited chunks, without replies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omniopd.types import Rollout

if TYPE_CHECKING:
    from omniopd.scored import Reading


def record(rollout: Rollout, reading: Reading) -> dict[str, Any]:
    """One response as one chunk: its tokens and the value of each, null where there is none.

    `score` is the mean of `log q - log p` per token, in nats: below 0 the teacher would rather have written something else.
    Where a distribution is the target there are no values.
    """
    heard = int(reading.mask.sum())
    values = [
        round(value, 6) if spoke else None
        for value, spoke in zip(reading.values.tolist(), reading.mask.tolist(), strict=True)
    ]
    scored = len(reading.log_ratios) and heard
    return {
        "prompt_id": rollout.prompt.id,
        "prompt": [{"role": m.role, "content": m.content} for m in rollout.prompt.messages],
        "text": rollout.text,
        "reference": rollout.prompt.reference,
        "finish": rollout.finish,
        "chunks": [
            {
                "start": 0,
                "end": len(rollout),
                "char_start": 0,
                "char_end": len(rollout.text),
                "prefix_end": 0,
                "text": rollout.text,
                "tokens": [rollout.text[a:b] for a, b in zip((0, *rollout.ends), rollout.ends, strict=False)],
                "score": round(float(reading.log_ratios.sum()) / heard, 6) if scored else None,
                "values": values if reading.target is None else [],
                "weight": float(reading.values[reading.mask].mean()) if heard and reading.target is None else None,
                "rejected": dict(reading.holes),
                "dropped": None if heard else reading.main_hole,
                "replies": [],
            }
        ],
    }
