"""When a call may be sent: how many at once, how many in a minute, and none while the server is down.

One `Pace` serves all teachers of a process that share a server, an account and a model (`shared_pace`). It outlives event
loops, but belongs to one thread.

How many at once is a fixed number or, with `auto`, found out (`Limit`). Servers tell their limit by refusing calls, and of
a burst that overshoots they refuse exactly those that are too many: each refusal takes one off, and what is left is the
server's limit. That holds for calls whose rank (how many were under way when it was sent, itself included) is higher than
has worked; a refusal at a lower rank is about something else, such as a limit per minute, and takes a share off.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from omniopd.errors import TeacherError
from omniopd.settings import Settings

# A call's end, as the pace sees it: answered at its first try; answered otherwise (a later try, or this one request was
# turned down: the server works, but says nothing about its limit); refused for coming too often; a fault of the server
# or the line; or given up by ourselves.
How = Literal["clean", "answered", "throttled", "fault", "gone"]
Concurrency = Literal["auto"] | int
C = TypeVar("C", bound=Settings)

START, LEAST, MOST = 20, 1, 256
LEAST_ROUND = 4  # answers
USED = 0.8  # a round counts where this share of the limit was under way at once
GROWTH, CUT = 0.05, 0.8
NEAR = 0.9  # a refusal below this share of what has worked is not about the number of calls
COOL_DOWN_S = 15.0
GRACE_S = 1.0  # a call that waits for its next try comes a moment later than it said
QUIET_S, LONGEST_QUIET_S = 30.0, 600.0  # doubles with each try of the ceiling that is refused

# At 30 % faults, this many in a row come by chance once in 300 million calls.
LEAST_FAULTS = 16
FIRST_REST_S, LONGEST_REST_S = 5.0, 30.0
PATIENCE_S = 300.0

WINDOW_S = 61.0  # a minute, and a second for calls that the network brings closer together

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Ticket:
    """A call under way. `cuts` is how often the limit had been cut when it was sent; `trial`: it tries a server that was
    down."""

    serial: int
    rank: int
    cuts: int
    trial: bool


@dataclass(frozen=True, slots=True)
class Change:
    """The limit from `time` on, by the pace's clock."""

    time: float
    limit: int
    reason: str


