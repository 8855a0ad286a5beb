"""How far the log-probs of what writes the rollouts are from the trainer's own (trap S1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Gap:
    """Absolute differences of log-probs of the same tokens under the same weights, in nats: mean, 99th percentile, count."""

    mean: float
    p99: float
    tokens: int

    def within(self, limit: float) -> bool:
        """Whether the 99th percentile is at most that. A difference that is no number is never within (trap S1).

        The mean would hide what goes wrong on few tokens, and the largest difference is that of the least likely token.
        """
        return math.isfinite(self.mean) and self.p99 <= limit

    def to_json(self) -> dict[str, float]:
        """The fields of a step's row."""
        return {"gap_mean": self.mean, "gap_p99": self.p99, "gap_tokens": self.tokens}


def gap(sampler: Sequence[float], trainer: Sequence[float]) -> Gap | None:
    """The gap between two sides' log-probs [n] of the same tokens; None where there are none to compare.

    The percentile is the smallest difference that at least 99 in 100 do not exceed.

    Raises:
        ValueError: the sides have different lengths.
    """
    if len(sampler) != len(trainer):
        raise ValueError(f"the sampler has {len(sampler)} log-probs, the trainer {len(trainer)}")
    if not sampler:
        return None
    difference = (torch.tensor(sampler, dtype=torch.float64) - torch.tensor(trainer, dtype=torch.float64)).abs()
    rank = -(-99 * len(difference) // 100)
    return Gap(float(difference.mean()), float(difference.kthvalue(rank).values), len(difference))
