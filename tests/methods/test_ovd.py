"""OVD: the grade filters, the task rewards, the teacher replaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pydantic import TypeAdapter, ValidationError

from omniopd.composition import compose
from omniopd.groups import normalised
from omniopd.judging import BEST, sections
from omniopd.method import Method
from omniopd.methods.ovd import Ovd, OvdConfig
from omniopd.registry import METHODS
from omniopd.settings import tagged
from omniopd.types import AnswerQuery, Answers, Evidence, Message, Prompt, Query, Reply, Rollout, Signal, Token
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer

GOLDEN = (9, 3, 7, 0)


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def prompt(name: str) -> Prompt:
    return Prompt(name, (Message("user", f"What is {name}?"),), reference=name)


def group(student: Policy, name: str = "a", seed: int = 0) -> list[Rollout]:
    torch.manual_seed(seed)
    ids = [[*torch.randint(5, 200, (length,)).tolist(), student.end_id] for length in (6, 3, 9, 4)]
    return [tiny.rollout(student, one, prompt(name), finish="stop") for one in ids]


def right_of(rows: Sequence[Rollout], right: Sequence[bool]) -> Any:
    """A verifier that finds these of the rollouts right."""
    known = {(row.prompt.id, row.text): one for row, one in zip(rows, right, strict=True)}
    return lambda asked, text: known[asked.id, text]


def ovd(
    student: Policy, rows: Sequence[Rollout], right: Sequence[bool] = (True, True, False, True) * 3, **settings: Any
) -> Method:
    config = TypeAdapter(tagged(METHODS)).validate_python({"name": "ovd", **settings})
    return compose(config, student, 0, right_of(rows, right[: len(rows)]))


def graded(queries: Sequence[Query], grades: Mapping[int, int | str | None]) -> list[Evidence]:
    said = {row: f"Grade: {grade}" for row, grade in grades.items() if grade is not None}
    return [
        Answers(q, (Reply(said[q.row], "stop"),)) if q.row in said else Answers(q, (), {"empty": 1})
        for q in queries
        if isinstance(q, AnswerQuery)
    ]


def shown(queries: Sequence[Query], text: str = "It is 19.") -> list[Evidence]:
    return [Answers(q, (Reply(text, "stop"),)) for q in queries if isinstance(q, AnswerQuery)]


def whole(method: Method, rows: Sequence[Rollout], grades: Sequence[int | str | None]) -> tuple[list[Evidence], Signal]:
    """All rounds of a step."""
    evidence = graded(method.audit(rows, 1), dict(enumerate(grades)))
    while more := method.again(dict(enumerate(rows)), evidence, 1):
        evidence += shown(more)
    return evidence, method.read(rows, evidence, 1)


def loss(student: Policy, method: Method, rows: Sequence[Rollout], signal: Signal) -> tuple[float, list[torch.Tensor]]:
    trainer = Trainer(student, OptimizerSettings(), method.objective)
    value = trainer.accumulate(rows, signal)["loss"]
    return value, [p.grad.clone() for p in student.model.parameters() if p.grad is not None]


def test_every_rollout_is_graded_by_the_judge(student: Policy) -> None:
    rows = [*group(student), tiny.rollout(student, [], prompt("b"))]
    queries = ovd(student, rows).audit(rows, 1)
    assert [q.row for q in queries] == [0, 1, 2, 3]  # an empty one can't be judged
    for query in queries:
        assert isinstance(query, AnswerQuery) and query.judge and query.n == 1
        (message,) = query.prompt.messages
        assert sections(message.content, "response") == [rows[query.row].text]
    assert queries == ovd(student, rows).audit(rows, 7)  # the same text has the same verdict in every step


def test_golden_the_grade_accepts(student: Policy) -> None:
    rows = group(student)
    evidence, signal = whole(ovd(student, rows), rows, GOLDEN)
    accepted = [bool(mask.all()) for mask in signal.mask_BT]
    assert accepted == [True, False, True, False]
    assert [bool(mask.any()) for mask in signal.mask_BT] == accepted
    assert [values[0].item() for values in signal.values_BT] == [1.0, 0.0, -1.0, 0.0]  # right, -, wrong, -
    assert signal.stats["accepted_share"] == 0.5
    assert signal.coverage == 1 and not signal.drops  # what was rejected is no hole
    assert [(b.row, b.at, student.decode(list(b.ids[:-1]))) for b in signal.branches] == [
        (1, 0, "It is 19."),
        (3, 0, "It is 19."),
    ]
    assert all(branch.ids[-1] == student.end_id for branch in signal.branches)
    assert [(one.query.row, one.query.judge) for one in evidence] == [(r, True) for r in range(4)] + [
        (1, False),
        (3, False),
    ]  # type: ignore[union-attr]


def test_the_grade_does_not_reach_the_gradient(student: Policy) -> None:
    rows = group(student)
    method = ovd(student, rows)
    one = loss(student, method, rows, whole(method, rows, (9, 3, 7, 0))[1])
    student.model.zero_grad()
    other = loss(student, method, rows, whole(method, rows, (6, 5, 9, 1))[1])
    assert one[0] == other[0] != 0 and all(map(torch.equal, one[1], other[1]))
    assert whole(method, rows, (9, 6, 7, 0))[1].mask_BT[1].all()  # at theta it does


@pytest.mark.parametrize("grade", [None, "ten", "10", ""])
def test_no_grade_is_no_verdict_and_never_0(student: Policy, grade: str | None) -> None:
    rows = group(student)
    evidence, signal = whole(ovd(student, rows, (True, True, True, False)), rows, (9, grade, 9, 9))
    assert signal.drops == {"no verdict": 1} and not signal.mask_BT[1].any()
    assert not any(isinstance(one, Answers) and not one.query.judge for one in evidence)  # it is not replaced, either
    assert [v[0].item() for v in signal.values_BT] == pytest.approx(
        [*normalised((1.0, 1.0, 0.0))[:1], 0.0, *normalised((1.0, 1.0, 0.0))[1:]]
    )
    assert signal.stats["grade_mean"] == 9


def test_an_unknown_outcome_is_masked(student: Policy) -> None:
    rows = group(student)
    rows[2] = tiny.rollout(student, rows[2].ids[:-1], rows[2].prompt, finish="length")
    method = ovd(student, rows)
    _, signal = whole(method, rows, (9, 9, 9, 9))
    assert signal.drops == {"no outcome": 1} and not signal.mask_BT[2].any()


def test_theta_0_without_replacement_is_grpo_on_the_outcome(student: Policy) -> None:
    rows = [*group(student), *group(student, "b", 1)]
    right = (True, True, False, True, False, False, False, True)
    method = ovd(student, rows, right, theta=0, replace=False, anchor={"beta": 0, "allow_none": True})
    assert method.needs == {"verify", "group"} and method.audit(rows, 1) == []
    value, gradients = loss(student, method, rows, method.read(rows, [], 1))

    student.model.zero_grad()
    rewards = torch.tensor(right).double().view(2, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, correction=0, keepdim=True)).flatten()
    count = sum(map(len, rows))
    expected = 0.0
    for row, advantage in zip(rows, advantages.tolist(), strict=True):
        inputs = torch.tensor([[*row.prompt_ids, *row.ids]])
        logp = student.model(inputs).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
        one = -advantage * logp.gather(1, torch.tensor(row.ids)[:, None]).sum() / count
        one.backward()
        expected += one.item()
    reference = [p.grad for p in student.model.parameters() if p.grad is not None]
    assert value == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(gradients, reference, rtol=1e-3, atol=1e-6)


def test_what_is_not_asked_is_not_needed(student: Policy) -> None:
    rows = group(student)
    assert ovd(student, rows).needs == Ovd.needs
    assert ovd(student, rows, replace=False).needs == {"judge", "verify", "group"}
    assert ovd(student, rows, use="reward").needs == {"judge", "group"}
    assert ovd(student, rows, theta=0).needs == {"verify", "group"}


def test_the_grade_as_a_reward(student: Policy) -> None:
    rows = group(student)
    method = ovd(student, rows, use="reward")
    evidence, signal = whole(method, rows, (9, 3, None, 0))
    expected = normalised((1.0, 3 / 9, 0.0))
    assert [v[0].item() for v in signal.values_BT] == pytest.approx([*expected[:2], 0.0, expected[2]])
    assert not signal.branches and len(evidence) == 4 and signal.drops == {"no verdict": 1}
    with pytest.raises(ValidationError, match="theta: and replace are read with use: filter only"):
        OvdConfig(use="reward", theta=3)


def test_nothing_known_is_nothing_learned(student: Policy) -> None:
    rows = group(student)
    _, signal = whole(ovd(student, rows), rows, (None,) * 4)
    assert signal.coverage == 0 and not signal.branches and signal.drops == {"no verdict": 4}
    _, signal = whole(ovd(student, rows, (True,) * 4), rows, (9,) * 4)
    assert signal.coverage == 1 and not any(values.any() for values in signal.values_BT)


def test_a_cut_or_missing_answer_replaces_nothing(student: Policy) -> None:
    rows = group(student)
    method = ovd(student, rows)
    evidence = graded(method.audit(rows, 1), dict(enumerate(GOLDEN)))
    (first, second) = method.again(dict(enumerate(rows)), evidence, 1)
    evidence += [Answers(first, (Reply("It", "length"),)), Answers(second, (), {"cut": 1})]  # type: ignore[arg-type]
    assert method.again(dict(enumerate(rows)), evidence, 1) == []
    signal = method.read(rows, evidence, 1)
    assert not signal.branches and signal.stats["answers_learned"] == 0 and signal.rejects == {"cut": 1}


def test_control_grades_are_dealt_out_anew_and_alike_in_both_rounds(student: Policy) -> None:
    rows = [*group(student), *group(student, "b", 1), *group(student, "c", 2)]
    grades = [0] * 6 + [9] * 6
    method = ovd(student, rows, control="shuffled")
    assert method.one_process
    _, signal = whole(method, rows, grades)
    accepted = [bool(mask.any()) for mask in signal.mask_BT]
    assert sum(accepted) == 6 and accepted != [False] * 6 + [True] * 6
    assert [b.row for b in signal.branches] == [row for row, one in enumerate(accepted) if not one]
    assert whole(method, rows, grades)[1].stats == signal.stats


def test_the_expected_grade_is_logged(student: Policy) -> None:
    rows = group(student)
    method = ovd(student, rows)
    evidence = [
        Answers(q, (Reply("7", "stop", (Token("7", -0.5, (("7", -0.5), ("3", -0.5))),)),))
        for q in method.audit(rows, 1)
        if isinstance(q, AnswerQuery)
    ]
    assert method.read(rows, evidence, 1).stats["grade_expected"] == pytest.approx(5.0)


def test_it_says_which_wording_the_grades_are_due_to(student: Policy) -> None:
    assert "wording " in ovd(student, []).describe() and "judge" not in ovd(student, [], theta=0).describe()


def test_the_defaults_of_the_sheet() -> None:
    config = OvdConfig()
    assert (config.use, config.theta, config.replace, config.deviation, BEST) == ("filter", 6, True, "population", 9)
