"""A run's teacher and judge, opened with their store and ledger."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from omniopd.errors import ConfigError
from omniopd.fitting import check_needs
from omniopd.ledger import Ledger, read_prices
from omniopd.registry import TEACHERS
from omniopd.store import Store
from omniopd.threads import one_thread
from omniopd.types import Teacher
from teachers.judged import JudgedTeacher
from teachers.pace import shared_out

if TYPE_CHECKING:
    from omniopd.run import Run


@asynccontextmanager
async def open_teacher(run: Run, run_id: str = "") -> AsyncIterator[tuple[Teacher, Ledger]]:
    """The config's teacher with its store and ledger, closed at the end; refused if it can't give what the method needs.

    A judge of its own comes with it where the method asks for verdicts.
    """
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
            if config.judge is not None and "judge" in run.method.needs:
                with one_thread(run.ranks.device.type == "cpu"):
                    judge = _judge(shared_out(config.judge, run.ranks.count), store, ledger)
                teacher = JudgedTeacher(teacher, judge)
            check_needs(run.method, teacher)
            yield teacher, ledger
        finally:
            await teacher.close()
    finally:
        store.close()


def _judge(config: Any, store: Store, ledger: Ledger) -> Teacher:
    """The judge that a config describes.

    Raises:
        ConfigError: it can't be had; the message names it as the judge.
    """
    try:
        judge: Teacher = TEACHERS.build(config, store, ledger)
        return judge
    except ConfigError as error:
        raise ConfigError(f"judge: {error}") from None
