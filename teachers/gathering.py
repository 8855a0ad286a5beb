"""One gather: its queries as they come, what it has seen so far, and its calls under way, which are paid for and so are
waited for; and one gather of several teachers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from omniopd.errors import OmniError, TeacherError
from omniopd.ledger import Ledger
from omniopd.types import Evidence, Heard, Queries, Query, Teacher
from teachers.asks import order
from teachers.wire import Quits, Session

DRAIN_S = 20.0  # how long a gather that ends early waits for the calls under way

T = TypeVar("T")


async def lists(queries: Queries) -> AsyncGenerator[Sequence[Query], None]:
    """The lists of queries as they come; those that are all there are one list."""
    if isinstance(queries, Sequence):
        yield queries
    else:
        async for some in queries:
            yield some


def chains(queries: Sequence[Query], *, linked: bool) -> list[list[int]]:
    """The places of the queries, as they are to follow one another: a chain for each rollout, or (not `linked`) for each
    query."""
    ranked = sorted(range(len(queries)), key=lambda index: order(queries[index]))
    if not linked:
        return [[index] for index in ranked]
    return [list(chain) for _, chain in groupby(ranked, key=lambda index: queries[index].row)]


def spans(indexes: Sequence[int], most: int | None) -> Iterator[list[int]]:
    """Runs of neighbouring indexes, none longer than `most`."""
    span: list[int] = []
    for index in indexes:
        if span and (index != span[-1] + 1 or len(span) == most):
            yield span
            span = []
        span.append(index)
    if span:
        yield span


def first_error(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to show of those that ended a task group: one of ours if there is any."""
    leaves: list[BaseException] = []
    for failure in failures.exceptions:
        leaves.append(first_error(failure) if isinstance(failure, BaseExceptionGroup) else failure)
    return next((leaf for leaf in leaves if isinstance(leaf, OmniError)), leaves[0])


class Locks:
    """A lock for each name, there for as long as somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def __getitem__(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())


@dataclass
class Gathering:
    """What one gather has seen so far."""

    calls: int = 0
    dropped: int = 0
    reused: int = 0
    last: str = ""
    over: bool = False  # nothing new is sent
    under_way: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def silent(self) -> bool:
        """Whether nothing has been answered."""
        return self.calls > 0 and self.dropped == self.calls and not self.reused

    async def pay(self, ledger: Ledger, most_usd: float, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Reserve the money of a call, make it, and see it through to its end even if who asked is gone.

        Raises:
            BudgetSpent: it may cost more than is left.
        """
        held = await ledger.reserve(most_usd)
        if self.over:
            held.release()
            raise asyncio.CancelledError
        paid = asyncio.create_task(call())
        self.under_way.add(paid)

        def ended(task: asyncio.Task[T]) -> None:
            """The call is booked, or has failed; who sent it may be gone by then, so its error counts as heard."""
            self.under_way.discard(task)
            held.release()
            if not task.cancelled():
                task.exception()

        paid.add_done_callback(ended)
        return await asyncio.shield(paid)

    async def drain(self, session: Session) -> None:
        """Let the calls under way end: what they bring is paid for. They store it themselves."""
        self.over = True
        if isinstance(session, Quits):
            session.quit()
        if self.under_way:
            ending = asyncio.create_task(asyncio.wait(set(self.under_way), timeout=DRAIN_S))
            while not ending.done():
                # the gather has ended anyhow; another teacher's may just have failed
                with suppress(asyncio.CancelledError):
                    await asyncio.shield(ending)
            _, late = ending.result()
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


@dataclass
class _Share:
    """One teacher's share of a gather: its lists as they come, and where its queries stand among all; None ends it."""

    places: list[int] = field(default_factory=list)
    queue: asyncio.Queue[list[Query] | None] = field(default_factory=asyncio.Queue)
    done: int = 0

    def put(self, queries: dict[int, Query]) -> None:
        self.places += queries
        self.queue.put_nowait(list(queries.values()))

    def __aiter__(self) -> AsyncIterator[list[Query]]:
        return self

    async def __anext__(self) -> list[Query]:
        if (queries := await self.queue.get()) is None:
            raise StopAsyncIteration
        return queries


async def gather_among(
    parts: Mapping[str, Teacher],
    choose: Callable[[Query], str],
    queries: Queries,
    progress: Heard | None,
    prefix: Callable[[str], str],
) -> list[tuple[str, Evidence]]:
    """Ask each query's own teacher, all of them beside each other; who answered and what, in the order of the queries.

    A teacher that does not stream is asked when its whole share is there.

    Args:
        choose: the name of a query's teacher.
        prefix: what opens the errors of the teacher of that name.

    Raises:
        TeacherError: as the teachers do; and whatever `choose` raises.
    """
    shares: dict[str, _Share] = {}
    found: dict[int, tuple[str, Evidence]] = {}
    asked = 0

    async def ask(name: str, share: _Share) -> None:
        part = parts[name]

        def heard(done: int, _: int) -> None:
            share.done = done
            if progress is not None:
                progress(sum(one.done for one in shares.values()), asked)

        whole = None if part.streams else [query async for some in share for query in some]
        try:
            answers = await part.gather(share if whole is None else whole, heard)
        except TeacherError as error:
            raise TeacherError(f"{prefix(name)}{error}") from None
        for place, evidence in zip(share.places, answers, strict=True):
            found[place] = name, evidence

    try:
        async with aclosing(lists(queries)) as coming, asyncio.TaskGroup() as group:
            async for some in coming:
                split: dict[str, dict[int, Query]] = {}
                for place, query in enumerate(some, start=asked):
                    split.setdefault(choose(query), {})[place] = query
                asked += len(some)
                for name, queries_of in split.items():
                    if name not in shares:
                        shares[name] = _Share()
                        group.create_task(ask(name, shares[name]))
                    shares[name].put(queries_of)
            for share in shares.values():
                share.queue.put_nowait(None)
    except BaseExceptionGroup as failures:
        raise first_error(failures) from None
    return [found[place] for place in range(asked)]
