"""Neutral settings are plain on-policy distillation to the last bit: same loss, same gradient, through the real update.

Every registered method says its neutral settings, or why it has none; every part says its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pydantic import TypeAdapter
from references import opd_dense, opd_sampled
from scored_by import scored
from torch import Tensor

from omniopd.composition import compose
from omniopd.losses import sum_over_slices, token_logp
from omniopd.method import Method
from omniopd.model import split_model
from omniopd.registry import METHODS, PARTS
from omniopd.settings import tagged
from omniopd.types import Rollout, Signal
from students.batches import micro_batches, tensors
from students.packing import build_rows
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer

SAMPLED: dict[str, Any] = {"name": "opd"}
DENSE: dict[str, Any] = {"name": "opd", "form": "dense"}
NEUTRAL: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"name": "dpca", "openings": 0}, SAMPLED),
    ({"name": "dpca", "openings": 0, "credit": "uniform"}, SAMPLED),
    ({"name": "dpca", "openings": 0, "credit": "full", "max_chunk_tokens": 1}, SAMPLED),
    ({"name": "opd", "estimator": "k2"}, SAMPLED),
    ({"name": "opd", "form": "dense", "divergence": "jsd", "beta": 1.0}, DENSE),
    ({"name": "bpm", "divergence": "reverse", "mask_blanks": False}, DENSE),
    ({"name": "gold", "beta": 1.0}, DENSE),
    ({"name": "trb", "parts": [{"name": "behaviour_blend", "steps": 0}]}, dict(METHODS.get("trb").plain)),
]
NEUTRAL += [
    ({"name": name, **METHODS.get(name).neutral}, dict(METHODS.get(name).plain))
    for name in METHODS.names()
    if not isinstance(METHODS.get(name).neutral, str)
]
NEUTRAL += [
    ({"name": "opd", "parts": [{"name": name, **PARTS.get(name).neutral}]}, SAMPLED)
    for name in PARTS.names()
    if not isinstance(PARTS.get(name).neutral, str)
]

STACK = [
    {"name": name, **PARTS.get(name).neutral} for name in PARTS.names() if not isinstance(PARTS.get(name).neutral, str)
]
NEUTRAL += [({**plain, "parts": STACK}, plain) for plain in (SAMPLED, DENSE)]

NEUTRAL += [
    ({**DENSE, "parts": [{"name": name, **PARTS.get(name).neutral}]}, DENSE)
    for name in PARTS.names()
    if PARTS.get(name).dense and not isinstance(PARTS.get(name).neutral, str)
]


def _named(config: dict[str, Any]) -> str:
    return "the whole stack" if config.get("parts") is STACK else " ".join(map(str, config.values()))


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def rows_of(student: Policy) -> list[Rollout]:
    torch.manual_seed(4)
    ids = [torch.randint(5, 200, (length,)).tolist() for length in (13, 5, 0, 8)]
    rows = [tiny.rollout(student, [*ids[0], student.end_id], finish="stop")]
    return [*rows, *(tiny.rollout(student, part) for part in ids[1:])]


def built(config: dict[str, Any], student: Policy) -> Method:
    return compose(TypeAdapter(tagged(METHODS)).validate_python(config), student, 0)


def signal_of(
    student: Policy, teacher: Policy, rows: Sequence[Rollout], config: dict[str, Any]
) -> tuple[Method, Signal]:
    method = built(config, student)
    return method, method.read(rows, [scored(teacher, query) for query in method.audit(rows, 1)], 1)


def gradient(student: Policy) -> list[Tensor]:
    return [p.grad.clone() for p in student.model.parameters() if p.grad is not None]


def taught(
    student: Policy, teacher: Policy, config: dict[str, Any], responses: int = 4
) -> tuple[float, list[Tensor], Signal]:
    """Loss and gradient of one step, and the signal behind them."""
    rows = rows_of(student)[:responses]
    method, signal = signal_of(student, teacher, rows, config)
    trainer = Trainer(student, OptimizerSettings(), method.objective)
    loss = trainer.accumulate(rows, signal)["loss"]
    return loss, gradient(student), signal


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("config", "plain"), NEUTRAL, ids=_named)
def test_a_neutral_setting_is_plain_distillation_to_the_last_bit(
    student: Policy, teacher: Policy, config: dict[str, Any], plain: dict[str, Any]
) -> None:
    loss, gradients, signal = taught(student, teacher, config)
    expected, of_plain, reference = taught(student, teacher, plain)
    assert loss == expected != 0
    assert same(gradients, of_plain)
    assert same(signal.values_BT, reference.values_BT)
    assert same(signal.mask_BT, reference.mask_BT)


@pytest.mark.parametrize(("config", "plain"), NEUTRAL, ids=_named)
def test_a_neutral_setting_asks_the_teacher_and_the_sampler_for_nothing_more(
    student: Policy, config: dict[str, Any], plain: dict[str, Any]
) -> None:
    rows = rows_of(student)
    prompts = {row: rollout.prompt for row, rollout in enumerate(rows)}
    one, other = built(config, student), built(plain, student)
    assert one.audit(rows, 1) == other.audit(rows, 1)
    assert one.before(prompts, 1) == one.again(dict(enumerate(rows)), [], 1) == []
    assert (one.writings(prompts, [], 1), one.budget(1), one.writes, one.candidates) == ({}, 0.0, frozenset(), 0)
    assert not (one.reads_entropy or one.keeps_initial or one.one_process)


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_has_a_neutral_setting_or_says_why_not(name: str) -> None:
    neutral = METHODS.get(name).neutral
    assert neutral if isinstance(neutral, str) else isinstance(neutral, Mapping), (
        f"{name}: set neutral (docs/adding-a-method.md)"
    )
    assert not isinstance(neutral, str) or len(neutral.split()) > 3


# ------------------------------------------------------------------ the two references


@dataclass
class Step:
    """The student's forward pass over a step in one micro-batch: all that the update does but for its loss."""

    hidden: Tensor  # [R, D]
    head: Any
    order: list[int]  # the place of each row in the step

    @classmethod
    def of(cls, student: Policy, rows: Sequence[Rollout]) -> Step:
        budget, shape = student.settings.micro_batch_tokens, student.hidden_size
        (batch,) = micro_batches(build_rows(rows, [], trees=True), budget, forests=True, hidden=shape)
        inputs = tensors(batch, torch.float32, torch.device("cpu"))
        body, head = split_model(student.model)
        hidden = body(**inputs, use_cache=False).last_hidden_state
        places, _, numbers = batch.own_sites()
        return cls(hidden.flatten(0, 1)[places], head, numbers.tolist())

    def ordered(self, parts: Sequence[Any], dtype: torch.dtype = torch.float64) -> Tensor:
        """A ragged list of the step's numbers, flat, in the order of the update."""
        return torch.cat([torch.as_tensor(part, dtype=dtype) for part in parts])[self.order]

    def loss(self, reference: Callable[[Tensor], Tensor]) -> float:
        """A reference of the logits [R, V], through the same matrix products as the update; its gradient is left behind."""
        bounds = [slice(0, len(self.hidden))]
        loss, _ = sum_over_slices(self.hidden, self.head, lambda logits, _: (reference(logits), torch.zeros(1)), bounds)
        loss.backward()
        return loss.item()


