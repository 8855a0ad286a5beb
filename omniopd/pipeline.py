"""What lets steps overlap: while the teacher reads one step's rollouts, the student writes and learns others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

from omniopd.types import Evidence, Query, Rollout

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Lane:
    """One thread in which all work on the student's device is done, in order, while the event loop talks to the teacher."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "student")

    async def run(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        """What `work` returns. Who waits for it may be cancelled, but not before it has ended: no update is left half done."""
        doing = asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        try:
            return await asyncio.shield(doing)
        except asyncio.CancelledError:
            await asyncio.wait({doing})
            raise

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


class Arrivals:
    """Lists of queries on their way from the lane, which puts them, to the event loop, which reads them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Sequence[Query] | None] = asyncio.Queue()

    def put(self, queries: Sequence[Query] | None) -> None:
        """Send a list, from any thread; None says that no more will come."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, queries)

    async def __aiter__(self) -> AsyncIterator[Sequence[Query]]:
        while (queries := await self._queue.get()) is not None:
            yield queries


class Clock:
    """When each stage of a step began and ended, in seconds since `origin`."""

    def __init__(self, origin: float) -> None:
        self._origin = origin
        self.spans: dict[str, tuple[float, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The stage lasts as long as the block."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.spans[name] = (round(began - self._origin, 4), round(time.monotonic() - self._origin, 4))

    def to_json(self) -> dict[str, object]:
        """`spans` as they are, and how long each stage took."""
        seconds = {f"seconds_{name}": round(end - start, 4) for name, (start, end) in self.spans.items()}
        return {**seconds, "spans": {name: list(span) for name, span in self.spans.items()}}


@dataclass(frozen=True)
class Begun:
    """A step whose rollouts are written and whose evidence is on its way.

    `rollouts` are this process's share of the step's, `rows` their places in it.
    """

    step: int
    rows: Sequence[int]
    rollouts: Sequence[Rollout]
    asked: asyncio.Task[list[Evidence]]
    clock: Clock
