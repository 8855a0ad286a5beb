"""Rollouts of older weights: their own tokens count by the ratio of the two policies' probabilities (trap S2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omniopd.types import Rollout


@dataclass(frozen=True)
class Stale:
    """The tokens that the student's older weights sampled: `logp` is their log-prob then, in nats; nan at all other places.

    Their coefficient of -log p is multiplied with min(p_now / p_then, most), which is truncated importance sampling. Nothing
    else is: branches are the teacher's text, anchor and divergences are expectations over the whole vocabulary, in which no
    sampled token stands for others. What is old there are the places alone, and a forward KL forgives that
    (arXiv 2606.24143 [paper]). The values stay those that were read against the older weights' log-probs.
    """

    logp: Tensor
    most: float

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], updates: int, most: float) -> Stale | None:
        """Of a step's response tokens [R], for weights that have seen so many updates; None where nothing lags.

        Raises:
            ValueError: a rollout that lags has no log-prob for each of its tokens.
        """
        parts = [_logp_then(rollout, updates - rollout.version) for rollout in rollouts]
        logp = torch.cat([*parts, torch.zeros(0)])
        return None if bool(logp.isnan().all()) else cls(logp, most)

    def at(self, places: Tensor, others: int) -> Stale:
        """Of some of the tokens, and of `others` more that nobody sampled."""
        return replace(self, logp=torch.cat([self.logp[places], torch.full((others,), torch.nan)]))

    def to(self, device: torch.device) -> Stale:
        """The same with its tensor there."""
        return replace(self, logp=self.logp.to(device))

    def truncated(self, ratio: Tensor) -> Tensor:
        """What the coefficients are multiplied with: 1 where `ratio` is nan, which is where nothing lags."""
        return ratio.clamp(max=self.most).masked_fill(ratio.isnan(), 1.0)


def ratio_figures(ratios: Tensor, most: float) -> dict[str, float]:
    """What a step's log says of its ratios [n] before truncation, whose mean is near 1; {} where there are none."""
    if not len(ratios):
        return {}
    return {
        "ratio_mean": float(ratios.mean()),
        "ratio_max": float(ratios.max()),
        "ratio_truncated": float((ratios > most).float().mean()),
    }


def _logp_then(rollout: Rollout, lag: int) -> Tensor:
    """[T]: the log-probs of the student's own tokens in a rollout that lags, else nan."""
    if lag <= 0 or rollout.author in ("teacher", "initial"):
        return torch.full((len(rollout),), torch.nan)
    logp = torch.tensor(rollout.logprobs)
    if len(logp) != len(rollout) or not bool(logp.isfinite().all()):
        raise ValueError(
            f"a rollout of prompt {rollout.prompt.id} is {lag} updates old and lacks log-probs of its tokens"
        )
    return logp.index_fill(0, torch.arange(rollout.given), torch.nan)
