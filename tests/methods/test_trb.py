"""TRB: a budget that runs out, and a loss that knows who wrote the tokens."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from pydantic import TypeAdapter, ValidationError
from scored_by import scored

from omniopd.blending import BETA, LEFT, SPENT, STUDENT, Blend, Guide
from omniopd.composition import compose
from omniopd.config import load_config
from omniopd.errors import ConfigError
from omniopd.method import Method
from omniopd.parts.behaviour_blend import blend_budget
from omniopd.registry import METHODS
from omniopd.run import Run
from omniopd.settings import tagged
from omniopd.types import Capabilities, Rollout, Signal
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
LOG_MU = (-0.5, -1.0, -2.0, -0.25)
LOG_S = (-1.0, -0.75, -2.5, -0.25)


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def built(student: Policy, **config: Any) -> Method:
    return compose(TypeAdapter(tagged(METHODS)).validate_python({"name": "trb", **config}), student, 0)


def rollout(student: Policy, ids: tuple[int, ...] = (11, 60, 7, 30), blended: bool = True) -> Rollout:
    plain = replace(tiny.rollout(student, ids), logprobs=LOG_MU)
    facts = {STUDENT: LOG_S, BETA: (0.5, 0.5, 1.0, 0.0), SPENT: (0.02,) * 4, LEFT: (1.0, 2.0, 0.0, 1.0)}
    return replace(plain, facts=facts) if blended else plain


def read(student: Policy, teacher: Policy, rows: list[Rollout], step: int = 1, **config: Any) -> tuple[Method, Signal]:
    method = built(student, **config)
    return method, method.read(rows, [scored(teacher, query) for query in method.audit(rows, step)], step)


def test_the_budget_falls_in_a_line_and_is_nothing_from_k_on(student: Policy) -> None:
    assert [blend_budget(0.02, 4, k) for k in range(6)] == pytest.approx([0.02, 0.015, 0.01, 0.005, 0.0, 0.0])
    method = built(student)
    assert method.budget(1) == 0.02
    assert method.budget(26) == pytest.approx(0.01)
    assert method.budget(51) == method.budget(400) == 0
    assert built(student, parts=[{"name": "behaviour_blend", "steps": 0}]).budget(1) == 0


def test_the_loss_is_the_plain_one_on_the_students_16_likeliest(student: Policy, teacher: Policy) -> None:
    rows = [rollout(student)]
    found = []
    for config in ({}, {"name": "opd", "form": "dense", "support": "student", "k": 16}):
        method, signal = read(student, teacher, rows, **config)
        trainer = Trainer(student, OptimizerSettings(), method.objective)
        loss = trainer.accumulate(rows, signal)["loss"]
        found.append((loss, torch.cat([p.grad.flatten() for p in trainer.trained])))
    assert found[0][0] == found[1][0] != 0
    assert torch.equal(found[0][1], found[1][1])


def test_what_the_log_says_of_the_blend(student: Policy, teacher: Policy) -> None:
    _, signal = read(student, teacher, [rollout(student), rollout(student, blended=False)])

    assert {name: number for name, number in signal.stats.items() if name.startswith("blend_")} == {
        "blend_beta": 0.5,
        "blend_whole_share": 0.25,
        "blend_kl_student": pytest.approx(0.02),
        "blend_kl_teacher": 1.0,
    }
    _, signal = read(student, teacher, [rollout(student, blended=False)])
    assert not any(name.startswith("blend_") for name in signal.stats)


def test_a_sampled_token_is_weighed_with_the_ratio_and_credited_against_the_student(
    student: Policy, teacher: Policy
) -> None:
    rows = [rollout(student), rollout(student, blended=False)]
    settings = {"form": "sampled"}
    method, signal = read(student, teacher, rows, **settings)
    _, plain = read(student, teacher, rows, name="opd")
    said = torch.tensor(scored(teacher, method.audit(rows, 1)[0]).logprobs, dtype=torch.float64)  # type: ignore[arg-type]
    mu, own = torch.tensor(LOG_MU, dtype=torch.float64), torch.tensor(LOG_S, dtype=torch.float64)

    torch.testing.assert_close(signal.values_BT[0], ((own - mu).exp() * (said - own)).float())
    assert torch.equal(signal.values_BT[1], plain.values_BT[1])
    late = [replace(rows[0], version=1), rows[1]]
    _, signal = read(student, teacher, late, step=3, **settings)  # the update's ratio p_now / mu weighs it
    torch.testing.assert_close(signal.values_BT[0], (said - own).float())


def test_what_it_needs_and_refuses(student: Policy) -> None:
    digest = student.vocabulary.digest
    served = Capabilities(score=True, topk=512, logits=True, vocabulary=digest)
    assert built(student).lacking(served) == ["decode"]
    assert built(student).lacking(replace(served, decode=True)) == []
    assert "same tokenizer" in built(student).lacking(replace(served, decode=True, vocabulary="other"))
    with pytest.raises(ConfigError, match="behaviour_blend.*set form: dense, or estimator: k1"):
        built(student, name="opd", estimator="k3", parts=["behaviour_blend"])
    with pytest.raises(ConfigError, match="behaviour_blend.*form: dense"):
        built(student, name="omniopd", parts=["behaviour_blend"])
    with pytest.raises(ValidationError, match="budget"):
        built(student, parts=[{"name": "behaviour_blend", "budget": -1}])


def test_from_step_k_on_rollouts_are_the_students_own_to_the_last_bit(student: Policy, teacher: Policy) -> None:
    method = built(student, parts=[{"name": "behaviour_blend", "budget": 0.5, "steps": 2}])
    prompts = {row: tiny.prompt(f"{row} + 1?", str(row)) for row in range(4)}
    weights: Any = SimpleNamespace(
        guide=Guide(teacher.causal_lm, teacher.end_ids, lambda prompt: teacher.prompt_ids(prompt), nullcontext())
    )

    def written(step: int, budget: float) -> dict[int, Rollout]:
        rows: dict[int, Rollout] = {}
        blend = Blend.of(weights, budget, student.end_id)
        tiny.sampler(student).fill(prompts, step, rows.__setitem__, {}, blend)
        return rows

    for step, own in ((1, False), (2, False), (3, True), (9, True)):
        blended, plain = written(step, method.budget(step)), written(step, 0.0)
        assert (blended == plain) == own
        assert all((STUDENT in row.facts) != own for row in blended.values())


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_blends_until_the_budget_is_spent(tmp_path: Path, lag: int) -> None:
    def rows(place: str) -> list[dict[str, Any]]:
        config = {
            "student": {"path": str(DEMO / "student"), "max_new_tokens": 24},
            "teacher": {"type": "transformers", "path": str(DEMO / "sibling")},
            "task": {"type": "arithmetic", "train_size": 16, "heldout_size": 4},
            "method": {"name": "trb", "parts": [{"name": "behaviour_blend", "budget": 0.1, "steps": 2}]},
            "train": {"steps": 3, "prompts_per_step": 4, "max_lag": lag},
            "eval": {"problems": 0},
            "output": str(tmp_path / place),
        }
        assert Run(load_config(config)).train()["status"] == "finished"
        return [json.loads(line) for line in (tmp_path / place / "metrics.jsonl").read_text().splitlines()]

    one, again = rows("one"), rows("again")
    assert [row["step"] for row in one if "blend_beta" in row] == [1, 2]
    assert 0 < one[0]["blend_kl_student"] <= 0.1
    assert [row["loss"] for row in one] == [row["loss"] for row in again]  # to the last bit, whoever computes when
