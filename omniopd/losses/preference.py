"""Preference losses of a pair of responses: `-log sigmoid(g(y+) - g(y-))`, with their slopes. In nats, elementwise.

g is what a loss takes for a response's reward: DPO (arXiv 2305.18290) the scaled log-ratio to a frozen reference, ORPO
(arXiv 2403.07691) the log odds of its mean likelihood. Slopes are by hand, so that a loss can be told as one number on each
token (`pair_slopes`); all in the dtype of the input, float64 where margins are to be exact.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

FLOOR = 1e-6  # [ours] 1 - P is never taken to be smaller: a response that is certain has finite odds


def pair_loss(margin: Tensor) -> Tensor:
    """`-log sigmoid(margin)`, the Bradley-Terry loss; log 2 where both sides are alike."""
    return -logsigmoid(margin)


def pair_slope(margin: Tensor) -> Tensor:
    """`-d pair_loss / d margin = sigmoid(-margin)`, in (0, 1): what is left to learn of a pair."""
    return torch.sigmoid(-margin)


def log_ratio(logp: Tensor, reference: Tensor, beta: float) -> Tensor:
    """DPO's reward `beta (log p(y) - log p_0(y))`, of sums over tokens; its slope in log p(y) is beta."""
    return beta * (logp - reference)


def log_odds(mean_logp: Tensor) -> Tensor:
    """ORPO's reward `log P / (1 - P)` with `P = exp(mean_t log p(y_t))`; finite at P = 1."""
    return mean_logp - _rest(mean_logp).clamp(min=FLOOR).log()


def log_odds_slope(mean_logp: Tensor) -> Tensor:
    """`d log_odds / d mean_logp = 1 / (1 - P)`, at least 1; 1 where 1 - P is floored."""
    rest = _rest(mean_logp)
    return torch.where(rest > FLOOR, 1 / rest.clamp(min=FLOOR), torch.ones_like(rest))


def _rest(mean_logp: Tensor) -> Tensor:
    """`1 - P`, exact near P = 1."""
    return -torch.expm1(mean_logp)
