"""What the teacher has cost: prices, the budget, and money reserved for calls under way.

Every call is booked into the answer store in the same transaction as what it brought (`store.Booking`), so a process that
is killed has booked exactly what it kept. `spent` of a run is the sum of its bookings.

Before a call is sent, the most that it can cost is reserved; spent plus reserved never passes the budget. A call that
does not fit waits while others are under way, since they may turn out cheaper; when none is, the budget is spent.
"""

from __future__ import annotations

import asyncio
import datetime
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from omniopd.errors import BudgetSpent, ConfigError
from omniopd.settings import Settings, first_problem
from omniopd.store import Booking, Store
from omniopd.types import Usage


class Price(Settings):
    """What a provider charges, in USD per million tokens. None are shipped: they age.

    `cache_read` and `cache_write` are for input that the provider's prompt cache served or took up; null: as `prompt`.
    """

    prompt: float = Field(default=0.0, ge=0)
    completion: float = Field(default=0.0, ge=0)
    cache_read: float | None = Field(default=None, ge=0)
    cache_write: float | None = Field(default=None, ge=0)

    def cost(self, usage: Usage) -> float:
        """USD for these tokens."""
        fresh = usage.prompt_tokens - usage.cache_read_tokens - usage.cache_write_tokens
        read = self.prompt if self.cache_read is None else self.cache_read
        write = self.prompt if self.cache_write is None else self.cache_write
        whole = (
            max(0, fresh) * self.prompt
            + usage.cache_read_tokens * read
            + usage.cache_write_tokens * write
            + usage.completion_tokens * self.completion
        )
        return whole / 1e6

    def most(self, prompt_tokens: int, completion_tokens: int) -> float:
        """USD for these tokens at most: all input at the dearest of its prices."""
        dearest = max(self.prompt, self.cache_read or 0.0, self.cache_write or 0.0)
        return (prompt_tokens * dearest + completion_tokens * self.completion) / 1e6


class PriceList(Settings):
    """A file of prices: `date`, `currency: USD`, and `models`, names (or patterns with *) to prices."""

    date: datetime.date
    currency: Literal["USD"] = "USD"
    models: dict[str, Price]

    def find(self, model: str) -> Price | None:
        """The price of that model: its own name first, else the longest pattern that fits."""
        if model in self.models:
            return self.models[model]
        fitting = [name for name in self.models if fnmatchcase(model, name)]
        return self.models[max(fitting, key=len)] if fitting else None


def read_prices(path: Path) -> PriceList:
    """Read a price file.

    Raises:
        ConfigError: it can't be read or is no price list.
    """
    try:
        return PriceList.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise ConfigError(f"prices: {path}: can't be read: {reason}; name an existing YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"prices: {path}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except ValidationError as error:
        raise ConfigError(f"prices: {path}: {first_problem(error, PriceList)}") from None


class Reserved:
    """Money for one call, until it is released; a `with` block releases it at its end."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Give it back; doing so again does nothing."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Reserved:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Ledger:
    """The money of one run. `run` names it in the store; a resumed run has the name that it began with."""

    def __init__(
        self, store: Store, run: str = "", *, prices: PriceList | None = None, budget_usd: float | None = None
    ) -> None:
        self.run, self.prices, self.budget_usd = run, prices, budget_usd
        self.store = store
        self.before = store.spent(run)  # by those of the run's processes that share the store
        self.booked = 0.0  # since then, by this process
        self.reserved = 0.0
        self._elsewhere = 0.0  # since then, by the others
        self._shares = 1
        self._under_way = 0
        self._waiting: deque[tuple[float, asyncio.Future[None]]] = deque()

    @property
    def spent(self) -> float:
        """USD that the run has cost, as far as this process knows."""
        return self.before + self._elsewhere + self.booked

    def share(self, before: Mapping[int, float], shares: int) -> None:
        """One of several processes: each may spend an equal share of what is left.

        Args:
            before: what the run had cost, by each store that its processes use.
        """
        self._shares = shares
        self.before = sum(before.values())

    def hear(self, booked: Sequence[float]) -> None:
        """What each process of the run has booked so far, this one included."""
        self._elsewhere = sum(booked) - self.booked

    def price(self, model: str, own: Price | None) -> tuple[Price | None, str]:
        """What a teacher charges (its own setting, else the price file), and where that price is from.

        Raises:
            ConfigError: there is a budget but no price to count it with.
        """
        if own is not None:
            return own, "teacher.price"
        found = self.prices.find(model) if self.prices else None
        if found is None and self.budget_usd is not None:
            raise ConfigError(
                f"budget_usd: no price is known for the teacher's model '{model}'; set teacher.price, or name a file that "
                "has it in prices"
            )
        return found, f"prices of {self.prices.date}" if found and self.prices else ""

    async def reserve(self, usd: float) -> Reserved:
        """Money for one call; it must be released when the call has been booked. Calls get it in the order they ask.

        Raises:
            BudgetSpent: it does not fit into what is left, and nothing under way can free any.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((usd, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:  # its turn came in the same moment
                self._free(usd)
            else:
                self._admit()  # the one behind may be cheaper
            raise
        return Reserved(lambda: self._free(usd))

    def note(self, booking: Booking | None) -> None:
        """Count a booking that the store has taken."""
        if booking is not None:
            self.booked += booking.cost_usd

    def _admit(self) -> None:
        while self._waiting:
            usd, turn = self._waiting[0]
            if turn.done():
                self._waiting.popleft()
            elif self.booked + self.reserved + usd <= self._most:
                self._waiting.popleft()
                self.reserved, self._under_way = self.reserved + usd, self._under_way + 1
                turn.set_result(None)
            elif self._under_way:
                return
            else:
                self._refuse(usd)

    @property
    def _most(self) -> float:
        """USD that this process may book."""
        return math.inf if self.budget_usd is None else (self.budget_usd - self.before) / self._shares

    def _refuse(self, usd: float) -> None:
        """The run ends: those behind in the queue get nothing either, though a cheaper call might still fit."""
        whose = f", {self.booked:.4f} of one process's share of {self._most:.4f}" if self._shares > 1 else ""
        message = (
            f"budget_usd: {self.spent:.4f} of {self.budget_usd:g} dollars are spent{whose} and the next call may cost "
            f"{usd:.4f}; raise budget_usd, then continue with --resume"
        )
        for _, turn in self._waiting:
            if not turn.done():
                turn.set_exception(BudgetSpent(message))
        self._waiting.clear()

    def _free(self, usd: float) -> None:
        self._under_way -= 1
        self.reserved = self.reserved - usd if self._under_way else 0.0  # rounding does not add up
        self._admit()
