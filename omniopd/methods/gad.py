"""GAD (arXiv 2511.10643): a discriminator between the teacher's and the student's answers is the reward.

    max_G min_D E[ -log sigmoid(D(x, y_T) - D(x, G(x))) ]                                            [paper][official code]
    G: A_i = group-normalised D(x, y_i), L = - mean A log p(y) + 0.001 KL
    D: the Bradley-Terry loss of every rollout of a group against the teacher's one answer, after each step

D is a copy of the student with a scalar head on the last token and an AdamW of its own. For the first `warmup_steps` G learns
the teacher's answers by likelihood while D learns to tell the two apart; both go on from there. D moves after its rewards
are read, and they are plain numbers: nothing flows from G's loss into D. A D that stands still is exploited by longer answers
within some hundred steps: watch `mean_length`.

Ours: the population's standard deviation, and no reward where a group's D are equal (the code divides by sd + eps); the KL
is the anchor's, exact, of the initial student to the present one (the code: the low-variance estimate of the reverse). The
clip of the importance ratio never acts in one update per batch.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from omniopd.branches import answer_ids
from omniopd.groups import Deviation, by_prompt, dealt, normaliser, reward_signal
from omniopd.method import Discriminator, Facts, Gradients, Method, StudentModel, StudentText
from omniopd.objective import Anchor, Objective
from omniopd.registry import METHODS
from omniopd.sampling import named_seed
from omniopd.types import AnswerQuery, Answers, Branch, Evidence, Prompt, Query, Rollout, Signal

Text = tuple[Sequence[int], Sequence[int]]  # prompt ids, response ids
REWARD = "gad_reward"  # D of the whole rollout, at each of its tokens


class GadConfig(Objective):
    """The warm-up, and the discriminator's optimizer; the student's is `train`'s."""

    name: Literal["gad"] = "gad"
    anchor: Anchor = Anchor(beta=0.001, where="all")
    warmup_steps: int = Field(
        default=800, ge=0, description="steps of imitation before the rewards; published: one epoch"
    )
    answer_tokens: int = Field(
        default=512, ge=1, description="token limit of the teacher's answers; longer ones are left out"
    )
    learning_rate: float = Field(default=1e-6, gt=0, description="of the discriminator")
    max_grad_norm: float = Field(default=0.2, gt=0, description="of the discriminator")
    deviation: Deviation = Field(default="population", description="which standard deviation the group's rewards have")


@dataclass(frozen=True)
class Lesson:
    """What the discriminator learns from a step: texts, and the slope of its loss in D of each; and figures of that loss."""

    texts: Sequence[Text]
    slopes: Sequence[float]
    figures: Mapping[str, float]


