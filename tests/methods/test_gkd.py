"""GKD: rollouts of the student's and answers of the teacher's under one divergence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from answered import begun, built, heard
from torch import Tensor

from omniopd.losses.divergence import generalised_jsd
from omniopd.types import Evidence, Reply, Rollout, Signal
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer

TEXT = "It is 12 + 7 = 19."
PROMPTS = [tiny.prompt(f"{i} + 1?", str(i)) for i in range(4)]


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def step(student: Policy, teacher: Policy, finish: str = "stop", **part: Any) -> tuple[list[Rollout], Signal]:
    method = built(student, {"name": "gkd", "parts": [{"name": "teacher_rollouts", "loss": "divergence", **part}]})
    rows, before = begun(method, student, PROMPTS, lambda _: [Reply(TEXT, finish)])  # type: ignore[arg-type]
    evidence: list[Evidence] = [*before, *heard(method, teacher, rows)]
    return rows, method.read(rows, evidence, 1)


@torch.no_grad()
def logits(model: Any, rollout: Rollout) -> Tensor:
    whole = torch.tensor([[*rollout.prompt_ids, *rollout.ids]])
    return model(input_ids=whole).logits[0, len(rollout.prompt_ids) - 1 : -1]


def mean_jsd(student: Policy, teacher: Policy, rows: Sequence[Rollout]) -> float:
    each = [generalised_jsd(logits(teacher.model, row), logits(student.model, row), 0.5) for row in rows]
    return float(torch.cat(each).mean())


def test_by_default_half_of_the_rollouts_are_the_teachers(student: Policy, teacher: Policy) -> None:
    rows, signal = step(student, teacher)
    ids, _ = student.encode(TEXT)
    assert [row.author for row in rows] == ["teacher", "student"] * 2
    assert rows[0].ids == (*ids, student.end_id) and rows[0].finish == "stop"
    assert all(target is not None for target in signal.targets) and bool(torch.cat(signal.mask_BT).all())
    assert not bool(torch.cat(signal.values_BT).any()) and not signal.branches
    assert signal.coverage == 1.0


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_loss_is_the_mean_divergence_over_both_kinds_of_text(
    student: Policy, teacher: Policy, share: float
) -> None:
    rows, signal = step(student, teacher, share=share)
    assert sum(row.author == "teacher" for row in rows) == 4 * share
    objective = built(student, {"name": "gkd"}).objective
    terms = Trainer(student, OptimizerSettings(), objective).accumulate(rows, signal)
    expected = mean_jsd(student, teacher, rows)
    assert terms["loss"] == terms["divergence_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_cut_answer_leaves_the_row_to_the_student(student: Policy, teacher: Policy) -> None:
    rows, signal = step(student, teacher, "length")
    assert {row.author for row in rows} == {"student"} and signal.stats["teacher_rollouts_refused"] == 2.0


def test_what_it_needs(student: Policy) -> None:
    method = built(student, {"name": "gkd"})
    assert method.needs == {"logits", "same tokenizer", "answer"}
    config: Any = method.objective
    assert (config.form, config.apply, config.divergence, config.beta) == ("dense", "loss", "jsd", 0.5)
    assert config.parts[0].share == 0.5
