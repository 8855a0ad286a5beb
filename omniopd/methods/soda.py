"""SODA (arXiv 2604.03873): prefer the teacher's answer to what the student wrote before any training.

    L = -log sigmoid(beta [log p(y+)/p_0(y+) - log p(y-)/p_0(y-)])

Sums over tokens; y+ is the teacher's answer, y- an answer of the initial student's, each drawn once per prompt. Rows and
terms are those of `omniopd.pairs`. At p = p_0 the loss is log 2 and its slope beta / 2 for every pair.

[second-hand] the loss, and a reference apart from the base student, probably the student after a warm-up on the teacher's
answers; [ours] beta, and that the reference is the initial student. With `warm_steps` a run begins as `seqkd`, and its
reference stays the student before that. For the published order, train with `seqkd` and make the student in that run's
folder `student.path` here: then that one is the reference, and writes the rejected answers, too.

[ours] Pairs whose rejected answer the task's verifier calls right are left out, since the loss takes the student to be always
worse. Sums over tokens let long answers rule the margin: the log has both lengths.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field

from omniopd.losses.preference import log_ratio
from omniopd.method import StudentText
from omniopd.objective import Objective
from omniopd.pairs import INITIAL, PRESENT, Paired, PairObjective, Reward
from omniopd.registry import METHODS
from omniopd.types import Prompt, Rollout, Writing


class SodaConfig(PairObjective):
    """How strongly the reference holds, and which pairs count."""

    name: Literal["soda"] = "soda"
    beta: float = Field(default=0.1, gt=0, description="scale of the log-ratios to the initial student")
    warm_steps: int = Field(default=0, ge=0, description="steps of plain imitation of the teacher's answers before")
    filter: bool = Field(
        default=True, description="leave out pairs whose rejected answer is right, where the task can tell [ours]"
    )


@METHODS.register("soda")
class Soda(Paired):
    """The teacher's answers against the initial student's, by DPO."""

    Config: ClassVar[type[Objective]] = SodaConfig
    paper = "2604.03873"
    neutral: ClassVar = "none: without the teacher's log-probs nothing gives the log-ratio of plain distillation"
    reference = True

    def __init__(self, config: SodaConfig, text: StudentText, seed: int) -> None:
        super().__init__(config, text, seed)
        self.config = config

    def imitates(self, step: int) -> bool:
        """See `Paired`."""
        return step <= self.config.warm_steps

    def compares(self, step: int) -> bool:
        """See `Paired`."""
        return not self.imitates(step)

    def rejected(self, prompt: Prompt, row: int, step: int) -> Writing:
        """The initial student's, the same whenever the prompt comes."""
        return Writing(initial=True, seed=self.named("rejected", prompt, row))

    def reward(self, rollout: Rollout) -> Reward:
        """The log-ratio to the initial student."""
        present, initial = (
            torch.tensor(math.fsum(rollout.facts[name]), dtype=torch.float64) for name in (PRESENT, INITIAL)
        )
        return Reward(float(log_ratio(present, initial, self.config.beta)), self.config.beta)

    def unfit(self, rollout: Rollout) -> str:
        """See `Paired`."""
        return "rejected_right" if self.config.filter and self.verdict(rollout) else ""