@METHODS.register("gad")
class Gad(Method):
    """Rewards by a discriminator that learns along."""

    Config: ClassVar[type[Objective]] = GadConfig
    paper = "2511.10643"
    neutral: ClassVar = (
        "none: without the teacher's log-probs nothing gives the log-ratio of plain distillation; a constant discriminator "
        "gives advantage 0"
    )
    needs = frozenset({"answer", "group", "fresh"})
    decides = True  # which answer each prompt has
    one_process = True  # the discriminator sees all pairs of a step

    def __init__(self, config: GadConfig, text: StudentText, seed: int) -> None:
        super().__init__(config, text, seed)
        self.config = config
        self._discriminator: Discriminator | None = None
        self._restored: Mapping[str, Any] | None = None  # of one that is not made yet
        self._lesson: Lesson | None = None

    def before(self, prompts: Mapping[int, Prompt], step: int) -> list[Query]:
        """The teacher's answer to each prompt, the same one whenever the prompt comes."""
        seeds = {id: named_seed(self.seed, "teacher", id) % 2**31 for id in by_prompt(prompts)}
        return [
            AnswerQuery(prompts[rows[0]], rows[0], 1, self.config.answer_tokens, seeds[id])
            for id, rows in by_prompt(prompts).items()
        ]

    def ask(self, rollout: Rollout, row: int, step: int) -> list[Query]:
        """Nothing of a rollout by itself."""
        return []

    def measure(
        self, rollouts: Mapping[int, Rollout], evidence: Sequence[Evidence], student: StudentModel
    ) -> Mapping[int, Facts]:
        """D of each rollout, and what D is to learn once they are read."""
        groups, texts, pairs = (
            by_prompt(rollouts),
            list[Text](),
            dict[int, tuple[int, int]](),
        )  # places in texts, by row
        for id, answer in self._answers(evidence).items():
            place = len(texts)
            texts.append((rollouts[groups[id][0]].prompt_ids, answer))
            for row in groups[id]:
                if rollouts[row].ids:
                    pairs[row] = place, len(texts)
                    texts.append((rollouts[row].prompt_ids, rollouts[row].ids))
        values = torch.tensor(self._made(student).values(texts), dtype=torch.float64)
        self._lesson = None
        if pairs:
            taught, written = torch.tensor(list(pairs.values())).T
            loss, slopes = bradley_terry(values, taught, written)
            told = float((values[taught] > values[written]).double().mean())
            self._lesson = Lesson(texts, slopes.tolist(), {"gad_loss": loss, "gad_accuracy": told})
        return {row: {REWARD: [float(values[own])] * len(rollouts[row])} for row, (_, own) in pairs.items()}

    def read(self, rollouts: Sequence[Rollout], evidence: Sequence[Evidence], step: int) -> Signal:
        """See `Method`."""
        answers, warming = self._answers(evidence), step <= self.config.warmup_steps
        groups = by_prompt(dict(enumerate(rollouts)))
        found = [rollout.facts.get(REWARD, ()) for rollout in rollouts]
        lengths = [float(len(ids)) for ids in answers.values()]
        return reward_signal(
            rollouts,
            [values[0] if values and not warming else None for values in found],
            normaliser(self.config.deviation),
            [Branch(groups[id][0], 0, ids, 1.0) for id, ids in answers.items()] if warming else (),
            Counter("no answer" for rollout in rollouts if rollout.prompt.id not in answers),
            sum((Counter(one.rejected) for one in evidence), Counter[str]()),
            {"gad_warmup": float(warming), "answer_length": fmean(lengths) if lengths else None},
        )

    def after(
        self, rollouts: Sequence[Rollout], signal: Signal, step: int, gradients: Gradients
    ) -> Mapping[str, float]:
        """The discriminator's step."""
        lesson, self._lesson = self._lesson, None
        if lesson is None or self._discriminator is None:
            return {}
        return {**lesson.figures, "gad_grad_norm": self._discriminator.learn(lesson.texts, lesson.slopes)}

    def state_dict(self) -> dict[str, Any]:
        """The discriminator with its optimizer, once there is one."""
        if self._discriminator is None:
            return {"discriminator": self._restored} if self._restored else {}
        return {"discriminator": self._discriminator.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Method`."""
        self._restored = state.get("discriminator")
        if self._discriminator is not None and self._restored is not None:
            self._discriminator.load_state_dict(self._restored)

    def describe(self) -> str:
        """See `Method`."""
        return "the teacher's own answers, by a discriminator"

    def _made(self, student: StudentModel) -> Discriminator:
        """The discriminator, a copy of the student at the first step unless a checkpoint held one."""
        if self._discriminator is None:
            seed = named_seed(self.seed, "discriminator")
            self._discriminator = student.discriminator(self.config.learning_rate, self.config.max_grad_norm, seed)
            if self._restored is not None:
                self._discriminator.load_state_dict(self._restored)
        self._restored = None
        return self._discriminator

    def _answers(self, evidence: Sequence[Evidence]) -> dict[str, tuple[int, ...]]:
        """The teacher's whole answers by prompt, in the student's tokens; in the control each prompt has that of another."""
        own = [one for one in evidence if isinstance(one, Answers) and not one.query.judge]
        found = {one.query.prompt.id: reply for one in own for reply in one.replies if reply.finish == "stop"}
        answers = {id: answer_ids(reply, self.text) for id, reply in found.items()}
        if self.objective.control == "shuffled":
            given = dealt(sorted(answers), random.Random(named_seed(self.seed, "control", *sorted(answers))))
            return {id: answers[given[id]] for id in answers}
        return answers


def bradley_terry(values: Tensor, better: Tensor, worse: Tensor) -> tuple[float, Tensor]:
    """`mean -log sigmoid(values[better] - values[worse])` over pairs [P] of places in `values` [n], and its slopes [n]."""
    values = values.detach().requires_grad_()
    with torch.enable_grad():
        loss = -functional.logsigmoid(values[better] - values[worse]).mean()
        (slopes,) = torch.autograd.grad(loss, values)
    return float(loss.detach()), slopes
