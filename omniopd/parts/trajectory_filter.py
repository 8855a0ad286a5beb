"""Drop the rollouts that the teacher finds least likely per token (FiRe-OPD, arXiv 2606.02684, first stage).

    a_i = mean_t log q_t(y_t);    keep_i = [a_i >= Quantile_rho({a_j})]                                  [official code]

The quantile is over the whole step, of all processes; the released scripts take it inside micro-batches of one, where it
drops nothing. Ties at the threshold are kept [ours]. Where verdicts route rollouts (`correctness_router`), only those that
learn from the teacher are filtered.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field

from omniopd.draft import Draft
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.scored import nats


class TrajectoryFilterSettings(PartSettings):
    """How many rollouts are left out."""

    name: Literal["trajectory_filter"] = "trajectory_filter"
    drop: float = Field(default=0.2, ge=0, lt=1, description="rho, the share of rollouts that is dropped")

    @property
    def neutral(self) -> bool:
        return self.drop == 0


@PARTS.register("trajectory_filter")
class TrajectoryFilter(Part):
    """Leave out the rollouts that the teacher finds least likely."""

    Config = TrajectoryFilterSettings
    slots = ("credit",)
    place = Place.DROP
    needs = frozenset({"score"})
    neutral: ClassVar = {"drop": 0.0}

    def apply(self, draft: Draft) -> None:
        """See `Part`."""
        rows = [row for row in draft.rows if row not in draft.likelihood and row in draft.scores]
        if not rows:
            return
        scores = torch.stack([nats(draft.scores[row].logprobs).nanmean() for row in rows])
        threshold = float(scores.quantile(self.config.drop))  # linear interpolation, as numpy's
        draft.drop([row for row, a in zip(rows, scores.tolist(), strict=True) if not a >= threshold])
        draft.note(filter_threshold=threshold if math.isfinite(threshold) else None)
