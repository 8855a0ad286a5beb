"""GAD: a discriminator's values as rewards, imitation before, and an update of its own after each step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from omniopd.methods.gad import REWARD, Gad, GadConfig, bradley_terry
from omniopd.types import AnswerQuery, Answers, Evidence, Message, Prompt, Reply, Rollout, Signal
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer
from students.view import StudentView

GROUP = (0.1, 0.4, -0.2, 0.9)


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


class Says:
    """A discriminator that gives each text what a function says, and learns nothing."""

    def __init__(self, value: Any) -> None:
        self.value, self.lessons = value, list[tuple[Any, Any]]()

    def values(self, texts: Sequence[Any]) -> list[float]:
        return [self.value(prompt, ids) for prompt, ids in texts]

    def learn(self, texts: Sequence[Any], slopes: Sequence[float]) -> float:
        self.lessons.append((texts, slopes))
        return 0.5

    def discriminator(self, *settings: Any) -> Says:
        return self


def rows_of(student: Policy, names: str = "aaaa") -> list[Rollout]:
    torch.manual_seed(0)
    ids = [[*torch.randint(5, 200, (4 + n,)).tolist(), student.end_id] for n in range(len(names))]
    prompts = [Prompt(name, (Message("user", f"What is {name}?"),)) for name in names]
    return [tiny.rollout(student, one, prompt, finish="stop") for one, prompt in zip(ids, prompts, strict=True)]


def gad(student: Policy, **settings: Any) -> Gad:
    return Gad(GadConfig(**{"warmup_steps": 0, **settings}), student, 0)


def answered(method: Gad, rows: Sequence[Rollout], *missing: str) -> list[Evidence]:
    queries = method.before({row: one.prompt for row, one in enumerate(rows)}, 1)
    return [
        Answers(
            q,
            () if q.prompt.id in missing else (Reply(f"It is {q.prompt.id}.", "stop"),),
            {"cut": 1} if q.prompt.id in missing else {},
        )
        for q in queries
        if isinstance(q, AnswerQuery)
    ]


def read(
    method: Gad, rows: Sequence[Rollout], evidence: Sequence[Evidence], student: Any, step: int = 1
) -> tuple[list[Rollout], Signal]:
    facts = method.measure(dict(enumerate(rows)), evidence, student)
    measured = [
        replace(one, facts={name: tuple(numbers) for name, numbers in facts.get(row, {}).items()})
        for row, one in enumerate(rows)
    ]
    return measured, method.read(measured, evidence, step)


def no_gradients() -> Any:
    return None


# ------------------------------------------------------------------ the loss of D


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs(teacher: float, *student: float) -> float:
    places = torch.arange(1, 1 + len(student))
    return bradley_terry(numbers(teacher, *student), torch.zeros_like(places), places)[0]


def test_golden_bradley_terry() -> None:
    assert pairs(1.2, 0.3) == pytest.approx(0.3411538747, abs=1e-10)
    assert pairs(0.7, 0.7) == pytest.approx(0.6931471806, abs=1e-10)
    assert pairs(1.2, *GROUP) == pytest.approx(0.3583021614, abs=1e-10)


def test_slopes_are_those_of_the_loss() -> None:
    values, better, worse = numbers(1.2, *GROUP, -0.3, 7.0), torch.tensor([0, 5, 5, 0]), torch.tensor([1, 2, 3, 4])
    _, slopes = bradley_terry(values, better, worse)
    expected = torch.zeros(7, dtype=torch.float64)
    for one, other in zip(better, worse, strict=True):
        pull = torch.sigmoid(values[other] - values[one]) / 4
        expected[one] -= pull
        expected[other] += pull
    torch.testing.assert_close(slopes, expected, rtol=1e-12, atol=1e-15)
    assert slopes[6] == 0


# ------------------------------------------------------------------ a step


def test_rewards_are_the_discriminators_group_normalised(student: Policy) -> None:
    rows = rows_of(student)
    by_length = dict(zip((len(row) for row in rows), GROUP, strict=True))
    judge = Says(lambda prompt, ids: by_length.get(len(ids), 1.2) if ids in {row.ids for row in rows} else 1.2)
    method = gad(student)
    measured, signal = read(method, rows, answered(method, rows), judge)
    assert [row.facts[REWARD] for row in measured] == [
        (value,) * len(row) for value, row in zip(GROUP, rows, strict=True)
    ]
    golden = (-0.49236596, 0.24618298, -1.23091491, 1.47709789)
    assert [values.tolist() for values in signal.values_BT] == [
        pytest.approx([value] * len(row), abs=1e-7) for value, row in zip(golden, rows, strict=True)
    ]
    assert signal.coverage == 1 and not signal.branches
    figures = method.after(measured, signal, 1, no_gradients())  # type: ignore[arg-type]
    assert figures["gad_loss"] == pytest.approx(0.3583021614, abs=1e-10)
    assert figures["gad_accuracy"] == 1.0 and figures["gad_grad_norm"] == 0.5
    ((texts, slopes),) = judge.lessons
    ending = (*student.encode("It is a.")[0], student.end_id)
    assert texts[0] == (rows[0].prompt_ids, ending) and [ids for _, ids in texts[1:]] == [row.ids for row in rows]
    assert sum(slopes) == pytest.approx(0, abs=1e-12) and slopes[0] < 0 < min(slopes[1:])
    assert method.after(measured, signal, 1, no_gradients()) == {}  # type: ignore[arg-type]


def test_a_constant_discriminator_leaves_the_kl_alone(student: Policy) -> None:
    rows = rows_of(student, "aabb")
    method = gad(student)
    _, signal = read(method, rows, answered(method, rows), Says(lambda prompt, ids: 0.3))
    assert signal.coverage == 1 and not any(values.any() for values in signal.values_BT)
    with torch.no_grad():
        for weight in student.model.parameters():
            weight += 0.01 * torch.randn_like(weight)
    terms = Trainer(student, OptimizerSettings(), method.objective).accumulate(rows, signal)
    assert terms["loss"] == terms["anchor_loss"] == pytest.approx(0.001 * terms["kl"]) != 0


def test_warm_up_imitates_and_the_discriminator_learns_all_the_same(student: Policy) -> None:
    rows = rows_of(student, "aabb")
    judge = Says(lambda prompt, ids: float(len(ids)))
    method = gad(student, warmup_steps=2)
    evidence = answered(method, rows)
    measured, signal = read(method, rows, evidence, judge, 2)
    assert [(b.row, b.at, student.decode(list(b.ids[:-1]))) for b in signal.branches] == [
        (0, 0, "It is a."),
        (2, 0, "It is b."),
    ]
    assert all(branch.ids[-1] == student.end_id for branch in signal.branches)
    assert signal.coverage == 0 and signal.stats["gad_warmup"] == 1 and not signal.drops
    assert method.after(measured, signal, 2, no_gradients())["gad_loss"] > 0  # type: ignore[arg-type]
    _, signal = read(method, rows, evidence, judge, 3)
    assert not signal.branches and signal.coverage == 1 and signal.stats["gad_warmup"] == 0


def test_a_prompt_without_an_answer_is_masked_and_counted(student: Policy) -> None:
    rows = [*rows_of(student, "aabb"), tiny.rollout(student, [], rows_of(student, "a")[0].prompt)]
    judge = Says(lambda prompt, ids: float(len(ids)))
    method = gad(student)
    measured, signal = read(method, rows, answered(method, rows, "b"), judge)
    assert [bool(mask.any()) for mask in signal.mask_BT] == [True, True, False, False, False]
    assert signal.drops == {"no answer": 2} and signal.rejects == {"cut": 1} and REWARD not in measured[2].facts
    measured, signal = read(method, rows, answered(method, rows, "a", "b"), judge)
    assert signal.coverage == 0 and method.after(measured, signal, 1, no_gradients()) == {}  # type: ignore[arg-type]


def test_answers_are_the_same_whenever_a_prompt_comes(student: Policy) -> None:
    prompts = {row: one.prompt for row, one in enumerate(rows_of(student, "aabb"))}
    method = gad(student)
    queries = method.before(prompts, 1)
    assert [(q.prompt.id, q.row, q.n) for q in queries] == [("a", 0, 1), ("b", 2, 1)]  # type: ignore[union-attr]
    assert queries == method.before(prompts, 7) and len({q.seed for q in queries}) == 2  # type: ignore[union-attr]


def test_control_texts_of_other_prompts(student: Policy) -> None:
    rows = rows_of(student, "aabb")
    method = gad(student, control="shuffled", warmup_steps=1)
    _, signal = read(method, rows, answered(method, rows), Says(lambda prompt, ids: 0.0))
    assert [(b.row, student.decode(list(b.ids[:-1]))) for b in signal.branches] == [(0, "It is b."), (2, "It is a.")]


# ------------------------------------------------------------------ with a real discriminator


def test_nothing_of_the_policy_loss_reaches_the_discriminator(student: Policy) -> None:
    rows = rows_of(student)
    method = gad(student, learning_rate=1e-2)
    measured, signal = read(method, rows, answered(method, rows), StudentView(student))
    network = method._discriminator.network  # type: ignore[union-attr]
    before = copy.deepcopy(network.state_dict())
    trainer = Trainer(student, OptimizerSettings(learning_rate=1e-2), method.objective)
    trainer.update(measured, signal)
    assert all(weight.grad is None for weight in network.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    assert not any(values.requires_grad for values in signal.values_BT)
    method.after(measured, signal, 1, trainer)
    assert not all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())


def test_it_learns_to_tell_the_two_apart(student: Policy) -> None:
    rows = rows_of(student, "aabb")
    method = gad(student, learning_rate=3e-3, max_grad_norm=10.0)
    figures = []
    for step in range(1, 13):
        measured, signal = read(method, rows, answered(method, rows), StudentView(student), step)
        figures.append(method.after(measured, signal, step, no_gradients()))  # type: ignore[arg-type]
    assert figures[-1]["gad_loss"] < 0.5 * figures[0]["gad_loss"] and figures[-1]["gad_accuracy"] == 1


def test_a_checkpoint_holds_the_discriminator(student: Policy) -> None:
    rows, view = rows_of(student), StudentView(student)
    method = gad(student, learning_rate=1e-3)
    assert method.state_dict() == {}

    def step(one: Gad) -> list[list[float]]:
        measured, signal = read(one, rows, answered(one, rows), view)
        one.after(measured, signal, 1, no_gradients())  # type: ignore[arg-type]
        return [values.tolist() for values in signal.values_BT]

    step(method)
    state = copy.deepcopy(method.state_dict())
    resumed = gad(student, learning_rate=1e-3)
    resumed.load_state_dict(state)
    again = resumed.state_dict()["discriminator"]["weights"]  # saved again before its first step
    assert all(torch.equal(weight, again[name]) for name, weight in state["discriminator"]["weights"].items())
    assert [step(resumed), step(resumed)] == [step(method), step(method)]


def test_what_it_needs(student: Policy) -> None:
    method = gad(student)
    assert method.needs == {"answer", "group", "fresh"} and method.one_process and method.measures
    assert (method.objective.anchor.beta, method.objective.anchor.where) == (0.001, "all")


def test_the_defaults_are_the_official_codes() -> None:
    config = GadConfig()
    assert (config.learning_rate, config.max_grad_norm, config.warmup_steps) == (1e-6, 0.2, 800)
    assert (config.anchor.beta, config.anchor.where, config.deviation) == (0.001, "all", "population")
