"""`omniopd probe CONFIG`: what the config's live teacher does, whether it is shown what the student is shown, and a pilot.

The pilot asks what the first step of the run would ask, and nothing else: its answers are in the store when the run begins,
and what they cost makes the forecast of `--dry-run` one from measurement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import fmean
from typing import Any

from rapidfuzz.distance import Levenshtein

from omniopd import pilot
from omniopd.choosing import against_scores
from omniopd.decay import Decay, decay_curve, decay_queries
from omniopd.errors import ConfigError
from omniopd.ledger import Ledger
from omniopd.opening import open_teacher
from omniopd.prompt_check import Compared, compare_prompts
from omniopd.registry import TEACHERS
from omniopd.run import Run
from omniopd.summary import used
from omniopd.types import Continuations, ContinueQuery, Query, Rollout, ScoreQuery, Teacher, Usage
from teachers.backend import estimate_tokens
from teachers.client import ApiTeacher
from teachers.findings import Record, disproved
from teachers.judged import JudgedTeacher
from teachers.ladder import Rung
from teachers.probe import FRAME, at_most, probe, questions

OTHER_SEEDS = 1_000_003  # far from any draw's own


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
    prompts: Compared | None
    disproved: list[str]
    fidelity: list[Fidelity]
    decay: list[Decay]

    def to_json(self) -> dict[str, Any]:
        """Plain data: the record as it is kept, and beside it what is not kept."""
        return {
            **self.record,
            "prompts": asdict(self.prompts) if self.prompts else None,
            "disproved": self.disproved,
            "fidelity": [asdict(row) for row in self.fidelity],
            "decay": [asdict(row) for row in self.decay],
        }


async def probe_run(
    run: Run, *, fidelity: bool = False, decay: Sequence[int] = (), agree: Callable[[str], bool] | None = None
) -> Found:
    """Probe the teacher of a run, compare prompts, run the pilot, and compare rungs if that is asked for.

    Args:
        decay: after how many tokens of the student's the teacher is to end its answers, for the accuracy of that.
        agree: is told what it costs at most, before anything is sent; no ends it.

    Raises:
        ConfigError: the teacher is no single live one, it was not agreed to, or the task can't judge.
        TeacherError: it can't be reached, or refuses the key or the model.
    """
    async with open_teacher(run) as (teacher, ledger):
        live, queries = the_teacher(teacher), pilot.pilot_queries(run)
        chunks = comparable(live, queries) if fidelity else []
        begun = judgeable(run) if decay else []
        ends = decay_queries(begun, decay, run.policy.settings.max_new_tokens, run.config.seed)
        if agree is not None and not agree(ahead(run, live, [*queries, *ends], chunks)):
            raise ConfigError("probe: not agreed to; nothing was sent")
        earlier = (live.probe or {}).get("pilot")
        with run.progress.task("probing", total=len(questions(live)), brief=True) as bar:
            record = await probe(live, run.task.train[0], lambda done: bar.advance(by=done - bar.done))
        if against_scores(record.to_json()):
            queries = [query for query in queries if not isinstance(query, ScoreQuery)]
        record = await run_pilot(run, live, replace(record, pilot=earlier), queries)
        prompts = await compare_prompts(run.policy, live, run.task.train)
        rows = await compare_rungs(run, live, ledger, chunks) if fidelity else []
        curve = decay_curve(begun, decay, await _continuations(live, ends), run.task.check)
    plain = record.to_json()
    return Found(plain, prompts, disproved(run.config.teacher, plain), rows, curve)


def the_teacher(teacher: Teacher) -> ApiTeacher:
    """A live teacher, the only kind that can be probed.

    Raises:
        ConfigError: it is a recording, or several.
    """
    teacher = teacher.teacher if isinstance(teacher, JudgedTeacher) else teacher
    if not isinstance(teacher, ApiTeacher):
        raise ConfigError("teacher.type: only a single live teacher can be probed; name one of them in teacher")
    return teacher


def ahead(run: Run, teacher: ApiTeacher, queries: Sequence[Query], chunks: Sequence[Query] = ()) -> str:
    """What a probe uses at most, with the pilot's queries and the chunks that rungs are compared on."""
    counter = pilot.Counter(run, teacher.manner.rung)

    def size(text: str) -> int:
        return max(estimate_tokens([text]), counter.size(text))  # the teacher's tokens may be other ones

    def asking(queries: Sequence[Query], times: int = 1) -> Usage:
        asks = [(query.n * times, teacher.manner.ask(query)) for query in queries]
        return Usage(
            calls=sum(n for n, _ in asks),
            prompt_tokens=sum(n * sum(size(turn.content) + FRAME for turn in ask.messages) for n, ask in asks),
            completion_tokens=sum(n * ask.max_tokens for n, ask in asks),
        )

    usage = at_most(teacher, run.task.train[0], size) + asking(queries) + asking(chunks, len(teacher.backend.rungs) + 1)
    cost = teacher.price.most(usage.prompt_tokens, usage.completion_tokens) if teacher.price else None
    return (
        f"the probe asks the live teacher: at most {usage.calls:,} calls, {usage.prompt_tokens:,} tokens in, "
        f"{usage.completion_tokens:,} out, {'no price is known' if cost is None else f'${cost:.4f}'}"
    )


