"""What lets steps overlap: while the teacher reads one step's rollouts, the student writes and learns others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, TypeVarTuple

from omniopd.threads import DeviceThread
from omniopd.types import Evidence, Prompt, Query, Rollout
from omniopd.verification.text import char_ends
from students.gap import Gap

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def ended(futures: Iterable[asyncio.Future[Any]]) -> bool:
    """Wait until all have ended, whatever becomes of who waits; says whether that one was cancelled meanwhile."""
    cancelled, futures = False, list(futures)
    while under_way := [future for future in futures if not future.done()]:
        try:
            await asyncio.wait(under_way)
        except asyncio.CancelledError:
            cancelled = True
    return cancelled


async def dropped(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks and see them to their end; their errors are nobody's any more."""
    for task in tasks:
        task.cancel()
    await ended(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()


class Lane:
    """One thread in which all work on the student's device is done, in order, while the event loop talks to the teacher."""

    def __init__(self, device: str = "cpu", enter: Callable[[], None] | None = None) -> None:
        """See `DeviceThread`."""
        self._thread = DeviceThread(device, enter)

    async def run(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        """What `work` returns.

        Who waits for it may be cancelled, and hears of that at the next wait after the work has ended: no update is left half
        done, and none is done that nobody gets to know of.
        """
        await asyncio.sleep(0)  # a cancellation that came during the work before: this one is not begun
        doing = asyncio.wrap_future(self._thread.submit(work, *args))
        cancelled = await ended([doing])
        result = doing.result()
        if cancelled and (waiting := asyncio.current_task()) is not None:
            waiting.uncancel()  # once more, not twice: `asyncio.run` counts
            waiting.cancel()
        return result

    def close(self) -> None:
        """Wait for the work under way."""
        self._thread.close()


class Arrivals:
    """Lists of queries on their way from the lane, which puts them, to the event loop, which reads them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Sequence[Query] | None] = asyncio.Queue()
        self._came = asyncio.Event()

    def put(self, queries: Sequence[Query] | None) -> None:
        """Send a list, from any thread; None says that no more will come."""
        self._loop.call_soon_threadsafe(self._take, queries)

    def _take(self, queries: Sequence[Query] | None) -> None:
        self._queue.put_nowait(queries)
        self._came.set()

    async def first(self) -> None:
        """Wait until something has come."""
        await self._came.wait()

    def __aiter__(self) -> AsyncIterator[Sequence[Query]]:
        return self

    async def __anext__(self) -> Sequence[Query]:
        if (queries := await self._queue.get()) is None:
            raise StopAsyncIteration
        return queries


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

    `rollouts` are this process's share of the step's, `rows` their places in it. `gap` is how far their log-probs are from
    the trainer's, where the sampler compared them. `state` is the method's when the step began.
    """

    step: int
    rows: Sequence[int]
    rollouts: Sequence[Rollout]
    asked: asyncio.Task[list[Evidence]]
    clock: Clock
    gap: Gap | None = None
    state: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[int, dict[str, Any]]:
        """Its rollouts by row, as a checkpoint keeps them; numbers survive JSON as they are."""
        return {row: _kept(rollout) for row, rollout in zip(self.rows, self.rollouts, strict=True)}


@dataclass(frozen=True)
class Kept:
    """A step that was begun before a resumption: its rollouts by row, and the method's state when it began."""

    rollouts: Sequence[Mapping[str, Any]]
    state: Mapping[str, Any]


class Text(Protocol):
    """The student's tokenizer, as a kept rollout needs it."""

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]: ...

    def decode(self, ids: list[int]) -> str: ...


def _kept(rollout: Rollout) -> dict[str, Any]:
    """What of a rollout can't be told from its prompt and its tokens, and these."""
    return {
        "ids": list(rollout.ids),
        "logprobs": list(rollout.logprobs),
        "entropy": list(rollout.entropy),
        "finish": rollout.finish,
        "version": rollout.version,
        "author": rollout.author,
        "given": rollout.given,
        "facts": {name: list(numbers) for name, numbers in rollout.facts.items()},
        "top": [[list(one) for one in place] for place in rollout.top],
    }


def rollout_of(kept: Mapping[str, Any], prompt: Prompt, text: Text) -> Rollout:
    """The student's rollout that a checkpoint kept."""
    ids = tuple(kept["ids"])
    return Rollout(
        prompt=prompt,
        prompt_ids=text.prompt_ids(prompt),
        ids=ids,
        logprobs=tuple(kept["logprobs"]),
        entropy=tuple(kept["entropy"]),
        ends=tuple(char_ends(ids, text.decode)),
        text=text.decode(list(ids)),
        finish=kept["finish"],
        version=kept["version"],
        author=kept["author"],
        given=kept["given"],
        facts={name: tuple(numbers) for name, numbers in kept["facts"].items()},
        top=tuple(tuple((int(id), logprob) for id, logprob in place) for place in kept["top"]),
    )
