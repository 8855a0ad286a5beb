"""Weight tokens by the teacher's confidence and the student's doubt (FiRe-OPD, arXiv 2606.02684, second stage).

    c_t = clip(1 - H_T(t) / max H_T, 0, 1);    k_t = clip(H_S(t) / max H_S, 0, 1)
    w_t = (1 + alpha c_t)(1 + beta k_t) / mean of that                                                    [official code]

Maxima and the mean are over the learned tokens of one rollout [second-hand; ours: after all masks]. H_S is that of the
weights which wrote the rollout. H_T is exact where the teacher gives whole distributions; of its likeliest tokens and a
bucket for the rest it is a lower bound, said in the log as `approximate` [ours].
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from omniopd.draft import Draft
from omniopd.measures import entropies, entropies_of_top
from omniopd.method import Facts, StudentModel, StudentText
from omniopd.objective import Objective
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.types import Rollout, TokenScores

TEACHER = "entropy_weights.teacher"


class EntropyWeightsSettings(PartSettings):
    """How strongly either side's entropy counts."""

    name: Literal["entropy_weights"] = "entropy_weights"
    alpha: float = Field(default=1.0, ge=0, description="of the teacher's confidence; 0 needs no teacher")
    beta: float = Field(default=1.0, ge=0, description="of the student's doubt")
    k: int = Field(
        default=0, ge=0, description="likeliest tokens to take the teacher's entropy from; 0: its whole distributions"
    )

    @property
    def neutral(self) -> bool:
        return self.alpha == self.beta == 0


@PARTS.register("entropy_weights")
class EntropyWeights(Part):
    """More for tokens where the teacher is sure and the student is not; the mean stays 1."""

    Config = EntropyWeightsSettings
    slots = ("credit",)
    place = Place.WEIGHT
    neutral: ClassVar = {"alpha": 0.0, "beta": 0.0}

    def __init__(self, config: EntropyWeightsSettings, objective: Objective, text: StudentText, seed: int) -> None:
        super().__init__(config, objective, text, seed)
        if config.alpha:
            self.needs = frozenset({"topk" if config.k else "logits", "same tokenizer"})
            self.top, self.whole = config.k, not config.k

    def measure(self, rollout: Rollout, scores: TokenScores | None, student: StudentModel) -> Facts:
        """See `Part`."""
        if not self.config.alpha or scores is None:
            return {}
        if scores.distributions is not None and not self.config.k:
            return {TEACHER: entropies(scores.distributions).tolist()}
        return {TEACHER: entropies_of_top(scores.top).tolist()} if scores.top else {}

    def apply(self, draft: Draft) -> None:
        """See `Part`."""
        for row in draft.rows:
            teacher = draft.facts(row, TEACHER) if self.config.alpha else None
            if row in draft.likelihood or (self.config.alpha and teacher is None):
                continue
            own = torch.tensor(draft.rollouts[row].entropy, dtype=torch.float64)
            weight = entropy_weights(teacher, own, draft.mask[row], self.config.alpha, self.config.beta)
            draft.weigh(row, weight)
        draft.note(approximate=1.0 if self.config.k else None)


def entropy_weights(teacher: Tensor | None, student: Tensor, mask: Tensor, alpha: float, beta: float) -> Tensor:
    """The weights [T] of one rollout; 1 outside the mask.

    Args:
        teacher: H_T [T] in nats; None with `alpha` 0.
        student: H_S [T] in nats.
        mask: [T] bool, the learned tokens.
    """
    doubt = _relative(student, mask)
    sure = torch.zeros_like(doubt) if teacher is None else 1 - _relative(teacher, mask)
    raw = (1 + alpha * sure.clamp(0, 1)) * (1 + beta * doubt.clamp(0, 1))
    return (raw / raw[mask].mean()).where(mask, torch.ones_like(raw)) if bool(mask.any()) else torch.ones_like(raw)


def _relative(entropy: Tensor, mask: Tensor) -> Tensor:
    """Entropies over their largest under the mask; 0 everywhere where that is 0."""
    most = float(entropy[mask].max()) if bool(mask.any()) else 0.0
    return entropy / most if most > 0 else torch.zeros_like(entropy)
