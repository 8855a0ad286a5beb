"""Some of a step's rollouts are the teacher's own answers, plain text from any teacher.

- `loss: nll`: such a row has no tokens of the student's; its answer is a branch right after the prompt, learned by its
  likelihood in a term of its own: `weight` times the mean of -log p. Never an advantage, which is valid on the student's own
  draws alone. The cold start of SG-OPD (arXiv 2606.09304; reconstructed, see `omniopd.methods.sg_opd`)
- `loss: divergence`: the answer is read as if it were a rollout, under the dense divergence. The off-policy share
  `1 - lambda` of GKD (arXiv 2306.13649 [paper])

    rho(k) = share (1 - k / K),      k = step - 1;     rho(k) = share where `steps` is not set

Of the first n rows of a step, round(n rho(k)) are the teacher's, spread evenly over the step [ours]: in a group of G rollouts
of one prompt round(G rho), or one off where G rho is no whole number. With `accept: right` the first of `tries` answers that
the task's verifier accepts is taken, all asked for at once. A row without such an answer stays the student's. Answers that
the token limit cut are not taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from omniopd.branches import answer_ids
from omniopd.draft import Draft
from omniopd.errors import ConfigError
from omniopd.method import StudentText
from omniopd.objective import Objective
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.sampling import named_seed
from omniopd.types import AnswerQuery, Answers, Branch, Evidence, Prompt, Query, Reply, Writing, asked_by

NAME = "teacher_rollouts"


class TeacherRolloutsSettings(PartSettings):
    """How many rollouts are the teacher's, which of its answers serve, and how they are learned."""

    name: Literal["teacher_rollouts"] = "teacher_rollouts"
    share: float = Field(default=0.5, ge=0, le=1, description="rho_0, of the rollouts at the first step")
    steps: int | None = Field(
        default=None, ge=1, description="K, steps until the share is 0; SG-OPD: 10-15% of the run's. Unset: it stays"
    )
    loss: Literal["nll", "divergence"] = Field(
        default="nll", description="nll: by their likelihood; divergence: as rollouts, with form: dense"
    )
    weight: float = Field(default=1.0, ge=0, description="nll: weight of the mean -log p of the teacher's tokens")
    accept: Literal["all", "right"] = Field(default="all", description="right: only what the task's verifier accepts")
    tries: int = Field(default=1, ge=1, le=128, description="m, answers asked for; the first that serves is taken")
    answer_tokens: int = Field(default=512, ge=1, description="token limit of an answer; longer ones are not taken")

    @property
    def neutral(self) -> bool:
        return self.share == 0


@PARTS.register(NAME)
class TeacherRollouts(Part):
    """The shared mixer of the teacher's text."""

    Config = TeacherRolloutsSettings
    slots = ("sampling", "objective", "schedule")
    place = Place.SAMPLE
    decides = False
    needs = frozenset({"answer"})
    neutral: ClassVar = {"share": 0.0}

    def __init__(self, config: TeacherRolloutsSettings, objective: Objective, text: StudentText, seed: int) -> None:
        super().__init__(config, objective, text, seed)
        if config.accept == "right":
            self.needs = self.needs | {"verify"}
        if config.loss == "divergence" and getattr(objective, "form", "") != "dense":
            raise ConfigError(
                f"method.parts: {NAME}.loss=divergence is read with form: dense only, since what the teacher wrote has no "
                "log-ratio; set method.form=dense, or loss=nll"
            )

    def before(self, prompts: Mapping[int, Prompt], step: int) -> list[Query]:
        """Answers for each row that is to be the teacher's."""
        rho = linear_share(self.config.share, step - 1, self.config.steps)
        return [
            AnswerQuery(prompt, row, self.config.tries, self.config.answer_tokens, self._seed(step, row), by=NAME)
            for row, prompt in prompts.items()
            if falls_on(row, rho)
        ]

    def writings(self, prompts: Mapping[int, Prompt], evidence: Sequence[Evidence], step: int) -> dict[int, Writing]:
        """Answers as whole rollouts, or none of the student's."""
        chosen = {row: ids for row, ids in self._chosen(evidence).items() if ids}
        if self.config.loss == "divergence":
            return {row: Writing(begins=ids, whole=True) for row, ids in chosen.items()}
        return {row: Writing(blank=True) for row in chosen}

    def apply(self, draft: Draft) -> None:
        """See `Part`."""
        found = self._chosen(draft.evidence)
        chosen = {row: ids for row, ids in found.items() if ids}
        if self.config.loss == "nll" and chosen:
            draft.branch([Branch(row, 0, ids, 1.0) for row, ids in chosen.items()], self.config.weight)
        draft.note(
            teacher_rollouts=float(len(chosen)),
            teacher_rollouts_refused=float(len(found) - len(chosen)),
            teacher_rollout_tokens=float(sum(map(len, chosen.values()))),
        )

    def _chosen(self, evidence: Sequence[Evidence]) -> dict[int, tuple[int, ...]]:
        """The first answer that serves, in the student's tokens, by the row that asked; () where none does."""
        found = [one for one in asked_by(evidence, NAME) if isinstance(one, Answers)]
        served = {one.query.row: [r for r in one.replies if self._serves(one.query.prompt, r)] for one in found}
        return {row: answer_ids(replies[0], self.text) if replies else () for row, replies in served.items()}

    def _serves(self, prompt: Prompt, reply: Reply) -> bool:
        if reply.finish == "length":
            return False
        if self.config.accept == "all":
            return True
        return self.check is not None and prompt.reference is not None and bool(self.check(prompt, reply.text))

    def _seed(self, step: int, row: int) -> int:
        return named_seed(self.seed, NAME, step, row) % 2**31


def linear_share(share: float, k: int, steps: int | None) -> float:
    """`share (1 - k / steps)`, 0 from `steps` on; `share` where there are none."""
    return share if steps is None else share * max(0.0, 1 - k / steps)


def falls_on(row: int, share: float) -> bool:
    """Whether the row is one of those that bring the count among the first n to `round(n share)`, for every n."""
    return math.floor((row + 1) * share + 0.5) > math.floor(row * share + 0.5)
