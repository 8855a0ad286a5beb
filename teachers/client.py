"""A back end as a teacher: what was answered before comes from the store, the rest is asked for, stored, and used.

Order: the queries of one rollout follow one another by ascending chunk start, each sent when the one before is
answered, so that nested prefixes hit the provider's prompt cache; where one call can't carry all draws of a chunk, one
goes ahead and warms that cache, and the others follow together. Rollouts run beside each other. With `warm_cache: false`
all queries run beside each other, in the same order.

Draws: one that was rejected or dropped is not replaced, so `len(replies) + sum(rejected) == query.n` always. A call
covers neighbouring draws only and is seeded with the first one's seed, so that a server that gives choice j the seed
`seed + j` never returns one draw twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal

import httpx

from omniopd.errors import OmniError, TeacherError
from omniopd.store import NEVER_STORED, Draw, Store
from omniopd.types import Capabilities, ContinueQuery, Evidence, Query, Usage
from teachers.asks import Ask, Manner, evidence, judge, order, settings_of
from teachers.rung import look
from teachers.transport import Session, Sleep, Transport
from teachers.wire import ApiConfig, Backend, Completion, Outcome, Price

log = logging.getLogger(__name__)

SILENT_CALLS = 8  # that many dropped calls before any answer: the step ends at once, not after thousands of tries


@dataclass
class _Step:
    """What one gather has seen so far."""

    calls: int = 0
    dropped: int = 0
    reused: int = 0
    last: str = ""
    locks: dict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))

    @property
    def silent(self) -> bool:
        return self.calls > 0 and self.dropped == self.calls and not self.reused


class ApiTeacher:
    """A `Teacher` made of a back end, the ladder and the store. `on_progress` hears how many queries are done."""

    def __init__(
        self,
        backend: Backend,
        config: ApiConfig,
        store: Store,
        *,
        http: httpx.AsyncBaseTransport | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.fingerprint = backend.fingerprint
        self.on_progress: Callable[[int], None] | None = None
        self._backend, self._config, self._store = backend, config, store
        self._transport = Transport(
            backend,
            concurrency=config.concurrency,
            timeout_s=config.timeout_s,
            max_attempts=config.max_attempts,
            http=http,
            sleep=sleep,
        )
        self._most: int | None = None if config.n else 1  # draws per call; learnt when a server gives fewer
        self._checked = False
        # Until `auto` has looked, only the rung that every chat model has is promised.
        self._use("prefill" if config.continuation == "prefill" else "instruct")

    async def gather(self, queries: Sequence[Query]) -> list[Evidence]:
        """Evidence for each query, in order.

        Raises:
            TeacherError: the teacher can't be reached, refuses the key, the model or the request, or answers nothing.
            StoreError: the store can't be read or written.
        """
        if not queries:
            return []
        step, results = _Step(), dict[int, Evidence]()
        ranked = sorted(range(len(queries)), key=lambda index: order(queries[index]))
        if self._config.warm_cache:
            rows = [list(row) for _, row in groupby(ranked, key=lambda index: order(queries[index])[0])]
        else:
            rows = [[index] for index in ranked]

        async def follow(session: Session, row: Iterable[int]) -> None:
            for index in row:
                results[index] = await self._answer(session, step, queries[index])
                if self.on_progress is not None:
                    self.on_progress(len(results))

        try:
            async with self._transport.session() as session:
                checked = await self._settle(session, queries)
                async with asyncio.TaskGroup() as group:
                    for row in rows:
                        group.create_task(follow(session, row))
        except BaseExceptionGroup as failures:
            raise _first(failures) from None
        if step.silent:
            raise self._silence(step)
        if step.dropped:
            log.warning("%d of %d calls to the teacher were given up (last: %s)", step.dropped, step.calls, step.last)
        if checked != Usage():
            results[0] = replace(results[0], usage=results[0].usage + checked)
        return [results[index] for index in range(len(queries))]

    async def close(self) -> None:
        """Nothing stays open between gathers; the store belongs to the caller."""

    async def _answer(self, session: Session, step: _Step, query: Query) -> Evidence:
        ask = self._manner.ask(query)
        keys = ask.keys(query.n)
        if not keys:
            return evidence(query, {}, Usage())
        async with step.locks[keys[0]]:  # equal queries of one step are paid for once
            held = self._store.get_many(keys)
            got: dict[int, Draw | str] = {index: held[key] for index, key in enumerate(keys) if key in held}
            step.reused += len(got)
            usage = Usage(cached_calls=1 if len(got) == len(keys) else 0)
            warm = not self._config.warm_cache
            while missing := [index for index in range(query.n) if index not in got]:
                spans = list(_spans(missing, self._most))
                async with asyncio.TaskGroup() as group:
                    sent = [
                        group.create_task(self._call(session, step, ask, keys, span))
                        for span in (spans if warm else spans[:1])
                    ]
                for task in sent:
                    outcomes, used = task.result()
                    got.update(outcomes)
                    usage += used
                warm = True
        return evidence(query, got, usage)

    async def _call(
        self, session: Session, step: _Step, ask: Ask, keys: Sequence[str], span: Sequence[int]
    ) -> tuple[dict[int, Draw | str], Usage]:
        """One call for the draws of `span`; what came of them (at least one; all, if it was dropped), and its cost."""
        outcome = await session.call(self._backend.body(ask, len(span), ask.seed + span[0]))
        step.calls += 1
        if outcome.completion is None:
            self._note_dropped(step, outcome)
            self._store.put_holes({keys[index]: outcome.reason for index in span})
            return dict.fromkeys(span, outcome.reason), self._usage(outcome)
        completion = outcome.completion
        draws = dict(zip(span, _draws(completion, ask, len(span)), strict=False))  # a server may give fewer
        if len(draws) < len(span):
            self._most = min(self._most or len(draws), len(draws))
        return self._keep(keys, draws), self._usage(outcome)

    def _keep(self, keys: Sequence[str], draws: Mapping[int, Draw]) -> dict[int, Draw | str]:
        """Store what may be stored; what the store then holds is what counts."""
        lasting = {keys[index]: draw for index, draw in draws.items() if draw.rejected not in NEVER_STORED}
        holes = {keys[index]: draw.rejected for index, draw in draws.items() if draw.rejected in NEVER_STORED}
        stored = self._store.put_many(lasting)
        self._store.put_holes({key: reason for key, reason in holes.items() if reason is not None})
        return {index: stored.get(keys[index], draw) for index, draw in draws.items()}

    def _note_dropped(self, step: _Step, outcome: Outcome) -> None:
        if outcome.reason != "error":
            return
        step.dropped += 1
        step.last = outcome.detail
        if step.silent and step.dropped >= SILENT_CALLS:
            raise self._silence(step)

    def _silence(self, step: _Step) -> TeacherError:
        return TeacherError(
            f"teacher at {self._backend.url} is unreachable: none of {step.calls} calls brought an answer "
            f"(last: {step.last}); check the server and teacher.base_url, then resume"
        )

    def _usage(self, outcome: Outcome) -> Usage:
        price, completion = self._config.price or Price(), outcome.completion
        if completion is None:
            return Usage(calls=outcome.attempts)
        cost = completion.prompt_tokens * price.prompt + completion.completion_tokens * price.completion
        return Usage(outcome.attempts, 0, completion.prompt_tokens, completion.completion_tokens, cost / 1e6)

    def _use(self, rung: Literal["prefill", "instruct"]) -> None:
        config = self._config
        self.capabilities = Capabilities(continuation=rung)
        self._manner = Manner(self.fingerprint, rung, config.system, config.temperature, config.top_p)

    async def _settle(self, session: Session, queries: Sequence[Query]) -> Usage:
        """Before the first calls: with `auto` look for the rung, once per store; then record how this teacher is asked.

        Returns:
            What the look cost.
        """
        used, settled = Usage(), True
        if self._checked:
            return used
        if self._config.continuation == "auto":
            rung: Literal["prefill", "instruct"] | None = self._store.teachers().get(self.fingerprint, {}).get("rung")
            if rung is None and any(isinstance(query, ContinueQuery) and query.chunk.prefix for query in queries):
                rung, outcome = await look(session, self._backend, self._manner)
                used = self._usage(outcome)
            if rung is not None:
                self._use(rung)
            settled = rung is not None
        asked = settings_of(self._manner) if settled else settings_of(self._manner) | {"rung": None}
        self._store.put_teacher(self.fingerprint, self._backend.record() | asked)
        self._checked = settled
        return used


def _draws(completion: Completion, ask: Ask, most: int) -> list[Draw]:
    """The choices as draws, each with its share of the tokens; the shares add up to the call's usage."""
    choices = completion.choices[:most]
    prompt, more_prompt = divmod(completion.prompt_tokens, len(choices))
    text, more_text = divmod(completion.completion_tokens, len(choices))
    return [
        judge(choice, ask, completion.model, prompt + (index < more_prompt), text + (index < more_text))
        for index, choice in enumerate(choices)
    ]


def _spans(indexes: Sequence[int], most: int | None) -> Iterator[list[int]]:
    """Runs of neighbouring indexes, none longer than `most`."""
    span: list[int] = []
    for index in indexes:
        if span and (index != span[-1] + 1 or len(span) == most):
            yield span
            span = []
        span.append(index)
    if span:
        yield span


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to show of those that ended a task group: one of ours if there is any."""
    leaves: list[BaseException] = []
    for failure in failures.exceptions:
        leaves.append(_first(failure) if isinstance(failure, BaseExceptionGroup) else failure)
    return next((leaf for leaf in leaves if isinstance(leaf, OmniError)), leaves[0])
