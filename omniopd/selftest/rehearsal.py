"""A step without writing and learning: rollouts that are given, answers that are made up, and the method's own hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from omniopd.method import Method, StudentModel
from omniopd.types import Evidence, Query, Rollout

Answer = Callable[[Sequence[Query]], list[Evidence]]


def rehearsed(
    method: Method, rollouts: Sequence[Rollout], answer: Answer, student: StudentModel, step: int = 1
) -> tuple[list[Rollout], list[Evidence]]:
    """What `Method.read` gets: the rollouts with what is measured of them, and the evidence, round after round."""
    rows = dict(enumerate(rollouts))
    first = method.before({row: rollout.prompt for row, rollout in rows.items()}, step)
    evidence = answer([*first, *method.audit(rollouts, step)])
    while more := method.again(rows, evidence, step):
        evidence += answer(more)
    evidence.sort(key=lambda one: one.query.row)
    facts = method.measure(rows, evidence, student)
    measured = {row: {name: tuple(numbers) for name, numbers in own.items()} for row, own in facts.items()}
    return [replace(one, facts={**one.facts, **measured.get(row, {})}) for row, one in rows.items()], evidence