class Limit:
    """How many calls the server takes at once: fixed, or learnt from its answers.

    Until the first refusal, each clean round doubles it. A refused call of a rank that has not worked is one too many: it
    takes one off (which of a burst it is says nothing, for calls overtake one another), and what was refused stays as a
    ceiling, which is tried again only after a quiet time. Any other refusal takes a fifth off, once per cool-down. Later
    rounds add 5 %. Faults start the round over and never cut.
    """

    def __init__(self, concurrency: Concurrency, name: str, now: float) -> None:
        self.auto, self.value = concurrency == "auto", START if concurrency == "auto" else concurrency
        self.history: deque[Change] = deque([Change(now, self.value, "start")], maxlen=10_000)
        self.cuts = 0
        self._name = name
        self._ceiling: int | None = None
        self._proved: int | None = 0  # the highest rank answered; None after a refusal that put all ranks in doubt
        self._round = self._peak = 0
        self._floor = LEAST  # half of what it was when the burst came whose refusals take it down
        self._hold = self._next_cut = self._refused = -math.inf
        self._quiet_s = QUIET_S

    def fix(self, most: int, now: float) -> None:
        """From now on a fixed number, or the smaller of two fixed numbers."""
        value = most if self.auto else min(self.value, most)
        self.auto = False
        self._set(value, "fixed by teacher.concurrency", now)

    def sent(self, rank: int) -> None:
        """A call was sent."""
        self._peak = max(self._peak, rank)

    def answered(self, ticket: Ticket, clean: bool, now: float) -> None:
        """A call was answered; only one at its first try counts for the round."""
        if ticket.cuts == self.cuts:
            self._proved = max(self._proved or 0, ticket.rank)
        if not (self.auto and clean) or now < self._hold:
            return
        self._round += 1
        if self._round >= max(self.value, LEAST_ROUND):
            used = self._peak >= USED * self.value
            self.start_round()
            if used:
                self._grow(now)

    def start_round(self) -> None:
        """Count the clean answers from none again."""
        self._round = self._peak = 0

    def refused(self, ticket: Ticket, wait_s: float, now: float) -> bool:
        """A call was refused for coming too often. Is the limit now low enough to explain it?"""
        if not self.auto:
            return False
        self.start_round()
        self._refused = now
        self._hold = max(self._hold, now + max(COOL_DOWN_S, wait_s))
        late = ticket.cuts < self.cuts  # sent before the last cut
        if ticket.rank > 1 and self._proved is not None and ticket.rank > NEAR * self._proved:
            if not late:
                if self._ceiling is not None and self.value >= self._ceiling:
                    self._quiet_s = min(2 * self._quiet_s, LONGEST_QUIET_S)
                self.cuts += 1
                self._floor = math.ceil(self.value / 2)
            if self.value > self._floor:
                self._ceiling = min(self._ceiling or self.value, self.value)
                self._set(self.value - 1, "one too many was refused", now)
            return True
        if not late and now >= self._next_cut:
            self.cuts += 1
            self._next_cut = now + max(COOL_DOWN_S, wait_s)
            self._ceiling = min(self._ceiling or self.value, self.value)
            self._proved = None
            self._set(max(LEAST, int(CUT * self.value)), "calls are refused whatever their number", now)
            self._floor = self.value
        return False

    def _grow(self, now: float) -> None:
        if self._ceiling is not None and (self._proved or 0) >= self._ceiling:
            self._ceiling, self._quiet_s = None, QUIET_S  # what was refused is taken now
        reason = "a clean round"
        target = 2 * self.value if self.cuts == 0 else self.value + max(1, int(GROWTH * self.value))
        if self._ceiling is not None and target >= self._ceiling:
            if self.value < self._ceiling - 1:
                target = self._ceiling - 1
            elif now >= self._refused + self._quiet_s:
                target, reason = self._ceiling, f"quiet for {self._quiet_s:.0f} s: one more is tried"
            else:
                return
        self._set(min(target, MOST), reason, now)

    def _set(self, value: int, reason: str, now: float) -> None:
        if value != self.value:
            log.info("%s: %d calls at once, before %d (%s)", self._name, value, self.value, reason)
            self.value = value
            self.history.append(Change(now, value, reason))


class Minute:
    """A quantity that may not pass `most` within any minute; None: no bound."""

    def __init__(self, most: int | None) -> None:
        self.most = most
        self._used: deque[tuple[float, int]] = deque()
        self._sum = 0

    def lower(self, most: int | None) -> None:
        """The smaller of two bounds holds."""
        if most is not None:
            self.most = most if self.most is None else min(self.most, most)

    def wait_s(self, amount: int, now: float) -> float:
        """Seconds until so much fits; inf if it never does."""
        while self._used and self._used[0][0] + WINDOW_S <= now:
            self._sum -= self._used.popleft()[1]
        if self.most is None or self._sum + amount <= self.most:
            return 0.0
        left = self._sum
        for sent, used in self._used:
            left -= used
            if left + amount <= self.most:
                return sent + WINDOW_S - now
        return math.inf

    def add(self, amount: int, now: float) -> None:
        """So much is sent now."""
        self._used.append((now, amount))
        self._sum += amount


