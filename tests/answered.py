"""The first half of a step without a back end: made-up answers to what a method asks first, and what is then written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tiny
from pydantic import TypeAdapter
from scored_by import scored

from omniopd.composition import compose
from omniopd.method import Check, Method
from omniopd.registry import METHODS
from omniopd.settings import tagged
from omniopd.types import AnswerQuery, Answers, Evidence, Prompt, Reply, Rollout, ScoreQuery
from students.policy import Policy

Say = Callable[[AnswerQuery], Sequence[Reply]]


def built(student: Policy, config: dict[str, Any], check: Check | None = None) -> Method:
    """The method of a config with its parts."""
    return compose(TypeAdapter(tagged(METHODS)).validate_python(config), student, 0, check)


def answers(queries: Sequence[Any], say: Say) -> list[Evidence]:
    """An answer to each query for answers."""
    return [Answers(one, tuple(said), {} if said else {"empty": one.n}) for one in queries for said in [say(one)]]


def begun(
    method: Method, student: Policy, prompts: Sequence[Prompt], say: Say, step: int = 1
) -> tuple[list[Rollout], list[Evidence]]:
    """The rollouts of a step, and the evidence from before they were written."""
    asked = dict(enumerate(prompts))
    before = answers(method.before(asked, step), say)
    written: dict[int, Rollout] = {}
    writings = method.writings(asked, before, step)
    tiny.sampler(student).fill(asked, step, written.__setitem__, writings)
    return [written[row] for row in asked], before


def heard(method: Method, teacher: Policy, rollouts: Sequence[Rollout], step: int = 1) -> list[Evidence]:
    """What a teacher of weights says of them."""
    return [scored(teacher, query) for query in method.audit(rollouts, step) if isinstance(query, ScoreQuery)]