def test_many_faces_token_reverse_kl_is_the_sampled_form_to_the_last_bit(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student)
    loss, ours, _ = taught(student, teacher, SAMPLED)
    student.model.zero_grad()
    step = Step.of(student, rows)
    found = {f.query.row: f for f in map(partial(scored, teacher), built(SAMPLED, student).audit(rows, 1))}
    old = step.ordered([row.logprobs for row in rows])
    said = step.ordered([found[row].logprobs if row in found else () for row in range(len(rows))])
    ids = step.ordered([row.ids for row in rows], torch.long)

    def reference(logits: Tensor) -> Tensor:
        return opd_sampled(token_logp(logits, ids), old, said, torch.ones(len(ids), dtype=torch.bool))

    assert loss == step.loss(reference) != 0
    assert same(ours, gradient(student))


def test_many_faces_the_whole_vocabulary_is_the_dense_form_to_the_last_bit(student: Policy, teacher: Policy) -> None:
    """Of one response, since the update adds up responses one by one; its gradient is in closed form, the reference's by
    autograd, so that they are equal up to rounding."""
    rows = rows_of(student)[:1]
    loss, ours, _ = taught(student, teacher, DENSE, responses=1)
    student.model.zero_grad()
    step = Step.of(student, rows)
    given = [f.distributions for f in map(partial(scored, teacher), built(DENSE, student).audit(rows, 1))]
    whole = torch.cat([one.head(one.hidden) for one in given if one is not None]).detach()[step.order]
    assert loss == step.loss(lambda logits: opd_dense(logits, whole, torch.ones(len(whole), dtype=torch.bool))) != 0
    torch.testing.assert_close(ours, gradient(student), rtol=1e-4, atol=2e-6)
