"""GOLD: groups of tokens that spell the same bytes, one divergence per group between two vocabularies.

Tokens that both vocabularies have are compared as they are, by a generalised JSD; the others by their sorted probabilities,
which says how sure the teacher is and not of what. The group's divergence stands at its last token.

[official code https://github.com/huggingface/trl, trl/experimental/gold] merge ("bayesian"), weights, beta; [ours] equal
tokens by their bytes, groups that spell different bytes left out, on-policy text only (lmbda 1), temperature 1, no
cross-entropy. With one tokenizer on both sides this is `opd` with the generalised JSD, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from omniopd.alignment import AlignedChunk
from omniopd.mapped import Laid, Mapped, MappedObjective
from omniopd.method import StudentText
from omniopd.objective import Objective
from omniopd.registry import METHODS
from omniopd.scored import Reading
from omniopd.targets.full import FullTarget
from omniopd.targets.gold import GroupTarget
from omniopd.types import Target

GROUPED = "grouped"  # an earlier token of a group, of which the group's last one speaks


class GoldConfig(MappedObjective):
    """The JSD and its part of the whole."""

    name: Literal["gold"] = "gold"
    beta: float = Field(
        default=0.5, ge=0, le=1, description="0: forward KL on equal tokens, 1: reverse KL [official code]"
    )
    matched_weight: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="part of the JSD, the rest is for the sorted L1; null: the share of the teacher's tokens that match",
    )
    min_coverage: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="share of tokens that end a group, or the run stops; digits alone are one in three",
    )


@METHODS.register("gold")
class Gold(Mapped):
    """The teacher's distributions over groups of tokens."""

    Config: ClassVar[type[Objective]] = GoldConfig
    neutral: ClassVar = {"beta": 1.0}
    plain: ClassVar = {"name": "opd", "form": "dense"}

    def __init__(self, config: GoldConfig, text: StudentText, seed: int) -> None:
        super().__init__(config, text, seed)
        self.config = config

    def cautions(self) -> list[str]:
        return [
            *super().cautions(),
            "method.name=gold: a baseline; sorted probabilities of unequal tokens do not say which",
        ]

    def lay(self, laid: Laid) -> Reading:
        """A group for each chunk, heard at its last token."""
        groups = [spelled.chunk for spelled in laid.heard]
        mask = torch.zeros(len(laid.rollout), dtype=torch.bool)
        mask[[group.end - 1 for group in groups]] = True
        grouped = Counter({GROUPED: sum(group.end - group.start - 1 for group in groups)})
        return Reading(mask, torch.zeros(len(mask)), laid.holes + grouped, self._target(laid, groups))

    def _target(self, laid: Laid, groups: Sequence[AlignedChunk]) -> Target:
        beta, weight = self.config.beta, self.config.matched_weight
        if laid.words.identity and weight is None:
            return FullTarget(laid.distributions, "jsd", beta)
        return GroupTarget(groups, laid.scores.ids, laid.distributions, laid.words, beta, weight)
