"""A judge beside the teacher: who is asked what, what both cost, and what tells them from others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from omniopd import judging
from omniopd.errors import BudgetSpent, ConfigError, TeacherError
from omniopd.fitting import check_needs
from omniopd.ledger import Ledger
from omniopd.registry import TEACHERS
from omniopd.store import Store
from omniopd.types import AnswerQuery, Answers, Capabilities, Evidence, Heard, Queries, Query, Reply, Usage
from teachers.judged import JudgedTeacher, judged
from teachers.scripted import ScriptedConfig


@dataclass
class Saying:
    """Answers everything with its name."""

    name: str
    capabilities: Capabilities = field(default_factory=Capabilities)
    streams: bool = True
    fails: bool = False
    heard: list[Query] = field(default_factory=list)
    closed: bool = False
    probe: Any = None

    @property
    def fingerprint(self) -> str:
        return f"saying/{self.name}"

    async def gather(self, queries: Queries, progress: Heard | None = None) -> list[Evidence]:
        if self.fails:
            raise TeacherError("is unreachable")
        asked = list(queries) if isinstance(queries, Sequence) else [q async for some in queries for q in some]
        self.heard += asked
        if progress is not None:
            progress(len(asked), len(asked))
        return [Answers(q, (Reply(self.name, "stop"),), usage=Usage(calls=1)) for q in asked]  # type: ignore[arg-type]

    async def close(self) -> None:
        self.closed = True


def asked(row: int, judge: bool) -> AnswerQuery:
    return AnswerQuery(tiny.prompt(), row, 1, 8, 0, judge)


@pytest.mark.parametrize("streams", [True, False])
def test_verdicts_go_to_the_judge_and_answers_come_in_order(streams: bool) -> None:
    teacher, judge = Saying("t"), Saying("j", streams=streams)
    queries = [asked(row, judge=row in (1, 2, 4)) for row in range(6)]
    done: list[int] = []
    both = JudgedTeacher(teacher, judge)
    found = asyncio.run(both.gather(queries, lambda n, _: done.append(n)))
    assert [one.query for one in found] == queries
    assert [one.replies[0].text for one in found] == ["t", "j", "j", "t", "j", "t"]  # type: ignore[union-attr]
    assert [one.teacher for one in found] == ["teacher", "judge", "judge", "teacher", "judge", "teacher"]
    assert all(map(judged, judge.heard)) and not any(map(judged, teacher.heard)) and done[-1] == 6


def test_one_of_several_teachers_keeps_its_name() -> None:
    class Routed(Saying):
        async def gather(self, queries: Queries, progress: Heard | None = None) -> list[Evidence]:
            return [replace(one, teacher="maths") for one in await super().gather(queries, progress)]

    found = asyncio.run(JudgedTeacher(Routed("t"), Saying("j")).gather([asked(0, False), asked(1, True)]))
    assert [one.teacher for one in found] == ["maths", "judge"]


def test_errors_say_whose_they_are() -> None:
    both = JudgedTeacher(Saying("t"), Saying("j", fails=True))
    with pytest.raises(TeacherError, match="^judge: is unreachable$"):
        asyncio.run(both.gather([asked(0, True)]))
    with pytest.raises(TeacherError, match="^is unreachable$"):
        asyncio.run(JudgedTeacher(Saying("t", fails=True), Saying("j")).gather([asked(0, False)]))


def test_it_offers_what_the_teacher_offers_and_is_told_by_both() -> None:
    teacher = Saying("t", Capabilities(continuation="prefill", score=True), probe={"rung": "prefill"})
    both = JudgedTeacher(teacher, Saying("j"))
    assert both.capabilities == teacher.capabilities and both.probe == teacher.probe
    assert both.fingerprint == "saying/t judged by saying/j"
    assert both.fingerprint != JudgedTeacher(teacher, Saying("k")).fingerprint
    assert not hasattr(both, "parts")
    asyncio.run(both.close())
    assert teacher.closed and both.judge.closed  # type: ignore[attr-defined]


def test_who_judges_must_answer() -> None:
    class Needing:
        needs = frozenset({"judge"})

        def lacking(self, offered: Capabilities) -> list[str]:
            return []

    silent = Saying("s", Capabilities(answer=False))
    check_needs(Needing(), JudgedTeacher(silent, Saying("j")))  # type: ignore[arg-type]
    for teacher in (silent, JudgedTeacher(Saying("t"), silent)):
        with pytest.raises(ConfigError, match="^judge: has to answer"):
            check_needs(Needing(), teacher)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    kept = Store(tmp_path / "answers.sqlite")
    yield kept
    kept.close()


def test_both_are_booked_in_one_ledger_and_stop_at_one_budget(store: Store) -> None:
    price = {"prompt": 1000, "completion": 1000}  # dollars per million tokens
    ledger = Ledger(store, "run", budget_usd=1.0)
    config = ScriptedConfig(rule="arithmetic", price=price)  # type: ignore[arg-type]
    both = JudgedTeacher(TEACHERS.build(config, store, ledger), TEACHERS.build(config, store, ledger))
    grading = judging.grading(tiny.prompt("Ann has 4 coins. Ann loses 1. How many coins does Ann have now?"), "#### 3")
    asyncio.run(both.gather([AnswerQuery(grading, 0, 1, 64, 0, judge=True)]))
    once = ledger.spent
    assert once > 0
    asyncio.run(both.gather([AnswerQuery(grading, 0, 1, 64, 1)]))
    assert ledger.spent == pytest.approx(2 * once)
    with pytest.raises(BudgetSpent):
        asyncio.run(both.gather([AnswerQuery(grading, 0, 1, 64, seed, judge=True) for seed in range(2, 99)]))
    assert ledger.spent == pytest.approx(store.spent("run")) and ledger.spent <= 1
