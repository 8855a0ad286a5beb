"""`omniopd probe CONFIG`: what the config's live teacher does, whether it is shown what the student is shown, and a pilot.

The pilot asks what the first step of the run would ask, and nothing else: its answers are in the store when the run begins,
and what they cost makes the forecast of `--dry-run` one from measurement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean
from typing import Any

from rapidfuzz.distance import Levenshtein

from omniopd.errors import ConfigError
from omniopd.ledger import Ledger
from omniopd.prompt_check import compare_prompts
from omniopd.registry import TEACHERS
from omniopd.run import Run, open_teacher
from omniopd.summary import used
from omniopd.types import Continuations, ContinueQuery, Query, Teacher, Usage
from teachers.client import ApiTeacher
from teachers.ladder import Rung
from teachers.probe import CHECKS, MOST_CALLS, Record, disproved, probe

PILOT = 16  # rollouts of the first step
OTHER_SEEDS = 1_000_003  # far from any draw's own


@dataclass(frozen=True)
class Ahead:
    """What a probe will use at most."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None


@dataclass(frozen=True)
class Fidelity:
    """How near the continuations of a rung are to those of the reference rung, over the same chunks.

    `similarity` is the mean edit similarity at equal length between replies of this rung and of the reference;
    for the reference itself, between its own draws and a second set of them, the best that can be had.
    """

    rung: Rung
    similarity: float | None
    rejected: float
    reasons: dict[str, int]
    replies: int


@dataclass(frozen=True)
class Found:
    """All that `omniopd probe` shows."""

    record: dict[str, Any]
    prompts: tuple[list[tuple[str, str, str]], list[str]] | None
    disproved: list[str]
    fidelity: list[Fidelity]


async def probe_run(run: Run, *, fidelity: bool = False, agree: Callable[[str], bool] | None = None) -> Found:
    """Probe the teacher of a run, compare prompts, run the pilot, and compare rungs if that is asked for.

    Args:
        agree: is told what it costs at most, before anything is sent; no ends it.

    Raises:
        ConfigError: the teacher is no single live one, or it was not agreed to.
        TeacherError: it can't be reached, or refuses the key or the model.
    """
    async with open_teacher(run) as (teacher, ledger):
        live, queries = the_teacher(teacher), pilot_queries(run)
        most = ahead(run, live, queries)
        price = "no price is known" if most.cost_usd is None else f"${most.cost_usd:.4f}"
        cost = f"{most.calls} calls, {most.prompt_tokens:,} tokens in, {most.completion_tokens:,} out, {price} at most"
        if agree is not None and not agree(f"the probe asks the live teacher: {cost}"):
            raise ConfigError("probe: not agreed to; nothing was sent")
        with run.progress.task("probing", total=CHECKS + len(live.backend.rungs), brief=True) as bar:
            record = await probe_teacher(run, live, queries, lambda done: bar.advance(by=done - bar.done))
        prompts = await compare_prompts(run.policy, live, run.task.train[0])
        rows = await compare_rungs(run, live, ledger, queries) if fidelity else []
    return Found(record.to_json(), prompts, disproved(run.config.teacher, record.to_json()), rows)


def the_teacher(teacher: Teacher) -> ApiTeacher:
    """A live teacher, the only kind that can be probed.

    Raises:
        ConfigError: it is a recording, or several.
    """
    if not isinstance(teacher, ApiTeacher):
        raise ConfigError("teacher.type: only a single live teacher can be probed; name one of them in teacher")
    return teacher


def pilot_queries(run: Run, rollouts: int = PILOT) -> list[Query]:
    """What the first step of the run asks about its first rollouts; the run itself asks the very same."""
    count = min(rollouts, run.config.train.prompts_per_step)
    prompts = run.prompts(1)[:count]
    written = run.sampler.sample(prompts, 1) if run.method.on_policy else run.sampler.unwritten(prompts)
    return run.method.audit(written, 1)


