"""A student and teachers of other tokenizer families, for tests of the methods that compare distributions between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch
from pydantic import TypeAdapter
from scored_by import scored
from torch import Tensor

from omniopd.method import Method
from omniopd.registry import METHODS, TASKS
from omniopd.settings import tagged
from omniopd.types import Distributions, Rollout, Signal, TokenScores
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"
TEXTS = [
    "The answer is 12 + 7 = 19, so Tom has 19 apples.",
    "First, we add the two numbers.\n\n    return x  # done\n",
    "naïve café, 東京は大きい, 😀👍🏽 emoji",
]


def rows_of(student: Policy) -> list[Rollout]:
    """Texts as the student would write them, the first of which it ended itself."""
    rows = [tiny.rollout(student, student.encode(text)[0]) for text in TEXTS]
    return [tiny.rollout(student, [*rows[0].ids, student.end_id], finish="stop"), *rows[1:]]


def demo_rows(student: Policy) -> list[Rollout]:
    """Right answers to the demo's questions in its student's own words."""
    prompts = TASKS.build(TASKS.get("arithmetic").Config()).train[:3]
    ids = [[*student.encode(prompt.extras["terse"])[0], student.end_id] for prompt in prompts]
    return [tiny.rollout(student, row, prompt, "stop") for row, prompt in zip(ids, prompts, strict=True)]


def built(student: Policy, **config: Any) -> Method:
    return METHODS.build(TypeAdapter(tagged(METHODS)).validate_python(config), student, 0)  # type: ignore[no-any-return]


def evidence_of(method: Method, teacher: Policy, rows: Sequence[Rollout]) -> list[TokenScores]:
    return [scored(teacher, query) for query in method.audit(rows, 1)]


def read(student: Policy, teacher: Policy, rows: Sequence[Rollout], **config: Any) -> Signal:
    method = built(student, **config)
    return method.read(rows, evidence_of(method, teacher, rows), 1)


def shifted(scores: TokenScores, by: int = 1) -> TokenScores:
    """The same scores with every distribution that many places late."""
    given = scores.distributions
    assert given is not None
    return replace(scores, distributions=Distributions(given.hidden.roll(by, 0), given.head))


@torch.no_grad()
def divergences(student: Policy, rows: Sequence[Rollout], signal: Signal) -> Tensor:
    """What the targets say at all positions under the mask, one after the other."""
    found = []
    for row, target, mask in zip(rows, signal.targets, signal.mask_BT, strict=True):
        assert target is not None
        whole = torch.tensor([[*row.prompt_ids, *row.ids]])
        logits = student.model(input_ids=whole).logits[0, len(row.prompt_ids) - 1 : -1]
        found.append(target.divergence(logits, torch.tensor(row.ids), 0)[mask])
    return torch.cat(found)


def taught(student: Policy, teacher: Policy, rows: Sequence[Rollout], **config: Any) -> tuple[float, list[Tensor]]:
    """Loss and gradient of one step through the real update."""
    method = built(student, **config)
    signal = method.read(rows, evidence_of(method, teacher, rows), 1)
    loss = Trainer(student, OptimizerSettings(), method.objective).accumulate(rows, signal)["loss"]
    return loss, [p.grad.clone() for p in student.model.parameters() if p.grad is not None]


def learns(student: Policy, teacher: Policy, rows: Sequence[Rollout], steps: int, **config: Any) -> list[float]:
    """The loss over some steps on the same texts."""
    method = built(student, **config)
    signal = method.read(rows, evidence_of(method, teacher, rows), 1)
    trainer = Trainer(student, OptimizerSettings(learning_rate=1e-2), method.objective)
    return [trainer.update(rows, signal)["loss"] for _ in range(steps)]
