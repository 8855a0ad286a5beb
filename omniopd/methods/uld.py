"""ULD (universal logit distillation, arXiv 2402.12030): sorted probabilities, position by position; a baseline.

Position i of the student is held against position i of the teacher, whatever either token spells, as far as the shorter
side goes.

[official code https://github.com/Nicolas-BZRD/llm-recipes] the L1, its weight, both temperatures 1; [ours] no cross-entropy
by default: there it learns reference answers, here it would learn what the student wrote itself, with expected gradient 0.
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar, Literal

import torch
from pydantic import Field

from omniopd.method import StudentText
from omniopd.objective import Objective
from omniopd.registry import METHODS
from omniopd.scored import MISSING, Reading, Scored, ScoredObjective, finite, nats
from omniopd.targets.uld import SortedTarget
from omniopd.types import Rollout, TokenScores

BEYOND = "beyond"  # a token past the teacher's last position


class UldConfig(ScoredObjective):
    """Weights of the two terms."""

    name: Literal["uld"] = "uld"
    weight: float = Field(default=1.5, gt=0, description="of the sorted L1 [official code]")
    cross_entropy: float = Field(
        default=0, ge=0, description="of -log p of the student's own tokens; 1 in the official code"
    )


@METHODS.register("uld")
class Uld(Scored):
    """The teacher's sorted probabilities."""

    Config: ClassVar[type[Objective]] = UldConfig
    paper = "2402.12030"
    neutral: ClassVar = "none: sorted probabilities are compared, not those of the same tokens"
    needs = frozenset({"score", "logits"})
    whole = True

    def __init__(self, config: UldConfig, text: StudentText, seed: int) -> None:
        super().__init__(config, text, seed)
        self.config = config

    def describe(self) -> str:
        return "whole distributions, sorted, position by position"

    def cautions(self) -> list[str]:
        said = [
            *super().cautions(),
            "method.name=uld: a baseline; sorted probabilities say how sure the teacher is, not of what",
        ]
        if self.config.cross_entropy:
            said.append(
                f"method.cross_entropy={self.config.cross_entropy:g}: of text that the student wrote itself its expected "
                "gradient is 0, so it only adds noise; leave it out"
            )
        return said

    def place(self, rollout: Rollout, scores: TokenScores) -> Reading:
        """The positions that both sides have."""
        if scores.distributions is None or scores.vocabulary is None:
            return Reading.silent(len(rollout), MISSING)
        both = min(len(rollout), len(scores.ids))
        spoke, missing = finite(nats(scores.logprobs)[:both])
        mask = torch.zeros(len(rollout), dtype=torch.bool)
        mask[:both] = spoke
        holes = missing + Counter({BEYOND: len(rollout) - both})
        target = SortedTarget(scores.distributions, scores.vocabulary.size, self.config.weight)
        return Reading(mask, mask * self.config.cross_entropy, holes, target)
