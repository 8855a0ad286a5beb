"""A run's teacher, opened with its store and its ledger."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from omniopd.fitting import check_needs
from omniopd.ledger import Ledger, read_prices
from omniopd.registry import TEACHERS
from omniopd.store import Store
from omniopd.threads import one_thread
from omniopd.types import Teacher
from teachers.pace import shared_out

if TYPE_CHECKING:
    from omniopd.run import Run


@asynccontextmanager
async def open_teacher(run: Run, run_id: str = "") -> AsyncIterator[tuple[Teacher, Ledger]]:
    """The config's teacher with its store and ledger, closed at the end; refused if it can't give what the method needs."""
    config = run.config
    prices = read_prices(config.prices) if config.prices else None
    path = config.store_path
    if run.ranks.node:  # SQLite's log does not work across machines
        path = path.with_stem(f"{path.stem}-node{run.ranks.node}")
    path.parent.mkdir(parents=True, exist_ok=True)
    store = Store(path)
    ledger = Ledger(store, run_id, prices=prices, budget_usd=config.budget_usd)
    ledger.share(dict(run.ranks.all((run.ranks.node, ledger.before))), run.ranks.count)
    try:
        with one_thread(run.ranks.device.type == "cpu"):  # as of the student
            teacher: Teacher = TEACHERS.build(shared_out(config.teacher, run.ranks.count), store, ledger)
        try:
            check_needs(run.method, teacher)
            yield teacher, ledger
        finally:
            await teacher.close()
    finally:
        store.close()
