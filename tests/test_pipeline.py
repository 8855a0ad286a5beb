"""What lets steps overlap: the lane, what a cancellation does to it, and rollouts that travel through a checkpoint."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny

from omniopd.pipeline import Arrivals, Clock, Lane, _kept, dropped, ended, rollout_of
from omniopd.types import AnswerQuery, Query


def test_work_is_done_in_order_in_one_thread_that_is_not_the_loops() -> None:
    lane, order = Lane(), list[tuple[int, int]]()

    async def main() -> list[int]:
        def work(number: int) -> int:
            order.append((number, threading.get_ident()))
            return 2 * number

        return [await lane.run(work, number) for number in range(3)]

    assert asyncio.run(main()) == [0, 2, 4]
    lane.close()
    numbers, threads = zip(*order, strict=True)
    assert numbers == (0, 1, 2)
    assert len(set(threads)) == 1 and threading.get_ident() not in threads


def test_an_error_of_the_work_reaches_who_waits() -> None:
    def work() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(Lane().run(work))


def test_a_cancellation_waits_for_the_work_and_loses_no_result() -> None:
    lane, begun, may_end, results = Lane(), threading.Event(), threading.Event(), list[str]()

    def work() -> str:
        begun.set()
        assert may_end.wait(30)
        return "done"

    async def step() -> None:
        results.append(await lane.run(work))
        results.append("recorded")
        await lane.run(results.append, "never begun")

    async def main() -> None:
        task = asyncio.create_task(step())
        await asyncio.to_thread(begun.wait, 30)
        for _ in range(3):  # whoever is impatient
            task.cancel()
            await asyncio.sleep(0)
        assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert results == ["done", "recorded"]


def test_a_first_ctrl_c_during_the_work_is_still_a_keyboard_interrupt() -> None:
    """`asyncio.run` turns the cancellation of its own Ctrl-C, and no other, into KeyboardInterrupt, by counting."""

    async def main() -> None:
        task, may_end = asyncio.current_task(), threading.Event()
        assert task is not None
        loop = asyncio.get_running_loop()

        def work() -> None:
            loop.call_soon_threadsafe(task.cancel)
            loop.call_soon_threadsafe(may_end.set)
            assert may_end.wait(30)

        await Lane().run(work)
        assert task.cancelling() == 1
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(0)
        assert task.uncancel() == 0

    asyncio.run(main())


def test_dropped_tasks_have_ended_whatever_they_say_to_it() -> None:
    said: list[str] = []

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)  # as a gather waits for the calls under way
            said.append("drained")
            raise ValueError("that nobody hears") from None

    async def main() -> None:
        tasks = [asyncio.create_task(stubborn()) for _ in range(2)]
        await asyncio.sleep(0)
        await dropped(tasks)
        assert all(task.done() for task in tasks)
        assert not await ended(tasks)

    asyncio.run(main())
    assert said == ["drained"] * 2


def test_lists_arrive_in_order_from_another_thread() -> None:
    queries: list[Query] = [AnswerQuery(tiny.prompt(), row, 1, 8, row) for row in range(3)]

    async def main() -> list[Sequence[Query]]:
        arrivals, lane = Arrivals(), Lane()
        waiting = asyncio.create_task(arrivals.first())
        await asyncio.sleep(0)
        assert not waiting.done()
        await lane.run(lambda: [arrivals.put([query]) for query in queries])
        arrivals.put(None)
        await waiting
        return [some async for some in arrivals]

    assert asyncio.run(main()) == [[query] for query in queries]


def test_a_clock_tells_spans_and_seconds() -> None:
    clock = Clock(0.0)
    with pytest.raises(ValueError, match="ends"), clock.stage("rollout"):
        raise ValueError("ends it too")
    told = clock.to_json()
    start, end = told["spans"]["rollout"]  # type: ignore[index]
    assert told["seconds_rollout"] == pytest.approx(end - start, abs=1e-3)


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_kept_rollout_comes_back_as_it_was(tmp_path: Path, finish: str) -> None:
    student = tiny.policy(tiny.saved(tmp_path / "student", tiny.byte_level()))
    ids = [*student.encode("naïve 東京 😀 12 + 7")[0][:-1], *([student.end_id] if finish == "stop" else [])]
    rollout = tiny.rollout(student, ids, finish=finish)
    kept = json.loads(json.dumps(_kept(rollout)))
    assert rollout_of(kept, rollout.prompt, student) == rollout
    assert any(math.frexp(one)[0] * 2**24 % 1 == 0 for one in rollout.logprobs)  # fp32, all of their digits


def test_a_kept_rollout_of_no_tokens_comes_back(tmp_path: Path) -> None:
    student = tiny.policy(tiny.saved(tmp_path / "student", tiny.byte_level()))
    sampler = tiny.sampler(student)
    sampler.push(7)
    (rollout,) = sampler.unwritten([tiny.prompt()])
    assert rollout.version == 7
    assert rollout_of(json.loads(json.dumps(_kept(rollout))), rollout.prompt, student) == rollout
