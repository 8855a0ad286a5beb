"""One gather's bookkeeping: what it has seen so far, and its calls under way, which are paid for and so are waited for."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from omniopd.ledger import Ledger
from teachers.wire import Quits, Session

DRAIN_S = 20.0  # how long a gather that ends early waits for the calls under way

T = TypeVar("T")


@dataclass
class Gathering:
    """What one gather has seen so far."""

    calls: int = 0
    dropped: int = 0
    reused: int = 0
    last: str = ""
    over: bool = False  # nothing new is sent
    locks: dict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
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
