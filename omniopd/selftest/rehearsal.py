"""A step without writing and learning: rollouts that are given, answers that are made up, and the method's own hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from omniopd.method import Method, StudentModel
from omniopd.types import Evidence, Query, Rollout

Answer = Callable[[Sequence[Query]], list[Evidence]]


def rehearsed(
    method: Method, rollouts: Sequence[Rollout], answer: Answer, student: StudentModel, step: int = 1
) -> tuple[list[Rollout], list[Evidence]]:
    """What `Method.read` gets: the rollouts with what is measured of them, and the evidence."""
    measured, evidence = share(method, dict(enumerate(rollouts)), answer, student, step)
    return list(measured.values()), evidence


def share(
    method: Method, rollouts: Mapping[int, Rollout], answer: Answer, student: StudentModel, step: int = 1
) -> tuple[dict[int, Rollout], list[Evidence]]:
    """One process's part of that, by row: its own rollouts, and what is asked about them, round after round."""
    first = method.before({row: rollout.prompt for row, rollout in rollouts.items()}, step)
    asked = [query for row, rollout in rollouts.items() for query in method.ask(rollout, row, step)]
    evidence = answer([*first, *asked])
    while more := method.again(rollouts, evidence, step):
        evidence += answer(more)
    evidence.sort(key=lambda one: one.query.row)
    facts = method.measure(rollouts, evidence, student)
    measured = {row: {name: tuple(numbers) for name, numbers in own.items()} for row, own in facts.items()}
    return {row: replace(one, facts={**one.facts, **measured.get(row, {})}) for row, one in rollouts.items()}, evidence
