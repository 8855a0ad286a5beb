"""Score queries in the forecast, the pilot and the summary: what is counted before and after they are asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny

from omniopd.pilot import Counter
from omniopd.summary import per_teacher
from omniopd.types import AnswerQuery, Answers, Evidence, ScoreQuery, TokenScores
from students.policy import Policy
from teachers.asks import describe, order


def query(row: int = 0, **settings: Any) -> ScoreQuery:
    return ScoreQuery(tiny.prompt(), row, (300, 7, 9, 9, 1), "digest", "The 12", True, **settings)


@dataclass
class Run:
    """What a counter needs of a run."""

    policy: Policy
    config: Any


@dataclass
class Config:
    teacher: Any


@dataclass
class Teacher:
    continuation: str = "auto"
    system: str | None = None
    thinking_tokens: int = field(default=4096)


@pytest.mark.parametrize("system", [None, "Be exact."])
def test_a_score_reads_prompt_and_response_and_writes_one_token(llama_folder: Any, system: str | None) -> None:
    student = tiny.policy(llama_folder)
    counter = Counter(Run(student, Config(Teacher(system=system))))  # type: ignore[arg-type]
    asked = query()
    guide = counter.size(system or "")
    assert counter.read(asked) == len(student.prompt_ids(asked.prompt)) + guide + len(asked.ids)
    assert (counter.most(asked), counter.expected(asked)) == (1, 1)  # no thought goes before a score
    answer = AnswerQuery(asked.prompt, 0, 2, 10, 0)
    assert counter.expected(answer) == counter.most(answer) // 2


def test_a_score_belongs_to_its_rollout() -> None:
    assert query(3).row == 3
    assert order(query(3)) == (3, -1)
    assert describe(query(3)) == "prompt 'p', rollout 3, scores of the response"


def test_each_teachers_share_of_the_tokens() -> None:
    answer = AnswerQuery(tiny.prompt(), 0, 1, 50, 0)
    evidence: list[Evidence] = [
        TokenScores(query(), ids=(1, 2), logprobs=(-1.0, -2.0), ends=(3, 6), teacher="a"),
        TokenScores(query(1), rejected={"context_overflow": 1}, teacher="a"),
        Answers(answer, (), {"empty": 1}, teacher="b"),
        TokenScores(query(2), ids=(1,)),  # of a run with one teacher
    ]
    assert per_teacher(evidence) == {
        "a": {"queries": 2, "replies": 1, "tokens": 5, "rejected context_overflow": 1},
        "b": {"queries": 1, "replies": 0, "tokens": 0, "rejected empty": 1},
    }
