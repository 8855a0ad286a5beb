"""How far the log-probs of what writes the rollouts are from the trainer's own (trap S1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gap:
    """Absolute differences of log-probs of the same tokens under the same weights, in nats: mean, 99th percentile, count."""

    mean: float
    p99: float
    tokens: int


def gap(sampler: Sequence[float], trainer: Sequence[float]) -> Gap:
    """The gap between two sides' log-probs [n] of the same tokens."""
    raise NotImplementedError
