"""A made-up part that uses every hook, for the tests of the frame. It is registered only inside `registered()`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from omniopd.draft import Draft
from omniopd.method import Facts, Gradients, StudentModel, StudentText
from omniopd.objective import Objective
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.types import (
    AnswerQuery,
    Answers,
    Evidence,
    Prompt,
    Query,
    Rollout,
    Signal,
    TokenScores,
    Writing,
    asked_by,
)

NAME = "every_hook"
PLAIN, SHORT, BEGUN, BLANK, INITIAL, WHOLE = range(6)  # what becomes of row r: r modulo 6
ROUNDS = 2


class EveryHookSettings(PartSettings):
    """Nothing that matters."""

    name: Literal["every_hook"] = "every_hook"
    limit: int = Field(default=5, description="tokens of a short rollout")


class EveryHook(Part):
    """Writes rows in all ways, asks before, of each and in two more rounds, measures, weighs and learns a factor."""

    Config = EveryHookSettings
    slots = ("sampling", "audit", "credit", "schedule")
    place = Place.WEIGHT
    needs = frozenset({"answer", "score"})
    writes = frozenset({"horizon", "text", "initial"})
    keeps_initial = True
    reads_entropy = True
    neutral: ClassVar = "made up: it always changes something"

    def __init__(self, config: EveryHookSettings, objective: Objective, text: StudentText, seed: int) -> None:
        super().__init__(config, objective, text, seed)
        self.factor = 1.0  # moves with every update, and is seen by everything before it
        self.calls: list[tuple[str, int]] = []
        self.read: list[Rollout] = []

    def _query(self, prompt: Prompt, row: int, seed: int) -> AnswerQuery:
        return AnswerQuery(prompt, row, 1, 96, seed, by=NAME)

    def before(self, prompts: Mapping[int, Prompt], step: int) -> list[Query]:
        self.calls.append(("before", step))
        seed = 1000 * step + round(self.factor * 1e6) % 997  # the state decides what is asked
        return [self._query(prompt, row, seed) for row, prompt in prompts.items() if row % 6 in (BEGUN, WHOLE)]

    def writings(self, prompts: Mapping[int, Prompt], evidence: Sequence[Evidence], step: int) -> dict[int, Writing]:
        self.calls.append(("writings", step))
        said = {one.query.row: one.replies[0].text for one in evidence if isinstance(one, Answers) and one.replies}
        begins = {row: tuple(self.text.encode(text)[0]) for row, text in said.items()}
        ways = {
            SHORT: lambda row: Writing(max_tokens=self.config.limit),
            BEGUN: lambda row: Writing(begins=begins.get(row, ())[:3]),
            BLANK: lambda row: Writing(blank=True),
            INITIAL: lambda row: Writing(initial=True),
            WHOLE: lambda row: Writing(begins=(*begins.get(row, ()), self.text.end_id), whole=True),
        }
        return {row: ways[row % 6](row) for row in prompts if row % 6 in ways}

    def ask(self, rollout: Rollout, row: int, step: int) -> list[Query]:
        self.calls.append(("ask", step))
        seed = 2000 * step + round(self.factor * 1e6) % 997
        return [self._query(rollout.prompt, row, seed)] if row % 6 == PLAIN else []

    def again(self, rollouts: Mapping[int, Rollout], evidence: Sequence[Evidence], step: int) -> list[Query]:
        self.calls.append(("again", step))
        asked = [one.query.row for one in asked_by(evidence, NAME)]
        return [
            self._query(rollout.prompt, row, 3000 * step + 10 * row + asked.count(row))
            for row, rollout in rollouts.items()
            if row % 6 == PLAIN and asked.count(row) <= ROUNDS
        ]

    def measure(self, rollout: Rollout, scores: TokenScores | None, student: StudentModel) -> Facts:
        self.calls.append(("measure", rollout.version))
        if not len(rollout):
            return {}
        (now,), (initial,) = student.logprobs([rollout]), student.initial_logprobs([rollout])
        heard = [0.0] * len(rollout) if scores is None else scores.logprobs
        return {f"{NAME}.now": now, f"{NAME}.initial": initial, f"{NAME}.heard": heard}

    def apply(self, draft: Draft) -> None:
        self.calls.append(("apply", draft.step))
        self.read = list(draft.rollouts)
        asked = sum(one.query.seed for one in asked_by(draft.evidence, NAME) if isinstance(one, Answers)) % 7
        for row in draft.rows:
            near = draft.facts(row, f"{NAME}.now")
            assert near is not None
            draft.weigh(row, self.factor * near.exp() + torch.tensor(asked, dtype=torch.float64))

    def after(
        self, rollouts: Sequence[Rollout], signal: Signal, step: int, gradients: Gradients
    ) -> Mapping[str, float]:
        self.calls.append(("after", step))
        ((size,),) = gradients.gram(rollouts, [signal])
        self.factor = 0.5 * self.factor + 1.0 / (1.0 + size)
        return {"factor": self.factor}

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.factor = state["factor"]


@contextmanager
def registered() -> Iterator[None]:
    """The part can be named in a config."""
    PARTS.names()  # its own file among the others is looked for once
    PARTS._found[NAME] = EveryHook
    try:
        yield
    finally:
        del PARTS._found[NAME]
