"""What methods share that contrast the teacher's answer with the student's: pairs of rows, whole texts on both sides.

The rows of a prompt are chosen, rejected, chosen, rejected, ...; of an odd number the last one stays empty. A chosen row is
the teacher's answer in the student's tokens, with the end of the turn; beside it the student, or the student as it was at
first, writes what is rejected. Nothing that the student writes is sent to the teacher.

    L = - mean_t log p(y+_t)  +  mean_pairs weight * -log sigmoid(g(y+) - g(y-))

Which of the two terms a step has, its method says. The first is a branch, as in `seqkd`: without the second, nothing else is
written, and the step is that of `seqkd` on the same answers to the last bit. The second is numbers on tokens: with one
update per batch, its gradient is its slope at the present weights times the gradient of each token's log-prob.

Answers are asked for by names that hold the prompt, not the step: when a prompt comes again, the store answers.
"""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from omniopd.branches import answer_ids, continuation_branch
from omniopd.losses.preference import pair_loss, pair_slope
from omniopd.method import Facts, Method, StudentModel, StudentText
from omniopd.objective import Anchor, Objective
from omniopd.sampling import named_seed
from omniopd.types import AnswerQuery, Answers, Evidence, Prompt, Query, Reply, Rollout, Signal, Writing

PRESENT, INITIAL = "pairs_present", "pairs_initial"  # log-probs of a response's tokens, at the time of the update


class PairObjective(Objective):
    """Settings of every method of pairs. No anchor: what is imitated, or the reference inside the loss, holds the student."""

    anchor: Anchor = Anchor(beta=0, allow_none=True)
    reduction: Literal["term_mean"] = Field(
        default="term_mean",
        description="fixed: the mean over tokens of what is imitated, over pairs of what is compared",
    )
    answers: int = Field(default=1, ge=1, le=128, description="the teacher's answers to choose from, for each pair")
    answer_tokens: int = Field(default=512, ge=1, description="token limit of an answer; longer ones are left out")


class Reward(NamedTuple):
    """What the loss takes for a response's reward g, and its slope in the log-prob of each token, the same for all."""

    value: float
    slope: float


@dataclass(frozen=True)
class Pair:
    """Two rows of one prompt, and what the preference loss says of them."""

    chosen: int
    rejected: int
    good: Reward
    bad: Reward

    @property
    def margin(self) -> float:
        """How far the chosen response is ahead, in nats."""
        return self.good.value - self.bad.value


