"""Queries that come list after list: sent as they come, and nothing else about a gather changes."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from omniopd.errors import BudgetSpent, TeacherError
from omniopd.ledger import Ledger
from omniopd.types import Query, Usage
from teachers.client import SILENT_CALLS
from teachers.gathering import Locks
from teachers.in_process import InProcessTeacher
from teachers.openai import OpenAIConfig, OpenAITeacher
from teachers.replay import ReplayTeacher
from teachers.routed import RoutedConfig, RoutedTeacher


def honest(bench: Any) -> Any:
    """A server whose choice j depends on the seed it would have: seed + j."""
    return bench.Script(
        lambda body: bench.say(
            *(f" thirty-{body.get('seed', 0) + j}" for j in range(body.get("n", 1))), finish="length"
        )
    )


async def stream(lists: Sequence[Sequence[Query]]) -> AsyncIterator[Sequence[Query]]:
    for queries in lists:
        yield queries
        await asyncio.sleep(0)


def rollouts(bench: Any, rows: Sequence[int], chunks: int = 2) -> list[list[Query]]:
    """A list for each rollout, its chunks from the last to the first."""
    return [
        [bench.continue_query(row=row, start=start, seed=1000 * row + 10 * start) for start in range(chunks, 0, -1)]
        for row in rows
    ]


def test_a_stream_brings_the_evidence_of_the_same_queries_at_once(bench: Any) -> None:
    lists = rollouts(bench, [2, 0, 1])
    asked = [query for queries in lists for query in queries]
    teacher, heard = bench.teacher(honest(bench)), list[tuple[int, int]]()
    streamed = asyncio.run(teacher.gather(stream(lists), lambda *done: heard.append(done)))
    again = bench.teacher(script := honest(bench))
    together = asyncio.run(again.gather(asked))
    assert [one.query for one in streamed] == asked
    assert [one.replies for one in streamed] == [one.replies for one in together]
    assert all(one.usage.calls == 1 for one in streamed)
    assert script.calls == 0  # all of it was in the store
    assert [done for done, _ in heard] == list(range(1, 7))
    assert all(done <= total <= 6 for done, total in heard)
    assert heard[-1] == (6, 6)


@pytest.mark.parametrize("lists", [[], [[], []]])
def test_a_stream_of_nothing_is_an_empty_gather(bench: Any, lists: list[list[Query]]) -> None:
    teacher = bench.teacher(script := honest(bench))
    assert asyncio.run(teacher.gather(stream(lists))) == []
    assert script.calls == 0


def test_a_list_is_sent_before_the_next_one_comes(bench: Any) -> None:
    """Each list waits for the answers to the one before: a gather that waited for the end of the stream never ended."""
    lists, heard = rollouts(bench, range(3)), asyncio.Event()

    async def slowly() -> AsyncIterator[Sequence[Query]]:
        for queries in lists:
            heard.clear()
            yield queries
            await heard.wait()

    async def gathered(teacher: Any) -> list[Any]:
        return await asyncio.wait_for(teacher.gather(slowly(), lambda done, total: heard.set()), 30)

    assert len(asyncio.run(gathered(bench.teacher(honest(bench))))) == 6


def test_queries_of_one_list_follow_one_another_by_their_place(bench: Any) -> None:
    under_way, most = Counter[int](), Counter[int]()

    def answer(body: dict[str, Any]) -> Any:
        row = body["seed"] // 1000
        under_way[row] += 1
        most[row] = max(most[row], under_way[row])
        time.sleep(0.05)
        under_way[row] -= 1
        return bench.say(*"abcd", finish="length")

    script = bench.Script(answer)
    with bench.serving(script) as url:
        asyncio.run(bench.teacher(base_url=url).gather(stream(rollouts(bench, [0, 1], chunks=3))))
    assert most == {0: 1, 1: 1}
    seeds = [body["seed"] for body in script.bodies]
    for row in (0, 1):
        own = [seed for seed in seeds if seed // 1000 == row]
        assert own == sorted(own) and len(own) == 3


def test_auto_looks_for_the_rung_before_the_first_call_and_once(bench: Any) -> None:
    """Two gathers begin at once, the first with a list that needs no rung: one of them looks, and pays for it."""

    def answer(body: dict[str, Any]) -> Any:
        if body["messages"][-1]["content"] == "1, 2, 3, 4,":
            return bench.say(" 5, 6", usage=(20, 3))
        return bench.say(*(f" {body['seed'] + j}" for j in range(body.get("n", 1))), finish="length")

    script = bench.Script(answer)

    async def both(teacher: Any) -> list[Any]:
        first = [[bench.answer_query(row=9)], *rollouts(bench, [0, 1])]
        gathers = (teacher.gather(stream(first)), teacher.gather(stream(rollouts(bench, [2, 3]))))
        return [one for found in await asyncio.gather(*gathers) for one in found]

    with bench.serving(script) as url:
        teacher = bench.teacher(base_url=url, continuation="auto")
        found = asyncio.run(both(teacher))
    looks = [body for body in script.bodies if body["messages"][-1]["content"] == "1, 2, 3, 4,"]
    assert len(looks) == 1
    assert teacher.capabilities.continuation == "prefill"
    continuing = [body for body in script.bodies if body["messages"][-1]["role"] == "assistant"]
    assert continuing[0] is looks[0] and len(continuing) == 1 + 8
    assert sum((one.usage for one in found), Usage()).calls == script.calls == 10


def test_equal_queries_of_two_gathers_are_paid_once(bench: Any) -> None:
    script = honest(bench)

    async def both(teacher: Any) -> list[Any]:
        gathers = [teacher.gather(stream(rollouts(bench, [0, 1]))) for _ in range(2)]
        return await asyncio.gather(*gathers)

    with bench.serving(script) as url:
        one, other = asyncio.run(both(bench.teacher(base_url=url)))
    assert script.calls == 4
    assert [found.replies for found in one] == [found.replies for found in other]
    assert sum((found.usage for found in [*one, *other]), Usage()).cached_calls == 4


def test_a_lock_is_gone_with_those_who_use_it() -> None:
    locks = Locks()

    async def used() -> None:
        async with locks["a"]:
            assert locks["a"].locked()
            assert not locks["b"].locked()

    asyncio.run(used())
    asyncio.run(used())  # another event loop
    assert not locks._locks


def test_s10_a_stream_that_fails_keeps_what_was_under_way(bench: Any) -> None:
    slow = bench.say(*"abcd")
    slow.delay_s = 0.5
    sent = bench.Script(lambda body: slow)

    async def failing() -> AsyncIterator[Sequence[Query]]:
        yield rollouts(bench, [0], chunks=1)[0]
        while not sent.calls:
            await asyncio.sleep(0.01)
        raise RuntimeError("no more rollouts")

    with bench.serving(sent) as url, pytest.raises(RuntimeError, match="no more rollouts"):
        asyncio.run(bench.teacher(base_url=url).gather(failing()))
    assert bench.store.stats().answers == 4


def test_a_failing_call_ends_a_gather_whose_stream_goes_on(bench: Any) -> None:
    teacher = bench.teacher(bench.Script([bench.Said(401, {"error": {"message": "no such key"}})]))

    async def endless() -> AsyncIterator[Sequence[Query]]:
        yield rollouts(bench, [0])[0]
        await asyncio.Event().wait()

    with pytest.raises(TeacherError, match="key"):
        asyncio.run(asyncio.wait_for(teacher.gather(endless()), 30))


def test_a_silent_teacher_ends_the_gather_before_the_stream_does(bench: Any) -> None:
    script = bench.Script([bench.Said(500, {})])
    teacher = bench.teacher(script, max_attempts=1, concurrency=1)

    async def endless() -> AsyncIterator[Sequence[Query]]:
        for row in range(4 * SILENT_CALLS):
            yield rollouts(bench, [row], chunks=1)[0]
        await asyncio.Event().wait()

    with pytest.raises(TeacherError, match="is unreachable: none of"):
        asyncio.run(asyncio.wait_for(teacher.gather(endless()), 30))
    assert SILENT_CALLS <= script.calls < 4 * SILENT_CALLS


def test_two_gathers_share_one_budget(bench: Any) -> None:
    script = honest(bench)
    ledger = Ledger(bench.store, "run", budget_usd=1.0)
    config = OpenAIConfig(
        model="m", base_url="http://127.0.0.1:9/v1", api_key_env=None, continuation="prefill", price={"prompt": 1000}
    )
    teacher = OpenAITeacher(config, bench.store, ledger, http=script.mock(), sleep=bench.sleep)

    async def both() -> list[Any]:
        gathers = [teacher.gather(stream(rollouts(bench, rows))) for rows in (range(5), range(5, 10))]
        return await asyncio.gather(*gathers, return_exceptions=True)

    found = asyncio.run(both())
    assert any(isinstance(one, BudgetSpent) for one in found)
    assert 0 < ledger.spent <= 1.0
    assert ledger.spent == pytest.approx(bench.store.spent("run")) == pytest.approx(0.1 * script.calls)
    assert ledger.reserved == 0


def test_who_streams(bench: Any) -> None:
    assert OpenAITeacher.streams and RoutedTeacher.streams
    assert not InProcessTeacher.streams and not ReplayTeacher.streams


@pytest.mark.parametrize("streaming", [True, False])
def test_a_routed_stream_goes_to_each_teacher_as_it_wants_it(
    bench: Any, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    """The second list comes when the first is answered, or (a teacher that does not stream) when it has been given over."""
    one = {"type": "openai", "api_key_env": None, "continuation": "prefill", "model": "m", "max_attempts": 1}
    with bench.serving(honest(bench)) as url, bench.serving(honest(bench)) as other:
        settings = {"maths": {**one, "base_url": url}, "prose": {**one, "base_url": other, "model": "prose"}}
        teacher = RoutedTeacher(RoutedConfig(teachers=settings, by="subject"), bench.store)
        prose, given = teacher._parts["prose"], list[Any]()
        monkeypatch.setattr(prose, "streams", streaming)
        gather = prose.gather
        monkeypatch.setattr(prose, "gather", lambda queries, *more: given.append(queries) or gather(queries, *more))
        lists = [
            [replace(query, prompt=replace(query.prompt, extras={"subject": subject})) for query in queries]
            for queries, subject in zip(rollouts(bench, range(4)), ("prose", "maths", "prose", "maths"), strict=True)
        ]
        lists.append([lists[0][0], lists[1][0]])  # one list for both
        heard, done = asyncio.Event(), list[tuple[int, int]]()

        def progress(*counts: int) -> None:
            done.append(counts)  # type: ignore[arg-type]
            heard.set()

        async def slowly() -> AsyncIterator[Sequence[Query]]:
            for queries in lists:
                yield queries
                if streaming:
                    await heard.wait()
                    heard.clear()

        found = asyncio.run(asyncio.wait_for(teacher.gather(slowly(), progress), 30))
    assert [one.query for one in found] == [query for queries in lists for query in queries]
    assert [one.teacher for one in found] == ["prose"] * 2 + ["maths"] * 2 + ["prose"] * 2 + ["maths"] * 2 + [
        "prose",
        "maths",
    ]
    assert isinstance(given[0], list) is not streaming
    assert done[-1] == (10, 10)
