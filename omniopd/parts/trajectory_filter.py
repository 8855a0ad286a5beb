"""Drop the rollouts that the teacher finds least likely per token (FiRe-OPD, arXiv 2606.02684, first stage).

    a_i = mean_t log q_t(y_t);    keep_i = [a_i >= Quantile_rho({a_j})]                                  [official code]

The quantile is over the whole step, of all processes, apart for each of several teachers, whose scales differ [ours]; the
released scripts take it inside micro-batches of one, where it drops nothing. Ties at the threshold are kept [ours]. Where
verdicts route rollouts (`correctness_router`), only those that learn from the teacher are filtered.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from omniopd.draft import Draft
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.scored import nats

log = logging.getLogger(__name__)


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
        means: dict[str, dict[int, float]] = {}  # by teacher and row
        for row in draft.rows:
            if row in draft.likelihood or row not in draft.scores:
                continue
            mean = float(nats(draft.scores[row].logprobs).nanmean())
            if not math.isnan(mean):
                means.setdefault(draft.scores[row].teacher, {})[row] = mean
        thresholds = {name: least_kept(list(own.values()), self.config.drop) for name, own in means.items()}
        draft.drop([row for name, own in means.items() for row, mean in own.items() if mean < thresholds[name]])
        if alone := [name for name, own in means.items() if len(own) == 1]:
            log.warning(
                "step %d: trajectory_filter drops nothing of one rollout%s; raise train.prompts_per_step",
                draft.step,
                f" of teacher {', '.join(alone)}" if any(alone) else "",
            )
        (only,) = thresholds.values() if len(thresholds) == 1 else (math.nan,)
        draft.note(filter_threshold=only if math.isfinite(only) else None)


def least_kept(means: Sequence[float], drop: float) -> float:
    """`Quantile_drop` of mean log-probs [n], in nats, by linear interpolation.

    Between -inf (a token that the teacher rules out) and a number it is that number: what is impossible goes first.
    """
    ordered = torch.tensor(means, dtype=torch.float64)
    threshold = float(ordered.quantile(drop))
    return threshold if math.isfinite(threshold) else float(ordered.quantile(drop, interpolation="higher"))
