"""A teacher with a judge beside it: verdicts are asked of the judge, everything else of the teacher (`judge:` in a config).

Both share the run's store, ledger and budget, and answer beside each other.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from omniopd.types import AnswerQuery, Capabilities, Evidence, Heard, Queries, Query, Teacher
from teachers.gathering import gather_among

TEACHER, JUDGE = "teacher", "judge"  # who answered, in the counts of a step


class JudgedTeacher:
    """What a run sees as its teacher, where its judge is somebody else. It offers what the teacher offers.

    It streams: of the two, one that does not is asked when its whole share is there.
    """

    streams: bool = True

    def __init__(self, teacher: Teacher, judge: Teacher) -> None:
        self.teacher, self.judge = teacher, judge
        self.fingerprint = f"{teacher.fingerprint} judged by {judge.fingerprint}"

    def __getattr__(self, name: str) -> Any:
        """What else a run may look for in its teacher: a probe, weights, several parts."""
        if name in ("teacher", "judge"):  # not there yet
            raise AttributeError(name)
        return getattr(self.teacher, name)

    @property
    def capabilities(self) -> Capabilities:
        """The teacher's."""
        return self.teacher.capabilities

    async def gather(self, queries: Queries, progress: Heard | None = None) -> list[Evidence]:
        """Evidence for each query, in the order in which they came.

        Raises:
            TeacherError: as the two do; the judge's opens with `judge`.
        """
        found = await gather_among(
            {TEACHER: self.teacher, JUDGE: self.judge},
            lambda query: JUDGE if judged(query) else TEACHER,
            queries,
            progress,
            lambda name: "judge: " if name == JUDGE else "",
        )
        return [one if one.teacher and name == TEACHER else replace(one, teacher=name) for name, one in found]

    async def close(self) -> None:
        """Close both."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.teacher.close)
            stack.push_async_callback(self.judge.close)


def judged(query: Query) -> bool:
    """Whether a query asks for a verdict."""
    return isinstance(query, AnswerQuery) and query.judge
