"""When calls are sent: the limit that is found out, limits per minute, and the breaker. Time is virtual."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual import Clock

from omniopd.config import load_config
from omniopd.errors import TeacherError
from teachers.pace import LEAST_FAULTS, Pace, Ticket, shared_out, shared_pace


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def fill(pace: Pace) -> list[Ticket]:
    """Send calls until the limit is reached."""
    return [await pace.enter() for _ in range(pace.limit - pace.in_flight)]


async def clean_round(pace: Pace) -> None:
    """One round of calls that fills the limit and is answered well."""
    for ticket in await fill(pace):
        pace.leave(ticket, "clean")


async def rounds_to(pace: Pace, limit: int) -> None:
    for _ in range(300):
        if pace.limit >= limit:
            return
        await clean_round(pace)
    raise AssertionError(f"the limit stays at {pace.limit}")


def limits(pace: Pace) -> list[int]:
    return [change.limit for change in pace.history]


# How many at once


def test_a_clean_round_doubles_the_limit_until_256(clock: Clock) -> None:
    async def main() -> list[int]:
        pace = Pace("auto", clock=clock)
        for _ in range(8):
            await clean_round(pace)
        return limits(pace)

    assert clock.run(main()) == [20, 40, 80, 160, 256]


@pytest.mark.parametrize(("used", "after"), [(15, 20), (16, 40)])
def test_only_rounds_that_used_the_limit_count(clock: Clock, used: int, after: int) -> None:
    async def main() -> int:
        pace = Pace("auto", clock=clock)
        flying = [await pace.enter() for _ in range(used)]
        for _ in range(20):
            pace.leave(flying.pop(), "clean")
            flying.append(await pace.enter())
        return pace.limit

    assert clock.run(main()) == after


@pytest.mark.parametrize(("how", "after"), [("clean", 40), ("answered", 20), ("fault", 20), ("gone", 20)])
def test_a_round_is_made_of_clean_answers(clock: Clock, how: Any, after: int) -> None:
    async def main() -> int:
        pace = Pace("auto", clock=clock)
        tickets = await fill(pace)
        for ticket in tickets[:19]:
            pace.leave(ticket, "clean")
        pace.leave(tickets[19], how)
        return pace.limit

    assert clock.run(main()) == after


def test_a_fault_starts_the_round_over_and_never_cuts(clock: Clock) -> None:
    async def main() -> None:
        pace = Pace("auto", clock=clock)
        tickets = await fill(pace)
        for ticket in tickets[:19]:
            pace.leave(ticket, "clean")
        pace.leave(tickets[19], "fault")
        for count in range(20):
            assert pace.limit == 20, count
            refill = await fill(pace)
            pace.leave(refill[0], "clean")
            for ticket in refill[1:]:
                pace.leave(ticket, "gone")
        assert pace.limit == 40
        for ticket in await fill(pace):
            pace.leave(ticket, "fault")
        assert pace.limit == 40

    clock.run(main())


def test_a_refusal_starts_the_round_over(clock: Clock) -> None:
    async def main() -> None:
        pace = Pace("auto", clock=clock)
        tickets = await fill(pace)
        for ticket in tickets[:18]:
            pace.leave(ticket, "clean")
        pace.leave(tickets[19], "throttled")
        assert pace.limit == 19
        clock.now += 60
        pace.leave(tickets[18], "clean")
        assert pace.limit == 19
        await clean_round(pace)
        assert pace.limit == 20

    clock.run(main())


def test_a_round_is_no_less_than_four_answers(clock: Clock) -> None:
    async def main() -> None:
        pace = Pace("auto", clock=clock)
        while pace.limit > 1:
            for ticket in await fill(pace):
                pace.leave(ticket, "throttled")
            clock.now += 100
        for _ in range(3):
            pace.leave(await pace.enter(), "clean")
        assert pace.limit == 1
        pace.leave(await pace.enter(), "clean")
        assert pace.limit == 2

    clock.run(main())


@pytest.mark.parametrize("refused", ["the last", "the last, backwards", "any of the burst"])
def test_one_burst_that_overshoots_finds_the_servers_limit(clock: Clock, refused: str) -> None:
    async def main() -> None:
        pace = Pace("auto", clock=clock)
        await rounds_to(pace, 40)
        tickets = await fill(pace)
        for ticket in tickets[:-1]:
            pace.leave(ticket, "clean")
        last = tickets[-1]
        tickets = [*[await pace.enter() for _ in range(39)], last]
        pace.leave(last, "clean")
        tickets.pop()
        assert pace.limit == 80
        burst = await fill(pace)  # 41 at once, and calls overtake one another on the way
        unlucky = {"the last": burst[-16:], "the last, backwards": burst[:-17:-1]}.get(refused)
        for ticket in unlucky or random.Random(3).sample(burst, 16):
            burst.remove(ticket)
            pace.leave(ticket, "throttled", 0.4)
        assert (pace.limit, pace.in_flight) == (64, 64)
        for ticket in tickets + burst:  # the answers of that burst change nothing
            pace.leave(ticket, "clean")
        assert pace.limit == 64
        again = await asyncio.wait_for(fill(pace), 0.1)  # no place is kept for calls that the cut was made for
        pace.leave(again[-1], "throttled")  # nor do ranks count that only some of that burst had
        assert pace.limit == 63

    clock.run(main())


def test_calls_that_are_answered_and_sent_while_a_burst_is_refused_do_not_blur_it(clock: Clock) -> None:
    async def main() -> None:
        pace = Pace("auto", clock=clock)
        await rounds_to(pace, 80)
        tickets = await fill(pace)
        for index, ticket in enumerate(tickets[64:]):
            pace.leave(tickets[index], "answered")
            await fill(pace)
            pace.leave(ticket, "throttled")
        assert (pace.limit, pace.in_flight) == (64, 64)

    clock.run(main())


def test_refusals_of_calls_sent_before_the_cut_do_not_cut_again(clock: Clock) -> None:
    async def main() -> None:
        pace = Pace("auto", clock=clock)
        await rounds_to(pace, 80)
        tickets = await fill(pace)
        pace.leave(tickets[10], "throttled")  # a rank that has worked: a fifth off
        assert pace.limit == 64
        clock.now += 60
        for ticket in tickets[11:30]:
            pace.leave(ticket, "throttled")
        assert pace.limit == 64
        pace.leave(await pace.enter(), "clean")  # rank 61 works again, and the late refusals are of higher ones
        for ticket in tickets[30:]:
            pace.leave(ticket, "throttled")
        assert pace.limit == 64

    clock.run(main())


def test_one_burst_takes_no_more_than_half(clock: Clock) -> None:
    async def main() -> list[int]:
        pace = Pace("auto", clock=clock)
        tickets = await fill(pace)
        for ticket in tickets[2:]:
            pace.leave(ticket, "throttled")
        return limits(pace)

    assert clock.run(main()) == [*range(20, 9, -1)]


def test_the_limit_never_falls_below_one(clock: Clock) -> None:
    async def main() -> list[int]:
        pace = Pace("auto", clock=clock)
        for _ in range(40):
            for ticket in await fill(pace):
                pace.leave(ticket, "throttled")
            clock.now += 100
        return limits(pace)

    found = clock.run(main())
    assert found[-1] == min(found) == 1


def test_a_refusal_that_rank_does_not_explain_takes_a_fifth_off_once_per_cool_down(clock: Clock) -> None:
    async def refuse(pace: Pace) -> None:
        pace.leave(await pace.enter(), "throttled")

    async def main() -> None:
        pace = Pace("auto", clock=clock)
        await rounds_to(pace, 40)
        pace_40 = await fill(pace)
        for ticket in pace_40[:-1]:
            pace.leave(ticket, "answered")
        pace.leave(pace_40[-1], "answered")  # rank 40 has worked
        for seconds, limit in ((0, 32), (1, 32), (13.9, 32), (0.2, 25), (5, 25)):
            clock.now += seconds
            await refuse(pace)
            assert pace.limit == limit

    clock.run(main())


@pytest.mark.parametrize(("wait_s", "cool_down_s"), [(0, 15), (7, 15), (40, 40)])
def test_no_growth_in_the_cool_down_and_five_per_cent_after_it(clock: Clock, wait_s: float, cool_down_s: float) -> None:
    async def main() -> None:
        pace = Pace("auto", clock=clock)
        await rounds_to(pace, 160)
        tickets = await fill(pace)
        pace.leave(tickets[3], "throttled", wait_s)
        for ticket in tickets[:3] + tickets[4:]:
            pace.leave(ticket, "clean")
        assert pace.limit == 128
        pace.leave(await pace.enter(after=tickets[3]), "gone")
        clock.now += cool_down_s - 0.1
        for _ in range(5):
            await clean_round(pace)
        assert pace.limit == 128
        clock.now += 0.2
        await clean_round(pace)
        assert pace.limit == 134
        await clean_round(pace)
        assert pace.limit == 140

    clock.run(main())


async def found_64(clock: Clock) -> Pace:
    """A pace that has just overshot, and so found out that the server takes 64 calls."""
    pace = Pace("auto", clock=clock)
    await rounds_to(pace, 80)
    tickets = await fill(pace)
    for ticket in tickets[64:]:
        pace.leave(ticket, "throttled")
    for ticket in tickets[:64]:
        pace.leave(ticket, "clean")
    return pace


def test_the_limit_found_is_kept_and_one_more_tried_after_a_quiet_time(clock: Clock) -> None:
    async def main() -> None:
        pace = await found_64(clock)
        for _ in range(29):
            clock.now += 1
            await clean_round(pace)
            assert pace.limit == 64
        for quiet in (30, 60, 120):  # each try that is refused doubles the time until the next
            clock.now += quiet - 30
            await clean_round(pace)
            assert pace.limit == 64
            clock.now += 30
            await clean_round(pace)
            assert pace.limit == 65
            tickets = await fill(pace)
            pace.leave(tickets.pop(), "throttled")
            for ticket in tickets:
                pace.leave(ticket, "clean")
            assert pace.limit == 64

    clock.run(main())


def test_growth_after_a_cut_stops_below_the_ceiling(clock: Clock) -> None:
    async def main() -> None:
        pace = await found_64(clock)
        tickets = await fill(pace)
        pace.leave(tickets.pop(), "answered")  # rank 64 has worked
        pace.leave(tickets[0], "throttled")
        for ticket in tickets[1:]:
            pace.leave(ticket, "gone")
        assert pace.limit == 51
        clock.now += 16
        for _ in range(20):
            await clean_round(pace)
        assert limits(pace)[-7:] == [51, 53, 55, 57, 59, 61, 63]

    clock.run(main())


def test_a_ceiling_that_is_no_longer_true_is_forgotten(clock: Clock) -> None:
    async def main() -> None:
        pace = await found_64(clock)
        clock.now += 31
        for _ in range(3):
            await clean_round(pace)
        assert limits(pace)[-3:] == [65, 68, 71]

    clock.run(main())


def test_a_fixed_number_is_never_adapted(clock: Clock) -> None:
    async def main() -> list[int]:
        pace = Pace(8, clock=clock)
        for how in ("clean", "throttled", "fault", "clean", "answered"):
            for _ in range(1 if how == "fault" else 5):
                for ticket in await fill(pace):
                    pace.leave(ticket, how)  # type: ignore[arg-type]
            clock.now += 60
        assert len(await fill(pace)) == 8
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pace.enter(), 100)
        return limits(pace)

    assert clock.run(main()) == [8]


def test_every_change_is_logged_with_its_reason(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> Pace:
        pace = Pace("auto", name="m at host", clock=clock)
        await rounds_to(pace, 80)
        tickets = await fill(pace)
        pace.leave(tickets[70], "throttled")
        return pace

    pace = clock.run(main())
    assert caplog.messages == [
        "m at host: 40 calls at once, before 20 (a clean round)",
        "m at host: 80 calls at once, before 40 (a clean round)",
        "m at host: 79 calls at once, before 80 (one too many was refused)",
    ]
    assert [(change.limit, change.reason) for change in pace.history][0::3] == [
        (20, "start"),
        (79, "one too many was refused"),
    ]


# A server in virtual time


class Server:
    """Takes so many calls at once, each for a while, and refuses the others."""

    def __init__(self, clock: Clock, takes: int, answer_s: float, refuse_s: float = 0.0) -> None:
        self.takes, self._answer_s, self._refuse_s, self._clock = takes, answer_s, refuse_s, clock
        self._start = clock()
        self._now = 0
        self.answered: list[float] = []
        self.refused: list[float] = []

    async def call(self) -> bool:
        if self._now >= self.takes:
            self.refused.append(self._clock() - self._start)
            await asyncio.sleep(self._refuse_s)
            return False
        self._now += 1
        await asyncio.sleep(self._answer_s)
        self._now -= 1
        self.answered.append(self._clock() - self._start)
        return True


async def drive(pace: Pace, call: Callable[[], Awaitable[bool]], calls: int, seconds: float) -> None:
    """Far more calls than the server takes, each retried after a while, for so long."""
    jitter = random.Random(5)

    async def one() -> None:
        ticket = None
        for tries in range(100):
            first = ticket is None
            ticket = await pace.enter(after=ticket)
            how: Any = "gone"
            wait_s = 0.0
            try:
                if await call():
                    how = "clean" if first else "answered"
                    return
                how, wait_s = "throttled", min(20.0, 0.5 * 2**tries) * jitter.uniform(0.5, 1)
            finally:
                pace.leave(ticket, how, wait_s)
            await asyncio.sleep(wait_s)

    tasks = [asyncio.create_task(one()) for _ in range(calls)]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(
    ("takes", "answer_s", "refuse_s"), [(64, 1, 0), (64, 1, 0.3), (1, 1, 0), (5, 2, 0.1), (150, 3, 0.1), (300, 1, 0)]
)
def test_what_the_server_takes_is_found_and_kept(clock: Clock, takes: int, answer_s: float, refuse_s: float) -> None:
    server, pace = Server(clock, takes, answer_s, refuse_s), Pace("auto", clock=clock)
    best = min(takes, 256) / answer_s
    clock.run(drive(pace, server.call, int(best * 120) + 300, 90))
    late = [when for when in server.answered if when >= 20]
    refused = [when for when in server.refused if when >= 20]
    assert len(late) >= 0.9 * best * 70
    assert len(refused) <= 0.02 * (len(late) + len(refused))
    assert (pace.in_flight, pace.waiting) == (0, 0)


def test_a_server_that_takes_fewer_and_then_more_is_followed(clock: Clock) -> None:
    server, pace = Server(clock, 64, 1), Pace("auto", clock=clock)
    found = []

    async def change() -> None:
        for takes in (32, 100):
            await asyncio.sleep(60)
            found.append(pace.limit)
            server.takes = takes

    async def main() -> None:
        task = asyncio.create_task(change())
        await drive(pace, server.call, 13_000, 200)
        await task

    clock.run(main())
    assert found[0] == 64
    assert 28 <= found[1] <= 32
    assert 90 <= pace.limit <= 101
    assert len(server.refused) <= 0.02 * len(server.answered)


# Limits per minute


def most_in_a_minute(sent: list[tuple[float, int]]) -> int:
    return max(sum(amount for when, amount in sent if start <= when <= start + 60) for start, _ in sent)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 400), st.sampled_from([0.0, 0.1, 3.0, 31.0])), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(400, 900),
)
def test_limits_per_minute_are_never_passed_and_every_call_is_sent(
    calls: list[tuple[int, float]], rpm: int, tpm: int
) -> None:
    clock = Clock()
    sent: list[tuple[float, int]] = []

    async def main() -> None:
        pace = Pace(5, rpm, tpm, clock=clock)

        async def one(tokens: int, takes_s: float) -> None:
            ticket = await pace.enter(tokens)
            sent.append((clock(), tokens))
            await asyncio.sleep(takes_s)
            pace.leave(ticket, "clean")

        async with asyncio.TaskGroup() as group:
            for tokens, takes_s in calls:
                group.create_task(one(tokens, takes_s))
        assert (pace.in_flight, pace.waiting) == (0, 0)

    clock.run(main())
    assert [tokens for _, tokens in sent] == [tokens for tokens, _ in calls]  # in order
    assert most_in_a_minute(sent) <= tpm
    assert most_in_a_minute([(when, 1) for when, _ in sent]) <= rpm


def test_a_minutes_calls_are_used_up(clock: Clock) -> None:
    async def main() -> float:
        pace = Pace("auto", rpm=30, clock=clock)
        for _ in range(100):
            pace.leave(await pace.enter(), "clean")
        return clock.now - 1000

    assert clock.run(main()) == pytest.approx(3 * 61)


def test_a_call_that_no_minute_can_hold_is_an_error(clock: Clock) -> None:
    async def main() -> None:
        pace = Pace(2, tpm=1000, name="m at host", clock=clock)
        await pace.enter(1000)
        with pytest.raises(TeacherError, match=r"one call to m at host may use 1001 tokens, .*teacher\.tpm=1000"):
            await pace.enter(1001)
        waiting = asyncio.create_task(pace.enter(900))
        await asyncio.sleep(1)
        pace.tighten("auto", None, 800)
        with pytest.raises(TeacherError, match="900 tokens"):
            await waiting

    clock.run(main())


# Turns


def test_a_call_that_was_tried_before_goes_first(clock: Clock) -> None:
    async def main() -> list[str]:
        pace = Pace(1, clock=clock)
        first = await pace.enter()
        order = []

        async def one(name: str, after: Ticket | None) -> None:
            ticket = await pace.enter(after=after)
            order.append(name)
            pace.leave(ticket, "clean")

        tasks = [asyncio.create_task(one("fresh 1", None)), asyncio.create_task(one("fresh 2", None))]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(one("again", first)))
        await asyncio.sleep(0)
        pace.leave(first, "fault")
        await asyncio.gather(*tasks)
        return order

    assert clock.run(main()) == ["again", "fresh 1", "fresh 2"]


def test_a_refused_call_keeps_its_place_until_its_next_try(clock: Clock) -> None:
    async def main() -> None:
        pace = Pace(2, clock=clock)
        _other, refused = await pace.enter(), await pace.enter()
        pace.leave(refused, "throttled", 5)
        fresh = asyncio.create_task(pace.enter())
        await asyncio.sleep(4.9)
        assert not fresh.done()
        again = await asyncio.wait_for(pace.enter(after=refused), 0.05)
        assert not fresh.done()
        pace.leave(again, "throttled", 7)  # and does not come back: the place is free when its time is over
        await asyncio.sleep(7.9)  # calls come back a moment late
        assert not fresh.done()
        await asyncio.sleep(0.2)
        assert fresh.done()

    clock.run(main())


@pytest.mark.parametrize("moment", ["waiting", "in its turn", "waiting again"])
def test_a_cancelled_call_leaves_nothing_behind(clock: Clock, moment: str) -> None:
    async def main() -> None:
        pace = Pace(1, clock=clock)
        ticket = await pace.enter()
        after = None
        if moment == "waiting again":
            pace.leave(ticket, "throttled", 50)
            after, ticket = ticket, await pace.enter(after=ticket)
            pace.leave(ticket, "throttled", 50)
            after, ticket = ticket, await pace.enter(after=ticket)
            pace.leave(ticket, "throttled", 50)
            after = ticket
            ticket = await pace.enter(after=Ticket(-1, 1, 0, False))
        waiting = asyncio.create_task(pace.enter(after=after))
        behind = asyncio.create_task(pace.enter())
        await asyncio.sleep(1)
        if moment == "in its turn":
            pace.leave(ticket, "clean")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        if moment != "in its turn":
            assert not behind.done()
            pace.leave(ticket, "clean")
        pace.leave(await asyncio.wait_for(behind, 1), "clean")
        assert (pace.in_flight, pace.waiting) == (0, 0)

    clock.run(main())


def test_a_cancelled_call_makes_way_for_a_smaller_one(clock: Clock) -> None:
    async def main() -> None:
        pace = Pace(9, tpm=100, clock=clock)
        await pace.enter(60)
        large = asyncio.create_task(pace.enter(90))
        small = asyncio.create_task(pace.enter(30))
        await asyncio.sleep(1)
        assert not small.done()
        large.cancel()
        await asyncio.wait_for(small, 1)

    clock.run(main())


def test_a_ticket_is_given_back_once(clock: Clock) -> None:
    async def main() -> None:
        pace = Pace("auto", clock=clock)
        tickets = await fill(pace)
        for _ in range(20):
            pace.leave(tickets[0], "clean")
        assert (pace.in_flight, pace.limit) == (19, 20)

    clock.run(main())


def test_the_state_outlives_event_loops_and_the_calls_that_waited_in_them(clock: Clock) -> None:
    pace = Pace(1, rpm=2, clock=clock)

    async def once() -> float:
        begun = clock()
        ticket = await pace.enter()
        waiting = asyncio.create_task(pace.enter())
        await asyncio.sleep(1)
        waiting.cancel()
        pace.leave(ticket, "clean")
        return clock() - begun

    assert [clock.run(once()) for _ in range(3)] == pytest.approx([1, 1, 60])


def test_calls_that_waited_in_a_loop_that_is_gone_wait_no_more(clock: Clock) -> None:
    pace = Pace(1, clock=clock)
    ticket = clock.run(pace.enter())
    loop = asyncio.new_event_loop()  # stops in the middle: its call neither ends nor is cancelled
    left = loop.create_task(pace.enter())
    loop.run_until_complete(asyncio.sleep(0))
    assert pace.waiting == 1
    loop.close()
    pace.leave(ticket, "clean")
    assert (pace.in_flight, pace.waiting) == (0, 0)
    clock.run(pace.enter())
    assert not left.done()


# One pace for many teachers


def test_teachers_of_one_server_account_and_model_share_a_pace(clock: Clock) -> None:
    def of(address: str = "https://host/v1", account: str = "a", model: str = "m") -> Pace:
        return shared_pace((address, account, model), concurrency=3)

    one = of()
    assert of() is one
    assert of("https://host/beta") is one
    others = [of("https://host:8443/v1"), of("http://host/v1"), of(account="b"), of(model="n")]
    assert len({id(pace) for pace in [one, *others]}) == 5

    async def main() -> None:
        for _ in range(3):
            await of().enter()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(one.enter(), 5)

    clock.run(main())
    shared_pace(("https://host/v1", "a", "m"), concurrency=2)
    assert one.limit == 2


def test_the_state_goes_with_its_last_user() -> None:
    pace = shared_pace(("https://host/v1", "a", "m"), concurrency=3)
    del pace
    gc.collect()
    assert shared_pace(("https://host/v1", "a", "m"), concurrency=5).limit == 5


def test_of_two_settings_the_stricter_holds(clock: Clock) -> None:
    pace = Pace("auto", tpm=1000, clock=clock)
    for concurrency, rpm, tpm in (("auto", 5, None), (9, None, 2000), (12, 7, None), ("auto", None, None)):
        pace.tighten(concurrency, rpm, tpm)  # type: ignore[arg-type]

    async def main() -> None:
        for _ in range(5):
            pace.leave(await pace.enter(200), "clean")
        begun = clock()
        pace.leave(await pace.enter(), "clean")
        assert clock() - begun == pytest.approx(61)
        with pytest.raises(TeacherError, match="tpm=1000"):
            await pace.enter(1001)

    clock.run(main())
    assert limits(pace) == [20, 9]


# The breaker


async def alive(clock: Clock, concurrency: Any = 4) -> Pace:
    """A pace whose server has answered once."""
    pace = Pace(concurrency, name="m at host", clock=clock)
    pace.leave(await pace.enter(), "clean")
    return pace


async def kill(pace: Pace, faults: int = LEAST_FAULTS) -> None:
    for _ in range(faults):
        pace.leave(await asyncio.wait_for(pace.enter(), 0.1), "fault")


@pytest.mark.parametrize("concurrency", [1, 4, "auto"])
def test_faults_at_random_never_trip_it(clock: Clock, concurrency: Any, caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(11)

    async def main() -> None:
        pace = Pace(concurrency, clock=clock)
        for _ in range(30_000):
            pace.leave(await pace.enter(), "fault" if chance.random() < 0.3 else "clean")

    begun = clock()
    clock.run(main())
    assert clock() == begun
    assert "rests" not in caplog.text


def test_a_dead_server_is_tried_ever_less_often_by_one_call_at_a_time(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> list[tuple[float, int]]:
        pace = await alive(clock)
        await kill(pace)
        begun = clock()
        tried = []

        async def one() -> None:
            while True:
                ticket = await pace.enter()
                tried.append((clock() - begun, pace.in_flight))
                await asyncio.sleep(1)
                if len(tried) >= 6:
                    pace.leave(ticket, "clean")
                    return
                pace.leave(ticket, "fault")

        await asyncio.gather(one(), one(), one())
        return tried

    # Rests of 5, 10, 20, 30, 30 seconds; each trial lasts one; then both others at once.
    found = [(round(when), flying) for when, flying in clock.run(main())]
    assert found == [(5, 1), (16, 1), (37, 1), (68, 1), (99, 1), (130, 1), (131, 2), (131, 2)]
    assert caplog.messages[0] == "m at host: 16 calls in a row failed; it rests for 5 s"
    assert caplog.messages[-1] == "m at host answers again"
    assert len(caplog.messages) == 7


def test_a_trial_that_is_answered_lets_the_calls_flow(clock: Clock) -> None:
    async def main() -> None:
        pace = await alive(clock)
        await kill(pace)
        trial = await pace.enter()
        waiting = [asyncio.create_task(pace.enter()) for _ in range(3)]
        await asyncio.sleep(100)
        assert not any(task.done() for task in waiting)
        pace.leave(trial, "answered")
        await asyncio.wait_for(asyncio.gather(*waiting), 0.1)
        for task in waiting:
            pace.leave(task.result(), "fault")
        await kill(pace, LEAST_FAULTS - 4)  # the count began again: one short of it
        pace.leave(await asyncio.wait_for(pace.enter(), 0.1), "fault")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pace.enter(), 4.9)

    clock.run(main())


@pytest.mark.parametrize("how", ["throttled", "gone"])
def test_a_trial_without_a_fault_lets_another_through(clock: Clock, how: Any) -> None:
    async def main() -> None:
        pace = await alive(clock)
        await kill(pace)
        pace.leave(await pace.enter(), how)
        await asyncio.wait_for(pace.enter(), 0.1)

    clock.run(main())


def test_an_answer_of_an_older_call_ends_the_rest(clock: Clock) -> None:
    async def main() -> None:
        pace = await alive(clock)
        old = await pace.enter()
        await kill(pace)
        waiting = asyncio.create_task(pace.enter())
        await asyncio.sleep(1)
        pace.leave(old, "clean")
        await asyncio.wait_for(waiting, 0.1)

    clock.run(main())


def test_faults_of_older_calls_do_not_lengthen_the_rest(clock: Clock) -> None:
    async def main() -> None:
        pace = await alive(clock)
        older = [await pace.enter() for _ in range(3)]
        await kill(pace)
        await asyncio.sleep(4)
        for ticket in older:
            pace.leave(ticket, "fault")
        await asyncio.wait_for(pace.enter(), 1.1)

    clock.run(main())


def test_it_trips_no_sooner_than_a_whole_limit_of_calls_has_failed(clock: Clock) -> None:
    async def main() -> None:
        pace = await alive(clock, "auto")
        await kill(pace, 19)
        await kill(pace, 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pace.enter(), 4.9)

    clock.run(main())


@pytest.mark.parametrize("between", ["clean", "answered"])
def test_any_answer_between_starts_the_count_again(clock: Clock, between: Any) -> None:
    async def main() -> None:
        pace = await alive(clock)
        for _ in range(10):
            await kill(pace, LEAST_FAULTS - 1)
            pace.leave(await asyncio.wait_for(pace.enter(), 0.1), between)

    clock.run(main())


@pytest.mark.parametrize("how", ["throttled", "gone"])
def test_what_is_no_fault_does_not_trip_it(clock: Clock, how: Any) -> None:
    async def main() -> None:
        pace = await alive(clock)
        await kill(pace, LEAST_FAULTS - 1)
        for _ in range(100):
            pace.leave(await asyncio.wait_for(pace.enter(), 0.1), how)

    clock.run(main())


def test_a_server_that_was_never_reached_is_left_to_the_calls_own_tries(clock: Clock) -> None:
    async def main() -> None:
        await kill(Pace(4, clock=clock), 200)

    clock.run(main())


def test_a_server_that_stays_down_ends_the_wait_with_an_error(clock: Clock) -> None:
    async def main() -> float:
        pace = await alive(clock)
        await kill(pace)
        begun = clock()
        waiting = [asyncio.create_task(pace.enter()) for _ in range(3)]
        while not waiting[-1].done():
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.exception() is None:
                    waiting.remove(task)
                    waiting.append(asyncio.create_task(pace.enter()))
                    await asyncio.sleep(0)
                    pace.leave(task.result(), "fault")
        for task in waiting:
            with pytest.raises(TeacherError, match="m at host has failed every call for 5 minutes"):
                await task
        ended = clock() - begun
        for ticket in await asyncio.wait_for(fill(pace), 0.1):
            pace.leave(ticket, "gone")
        await kill(pace, 100)  # and the next step finds out by its own tries
        return ended

    assert clock.run(main()) == pytest.approx(5 + 10 + 20 + 30 * 9)


def test_the_limits_of_several_processes_add_up_to_the_configs() -> None:
    settings = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "api_key_env": None}
    config: Any = load_config(
        {
            "student": {"path": "a/b"},
            "task": "arithmetic",
            "teacher": {
                "type": "routed",
                "weights": {"a": 1, "b": 1},
                "teachers": {
                    "a": {"type": "openai", **settings, "concurrency": 9, "rpm": 100, "tpm": 1},
                    "b": {"type": "openai", **settings},
                },
            },
        }
    ).teacher
    assert shared_out(config, 1) is config
    one, other = shared_out(config, 4).teachers.values()
    assert (one.concurrency, one.rpm, one.tpm) == (2, 25, 1)
    assert (other.concurrency, other.rpm, other.tpm) == ("auto", None, None)
    assert config.teachers["a"].concurrency == 9