def ahead(run: Run, teacher: ApiTeacher, queries: Sequence[Query]) -> Ahead:
    """The most that a probe of this teacher uses, before anything is sent; the pilot's answers serve the run itself."""
    prompt = len(run.policy.prompt_ids(run.task.train[0])) + 60
    read = MOST_CALLS * 2 * prompt + 6_000 + sum(query.n * 3 * prompt for query in queries)
    written = MOST_CALLS * 64 + sum(query.n * query.max_tokens for query in queries)
    usage = Usage(prompt_tokens=read, completion_tokens=written)
    return Ahead(MOST_CALLS + sum(query.n for query in queries), read, written, teacher.price_of(usage))


async def probe_teacher(
    run: Run, teacher: ApiTeacher, queries: Sequence[Query], progress: Callable[[int], None] | None = None
) -> Record:
    """Probe the teacher and run the pilot; the record is kept in the run's store.

    Raises:
        TeacherError: the teacher can't be reached, or refuses the key or the model.
        BudgetSpent: there is no money left for it.
    """
    record = await probe(teacher, run.task.train[0], progress)
    evidence = await teacher.gather(queries)
    spent = used(evidence)
    if spent.calls and not spent.cached_calls:  # answers from the store cost nothing and tell no price
        amounts = {"calls": spent.calls, "prompt": spent.prompt_tokens, "completion": spent.completion_tokens}
        amounts |= {"cache_read": spent.cache_read_tokens, "cache_write": spent.cache_write_tokens}
        pilot = {name: amount / len(queries) for name, amount in amounts.items()}
        record = replace(record, pilot=pilot)
        teacher.keep_probe(record.to_json())
    return record


async def compare_rungs(run: Run, teacher: ApiTeacher, ledger: Ledger, queries: Sequence[Query]) -> list[Fidelity]:
    """How near each rung comes to the best one that this teacher has, over the same chunks of the student's.

    Raises:
        ConfigError: the teacher has only one rung.
    """
    asked = [query for query in queries if isinstance(query, ContinueQuery) and query.chunk.prefix]
    rungs = teacher.backend.rungs
    if len(rungs) < 2 or not asked:
        raise ConfigError("teacher: has one rung only, so there is nothing to compare; name its tokenizer to add raw")
    said: dict[Rung, list[Continuations]] = {}
    for rung in rungs:
        config = run.config.teacher.model_copy(update={"continuation": rung})
        said[rung] = await _continuations(TEACHERS.build(config, ledger.store, ledger), asked)
        if rung == rungs[0]:
            others = [replace(query, seed=(query.seed + OTHER_SEEDS) % 2**31) for query in asked]
            again = await _continuations(TEACHERS.build(config, ledger.store, ledger), others)
    return [_fidelity(rung, found, again if rung == rungs[0] else said[rungs[0]]) for rung, found in said.items()]


async def _continuations(teacher: Teacher, queries: Sequence[ContinueQuery]) -> list[Continuations]:
    return [found for found in await teacher.gather(queries) if isinstance(found, Continuations)]


def _fidelity(rung: Rung, found: Sequence[Continuations], reference: Sequence[Continuations]) -> Fidelity:
    alike = [
        fmean(_similarity(one.text, other.text) for one, other in product(mine.replies, theirs.replies))
        for mine, theirs in zip(found, reference, strict=True)
        if mine.replies and theirs.replies
    ]
    reasons = sum((Counter(one.rejected) for one in found), Counter[str]())
    replies = sum(len(one.replies) for one in found)
    rejected = reasons.total() / max(1, reasons.total() + replies)
    return Fidelity(rung, fmean(alike) if alike else None, rejected, dict(reasons), replies)


def _similarity(one: str, other: str) -> float:
    size = min(len(one), len(other))
    return float(Levenshtein.normalized_similarity(one[:size], other[:size])) if size else 0.0
