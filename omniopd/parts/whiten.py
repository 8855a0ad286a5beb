"""Whiten the advantage over the whole step (GNDPO, arXiv 2606.09091).

    d = clamp(lr, -c, c);    A = (d - mu) / max(sqrt(var + 1e-8), sigma_min)

mu and var: mean and variance (n - 1) of d over all learned tokens of the step, of all processes [official code], or over
those of each prompt [ours], so that no prompt gains by being easier than another. `sigma_min` [ours]: without it the noise
between a student and a teacher that agree is blown up to unit variance. Absolute agreement is lost: a token that the teacher
mildly dislikes is rewarded. `sigma` in the log is the true measure of progress.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from omniopd.draft import Draft
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS

EPS = 1e-8  # inside the root [official code]


class WhitenSettings(PartSettings):
    """What is taken out of the advantage."""

    name: Literal["whiten"] = "whiten"
    clip: float = Field(default=5.0, gt=0, description="bound on |lr| before anything else, in nats; inf: none")
    center: bool = Field(default=True, description="subtract the mean")
    scale: bool = Field(default=True, description="divide by the standard deviation")
    over: Literal["step", "prompt"] = Field(
        default="step", description="whose tokens share mean and deviation: the whole step's, or one prompt's [ours]"
    )
    sigma_min: float = Field(default=0.05, ge=0, description="least divisor, in nats [ours]; 0: as published")

    @property
    def neutral(self) -> bool:
        return math.isinf(self.clip) and not self.center and not self.scale


@PARTS.register("whiten")
class Whiten(Part):
    """Advantages of mean 0 and variance 1 over the step."""

    Config = WhitenSettings
    slots = ("credit",)
    place = Place.TRANSFORM
    decides = False
    dense = False
    neutral: ClassVar = {"clip": math.inf, "center": False, "scale": False}

    def apply(self, draft: Draft) -> None:
        """See `Part`."""
        rows = [row for row in draft.rows if row not in draft.likelihood]
        joined = _learned(draft, rows)
        clipped = self._clipped(joined)
        mu, sigma = moments(clipped)  # of the whole step, for the log in either case
        groups = [rows] if self.config.over == "step" else draft.groups().values()
        for own in ([row for row in group if row in rows] for group in groups):
            centre, spread = moments(self._clipped(_learned(draft, own)))
            for row in own:
                draft.advantage[row] = self._whitened(draft.advantage[row], centre, spread)
        draft.note(
            whiten_mu=mu, whiten_sigma=sigma, clip_share=float((joined != clipped).double().mean()) if rows else None
        )

    def _clipped(self, ratios: Tensor) -> Tensor:
        return ratios.clamp(-self.config.clip, self.config.clip)

    def _whitened(self, ratios: Tensor, mu: float, sigma: float) -> Tensor:
        d = self._clipped(ratios)
        if self.config.center:
            d = d - mu
        return d / max(sigma, self.config.sigma_min) if self.config.scale else d


def _learned(draft: Draft, rows: Sequence[int]) -> Tensor:
    """The advantages [n] of all learned tokens of some rollouts."""
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(draft.advantage[row][draft.mask[row]] for row in rows)])


def moments(d: Tensor) -> tuple[float, float]:
    """Mean and `sqrt(var + 1e-8)` of [n], the variance over n - 1; that of one number is 0."""
    if not len(d):
        return 0.0, math.sqrt(EPS)
    var = float(d.var()) if len(d) > 1 else 0.0
    return float(d.mean()), math.sqrt(var + EPS)