class Breaker:
    """Holds the calls back from a server that has answered before and now fails them all.

    It trips after many faults in a row, rests, and lets one trial through: answered, the calls flow again; failed, it
    rests twice as long. A server that was never reached is left to the calls' own tries, so that a wrong address is an
    error within seconds.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._alive = False
        self._faults = 0
        self._rest_s = 0.0  # 0: calls flow
        self._until = self._since = -math.inf
        self._trying = False

    def wait_s(self, now: float) -> float:
        """Seconds until a call may be sent; inf while a trial is under way."""
        if not self._rest_s:
            return 0.0
        if now < self._until:
            return self._until - now
        return math.inf if self._trying else 0.0

    def sent(self) -> bool:
        """A call was sent: is it a trial?"""
        self._trying = bool(self._rest_s)
        return self._trying

    def answered(self) -> None:
        """The server works."""
        if self._rest_s:
            log.info("%s answers again", self._name)
        self._alive, self._faults, self._rest_s, self._trying = True, 0, 0.0, False

    def fault(self, trial: bool, most: int, now: float) -> bool:
        """A call failed; `most` in a row trip it. Has the server been down for so long that waiting is no use?"""
        self._faults += 1
        if self._rest_s and not trial:
            return False
        if not self._rest_s:
            if not self._alive or self._faults < most:
                return False
            self._since = now
        self._trying = False
        if now - self._since >= PATIENCE_S:
            self._alive, self._faults, self._rest_s = False, 0, 0.0
            return True
        self._rest_s = min(max(2 * self._rest_s, FIRST_REST_S), LONGEST_REST_S)
        self._until = now + self._rest_s
        log.warning("%s: %d calls in a row failed; it rests for %.0f s", self._name, self._faults, self._rest_s)
        return False

    def gone(self) -> None:
        """The trial was given up."""
        self._trying = False


@dataclass(slots=True, eq=False)
class _Turn:
    future: asyncio.Future[Ticket]
    tokens: int
    after: Ticket | None

    @property
    def over(self) -> bool:
        return self.future.done() or self.future.get_loop().is_closed()


class Pace:
    """The gate that every call to one server passes. `limit` is the number of calls at once, now; `history` its changes."""

    def __init__(
        self,
        concurrency: Concurrency,
        rpm: int | None = None,
        tpm: int | None = None,
        *,
        name: str = "teacher",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._clock = name, clock
        self._limit = Limit(concurrency, name, clock())
        self._breaker = Breaker(name)
        self._calls, self._tokens = Minute(rpm), Minute(tpm)
        self._flying: dict[int, Ticket] = {}
        self._kept: dict[int, float] = {}  # places of refused calls, until their next try
        self._again: deque[_Turn] = deque()
        self._fresh: deque[_Turn] = deque()
        self._serial = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def limit(self) -> int:
        """Calls that may be under way at once, now."""
        return self._limit.value

    @property
    def history(self) -> list[Change]:
        """Every limit so far, oldest first."""
        return list(self._limit.history)

    @property
    def in_flight(self) -> int:
        """Calls under way."""
        return len(self._flying)

    @property
    def waiting(self) -> int:
        """Calls that wait for their turn."""
        return sum(not turn.over for turn in (*self._again, *self._fresh))

    def tighten(self, concurrency: Concurrency, rpm: int | None, tpm: int | None) -> None:
        """Take on a second teacher's settings: of each the stricter, and a fixed number before `auto`."""
        if concurrency != "auto":
            self._limit.fix(concurrency, self._clock())
        self._calls.lower(rpm)
        self._tokens.lower(tpm)

    async def enter(self, tokens: int = 0, after: Ticket | None = None) -> Ticket:
        """Wait for the turn of a call that may use so many tokens. `after` is the ticket of the call's last try, if any:
        calls that were tried before go first. Every ticket must be given to `leave`.

        Raises:
            TeacherError: the call alone would pass `teacher.tpm`, or the server has failed every call for minutes.
        """
        turn = _Turn(asyncio.get_running_loop().create_future(), tokens, after)
        (self._fresh if after is None else self._again).append(turn)
        self._admit()
        try:
            return await turn.future
        except asyncio.CancelledError:
            if turn.future.cancelled():
                self._forget(after)
                self._admit()
            elif turn.future.exception() is None:  # its turn came in the same moment
                self.leave(turn.future.result(), "gone")
            raise

    def leave(self, ticket: Ticket, how: How, wait_s: float = 0.0) -> None:
        """A call has ended; `wait_s` is the time until its next try. A refused call keeps its place for so long, unless
        the limit was cut for it, so that a server that refuses is asked less. A second `leave` of a ticket does nothing."""
        if self._flying.pop(ticket.serial, None) is None:
            return
        now = self._clock()
        if how in ("clean", "answered"):
            self._limit.answered(ticket, how == "clean", now)
            self._breaker.answered()
        elif how == "throttled":
            if not self._limit.refused(ticket, wait_s, now) and wait_s > 0:
                self._kept[ticket.serial] = now + wait_s + GRACE_S
            if ticket.trial:
                self._breaker.answered()
        elif how == "fault":
            self._limit.start_round()
            if self._breaker.fault(ticket.trial, max(LEAST_FAULTS, self.limit), now):
                self._give_up()
        elif ticket.trial:
            self._breaker.gone()
        self._admit()

    def _admit(self) -> None:
        """Send whose turn it is; if that is a matter of time, come back."""
        now = self._clock()
        while (queue := self._queue()) is not None:
            turn = queue[0]
            if self._tokens.most is not None and turn.tokens > self._tokens.most:
                queue.popleft()
                turn.future.set_exception(self._too_large(turn.tokens))
                continue
            wait = self._wait_s(turn, now)
            if wait > 0:
                if self._timer is not None:
                    self._timer.cancel()
                if wait < math.inf:
                    self._timer = turn.future.get_loop().call_later(wait, self._admit)
                return
            queue.popleft()
            self._forget(turn.after)
            self._calls.add(1, now)
            self._tokens.add(turn.tokens, now)
            self._serial += 1
            ticket = Ticket(self._serial, self.in_flight + 1, self._limit.cuts, self._breaker.sent())
            self._flying[ticket.serial] = ticket
            self._limit.sent(ticket.rank)
            turn.future.set_result(ticket)

    def _queue(self) -> deque[_Turn] | None:
        for queue in (self._again, self._fresh):
            while queue and queue[0].over:
                queue.popleft()
            if queue:
                return queue
        return None

    def _wait_s(self, turn: _Turn, now: float) -> float:
        rest = self._breaker.wait_s(now)
        if rest:
            return rest
        if self.in_flight >= self.limit:
            return math.inf
        if turn.after is None:
            self._kept = {serial: until for serial, until in self._kept.items() if until > now}
            if self._kept and self.in_flight + len(self._kept) >= self.limit:
                return min(self._kept.values()) - now
        return max(self._calls.wait_s(1, now), self._tokens.wait_s(turn.tokens, now))

    def _forget(self, ticket: Ticket | None) -> None:
        if ticket is not None:
            self._kept.pop(ticket.serial, None)

    def _too_large(self, tokens: int) -> TeacherError:
        return TeacherError(
            f"one call to {self._name} may use {tokens} tokens, more than teacher.tpm={self._tokens.most} allows in a "
            "minute; raise teacher.tpm or ask for fewer tokens"
        )

    def _give_up(self) -> None:
        message = (
            f"{self._name} has failed every call for {PATIENCE_S / 60:.0f} minutes; go on when it works again: "
            "what it answered is kept"
        )
        for turn in (*self._again, *self._fresh):
            if not turn.over:
                turn.future.set_exception(TeacherError(message))
        self._again.clear()
        self._fresh.clear()


