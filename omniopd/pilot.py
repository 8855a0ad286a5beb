"""What a run will ask, by what its untrained student writes; and the pilot, which asks the first of it ahead.

The student is local and free, so lengths are not guessed: it writes, and the method says what it would ask. The pilot of
`omniopd probe` puts the first of these queries to the teacher. Its answers serve the run itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from omniopd.run import Run
from omniopd.types import AnswerQuery, Query, ScoreQuery, Usage
from teachers.asks import Manner, digest
from teachers.judged import judged
from teachers.ladder import Rung

ROLLOUTS, QUERIES = 16, 64  # of a pilot: rollouts are added until both are reached, or the step is at its end


@dataclass(frozen=True)
class Pilot:
    """What so many queries really used.

    `counted` is what `Counter.read` says of their prompts, asked on `rung`. `run` is a hash of what decides the queries: a
    run with other settings can't be forecast from this one.
    """

    run: str
    rung: Rung
    queries: int
    counted: int
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int

    @classmethod
    def of(cls, run: Run, counter: Counter, queries: Sequence[Query], used: Usage) -> Pilot:
        """The pilot of a run, from what its queries used."""
        return cls(
            run=run_digest(run),
            rung=counter.manner.rung,
            queries=len(queries),
            counted=sum(counter.read(query) for query in queries),
            calls=used.calls,
            prompt_tokens=used.prompt_tokens,
            completion_tokens=used.completion_tokens,
            cache_read_tokens=used.cache_read_tokens,
            cache_write_tokens=used.cache_write_tokens,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def run_digest(run: Run) -> str:
    """A hash of the settings that decide what a run asks, and how many tokens a draw may have."""
    config = run.config
    parts = {name: getattr(config, name).model_dump(mode="json") for name in ("method", "student", "task")}
    teacher = {name: getattr(config.teacher, name, None) for name in ("n", "thinking_tokens")}
    size = [config.train.prompts_per_step, config.train.rollouts_per_prompt]
    return digest([parts, teacher, config.seed, *size])[:16]


def queries_of(run: Run, step: int, rollouts: int | None = None) -> list[Query]:
    """What a step asks about its first rollouts (None: all) if its student is still the untrained one.

    Of the whole of step 1 these are the very queries of the run, as far as they go to the teacher: what a judge of its own
    is asked is left out, and what is asked again depends on the replies.
    """
    prompts = run.prompts(step)[:rollouts]
    written = run.sampler.sample(prompts, step) if run.method.on_policy else run.sampler.unwritten(prompts)
    queries = [*run.method.before(dict(enumerate(prompts)), step), *run.method.audit(written, step)]
    own = [query for query in queries if run.config.judge is None or not judged(query)]
    return sorted(own, key=lambda query: query.row)


def pilot_queries(run: Run) -> list[Query]:
    """The queries of the first step's first rollouts.

    The whole step is written all the same: what a rollout becomes must not depend on how many are written beside it.
    """
    taken: list[Query] = []
    for rows, (_, queries) in enumerate(groupby(queries_of(run, 1), key=lambda query: query.row)):
        if rows >= ROLLOUTS and len(taken) >= QUERIES:
            break
        taken += queries
    return taken


class Counter:
    """Counts what queries would have the teacher read and write, with the student's tokenizer."""

    def __init__(self, run: Run, rung: Rung | None = None) -> None:
        """`rung`: the one that `continuation: auto` ends on; None where it is not known yet."""
        self._run, teacher = run, run.config.teacher
        named = getattr(teacher, "continuation", "auto")
        self.manner = Manner(
            fingerprint="",
            rung=(rung or "prefill") if named == "auto" else named,  # type: ignore[arg-type]
            system=getattr(teacher, "system", None),
            temperature=None,
            top_p=None,
            thinking_tokens=getattr(teacher, "thinking_tokens", 0),
        )

    def read(self, query: Query) -> int:
        """Tokens of one request for it: the prompt as the student's template has it, and what is asked beyond it."""
        own = sum(self.size(message.content) for message in query.prompt.messages)
        messages = self.manner.ask(query).messages
        scored = len(query.ids) if isinstance(query, ScoreQuery) else 0  # the last message, token by token
        asked = sum(self.size(message.content) for message in (messages[:-1] if scored else messages))
        return len(self._run.policy.prompt_ids(query.prompt)) - own + asked + scored

    def most(self, query: Query) -> int:
        """Tokens that its draws may have in all."""
        return query.n * self.manner.ask(query).max_tokens

    def expected(self, query: Query) -> int:
        """Tokens that its draws will have: a continuation runs into its limit, an answer takes half of it, as a guess.

        A server writes a token behind a response that it scores.
        """
        most = self.most(query)
        return most // 2 if isinstance(query, AnswerQuery) else most

    def size(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._run.policy.encode(text)[0])
