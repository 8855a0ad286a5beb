"""`omniopd selftest CONFIG`: does distillation do what it should, with the very student and teacher of a run?

Nothing is trained and nothing is kept: trial updates are not applied, and what the teacher says goes into a temporary store.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from omniopd.choosing import settle
from omniopd.config import RunConfig
from omniopd.errors import ConfigError
from omniopd.opening import open_teacher
from omniopd.pilot import Counter
from omniopd.progress import Progress
from omniopd.prompt_check import compare_prompts
from omniopd.run import Run
from omniopd.selftest.bench import Bench
from omniopd.selftest.checks import CHECKS
from omniopd.settings import Settings
from omniopd.types import Evidence, Query, Rollout, ScoreQuery, Teacher
from teachers.wire import is_loopback

ROLLOUTS = 8

Verdict = Literal["passed", "failed", "skipped"]
_VERDICTS: dict[bool | None, Verdict] = {True: "passed", False: "failed", None: "skipped"}


@dataclass(frozen=True, slots=True)
class Result:
    """What a check came to."""

    name: str
    verdict: Verdict
    found: str


async def selftest(config: RunConfig, progress: Progress, agree: Callable[[str], bool]) -> list[Result]:
    """All checks on the student and teacher of a config, in order.

    Args:
        agree: is told what a paid teacher costs at most, before it is asked; no ends it.

    Raises:
        ConfigError: it was not agreed to, or the config does not fit.
        OmniError: student or teacher can't be had.
    """
    config, _ = settle(config)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            config.model_copy(update={"output": Path(folder), "store": Path(folder) / "answers.sqlite"}), progress
        )
        prompts = run.prompts(1)[:ROLLOUTS]
        rollouts = run.sampler.sample(prompts, 1) if run.method.on_policy else run.sampler.unwritten(prompts)
        bench = await _asked(run, rollouts, agree)
        with progress.task("checking", total=len(CHECKS), brief=True) as bar:
            results = []
            for check in CHECKS:
                seen = check.look(bench)
                results.append(Result(check.name, _VERDICTS[seen.passed], seen.what))
                bar.advance()
        return results


async def _asked(run: Run, rollouts: Sequence[Rollout], agree: Callable[[str], bool]) -> Bench:
    """The teacher's evidence about the rollouts; scores are asked for twice, the second time behind an empty store."""
    queries = run.method.audit(rollouts, 1)
    times = 2 if any(isinstance(query, ScoreQuery) for query in queries) else 1
    async with open_teacher(run) as (teacher, ledger):
        parts = getattr(teacher, "parts", {"": (run.config.teacher, teacher)}).values()
        if any(_charges(*part) for part in parts) and not agree(_ahead(run, queries, times, teacher)):
            raise ConfigError("selftest: not agreed to; nothing was sent")
        shown = [await compare_prompts(run.policy, part, run.task.train) for _, part in parts]
        gathers: list[list[Evidence]] = []
        for _ in range(times):
            ledger.store.prune()
            gathers.append(await teacher.gather(queries))
    different = [one for one in shown if one is not None and one.differences]
    return Bench(run, rollouts, gathers[0], gathers[1] if times == 2 else (), (different or shown)[0])


def _charges(config: Settings, teacher: Teacher) -> bool:
    """Whether asking may cost money: a price above 0, or no known price and an address that is not this machine's."""
    price, address = getattr(teacher, "price", None), getattr(config, "base_url", None)
    if price is not None:
        return bool(price.most(1, 1) > 0)
    return address is not None and not is_loopback(urlsplit(address).hostname)


def _ahead(run: Run, queries: Sequence[Query], times: int, teacher: Teacher) -> str:
    """What the teacher is asked at most, and the price of it."""
    counter = Counter(run)
    calls = times * sum(query.n for query in queries)
    read = times * sum(query.n * counter.read(query) for query in queries)
    written = times * sum(counter.most(query) for query in queries)
    price = getattr(teacher, "price", None)
    cost = "no price is known" if price is None else f"${price.most(read, written):.4f}"
    return f"the self-test asks the live teacher: at most {calls:,} calls, {read:,} tokens in, {written:,} out, {cost}"
