"""OVD (arXiv 2601.21968): the teacher grades what the student wrote, and shows how where the grade is low.

    accept(y) = [grade(y) >= theta];   A = group-normalised outcome of the accepted;   L = - mean A log p(y) - mean log p(y^T)

The judge gives each rollout a grade from 0 to 9 [paper]. It is a filter and enters no term of the loss; the reward is the
task's own verdict. A rejected rollout is replaced by an answer of the teacher's to the same prompt, learned token by token
as an accepted rollout of advantage 1 would be [ours]. A reply without a grade, or a rollout without an outcome, is masked
and counted. Accounts differ on whether the grade is a reward instead; `use: reward` takes grade / 9 [second-hand]. Theta, the
deviation and all else are [ours]. Of the later version, which keeps a good prefix, nothing is here.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from omniopd.branches import continuation_branch
from omniopd.groups import Deviation, normaliser, reward_signal
from omniopd.judging import BEST, GRADE, digest, expected_grade, grade_of, grading
from omniopd.method import Method, StudentText
from omniopd.objective import Objective, Reduction
from omniopd.registry import METHODS
from omniopd.sampling import named_seed
from omniopd.types import AnswerQuery, Answers, Branch, Evidence, Query, Rollout, Signal

REJECTED = "rejected"


class OvdConfig(Objective):
    """What the grade is used for, and what becomes of rollouts below it."""

    name: Literal["ovd"] = "ovd"
    reduction: Reduction = Field(
        default="token_mean", description="as of every method; token_mean: tokens of both sides count alike"
    )
    use: Literal["filter", "reward"] = Field(
        default="filter", description="filter: the grade decides which rollouts count; reward: it is the reward itself"
    )
    theta: int = Field(default=6, ge=0, le=BEST, description="filter: the least grade that is accepted; 0: no judge")
    replace: bool = Field(default=True, description="filter: the teacher's answer in the place of what is rejected")
    answer_tokens: int = Field(default=512, ge=1, description="token limit of such an answer; longer ones are left out")
    judge_tokens: int = Field(default=256, ge=1, description="token limit of a judge's reply")
    deviation: Deviation = Field(default="population", description="which standard deviation the group's rewards have")

    @model_validator(mode="after")
    def _a_reward_filters_nothing(self) -> OvdConfig:
        if self.use == "reward" and self.model_fields_set & {"theta", "replace"}:
            raise ValueError("theta: and replace are read with use: filter only; set that, or leave them out")
        return self


@METHODS.register("ovd")
class Ovd(Method):
    """Rollouts filtered by grade, the rejected ones replaced."""

    Config: ClassVar[type[Objective]] = OvdConfig
    paper = "2601.21968"
    neutral: ClassVar = (
        "none: without the teacher's log-probs nothing gives the log-ratio of plain distillation; theta: 0 with "
        "replace: false is plain GRPO on the task's verdicts"
    )
    needs = frozenset({"answer", "judge", "verify", "group"})  # of the defaults

    def __init__(self, config: OvdConfig, text: StudentText, seed: int) -> None:
        super().__init__(config, text, seed)
        self.config = config
        filters = config.use == "filter"
        self.graded = not filters or config.theta > 0
        self.replaces = filters and config.theta > 0 and config.replace
        asked = {"answer": self.replaces, "judge": self.graded, "verify": filters, "group": True}
        self.needs = frozenset(need for need, has in asked.items() if has)
        self.decides = self.graded
        self.one_process = config.control == "shuffled"  # grades are dealt out over the step

    def ask(self, rollout: Rollout, row: int, step: int) -> list[Query]:
        """A grade; equal responses to one prompt get one and the same, whenever they are written."""
        if not self.graded or not rollout.text.strip():
            return []
        asked, seed = grading(rollout.prompt, rollout.text), named_seed(self.seed, "judge") % 2**31
        return [AnswerQuery(asked, row, 1, self.config.judge_tokens, seed, judge=True)]

    def again(self, rollouts: Mapping[int, Rollout], evidence: Sequence[Evidence], step: int) -> list[Query]:
        """The teacher's own answers in the place of what was rejected."""
        shown = {found.query.row for found in evidence if isinstance(found, Answers) and not found.query.judge}
        return [
            AnswerQuery(rollouts[row].prompt, row, 1, self.config.answer_tokens, self._seed(step, row))
            for row, grade in self._grades(evidence, step).items()
            if self.replaces and grade < self.config.theta and row not in shown
        ]

    def read(self, rollouts: Sequence[Rollout], evidence: Sequence[Evidence], step: int) -> Signal:
        """See `Method`."""
        grades = self._grades(evidence, step)
        found = [self._reward(rollout, grades.get(row)) for row, rollout in enumerate(rollouts)]
        branches = [branch for one in evidence if isinstance(one, Answers) for branch in self._shown(rollouts, one)]
        expected = [g for one in _verdicts(evidence) for r in one.replies if (g := expected_grade(r)) is not None]
        reasons = Counter(one for one in found if isinstance(one, str))
        rejected = reasons.pop(REJECTED, 0)  # no hole: the judge spoke about it
        signal = reward_signal(
            rollouts,
            [None if isinstance(one, str) else one for one in found],
            normaliser(self.config.deviation),
            branches,
            reasons,
            sum((Counter(one.rejected) for one in evidence), Counter[str]()),
            {
                "grade_mean": fmean(grades.values()) if grades else None,
                "grade_expected": fmean(expected) if expected else None,
                "accepted_share": 1 - rejected / len(grades) if grades else None,
                "answers_learned": float(len(branches)),
            },
        )
        known = [len(r) for r, one in zip(rollouts, found, strict=True) if not isinstance(one, str) or one == REJECTED]
        return replace(signal, spoken=sum(known))

    def describe(self) -> str:
        """The wording that the grades are due to, and what they are for."""
        if not self.graded:
            return "the task's verdicts"
        return f"grades by a judge (wording {digest(GRADE)}), as a {self.config.use}"

    def _grades(self, evidence: Sequence[Evidence], step: int) -> dict[int, int]:
        """Grades by row, those that there are; in the control they are dealt out at random."""
        read = {one.query.row: grade_of(one.replies[0]) for one in _verdicts(evidence) if one.replies}
        grades = {row: grade for row, grade in sorted(read.items()) if grade is not None}
        if self.objective.control == "shuffled":
            dealer = random.Random(named_seed(self.seed, "control", step))
            return dict(zip(grades, dealer.sample(list(grades.values()), len(grades)), strict=True))
        return grades

    def _reward(self, rollout: Rollout, grade: int | None) -> float | str:
        """The reward, or the reason why there is none."""
        if self.graded and grade is None:
            return "no verdict"
        if self.config.use == "reward" and grade is not None:
            return grade / BEST
        if grade is not None and grade < self.config.theta:
            return REJECTED
        right = self.verdict(rollout)
        return "no outcome" if right is None else float(right)

    def _shown(self, rollouts: Sequence[Rollout], found: Answers) -> list[Branch]:
        """The teacher's answers as branches right after their prompt; none of a judge's replies."""
        replies = [] if found.query.judge else [reply for reply in found.replies if reply.finish == "stop"]
        row = found.query.row
        made = [continuation_branch(rollouts[row], row, "", reply, 1.0, self.text) for reply in replies]
        return [branch for branch in made if branch is not None]

    def _seed(self, step: int, row: int) -> int:
        return named_seed(self.seed, "teacher", step, row) % 2**31


def _verdicts(evidence: Sequence[Evidence]) -> list[Answers]:
    """What the judge said."""
    return [one for one in evidence if isinstance(one, Answers) and one.query.judge]
