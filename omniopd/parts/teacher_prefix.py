"""Rollouts begin with a piece of a teacher's answer, whose length goes to zero on a cosine.

    L(k) = L_max (1 + cos(pi k / K)) / 2,      k = step - 1;     l = min(tokens of the answer, L(k))

TrOPD (arXiv 2606.01249 [paper]): early rollouts are written where the teacher would be, late ones are the student's own. The
first l tokens are no draws of the student's, so they have no log-ratio: they are left out of the step's signal and learned
by their likelihood in a term of their own, `beta` times the mean of -log p (the published K1 forward KL, whose gradient that
is; with `reduction: token_mean` over all tokens of the step, as printed).

Prefixes are plain text, so any teacher that answers serves [paper]. [ours]: the share of rollouts, lengths drawn below the
cap, one answer for each rollout, and that the end of the text is never given: the student writes one token at least.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from omniopd.draft import Draft
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.sampling import named_seed
from omniopd.types import AnswerQuery, Answers, Branch, Evidence, Prompt, Query, Writing, asked_by

NAME = "teacher_prefix"


class TeacherPrefixSettings(PartSettings):
    """How long, for how long, and how much it is learned."""

    name: Literal["teacher_prefix"] = "teacher_prefix"
    tokens: int = Field(
        default=8096, ge=0, description="L_max; the published one is the longest rollout, so set student.max_new_tokens"
    )
    steps: int = Field(default=200, ge=1, description="K, steps until nothing is given any more: those of the run")
    share: float = Field(default=1.0, ge=0, le=1, description="of the rollouts that begin so [ours]")
    length: Literal["max", "uniform"] = Field(
        default="max", description="max: L(k) or the whole answer; uniform: a draw from 0 to that [ours]"
    )
    answer_tokens: int | None = Field(
        default=None, ge=1, description="token limit of an answer, longer ones do not serve; unset: as `tokens`"
    )
    beta: float = Field(default=0.001, ge=0, description="weight of the given tokens' mean -log p; 0: only read")

    @property
    def neutral(self) -> bool:
        return self.tokens == 0 or self.share == 0


@PARTS.register(NAME)
class TeacherPrefix(Part):
    """The teacher begins, the student goes on."""

    Config = TeacherPrefixSettings
    slots = ("sampling", "objective", "schedule")
    place = Place.SAMPLE
    decides = False
    needs = frozenset({"answer"})
    writes = frozenset({"text"})
    refuses: ClassVar[Mapping[str, str]] = {
        "teacher_rollouts": "the teacher would write one rollout twice; leave one of them out"
    }
    neutral: ClassVar = {"tokens": 0}

    def before(self, prompts: Mapping[int, Prompt], step: int) -> list[Query]:
        """An answer for each rollout that is to begin with one."""
        if not cosine_length(self.config.tokens, step - 1, self.config.steps):
            return []
        most = self.config.answer_tokens or self.config.tokens
        rows = [row for row in prompts if self._draw(step, row).random() < self.config.share]
        return [AnswerQuery(prompts[row], row, 1, most, self._seed(step, row), by=NAME) for row in rows]

    def writings(self, prompts: Mapping[int, Prompt], evidence: Sequence[Evidence], step: int) -> dict[int, Writing]:
        """What each begins with; rollouts whose answer did not come are all the student's."""
        found = {row: self._begins(answers, step) for row, answers in _answers(evidence).items()}
        return {row: Writing(begins=begins) for row, begins in found.items() if begins}

    def apply(self, draft: Draft) -> None:
        """Given tokens leave the signal and become branches right after the prompt."""
        asked, branches = _answers(draft.evidence), []
        for row in asked:
            rollout = draft.rollouts[row]
            if rollout.given:
                branches.append(Branch(row, 0, rollout.ids[: rollout.given], 1.0))
                draft.mask[row] = draft.mask[row] & (torch.arange(len(rollout)) >= rollout.given)
        if branches and self.config.beta:
            draft.branch(branches, self.config.beta)
        lengths = [len(branch.ids) for branch in branches]
        tokens = sum(map(len, draft.rollouts))
        draft.note(
            prefix_tokens=sum(lengths) / len(lengths) if lengths else 0.0,
            prefix_share=sum(lengths) / tokens if tokens else None,
            prefix_missing=float(sum(not answers.replies for answers in asked.values())),
        )

    def _begins(self, answers: Answers, step: int) -> tuple[int, ...]:
        """The first tokens of an answer, its end left out."""
        if not answers.replies:
            return ()
        reply = answers.replies[0]
        ids, _ = self.text.encode(reply.text)
        whole = len(ids) - (reply.finish == "length")  # the last token of a cut text may stop inside a word
        most = min(whole, cosine_length(self.config.tokens, step - 1, self.config.steps))
        if self.config.length == "uniform":
            draw = self._draw(step, answers.query.row)
            draw.random()  # the one that chose the row
            most = draw.randint(0, most)
        return tuple(ids[:most])

    def _seed(self, step: int, row: int) -> int:
        return named_seed(self.seed, NAME, step, row) % 2**31

    def _draw(self, step: int, row: int) -> random.Random:
        return random.Random(self._seed(step, row))


def cosine_length(longest: int, k: int, steps: int) -> int:
    """`longest (1 + cos(pi k / steps)) / 2` tokens, rounded; 0 from `steps` on."""
    return round(longest * 0.5 * (1 + math.cos(math.pi * min(k, steps) / steps)))


def _answers(evidence: Sequence[Evidence]) -> dict[int, Answers]:
    """The answers that this part asked for, by row."""
    return {one.query.row: one for one in asked_by(evidence, NAME) if isinstance(one, Answers)}
