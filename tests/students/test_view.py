"""What methods may read of the student's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import students.view
from omniopd.measures import log_probs
from students.policy import Policy
from students.view import StudentView


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def test_distributions_asked_rollout_by_rollout_cost_one_pass_and_are_those_of_each_text(
    student: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [tiny.rollout(student, ids) for ids in ([7, 8, 9, 10], [11, 12], [7, 8, 9, 10])]
    calls: list[Any] = []
    states = students.view.states
    monkeypatch.setattr(students.view, "states", lambda *args: calls.append(args) or states(*args))
    view = StudentView(student, rows)
    assert not calls
    for row in rows:
        (found,) = view.distributions([row])
        logp = torch.cat(list(log_probs(found))).gather(1, torch.tensor(row.ids)[:, None])[:, 0]
        torch.testing.assert_close(logp, torch.tensor(row.logprobs), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1

    other = tiny.rollout(student, [20, 21, 22])  # nobody foresaw it
    assert len(view.distributions([other])[0].hidden) == 3
    assert len(calls) == 2