class Paired(Method):
    """Base of the methods of pairs. A subclass says who writes what is rejected, and what a response's reward is.

    Attributes:
        weight: of the preference loss.
        reference: whether rewards read the initial student's log-probs.
    """

    needs = frozenset({"answer", "group"})
    writes = frozenset({"initial"})
    keeps_initial = True
    decides = True  # which answer each prompt has
    weight: float = 1.0
    reference: ClassVar[bool] = False

    def __init__(self, config: PairObjective, text: StudentText, seed: int) -> None:
        super().__init__(config, text, seed)
        self.pairing = config
        self.one_process = config.control == "shuffled"  # answers are dealt out over the whole step

    # ------------------------------------------------------------------ what a subclass says

    def imitates(self, step: int) -> bool:
        """Whether the chosen answers' likelihood is part of the loss."""
        return False

    def compares(self, step: int) -> bool:
        """Whether the preference loss is."""
        return True

    @abstractmethod
    def reward(self, rollout: Rollout) -> Reward:
        """Of a response, from what was measured of it."""

    @abstractmethod
    def rejected(self, prompt: Prompt, row: int, step: int) -> Writing:
        """Who writes a rejected response."""

    def usable(self, prompt: Prompt, reply: Reply) -> bool:
        """Whether an answer of the teacher's that ended by itself may be chosen."""
        return True

    def unfit(self, rollout: Rollout) -> str:
        """Why a text can't stand as the rejected one; "" if it can."""
        return ""

    # ------------------------------------------------------------------ rows

    def is_chosen(self, row: int) -> bool:
        """Whether a row is the first of a pair."""
        place = row % self.group
        return place % 2 == 0 and place + 1 < self.group

    def is_rejected(self, row: int) -> bool:
        """Whether a row is the second of a pair."""
        return row % self.group % 2 == 1

    def named(self, purpose: str, prompt: Prompt, row: int) -> int:
        """A seed for all steps in which the prompt has this pair."""
        return named_seed(self.seed, purpose, prompt.id, row % self.group // 2) % 2**31

    # ------------------------------------------------------------------ hooks

    def before(self, prompts: Mapping[int, Prompt], step: int) -> list[Query]:
        """Answers for the chosen rows; in the control, to another prompt of the step."""
        asked = {row: prompt for row, prompt in prompts.items() if self.is_chosen(row)}
        if self.objective.control == "shuffled":
            others = _others(prompts.values(), random.Random(named_seed(self.seed, "control", step)))
            asked = {row: others[prompt.id] for row, prompt in asked.items() if prompt.id in others}
        config = self.pairing
        return [
            AnswerQuery(prompt, row, config.answers, config.answer_tokens, self.named("answers", prompt, row))
            for row, prompt in asked.items()
        ]

    def writings(self, prompts: Mapping[int, Prompt], evidence: Sequence[Evidence], step: int) -> dict[int, Writing]:
        """The teacher's answer, whole, or what is to be rejected; nothing where nothing is compared."""
        written = dict.fromkeys(prompts, Writing(blank=True))
        if not self.compares(step):
            return written
        chosen, _ = self._chosen(evidence, step)
        for row, reply in chosen.items():
            written[row] = Writing(begins=answer_ids(reply, self.text), whole=True)
        return written | {row: self.rejected(prompts[row], row, step) for row in prompts if self.is_rejected(row)}

    def ask(self, rollout: Rollout, row: int, step: int) -> list[Query]:
        """Nothing: what the student writes is not shown to the teacher."""
        return []

    def measure(
        self, rollouts: Mapping[int, Rollout], evidence: Sequence[Evidence], student: StudentModel
    ) -> Mapping[int, Facts]:
        """Log-probs at the weights that are about to be updated, and the initial student's."""
        rows = [row for row, rollout in rollouts.items() if rollout.ids]
        written = [rollouts[row] for row in rows]
        facts = {row: {PRESENT: logp} for row, logp in zip(rows, student.logprobs(written), strict=True)}
        if self.reference:
            for row, logp in zip(rows, student.initial_logprobs(written), strict=True):
                facts[row][INITIAL] = logp
        return facts

    def read(self, rollouts: Sequence[Rollout], evidence: Sequence[Evidence], step: int) -> Signal:
        """Chosen answers as branches, pairs as values. A pair that can't be made is a drop, with its reason."""
        chosen, drops = self._chosen(evidence, step)
        drops["unasked"] = sum(map(self.is_chosen, range(len(rollouts)))) - len(chosen) - drops.total()
        pairs = []
        for row in sorted(chosen) if self.compares(step) else ():
            both = rollouts[row].ids and rollouts[row + 1].ids
            if reason := self.unfit(rollouts[row + 1]) if both else "empty":
                drops[reason] += 1
                continue
            pair = Pair(row, row + 1, self.reward(rollouts[row]), self.reward(rollouts[row + 1]))
            if math.isfinite(pair.margin):
                pairs.append(pair)
            else:
                drops["not_finite"] += 1
        branches = [
            continuation_branch(rollouts[row], row, "", reply, 1.0, self.text)
            for row, reply in sorted(chosen.items())
            if self.imitates(step)
        ]
        values, mask = _placed(pairs, rollouts, self.weight)
        learned = tuple(branch for branch in branches if branch is not None)
        return Signal(
            values_BT=values,
            mask_BT=mask,
            branches=learned,
            drops=+drops,
            rejects=sum((Counter(found.rejected) for found in evidence if isinstance(found, Answers)), Counter()),
            stats=_figures(pairs, rollouts) | {"branch_tokens": float(sum(len(one.ids) for one in learned))},
        )

    def cautions(self) -> list[str]:
        """See `Method`."""
        odd = "train.rollouts_per_prompt is odd: of each prompt one rollout has no partner and stays empty"
        return [odd] if self.group % 2 else []

    def _chosen(self, evidence: Sequence[Evidence], step: int) -> tuple[dict[int, Reply], Counter[str]]:
        """The chosen answer of each row that has one, drawn by name from those that are usable; why others have none."""
        chosen, drops = dict[int, Reply](), Counter[str]()
        for found in evidence:
            if not isinstance(found, Answers):
                continue
            row, ended = found.query.row, [reply for reply in found.replies if reply.finish == "stop"]
            if usable := [reply for reply in ended if self.usable(found.query.prompt, reply)]:
                chosen[row] = usable[named_seed(self.seed, "chosen", step, row) % len(usable)]
            elif ended:
                drops["chosen_not_right"] += 1
            else:
                drops[
                    "cut"
                    if found.replies
                    else max(found.rejected, key=found.rejected.__getitem__, default="unanswered")
                ] += 1
        return chosen, drops


def _others(prompts: Collection[Prompt], dealer: random.Random) -> dict[str, Prompt]:
    """Another prompt for each, by id: the next one in a random circle; none where there is but one."""
    known = {prompt.id: prompt for prompt in prompts}
    circle = dealer.sample(sorted(known), len(known))
    return {one: known[other] for one, other in pairwise([*circle, circle[0]]) if one != other} if circle else {}


def _placed(
    pairs: Sequence[Pair], rollouts: Sequence[Rollout], weight: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Values and masks [T] of all rollouts, such that their mean over the N masked tokens is the mean over the P pairs."""
    values = [torch.zeros(len(rollout)) for rollout in rollouts]
    mask = [torch.zeros(len(rollout), dtype=torch.bool) for rollout in rollouts]
    tokens = sum(len(rollouts[pair.chosen]) + len(rollouts[pair.rejected]) for pair in pairs)
    for pair, slope in zip(pairs, pair_slope(_margins(pairs)).tolist(), strict=True):
        share = weight * tokens / len(pairs) * slope
        values[pair.chosen].fill_(share * pair.good.slope)
        values[pair.rejected].fill_(-share * pair.bad.slope)
        mask[pair.chosen].fill_(True)
        mask[pair.rejected].fill_(True)
    return tuple(values), tuple(mask)


def _margins(pairs: Sequence[Pair]) -> Tensor:
    """[P], float64."""
    return torch.tensor([pair.margin for pair in pairs], dtype=torch.float64)


def _figures(pairs: Sequence[Pair], rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """What the log says of the pairs: their number and, as means over them, loss, margin and both lengths in tokens."""
    if not pairs:
        return {"pairs": 0.0}
    margins = _margins(pairs)
    return {
        "pairs": float(len(pairs)),
        "preference_loss": float(pair_loss(margins).mean()),
        "margin": float(margins.mean()),
        "ahead_share": float((margins > 0).double().mean()),
        "chosen_tokens": fmean(len(rollouts[pair.chosen]) for pair in pairs),
        "rejected_tokens": fmean(len(rollouts[pair.rejected]) for pair in pairs),
    }
