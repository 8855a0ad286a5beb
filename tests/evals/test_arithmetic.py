"""The generated problems: their worked answers are true, and their splits are apart."""

from __future__ import annotations

import re
from itertools import islice, pairwise

import pytest

from evals.checking import is_right
from evals.tasks.arithmetic import Arithmetic, Problem, problems
from omniopd.registry import TASKS

_EQUATION = re.compile(r"(\d+)([-+*])(\d+)=(\d+)\.")
_DO = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@pytest.fixture(scope="module")
def two_thousand() -> list[Problem]:
    return list(islice(problems("train", 0), 1500)) + list(islice(problems("heldout", 0), 500))


def test_worked_answers_are_right_in_both_styles(two_thousand: list[Problem]) -> None:
    for problem in two_thousand:
        reference = str(problem.answer)
        assert is_right(reference, problem.terse), problem
        assert is_right(reference, problem.wordy), problem
        assert not is_right(str(problem.answer + 1), problem.terse), problem


def test_every_equation_is_true_and_leads_to_the_next(two_thousand: list[Problem]) -> None:
    for problem in two_thousand:
        working, _, mark = problem.terse.partition(" #### ")
        steps = _EQUATION.findall(working)
        assert " ".join(f"{a}{sign}{b}={c}." for a, sign, b, c in steps) == working, problem
        assert all(_DO[sign](int(a), int(b)) == int(c) for a, sign, b, c in steps), problem
        assert all(before[3] == after[0] for before, after in pairwise(steps)), problem
        assert steps[-1][3] == mark == str(problem.answer), problem
        assert 2 <= len(steps) <= 4, problem


def test_splits_share_no_question_whatever_the_seeds() -> None:
    train = {p.question for seed in range(3) for p in islice(problems("train", seed), 1000)}
    heldout = {p.question for seed in range(3) for p in islice(problems("heldout", seed), 300)}
    assert not train & heldout


def test_the_task_is_reproducible_by_seed() -> None:
    config = Arithmetic.Config(train_size=50, heldout_size=20)
    first, again = Arithmetic(config), Arithmetic(config)
    other = Arithmetic(Arithmetic.Config(train_size=50, heldout_size=20, seed=1))
    assert first.train == again.train and first.heldout == again.heldout
    assert {p.messages for p in first.train} != {p.messages for p in other.train}
    assert len(first.train) == 50 and len(first.heldout) == 20


def test_the_task_by_its_name() -> None:
    assert TASKS.get("arithmetic") is Arithmetic
    task = Arithmetic(Arithmetic.Config(type="arithmetic"))
    assert (len(task.train), len(task.heldout)) == (4000, 500)
    ids = [prompt.id for prompt in [*task.train, *task.heldout]]
    assert len(set(ids)) == len(ids)
    prompt = task.heldout[0]
    assert task.check(prompt, prompt.extras["terse"]) and task.check(prompt, prompt.extras["wordy"])
    assert not task.check(prompt, "")
