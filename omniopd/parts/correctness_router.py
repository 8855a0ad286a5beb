"""Route rollouts by the verifier's verdict, weigh them by perplexity inside their group (SCOPE, arXiv 2604.10688).

Of the rollouts of one prompt, C are right and W are wrong:

    right:  A_t = 1 (likelihood of the student's own text),   w_i = PPL_S(i)^(1/tau) / sum_C PPL_S^(1/tau)      [paper]
    wrong:  A_t = log q_t(y_t) - log p_t(y_t),               w_i = PPL_T(i)^(-1/tau) / sum_W PPL_T^(-1/tau)     [paper]

PPL(y) = exp(-mean_t log pi(y_t)), all tokens of the response. In log space the weights are a softmax of the mean log-prob
over its temperature: rare right answers and recoverable wrong ones count more. `sum_to: count` makes their mean 1 instead of
their sum [official code]. The released script has the student's direction the other way round, and its YAML the teacher's:
directions are words here. Rollouts without a verdict (cut, or no reference) are plain distillation of weight 1 [ours].

Right rollouts never need the teacher, and it is not asked about them. A teacher that rules a token out has an infinite
perplexity, hence weight 0; where all wrong ones of a prompt have, their weights are equal [ours].
"""

from __future__ import annotations

import logging
import math
import random
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from omniopd.draft import Draft
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.sampling import named_seed
from omniopd.scored import nats

Direction = Literal["up_weight_high_ppl", "up_weight_low_ppl"]
SumTo = Literal["one", "count"]
COMPLETE = 0.5  # least share of rollouts with a verdict for a router to mean anything [ours]

log = logging.getLogger(__name__)


class CorrectnessRouterSettings(PartSettings):
    """How rollouts of one verdict share the weight of their prompt."""

    name: Literal["correctness_router"] = "correctness_router"
    tau: float = Field(default=1.0, gt=0, description="temperature of the weights; inf: all of a group alike")
    student: Direction = Field(default="up_weight_high_ppl", description="which right rollouts count more")
    teacher: Direction = Field(default="up_weight_low_ppl", description="which wrong rollouts count more")
    sum_to: SumTo = Field(default="one", description="what the weights of a group add up to; count: its rollouts")
    placebo: Literal["none", "random"] = Field(
        default="none",
        description="random: the same weights on random rollouts of their verdict; control: shuffled deals verdicts",
    )


@PARTS.register("correctness_router")
class CorrectnessRouter(Part):
    """Likelihood for right rollouts, distillation for wrong ones."""

    Config = CorrectnessRouterSettings
    slots = ("credit", "signal")
    place = Place.ROUTE
    needs = frozenset({"verify", "score", "group"})
    spares_right = True
    neutral: ClassVar = "none: right rollouts learn by likelihood, whatever the settings are"
    warns: ClassVar = {
        "trajectory_filter": "both act on what the teacher finds unlikely: wrong rollouts are weighed down and then dropped",
        "horizon": "rollouts that it cuts have no verdict, and are plain distillation",
        "adaptive_window": "rollouts that it cuts have no verdict, and are plain distillation",
        "kl_stop": "a rollout is judged by the whole of its text, and learned up to where it is cut",
    }

    def apply(self, draft: Draft) -> None:
        """See `Part`."""
        unknown = [row for row, verdict in enumerate(draft.verdicts) if verdict is None]
        right, wrong, lost = 0, 0, 0
        for rows in draft.groups().values():
            rows = [row for row in rows if len(draft.rollouts[row])]
            own = [row for row in rows if draft.verdicts[row] is True]
            other = [row for row in rows if draft.verdicts[row] is False and row in draft.scores]
            self._imitate(draft, own)
            self._weigh(draft, own, [draft.rollouts[row].logprobs for row in own], self.config.student)
            lost += self._weigh(draft, other, [draft.scores[row].logprobs for row in other], self.config.teacher)
            right, wrong = right + len(own), wrong + len(other)
        known = 1 - len(unknown) / len(draft.rollouts) if draft.rollouts else 1.0
        if known < COMPLETE:
            log.warning(
                "%.0f%% of the rollouts have no verdict (cut, or no reference): they are not routed", 100 - 100 * known
            )
        if lost:
            log.warning("the teacher rules out every wrong rollout of %d prompts: their weights are equal", lost)
        draft.note(
            routed_right=float(right), routed_wrong=float(wrong), unrouted=float(len(unknown)), verdict_share=known
        )

    def _imitate(self, draft: Draft, rows: list[int]) -> None:
        """Likelihood on these rollouts; also where the teacher said nothing, but not where an earlier part has cut them."""
        for row in rows:
            draft.likelihood.add(row)
            draft.targets[row] = None
            draft.mask[row] = draft.mask[row] | ~draft.signal.mask_BT[row]
            draft.advantage[row] = torch.ones(len(draft.rollouts[row]), dtype=torch.float64)

    def _weigh(self, draft: Draft, rows: list[int], logprobs: list[tuple[float, ...]], direction: Direction) -> bool:
        """Weigh a group; returns whether none of it can be told from another, all perplexities being infinite."""
        if not rows or (math.isinf(self.config.tau) and self.config.sum_to == "count"):
            return False  # exactly 1 each
        means = torch.stack([nats(one).nanmean() for one in logprobs])
        weights = group_weights(means, self.config.tau, direction, self.config.sum_to)
        if self.config.placebo == "random":
            weights = weights[self._anywhere(draft, rows)]
        for row, weight in zip(rows, weights, strict=True):
            draft.weigh(row, weight.expand(len(draft.rollouts[row])))
        return bool(means.isneginf().all())

    def _anywhere(self, draft: Draft, rows: list[int]) -> list[int]:
        """Which of a group's weights each of its rollouts has, at random."""
        name = draft.rollouts[rows[0]].prompt.id, draft.verdicts[rows[0]]
        dealer = random.Random(named_seed(self.seed, "correctness_router", draft.step, *name))
        return dealer.sample(range(len(rows)), len(rows))


def group_weights(mean_logprobs: Tensor, tau: float, direction: Direction, sum_to: SumTo) -> Tensor:
    """The weights [n] of one group from each rollout's mean log-prob [n] in nats, which is -log PPL.

    Those of -inf weigh 0; if all are, all weigh the same.
    """
    known = mean_logprobs > -math.inf
    if not bool(known.any()):
        known = torch.ones_like(known)
        mean_logprobs = torch.zeros_like(mean_logprobs)
    logits = mean_logprobs / tau if direction == "up_weight_low_ppl" else -mean_logprobs / tau
    weights = logits.masked_fill(~known, -math.inf).softmax(0)
    return weights * len(weights) if sum_to == "count" else weights
