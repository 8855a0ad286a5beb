"""Early rollouts are drawn from a blend of student and teacher (TRB, arXiv 2605.31159): see `omniopd.blending`.

    eps_k = eps_0 (1 - k / K) after k updates, 0 from K on: then rollouts are the student's own, bit for bit       [paper]

A divergence on the places that were visited needs no correction. The sampled token's log-ratio is biased there: it is taken
against the student, `log q - log S`, and weighed with `S / mu` [ours], in which its expectation is the student's again. Where
a rollout is older than the last update, the update's own ratio `p_now / mu` does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from omniopd.blending import BETA, LEFT, SPENT, STUDENT
from omniopd.draft import Draft
from omniopd.errors import ConfigError
from omniopd.method import StudentText
from omniopd.objective import Objective
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.scored import nats


class BehaviourBlendSettings(PartSettings):
    """How far the blend may be from the student, and for how long."""

    name: Literal["behaviour_blend"] = "behaviour_blend"
    budget: float = Field(default=0.02, ge=0, description="eps_0, nats of KL(mu || student) per token at first")
    steps: int = Field(default=50, ge=0, description="K, updates until there is no budget left")

    @property
    def neutral(self) -> bool:
        return self.budget == 0 or self.steps == 0


@PARTS.register("behaviour_blend")
class BehaviourBlend(Part):
    """The teacher bends what the student writes, less and less."""

    Config = BehaviourBlendSettings
    slots = ("sampling", "schedule")
    place = Place.SAMPLE
    decides = False
    needs = frozenset({"decode", "same tokenizer"})
    writes = frozenset({"blend"})
    neutral: ClassVar = {"budget": 0.0}
    refuses: ClassVar = {
        "teacher_prefix": "both let the teacher write in the student's rollouts; leave one out",
        "lookahead": "its candidates would be the blend's, not the student's; leave one out",
    }

    def __init__(self, config: BehaviourBlendSettings, objective: Objective, text: StudentText, seed: int) -> None:
        super().__init__(config, objective, text, seed)
        form, estimator = getattr(objective, "form", ""), getattr(objective, "estimator", "k1")
        if form not in ("dense", "sampled") or (form == "sampled" and estimator == "k3"):
            raise ConfigError(
                "method.parts: behaviour_blend knows how to correct a divergence and the log-ratio of plain distillation; "
                "set form: dense, or estimator: k1"
            )
        self.sampled = form == "sampled"

    def budget(self, step: int) -> float:
        """See `Part`."""
        return blend_budget(self.config.budget, self.config.steps, step - 1)

    def apply(self, draft: Draft) -> None:
        """See `Part`."""
        blended = [row for row, rollout in enumerate(draft.rollouts) if STUDENT in rollout.facts]
        if self.sampled:
            for row in blended:
                self._correct(draft, row)
        spent, beta, left = (_joined(draft, blended, name) for name in (SPENT, BETA, LEFT))
        if len(beta):
            draft.note(
                blend_beta=float(beta.mean()),
                blend_whole_share=float((beta == 1).double().mean()),
                blend_kl_student=float(spent.mean()),
                blend_kl_teacher=float(left.mean()),
            )

    def _correct(self, draft: Draft, row: int) -> None:
        student, rollout = draft.facts(row, STUDENT), draft.rollouts[row]
        assert student is not None, "blended"
        bent = nats(rollout.logprobs) - student  # log mu - log S
        draft.advantage[row] = (draft.advantage[row] + bent).where(draft.mask[row], 0.0)
        if rollout.version >= draft.step - 1:  # written by the weights that learn from it
            draft.weight[row] = (-bent).exp()  # no decision that the control could deal out


def blend_budget(first: float, steps: int, updates: int) -> float:
    """eps after so many updates, in nats."""
    return first * (1 - updates / steps) if updates < steps else 0.0


def _joined(draft: Draft, rows: Sequence[int], name: str) -> Tensor:
    """A fact of all tokens of some rollouts."""
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(nats(draft.rollouts[row].facts[name]) for row in rows)])
