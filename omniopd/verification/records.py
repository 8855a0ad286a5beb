"""Audits as JSON records for the report and `omniopd verify`: what was asked, what came back, what it was worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from omniopd.types import Chunk, Continuations, Rollout
from omniopd.verification.agreement import agreed, spoken
from omniopd.verification.audit import Audit, Verdict


def records(
    rollouts: Sequence[Rollout],
    answered: Sequence[Continuations],
    audits: Sequence[Audit],
    dropped: Mapping[Chunk, str],
    values: Sequence[torch.Tensor],
) -> list[dict[str, Any]]:
    """One record per rollout: its text and what happened to each of its chunks.

    Args:
        dropped: the reason of each chunk that gave no signal.
        values: [B] tensors [T], what the update multiplies -log p with.
    """
    verdicts = {audit.chunk: audit.verdict for audit in audits}
    return [
        {
            "prompt_id": rollout.prompt.id,
            "prompt": [{"role": m.role, "content": m.content} for m in rollout.prompt.messages],
            "text": rollout.text,
            "reference": rollout.prompt.reference,
            "finish": rollout.finish,
            "chunks": [
                _chunk(rollout, found, dropped.get(found.query.chunk))
                | _verdict(found, verdicts.get(found.query.chunk), values[row])
                for found in answered
                if found.query.chunk.row == row
            ],
        }
        for row, rollout in enumerate(rollouts)
    ]


def _chunk(rollout: Rollout, found: Continuations, dropped: str | None) -> dict[str, Any]:
    chunk = found.query.chunk
    opens = len(chunk.prefix)
    return {
        "start": chunk.start,
        "end": chunk.end,
        "char_start": opens,
        "char_end": opens + len(chunk.text),
        "prefix_end": opens,
        "text": chunk.text,
        "tokens": [chunk.text[a:b] for a, b in zip((0, *chunk.ends), chunk.ends, strict=False)],
        "entropy": rollout.entropy[chunk.start],
        "n_eff": len(found.replies),
        "rejected": dict(found.rejected),
        "dropped": dropped,
        "replies": [{"text": reply.text, "finish": reply.finish} for reply in found.replies],
    }


def _verdict(found: Continuations, verdict: Verdict | None, values: torch.Tensor) -> dict[str, Any]:
    """What is known of a chunk that was judged; nothing of one that was not."""
    if verdict is None:
        return {}
    chunk = found.query.chunk
    own = [round(value, 6) for value in values[chunk.start : chunk.end].tolist()]
    scores = iter(verdict.scores)  # one for each reply that could speak about a token
    replies: list[dict[str, Any]] = []
    for reply in found.replies:
        score = next(scores, None) if spoken(chunk, reply) else None
        judged = {} if score is None else {"score": round(score, 6), "agreed": agreed(chunk, reply)}
        replies.append({"text": reply.text, "finish": reply.finish, **judged})
    return {
        "k": verdict.k,
        "score": fmean(verdict.scores) if verdict.scores else None,
        "values": own,
        "weight": fmean(spoke) if (spoke := [value for value in own if value]) else None,
        "replies": replies,
    }
