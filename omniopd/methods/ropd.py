"""ROPD (arXiv 2605.07396): a rubric that contrasts the teacher's answers with the student's rollouts is the reward.

    score(y) = sum_k w_k v_k(y) / sum_k w_k;   A = score - mean of its group;   L = - mean A log p(y)         [official code]

For each prompt: 4 answers of the teacher's, one rubric of 4 to 12 weighted yes/no criteria that the judge writes with those
answers and the group's rollouts before it, and one check of each rollout against it. Advantages are centred, not divided by
the standard deviation. A criterion without a verdict leaves both sums [ours]; a rollout without any, a prompt without a
rubric or without answers are masked and counted. Answers are asked for by names that hold the prompt, not the step: when it
comes again, the store answers.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from omniopd.groups import by_prompt, centred, dealt, reward_signal
from omniopd.judging import (
    CHECK,
    RUBRIC,
    Criterion,
    checking,
    digest,
    is_check,
    is_rubric,
    rubric_of,
    rubric_writing,
    verdicts_of,
)
from omniopd.method import Method, StudentText
from omniopd.objective import Objective
from omniopd.registry import METHODS
from omniopd.sampling import named_seed
from omniopd.types import AnswerQuery, Answers, Evidence, Prompt, Query, Rollout, Signal


class RopdConfig(Objective):
    """How many answers and criteria. How many rollouts are compared, `train.rollouts_per_prompt` says; published: 8."""

    name: Literal["ropd"] = "ropd"
    answers: int = Field(default=4, ge=1, le=128, description="the teacher's answers to each prompt")
    answer_tokens: int = Field(default=512, ge=1, description="token limit of an answer; longer ones are left out")
    min_criteria: int = Field(default=4, ge=1, description="a rubric of fewer is none")
    max_criteria: int = Field(default=12, ge=1, description="what follows so many is left out")
    rubric_tokens: int = Field(default=1024, ge=1, description="token limit of a rubric")
    check_tokens: int = Field(default=256, ge=1, description="token limit of a check")

    @model_validator(mode="after")
    def _in_order(self) -> RopdConfig:
        if self.min_criteria > self.max_criteria:
            raise ValueError(
                f"min_criteria: {self.min_criteria} is more than max_criteria, {self.max_criteria}; lower it"
            )
        return self


@METHODS.register("ropd")
class Ropd(Method):
    """Rewards by rubric."""

    Config: ClassVar[type[Objective]] = RopdConfig
    paper = "2605.07396"
    neutral: ClassVar = (
        "none: without the teacher's log-probs nothing gives the log-ratio of plain distillation; one criterion that is the "
        "task's verifier is GRPO on the verifier"
    )
    needs = frozenset({"answer", "judge", "group"})
    decides = True  # which criteria each prompt has
    one_process = True  # a rubric is written from all rollouts of its prompt

    def __init__(self, config: RopdConfig, text: StudentText, seed: int) -> None:
        super().__init__(config, text, seed)
        self.config = config

    def before(self, prompts: Mapping[int, Prompt], step: int) -> list[Query]:
        """The teacher's answers, for the first rollout of each prompt."""
        config = self.config
        return [
            AnswerQuery(prompts[rows[0]], rows[0], config.answers, config.answer_tokens, self._seed("teacher", id))
            for id, rows in by_prompt(prompts).items()
        ]

    def ask(self, rollout: Rollout, row: int, step: int) -> list[Query]:
        """Nothing of a rollout by itself."""
        return []

    def again(self, rollouts: Mapping[int, Rollout], evidence: Sequence[Evidence], step: int) -> list[Query]:
        """A rubric for each prompt, then a check of each rollout."""
        groups, asked = by_prompt(rollouts), [one.query.prompt for one in evidence if isinstance(one, Answers)]
        if not any(map(is_rubric, asked)):
            return [self._rubric(rollouts, groups[id], texts) for id, texts in self._answers(evidence).items()]
        if any(map(is_check, asked)):
            return []
        return [
            self._judge(checking(rollouts[row].prompt, criteria, rollouts[row].text), row, self.config.check_tokens)
            for id, criteria in self._rubrics(rollouts, evidence, step).items()
            for row in groups[id]
            if rollouts[row].text.strip()
        ]

    def read(self, rollouts: Sequence[Rollout], evidence: Sequence[Evidence], step: int) -> Signal:
        """See `Method`."""
        answered, rubrics = self._answers(evidence), self._rubrics(dict(enumerate(rollouts)), evidence, step)
        replies = {one.query.row: one.replies for one in _judged(evidence) if is_check(one.query.prompt)}
        drops, rewards, marks = Counter[str](), list[float | None](), list[bool | None]()
        for row, rollout in enumerate(rollouts):
            criteria, said = rubrics.get(rollout.prompt.id, []), replies.get(row, ())
            verdicts = verdicts_of(said[0], len(criteria)) if said else [None] * len(criteria)
            rewards.append(weighted_share([one.weight for one in criteria], verdicts))
            marks += verdicts
            if rewards[-1] is None:
                drops["no verdict" if criteria else "no rubric" if rollout.prompt.id in answered else "no answer"] += 1
        return reward_signal(
            rollouts,
            rewards,
            centred,
            drops=drops,
            rejects=sum((Counter(one.rejected) for one in evidence), Counter[str]()),
            stats={
                "rubric_criteria": fmean(map(len, rubrics.values())) if rubrics else None,
                "criteria_met": fmean(known)
                if (known := [float(mark) for mark in marks if mark is not None])
                else None,
                "criteria_unmarked": fmean(mark is None for mark in marks) if marks else None,
            },
        )

    def describe(self) -> str:
        """The wordings that the verdicts are due to."""
        return f"verdicts of a judge on the criteria of its own rubrics (wordings {digest(RUBRIC, CHECK)})"

    def _answers(self, evidence: Sequence[Evidence]) -> dict[str, list[str]]:
        """The teacher's whole answers by prompt, where there are any."""
        own = [one for one in evidence if isinstance(one, Answers) and not one.query.judge]
        found = {one.query.prompt.id: [r.text for r in one.replies if r.finish == "stop"] for one in own}
        return {id: texts for id, texts in found.items() if texts}

    def _rubric(self, rollouts: Mapping[int, Rollout], rows: Sequence[int], answers: Sequence[str]) -> Query:
        config, responses = self.config, [rollouts[row].text for row in rows]
        asked = rubric_writing(rollouts[rows[0]].prompt, answers, responses, config.min_criteria, config.max_criteria)
        return self._judge(asked, rows[0], config.rubric_tokens)

    def _rubrics(
        self, rollouts: Mapping[int, Rollout], evidence: Sequence[Evidence], step: int
    ) -> dict[str, list[Criterion]]:
        """The criteria by prompt, where there are any; in the control each prompt has those of another."""
        found: dict[str, list[Criterion]] = {}
        for one in _judged(evidence):
            if is_rubric(one.query.prompt) and one.replies:
                criteria = rubric_of(one.replies[0], self.config.min_criteria, self.config.max_criteria)
                if criteria is not None:
                    found[rollouts[one.query.row].prompt.id] = criteria
        if self.objective.control == "shuffled":
            given = dealt(sorted(found), random.Random(named_seed(self.seed, "control", step)))
            return {id: found[given[id]] for id in found}
        return found

    def _judge(self, prompt: Prompt, row: int, max_tokens: int) -> Query:
        return AnswerQuery(prompt, row, 1, max_tokens, self._seed("judge"), judge=True)

    def _seed(self, *names: str) -> int:
        return named_seed(self.seed, *names) % 2**31


def weighted_share(weights: Sequence[float], verdicts: Sequence[bool | None]) -> float | None:
    """`sum w_k v_k / sum w_k` over the criteria [K] that have a verdict; None where none has."""
    known = [(weight, verdict) for weight, verdict in zip(weights, verdicts, strict=True) if verdict is not None]
    return sum(weight * verdict for weight, verdict in known) / sum(weight for weight, _ in known) if known else None


def _judged(evidence: Sequence[Evidence]) -> list[Answers]:
    """What the judge said."""
    return [one for one in evidence if isinstance(one, Answers) and one.query.judge]
