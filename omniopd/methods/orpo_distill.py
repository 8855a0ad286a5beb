"""ORPO-Distill (arXiv 2509.25100): imitate the teacher's right traces, and raise their odds over the student's wrong ones.

    L = - mean_t log p(y+_t)  +  weight * -log sigmoid(log odds(y+) - log odds(y-))
    odds(y) = P / (1 - P),    P = exp(mean_t log p(y_t))

y+ is one of K traces of the teacher's that reach the right answer, y- a trace of the student's that does not: with
probability phi the present student's, else the initial one's. Rows and terms are those of `omniopd.pairs`; who is right,
the task's verifier says. At weight 0 this is `seqkd` on the chosen traces, bit for bit.

[second-hand] the losses, K; [ours] phi and weight, whose published values are unknown; a right trace is imitated whether or
not the student's is wrong, so that the weight has a limit at 0; a trace that was cut is neither right nor wrong.
"""

from __future__ import annotations

from statistics import fmean
from typing import ClassVar, Literal

import torch
from pydantic import Field

from omniopd.losses.preference import log_odds, log_odds_slope
from omniopd.method import StudentText
from omniopd.objective import Objective
from omniopd.pairs import PRESENT, Paired, PairObjective, Reward
from omniopd.registry import METHODS
from omniopd.sampling import named_seed
from omniopd.types import Prompt, Reply, Rollout, Writing


class OrpoDistillConfig(PairObjective):
    """How much the contrast counts, and whose traces it rejects."""

    name: Literal["orpo_distill"] = "orpo_distill"
    answers: int = Field(default=8, ge=1, le=128, description="the teacher's traces to choose a right one from, K")
    weight: float = Field(default=0.1, ge=0, description="of the odds ratio, lambda; 0: seqkd on the chosen traces")
    phi: float = Field(default=0.5, ge=0, le=1, description="share of rejected traces that the present student writes")


@METHODS.register("orpo_distill")
class OrpoDistill(Paired):
    """The teacher's right traces against the student's wrong ones, by odds."""

    Config: ClassVar[type[Objective]] = OrpoDistillConfig
    paper = "2509.25100"
    neutral: ClassVar = "none: without the teacher's log-probs nothing gives the log-ratio of plain distillation"
    needs = frozenset({"answer", "group", "verify"})

    def __init__(self, config: OrpoDistillConfig, text: StudentText, seed: int) -> None:
        super().__init__(config, text, seed)
        self.config, self.weight = config, config.weight

    def imitates(self, step: int) -> bool:
        """See `Paired`."""
        return True

    def compares(self, step: int) -> bool:
        """See `Paired`."""
        return self.weight > 0

    def rejected(self, prompt: Prompt, row: int, step: int) -> Writing:
        """A new one of the present student's, or the initial one's, which is the same whenever the prompt comes."""
        if named_seed(self.seed, "phi", step, row) < self.config.phi * 2**63:
            return Writing()
        return Writing(initial=True, seed=self.named("rejected", prompt, row))

    def reward(self, rollout: Rollout) -> Reward:
        """The log odds of the mean likelihood."""
        mean = torch.tensor(fmean(rollout.facts[PRESENT]), dtype=torch.float64)
        return Reward(float(log_odds(mean)), float(log_odds_slope(mean)) / len(rollout))

    def usable(self, prompt: Prompt, reply: Reply) -> bool:
        """See `Paired`: it must be right."""
        return self.check is not None and prompt.reference is not None and bool(self.check(prompt, reply.text))

    def unfit(self, rollout: Rollout) -> str:
        """See `Paired`: it must be wrong."""
        verdict = self.verdict(rollout)
        return "rejected_right" if verdict else "" if verdict is False else "rejected_unknown"