async def run_pilot(run: Run, teacher: ApiTeacher, record: Record, queries: Sequence[Query]) -> Record:
    """Ask the pilot's queries; the record with what they used is kept in the run's store.

    Answers that are in the store already cost nothing and so tell no price: then the record's earlier pilot stays.

    Raises:
        TeacherError: the teacher can't be reached, or refuses the key or the model.
        BudgetSpent: there is no money left for it.
    """
    spent = used(await teacher.gather(queries))
    rung = teacher.manner.rung
    if rung != record.rung and run.config.teacher.continuation == "auto":
        run.progress.say(f"caution: the store holds answers drawn on '{rung}', so a run with it stays there")
    if queries and not spent.cached_calls:
        measured = pilot.Pilot.of(run, pilot.Counter(run, rung), queries, spent)
        record = replace(record, pilot=measured.to_json())
    teacher.keep_probe(record.to_json())
    return record


def comparable(teacher: ApiTeacher, queries: Sequence[Query]) -> list[ContinueQuery]:
    """The chunks that rungs can be compared on.

    Raises:
        ConfigError: the teacher has only one rung, or the method asks for no continuations.
    """
    if len(teacher.backend.rungs) < 2:
        raise ConfigError(
            f"teacher.type: has the rung {teacher.backend.rungs[0]} only, so there is nothing to compare; drop --fidelity"
        )
    chunks = [query for query in queries if isinstance(query, ContinueQuery) and query.chunk.prefix]
    if not chunks:
        raise ConfigError("method: asks for no continuations, so there is nothing to compare; drop --fidelity")
    return chunks


def judgeable(run: Run) -> list[Rollout]:
    """What the untrained student writes in the first step.

    Raises:
        ConfigError: a prompt has no right answer to judge it by.
    """
    prompts = run.prompts(1)
    if any(prompt.reference is None for prompt in prompts):
        raise ConfigError("task: has prompts without a right answer, so nothing can be judged; drop --decay")
    return run.sampler.sample(prompts, 1)


async def compare_rungs(
    run: Run, teacher: ApiTeacher, ledger: Ledger, chunks: Sequence[ContinueQuery]
) -> list[Fidelity]:
    """How near each rung comes to the best one that this teacher has, over the same chunks of the student's."""
    said: dict[Rung, list[Continuations]] = {}
    others = [replace(query, seed=(query.seed + OTHER_SEEDS) % 2**31) for query in chunks]
    again: list[Continuations] = []
    for rung in teacher.backend.rungs:
        one = TEACHERS.build(run.config.teacher.model_copy(update={"continuation": rung}), ledger.store, ledger)
        try:
            said[rung] = await _continuations(one, chunks)
            again = again or await _continuations(one, others)
        finally:
            await one.close()
    best = teacher.backend.rungs[0]
    return [_fidelity(rung, found, again if rung == best else said[best]) for rung, found in said.items()]


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
