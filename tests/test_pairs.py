"""Pairs of rows: who writes which, what is asked, which pairs are left out, and the same for any number of processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from paired import Step, answered, method_of, right

from omniopd.branches import answer_ids
from omniopd.settings import Settings
from omniopd.types import Prompt, Reply
from students.policy import Policy

BOTH = ["soda", "orpo_distill"]


@pytest.fixture(scope="module")
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def prompts(group: int = 2, *names: str) -> dict[int, Prompt]:
    asked = [replace(tiny.prompt(f"What is {name}?", name), reference=name) for name in names or ("1", "2", "3")]
    return dict(enumerate(prompt for prompt in asked for _ in range(group)))


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("group", [2, 3, 4])
def test_rows_are_the_teachers_and_the_students_in_turn(student: Policy, name: str, group: int) -> None:
    method = (
        method_of(student, name, group, weight=1.0, phi=0.0)
        if name == "orpo_distill"
        else method_of(student, name, group)
    )
    asked = prompts(group)
    queries = method.before(asked, 1)
    written = method.writings(asked, [answered(query) for query in queries], 1)

    kinds = [
        "whole" if w.whole else "initial" if w.initial else "blank" if w.blank else "own" for w in written.values()
    ]
    assert kinds == (["whole", "initial"] * (group // 2) + ["blank"] * (group % 2)) * 3
    assert [query.row for query in queries] == [row for row, kind in enumerate(kinds) if kind == "whole"]
    assert written[0].begins == answer_ids(Reply(right(asked[0]), "stop"), student)
    assert bool(method.cautions()) == bool(group % 2)


@pytest.mark.parametrize("name", BOTH)
def test_a_prompt_that_comes_again_is_asked_the_same_and_its_pairs_are_told_apart(student: Policy, name: str) -> None:
    method = method_of(student, name, 4)
    early, late = prompts(4, "1", "2"), prompts(4, "2", "1")
    first = {(q.prompt.id, q.seed) for q in method.before(early, 1)}  # type: ignore[union-attr]
    assert len(first) == 4
    assert first == {(q.prompt.id, q.seed) for q in method.before(late, 7)}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", BOTH)
def test_queries_and_writings_do_not_depend_on_the_processes(student: Policy, name: str) -> None:
    method, asked = method_of(student, name, 4), prompts(4)
    whole = method.before(asked, 3)
    evidence = [answered(query) for query in whole]
    written = method.writings(asked, evidence, 3)
    for rank in range(3):
        mine = {row: prompt for row, prompt in asked.items() if row % 3 == rank}
        own = method.before(mine, 3)
        assert own == [query for query in whole if query.row in mine]
        heard = [one for one in evidence if one.query.row in mine]
        assert method.writings(mine, heard, 3) == {row: written[row] for row in mine}


@pytest.mark.parametrize("name", BOTH)
def test_a_pair_that_cannot_be_made_is_a_drop_with_its_reason(student: Policy, name: str) -> None:
    step = Step(student, name, prompts(2, "1", "2", "3", "4"))
    step.answers[0] = answered(step.queries[0], Reply("it goes on and", "length"))
    step.answers[1] = replace(answered(step.queries[1]), replies=(), rejected={"refusal": 2, "empty": 1})
    step.rejected[5] = "so it is 3"
    signal = step.signal()
    assert dict(signal.drops) == {"cut": 1, "refusal": 1, "rejected_right": 1}
    assert dict(signal.rejects) == {"refusal": 2, "empty": 1}
    assert signal.stats["pairs"] == 1.0
    assert [bool(mask.any()) for mask in signal.mask_BT] == [False] * 6 + [True] * 2


@pytest.mark.parametrize("name", BOTH)
def test_a_step_without_any_pair_is_silent_and_finite(student: Policy, name: str) -> None:
    step = Step(student, name, prompts())
    step.answers = [replace(answered(query), replies=()) for query in step.queries]
    signal = step.signal()
    assert dict(signal.drops) == {"unanswered": 3}
    assert signal.stats == {"pairs": 0.0, "branch_tokens": 0.0} and signal.coverage == 0.0
    assert not any(values.any() for values in signal.values_BT)


@pytest.mark.parametrize("name", BOTH)
def test_a_number_that_is_not_finite_is_no_pair(student: Policy, name: str) -> None:
    step = Step(student, name, prompts())
    rollouts = step.rollouts()
    facts = {fact: (float("-inf"), *numbers[1:]) for fact, numbers in rollouts[1].facts.items()}
    if name == "orpo_distill":
        facts = {fact: (float("nan"),) * len(rollouts[1]) for fact in rollouts[1].facts}
    rollouts[1] = replace(rollouts[1], facts=facts)
    signal = step.method.read(rollouts, step.answers, 1)
    assert dict(signal.drops) == {"not_finite": 1} and signal.stats["pairs"] == 2.0
    assert all(bool(values.isfinite().all()) for values in signal.values_BT)


@pytest.mark.parametrize("name", BOTH)
def test_values_are_constant_on_a_row_and_of_opposite_signs(student: Policy, name: str) -> None:
    signal = Step(student, name, prompts()).signal()
    for row in (0, 2, 4):
        good, bad = signal.values_BT[row], signal.values_BT[row + 1]
        assert bool((good == good[0]).all()) and bool((bad == bad[0]).all()) and good[0] > 0 > bad[0]
    assert signal.stats["chosen_tokens"] == sum(len(signal.values_BT[row]) for row in (0, 2, 4)) / 3
    assert signal.stats["rejected_tokens"] == sum(len(signal.values_BT[row]) for row in (1, 3, 5)) / 3


@pytest.mark.parametrize("name", BOTH)
def test_the_control_pairs_a_prompt_with_the_answer_to_another(student: Policy, name: str) -> None:
    step, control = Step(student, name, prompts()), Step(student, name, prompts(), control="shuffled")
    asked = {query.row: query.prompt.id for query in control.queries}
    assert sorted(asked.values()) == ["1", "2", "3"]
    assert all(step.prompts[row].id != other for row, other in asked.items())
    real = {(query.prompt.id, query.seed) for query in step.queries}
    assert {(query.prompt.id, query.seed) for query in control.queries} == real, "the store has the answers already"
    signal = control.signal()
    assert not signal.drops and control.method.one_process and not step.method.one_process
    for row, other in asked.items():
        assert control.rollouts()[row].ids == answer_ids(Reply(right(tiny.prompt(name=other)), "stop"), student)


@pytest.mark.parametrize("name", BOTH)
def test_the_control_of_a_single_prompt_has_no_pair(student: Policy, name: str) -> None:
    control = Step(student, name, prompts(2, "1"), control="shuffled")
    assert not control.queries and dict(control.signal().drops) == {"unasked": 1}


@pytest.mark.parametrize("name", BOTH)
def test_the_mean_is_over_pairs_whatever_else_is_set(student: Policy, name: str) -> None:
    config: type[Settings] = type(method_of(student, name, 2).objective)
    with pytest.raises(ValueError, match="reduction"):
        config.model_validate({"reduction": "sum_seqmean"})
