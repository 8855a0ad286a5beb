"""A step of a method of pairs with made-up texts on both sides: answers, what is rejected, and what is measured of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import tiny
import torch
from pydantic import TypeAdapter
from torch import Tensor

from omniopd.composition import compose
from omniopd.pairs import Paired
from omniopd.registry import METHODS
from omniopd.settings import tagged
from omniopd.types import AnswerQuery, Answers, Prompt, Query, Reply, Rollout, Signal
from students.policy import Policy
from students.view import StudentView


def right(prompt: Prompt) -> str:
    """What the made-up teacher answers."""
    return f"The answer is {prompt.id}."


def checked(prompt: Prompt, text: str) -> bool:
    """The made-up verifier: the reference stands in the text."""
    return prompt.reference is not None and prompt.reference in text


def answered(query: Query, *replies: Reply) -> Answers:
    """The teacher's answer, right unless given."""
    assert isinstance(query, AnswerQuery)
    return Answers(query, replies or (Reply(right(query.prompt), "stop"),) * query.n)


def method_of(student: Policy, name: str, group: int, **config: Any) -> Paired:
    """A method of pairs as a run would make it."""
    settings = TypeAdapter(tagged(METHODS)).validate_python({"name": name, **config})
    method = compose(settings, student, 0, checked, group)
    assert isinstance(method, Paired)
    return method


class Step:
    """Asks, writes and measures; the rejected texts are wrong unless set in `rejected`, the answers right unless set."""

    def __init__(self, student: Policy, name: str, prompts: Mapping[int, Prompt], step: int = 1, **config: Any) -> None:
        group = max(sum(other.id == prompt.id for other in prompts.values()) for prompt in prompts.values())
        self.student, self.prompts, self.step = student, prompts, step
        self.method = method_of(student, name, group, **config)
        self.queries = [query for query in self.method.before(prompts, step) if isinstance(query, AnswerQuery)]
        self.answers = [answered(query) for query in self.queries]
        self.rejected: dict[int, str] = {}

    def rollouts(self) -> list[Rollout]:
        """The step's rollouts with what the method measured of them."""
        writings = self.method.writings(self.prompts, self.answers, self.step)
        written = {}
        for row, writing in writings.items():
            ids = () if writing.blank else writing.begins or self._wrong(row)
            finish = "stop" if ids and ids[-1] == self.student.end_id else "length"
            written[row] = tiny.rollout(self.student, ids, self.prompts[row], finish)
        facts = self.method.measure(written, self.answers, StudentView(self.student, list(written.values())))
        return [_with(rollout, facts.get(row, {})) for row, rollout in sorted(written.items())]

    def signal(self) -> Signal:
        """What the method makes of the step."""
        return self.method.read(self.rollouts(), self.answers, self.step)

    def _wrong(self, row: int) -> tuple[int, ...]:
        text = self.rejected.get(row, f"{'First, we add. ' * (row % 3)}It is six.")
        return (*self.student.encode(text)[0], self.student.end_id)


def _with(rollout: Rollout, facts: Mapping[str, Any]) -> Rollout:
    return replace(rollout, facts={name: tuple(numbers) for name, numbers in facts.items()})


def moved(student: Policy) -> Policy:
    """The student after some training, the initial one kept."""
    with student.reference():
        pass  # kept as it is now
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in student.model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return student


def sums(model: Any, rollouts: Sequence[Rollout]) -> Tensor:
    """Log-probs [B] of whole responses, one dense forward pass each, with gradient."""
    found = []
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.ids]])
        logp = model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1].double().log_softmax(-1)
        found.append(logp.gather(1, torch.tensor(rollout.ids)[:, None]).sum())
    return torch.stack(found)


def gradient_of(student: Policy) -> list[Tensor]:
    """The gradient that waits for an update; it is taken away."""
    gradient = [weight.grad.clone() for weight in student.model.parameters() if weight.grad is not None]
    student.model.zero_grad()
    return gradient
