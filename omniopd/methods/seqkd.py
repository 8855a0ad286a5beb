"""Sequence-level distillation (Kim & Rush 2016, arXiv 1606.07947): supervised training on the teacher's own answers.

    L = - mean_t log p(y_t),    y a teacher's answer, the end of the turn included

The baseline of every text-only comparison. The student writes nothing; each answer is a branch right after its prompt, which
is rendered with the student's own template. Answers are asked for by names that hold the prompt, not the step: in a second
epoch the store answers. One that the token limit cut is kept there, since it is paid for, and never learned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from omniopd.branches import continuation_branch
from omniopd.method import Method, StudentText
from omniopd.objective import Anchor, Objective
from omniopd.registry import METHODS
from omniopd.sampling import named_seed
from omniopd.types import AnswerQuery, Answers, Evidence, Query, Rollout, Signal


class SeqKDConfig(Objective):
    """How many answers to ask for, how long, and how often. No anchor, since there are no student tokens to hold."""

    name: Literal["seqkd"] = "seqkd"
    anchor: Anchor = Anchor(beta=0.0, allow_none=True)
    answers: int = Field(default=1, ge=1, le=128, description="answers asked for per prompt")
    answer_tokens: int = Field(default=512, ge=1, description="token limit of an answer; longer ones are dropped")
    fresh: bool = Field(
        default=False, description="new answers each time that a prompt comes; false: those of the first time, stored"
    )


@METHODS.register("seqkd")
class SeqKD(Method):
    """Learn the teacher's own answers."""

    Config: ClassVar[type[Objective]] = SeqKDConfig
    paper = "1606.07947"
    neutral: ClassVar = "none: without the teacher's log-probs nothing gives the log-ratio of plain distillation"
    needs = frozenset({"answer"})
    on_policy = False

    def __init__(self, config: SeqKDConfig, text: StudentText, seed: int) -> None:
        super().__init__(config, text, seed)
        self.config = config

    def ask(self, rollout: Rollout, row: int, step: int) -> list[Query]:
        """Whole answers to the prompt."""
        which = (step, row) if self.config.fresh else (rollout.prompt.id, row % self.group)
        seed = named_seed(self.seed, "teacher", *which) % 2**31
        return [AnswerQuery(rollout.prompt, row, self.config.answers, self.config.answer_tokens, seed)]

    def read(self, rollouts: Sequence[Rollout], evidence: Sequence[Evidence], step: int) -> Signal:
        """Whole answers become branches at 0; one that the token limit cut is dropped, not learned half."""
        drops, rejects, branches = Counter[str](), Counter[str](), []
        for found in evidence:
            if not isinstance(found, Answers):
                continue
            rejects.update(found.rejected)
            for reply in found.replies:
                if reply.finish == "length":
                    drops["cut"] += 1
                    continue
                row = found.query.row
                branch = continuation_branch(rollouts[row], row, "", reply, 1.0, self.text)
                if branch is not None:
                    branches.append(branch)
            if not found.replies:
                drops[max(found.rejected, key=lambda r: found.rejected[r], default="unanswered")] += 1
        return Signal(
            values_BT=tuple(torch.zeros(len(r)) for r in rollouts),
            mask_BT=tuple(torch.zeros(len(r), dtype=torch.bool) for r in rollouts),
            branches=tuple(branches),
            drops=drops,
            rejects=rejects,
            stats={"branch_tokens": float(sum(len(b.ids) for b in branches))},
        )
