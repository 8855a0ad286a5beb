"""A bonus for tokens after which the teacher is confident (LGR, arXiv 2605.30833).

    r(v) = max_w q(w | h_t, v);    r_conf = clip((r - mean) / std, +-clip) over the group;    A_t = lr_t + gamma r_conf(y_t)

The group are the student's K likeliest tokens at h_t, and y_t [second-hand; y_t in any case: ours]. It is asked about where
the student's entropy, as recorded when it wrote, exceeds tau: the teacher's own is what degrades, so it does not gate. The
available description adds the reward to a cost; here it is added to an advantage, so that confident branches gain [ours].
Where the group has (nearly) one confidence the bonus is 0, not rounding noise of unit scale [ours]. Ends of the response are
no candidates, and its last token has no bonus: nothing follows them. The fixed point is not the teacher [ours].

r(y_t) is read from the scores of the response; each other candidate is a query of two tokens behind the prefix, so a server
with a prefix cache computes the prefix once. A teacher without one reads the prefix K - 1 times per place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from omniopd.draft import Draft
from omniopd.method import StudentText
from omniopd.objective import Objective
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.types import Query, Rollout, ScoreQuery, TokenScores, asked_by

NAME: Literal["lookahead"] = "lookahead"
EPS = 1e-6  # added to the standard deviation [ours]
LEAST_STD = 1e-4  # below it a group counts as one confidence [ours]

Confidences = dict[tuple[int, int], list[float]]
"""The teacher's largest probability after the other candidates of (row, place)."""


class LookaheadSettings(PartSettings):
    """Where to look ahead, and how much it counts."""

    name: Literal["lookahead"] = NAME
    k: int = Field(default=8, ge=1, description="K, the student's likeliest tokens at a place that are compared")
    tau: float = Field(default=0.2, ge=0, description="nats of the student's entropy above which a place is looked at")
    gamma: float = Field(default=1.0, ge=0, description="of the bonus; at 10 students write repetitive text")
    clip: float = Field(default=2.0, gt=0, description="bound on the standardised confidence")
    min_tokens: int = Field(
        default=4096,
        ge=0,
        description="shorter rollouts have no bonus: the method was worse than without at 3k; 0: all have one",
    )

    @property
    def neutral(self) -> bool:
        return self.gamma == 0 or math.isinf(self.tau)


@PARTS.register(NAME)
class Lookahead(Part):
    """Reward tokens after which the teacher knows how to go on."""

    Config = LookaheadSettings
    slots = ("audit", "evidence", "signal")
    place = Place.BONUS
    needs = frozenset({"topk", "same tokenizer"})
    reads_entropy = True
    top = 1
    dense = False
    refuses: ClassVar = {"horizon": "it ends rollouts below the length at which looking ahead helps; leave one out"}
    warns: ClassVar = {
        "f_divergence": "its weights may be unbounded beside a bonus of order 1; watch lookahead_scale in the log",
    }
    neutral: ClassVar = {"gamma": 0.0}

    def __init__(self, config: LookaheadSettings, objective: Objective, text: StudentText, seed: int) -> None:
        super().__init__(config, objective, text, seed)
        self.candidates = config.k

    def ask(self, rollout: Rollout, row: int, step: int) -> list[Query]:
        """See `Part`: what follows each candidate but y_t; a token behind it has its place, whichever it is."""
        found: list[Query] = []
        for t in self._places(rollout):
            likeliest = rollout.top[t][: self.config.k]
            others = [v for v, _ in likeliest if v != rollout.ids[t] and v not in self.text.end_ids]
            found += [self._query(rollout, row, t, v) for v in others]
        return found

    def apply(self, draft: Draft) -> None:
        """See `Part`."""
        others = _confidences([one for one in asked_by(draft.evidence, NAME) if isinstance(one, TokenScores)])
        bonuses: list[Tensor] = []
        advantages: list[Tensor] = []
        for row in draft.rows:
            if row in draft.likelihood or row not in draft.scores:
                continue
            bonus = self._bonus(draft.rollouts[row], draft.scores[row], row, others)
            draft.add(row, self.config.gamma * bonus)
            bonuses.append(bonus[draft.mask[row]])
            advantages.append(draft.advantage[row][draft.mask[row]])
        joined = torch.cat(bonuses) if bonuses else torch.zeros(0, dtype=torch.float64)
        size = float(torch.cat(advantages).abs().mean()) if advantages else 0.0
        draft.note(
            lookahead_queries=float(len(asked_by(draft.evidence, NAME))),
            lookahead_share=float((joined != 0).double().mean()) if len(joined) else None,
            lookahead_scale=float(self.config.gamma * joined.abs().mean()) / size if size else None,
            repetition=repetition([draft.rollouts[row].ids for row in draft.rows]),
        )

    def cautions(self) -> list[str]:
        if not self.config.min_tokens:
            return []
        least = self.config.min_tokens
        return [f"method.parts: lookahead leaves rollouts of less than {least} tokens alone (lookahead.min_tokens)"]

    def _places(self, rollout: Rollout) -> list[int]:
        """Places that are looked at; the last token's is none."""
        if len(rollout) < self.config.min_tokens or not rollout.top:
            return []
        unsure = [t for t in range(rollout.given, len(rollout) - 1) if rollout.entropy[t] > self.config.tau]
        return [t for t in unsure if rollout.ids[t] not in self.text.end_ids]

    def _query(self, rollout: Rollout, row: int, t: int, candidate: int) -> ScoreQuery:
        vocabulary = self.text.vocabulary
        ids = (candidate, rollout.ids[t])
        text = self.text.decode(list(ids)) if vocabulary.lossy else vocabulary.spell(ids).text
        return ScoreQuery(
            prompt=rollout.prompt,
            row=row,
            ids=ids,
            vocabulary=vocabulary.digest,
            text=text,
            closes=False,
            top=1,
            after=rollout.ids[:t],
            by=NAME,
        )

    def _bonus(self, rollout: Rollout, scores: TokenScores, row: int, others: Confidences) -> Tensor:
        """The standardised confidence [T] after each token; 0 where nothing was compared."""
        bonus = torch.zeros(len(rollout), dtype=torch.float64)
        for t in self._places(rollout):
            if t + 1 < len(scores.top) and scores.top[t + 1] and (row, t) in others:
                group = torch.tensor([_most(scores.top[t + 1]), *others[row, t]], dtype=torch.float64)
                bonus[t] = standardised(group)[0].clamp(-self.config.clip, self.config.clip)
        return bonus


def standardised(group: Tensor, eps: float = EPS, least: float = LEAST_STD) -> Tensor:
    """Confidences [n] with mean 0 and (population) standard deviation 1; all 0 where theirs is below `least`."""
    std = group.std(correction=0)
    return (group - group.mean()) / (std + eps) if float(std) >= least else torch.zeros_like(group)


def repetition(texts: list[tuple[int, ...]], length: int = 4) -> float | None:
    """Share of all runs of `length` tokens that stood in the same text before; None where there are none."""
    runs = [[ids[i : i + length] for i in range(len(ids) - length + 1)] for ids in texts]
    total = sum(map(len, runs))
    return 1 - sum(len(set(own)) for own in runs) / total if total else None


def _confidences(found: list[TokenScores]) -> Confidences:
    """What the other candidates' queries found; one that failed leaves its group."""
    confidences: Confidences = {}
    for one in found:
        if one.top and one.top[-1]:
            confidences.setdefault((one.query.row, len(one.query.after)), []).append(_most(one.top[-1]))
    return confidences


def _most(top: Mapping[int, float]) -> float:
    return math.exp(max(top.values()))
