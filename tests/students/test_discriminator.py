"""The student's copy that tells two authors apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from omniopd.model import split_model
from students.discriminator import Discriminator
from students.policy import Policy
from students.view import StudentView

TEXTS = [((9, 8, 7), (20, 21, 22, 23)), ((9, 8), (30,)), ((9, 8, 7, 6, 5), (40, 41, 42, 43, 44, 45)), ((5,), ())]


def make(student: Policy, rate: float = 1e-2) -> Discriminator:
    return StudentView(student).discriminator(rate, 10.0, 3)


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def test_the_value_is_the_heads_of_the_last_token(student: Policy) -> None:
    judge = make(student)
    head = judge.network["head"].weight[0]
    body, _ = split_model(student.model)
    with torch.no_grad():
        alone = [float(body(torch.tensor([[*a, *b]])).last_hidden_state[0, -1] @ head) for a, b in TEXTS]
    assert judge.values(TEXTS) == pytest.approx(alone, abs=1e-5)
    assert len({round(value, 4) for value in alone}) == len(TEXTS)


def test_micro_batches_and_order_change_nothing(student: Policy, llama_folder: Path) -> None:
    narrow = tiny.policy(llama_folder, micro_batch_tokens=1)
    one, other = make(student), make(narrow)
    assert one.values(TEXTS) == pytest.approx(other.values(TEXTS), abs=1e-5)
    assert one.values(TEXTS[::-1]) == pytest.approx(one.values(TEXTS)[::-1], abs=1e-6)
    slopes = [0.5, -1.0, 0.25, 0.25]
    norms = one.learn(TEXTS, slopes), other.learn(TEXTS, slopes)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert one.values(TEXTS) == pytest.approx(other.values(TEXTS), abs=1e-3)


def test_it_moves_against_the_slopes_and_leaves_the_student_alone(student: Policy) -> None:
    before = copy.deepcopy(student.model.state_dict())
    judge = make(student, 1e-3)
    values = judge.values(TEXTS)
    for _ in range(5):
        assert judge.learn(TEXTS, [-1.0, 1.0, 0.0, 0.0]) > 0
    after = judge.values(TEXTS)
    assert after[0] > values[0] and after[1] < values[1]
    assert all(torch.equal(weight, before[name]) for name, weight in student.model.state_dict().items())
    assert all(weight.grad is None for weight in student.model.parameters())
    shared = {weight.data_ptr() for weight in student.model.parameters()}
    assert not shared & {weight.data_ptr() for weight in judge.network.parameters()}


def test_a_gradient_that_is_not_finite_is_left_out(student: Policy) -> None:
    judge = make(student)
    values = judge.values(TEXTS)
    assert not torch.tensor(judge.learn(TEXTS, [float("nan"), 0.0, 0.0, 0.0])).isfinite()
    assert judge.values(TEXTS) == values


def test_its_state_is_weights_and_optimizer(student: Policy) -> None:
    slopes = [1.0, -1.0, 0.5, 0.0]
    judge = make(student)
    judge.learn(TEXTS, slopes)
    state = copy.deepcopy(judge.state_dict())
    judge.learn(TEXTS, slopes)
    other = Discriminator(student, 1e-2, 10.0, 99)
    other.load_state_dict(state)
    other.learn(TEXTS, slopes)
    assert other.values(TEXTS) == judge.values(TEXTS)


def test_the_same_seed_gives_the_same_head(student: Policy) -> None:
    assert make(student).values(TEXTS) == make(student).values(TEXTS)
    assert Discriminator(student, 1e-2, 10.0, 4).values(TEXTS) != make(student).values(TEXTS)


def test_adapters_are_copied_and_trained_alone(llama_folder: Path) -> None:
    student = tiny.policy(llama_folder, lora={"rank": 2})
    judge = make(student)
    trained: dict[str, Any] = judge.state_dict()["weights"]
    assert "head.weight" in trained and all("lora_" in name or name == "head.weight" for name in trained)
    values = judge.values(TEXTS)
    judge.learn(TEXTS, [1.0, -1.0, 0.0, 0.0])
    assert judge.values(TEXTS) != values