def shared_out(config: C, processes: int) -> C:
    """A teacher's settings for one of several processes: their limits of calls at once and per minute add up to its own.

    What can't be divided is at least one for each. `auto` finds out what the server takes, however many ask.
    """
    if processes == 1:
        return config
    limits = {name: getattr(config, name, None) for name in ("concurrency", "rpm", "tpm")}
    shares: dict[str, Any] = {
        name: max(1, limit // processes) for name, limit in limits.items() if isinstance(limit, int)
    }
    if parts := getattr(config, "teachers", None):
        shares["teachers"] = {name: shared_out(part, processes) for name, part in parts.items()}
    return config.model_copy(update=shares)


# Weak: the state goes with the last teacher that uses it.
_shared: WeakValueDictionary[tuple[str, str, str], Pace] = WeakValueDictionary()


def shared_pace(
    key: tuple[str, str, str], *, concurrency: Concurrency, rpm: int | None = None, tpm: int | None = None
) -> Pace:
    """The pace of all teachers in this process that use the same server (any address on it), account (a hash, never the
    key itself) and model. Where their settings differ, the stricter holds."""
    address, account, model = key
    parts = urlsplit(address)
    key = f"{parts.scheme}://{parts.netloc}", account, model
    pace = _shared.get(key)
    if pace is None:
        pace = _shared[key] = Pace(concurrency, rpm, tpm, name=f"{model} at {parts.netloc}")
    else:
        pace.tighten(concurrency, rpm, tpm)
    return pace
