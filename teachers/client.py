"""A back end as a teacher: what was answered before comes from the store, the rest is asked for, stored, and used.

Order: the queries of one rollout follow one another by ascending chunk start, each sent when the one before is
answered, so that nested prefixes hit the provider's prompt cache; where one call can't carry all draws of a chunk, one
goes ahead and warms that cache, and the others follow together. Rollouts run beside each other. With `warm_cache: false`
all queries run beside each other, in the same order. Queries that come list after list are sent list after list.

Several gathers may be under way at once. They share the pace, the budget and what is known of the teacher, and of equal
queries, whichever gather they belong to, one is paid for.

Draws: one that was rejected or dropped is not replaced, so `len(replies) + sum(rejected) == query.n` always. A call
covers neighbouring draws only and is seeded with the first one's seed, so that a server that gives choice j the seed
`seed + j` never returns one draw twice.

Scores of a response are one call, and are kept and found again as a draw is. Only whole distributions are not: the hidden
states of every token would fill any disk, so that a resumed run has them computed again.

Money: the most that a call can cost is reserved before it is sent, and what it did cost is booked in the transaction that
stores what it brought. A gather that ends early waits for the calls under way: they are paid, so they are kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, ClassVar

from omniopd.errors import ConfigError, TeacherError
from omniopd.ledger import Ledger
from omniopd.store import NEVER_STORED, Booking, Draw, Store
from omniopd.types import (
    Capabilities,
    ContinueQuery,
    Distributions,
    Evidence,
    Heard,
    Prompt,
    Queries,
    Query,
    ScoreQuery,
    TokenScores,
    Usage,
)
from omniopd.vocabulary import Vocabulary
from teachers.asks import Ask, Manner, ScoreAsk, evidence, judge, settings_of
from teachers.gathering import Gathering, Locks, chains, first_error, lists, spans
from teachers.given import Passage, draw_of, hole, passage, token_scores
from teachers.ladder import Rung
from teachers.money import Meter, usage_of
from teachers.rung import choose, why_not
from teachers.scoring import Scoring
from teachers.wire import Backend, Completion, Outcome, RefusedRequest, Session, Shows, TeacherConfig

log = logging.getLogger(__name__)

SILENT_CALLS = 8  # that many dropped calls before any answer: the step ends at once, not after thousands of tries


class ApiTeacher:
    """A `Teacher` made of a back end, the ladder, the store and the ledger.

    A subclass names its `Config` and its `Backend`, a class that is made from the config.
    """

    Config: ClassVar[type[TeacherConfig]]
    Backend: ClassVar[Any]  # a callable (config, **test doubles) -> wire.Backend
    streams: bool = True

    def __init__(self, config: TeacherConfig, store: Store, ledger: Ledger | None = None, **backend: Any) -> None:
        """Ready to gather; `backend` goes to the back end (tests give it a fake network and a fake clock).

        Raises:
            ConfigError: the environment variable of the key is not set, or there is a budget but no price.
        """
        self._config, self._store, self._ledger = config, store, ledger or Ledger(store)
        self.backend: Backend = type(self).Backend(config, **backend)
        self.fingerprint = self.backend.fingerprint
        self._meter = Meter(self._ledger, self.fingerprint, getattr(config, "model", ""), config.price)
        self.price = self._meter.price
        n, seed = getattr(config, "n", True), getattr(config, "seed", True)
        self._most: int | None = 1 if n is False else None  # draws per call; learnt where no call brings more
        self._brought = 0  # the most that one call has brought
        self.seeded = seed is not False
        self._may_lose = {name for name, value in (("n", n), ("seed", seed)) if value == "auto"}
        self._locks = Locks()
        self._settled = False  # whether the rung is
        self.probed = Usage()  # what was asked outside gathers
        # Until `auto` has looked, only the rung that needs no proof is promised.
        self._use(self.backend.rungs[-1] if config.continuation == "auto" else config.continuation)

    @classmethod
    def promises(cls, config: TeacherConfig) -> Capabilities:
        """What a teacher of these settings will offer, before it is made: nothing is sent, and no weights are loaded.

        Raises:
            ConfigError: the tokenizer that the settings name does not load.
        """
        promised: Capabilities = cls.Backend.promises(config)
        return promised if config.continuation == "auto" else replace(promised, continuation=config.continuation)

    async def gather(self, queries: Queries, progress: Heard | None = None) -> list[Evidence]:
        """Evidence for each query, in the order in which they came.

        Raises:
            TeacherError: the teacher can't be reached, refuses the key, the model or the request, or answers nothing.
            BudgetSpent: the next call may cost more than is left.
            StoreError: the store can't be read or written.
        """
        step, looked = Gathering(), Usage()
        asked, results = list[Query](), dict[int, Evidence]()

        async def follow(session: Session, chain: Iterable[int]) -> None:
            for index in chain:
                results[index] = await self._answer(session, step, asked[index])
                if progress is not None:
                    progress(len(results), len(asked))

        try:
            async with self.backend.session() as session:
                try:
                    async with aclosing(lists(queries)) as coming, asyncio.TaskGroup() as group:
                        async for some in coming:
                            looked += await self._settle(session, some)
                            first = len(asked)
                            asked += some
                            for chain in chains(some, linked=self._config.warm_cache):
                                group.create_task(follow(session, [first + index for index in chain]))
                finally:
                    await step.drain(session)
        except BaseExceptionGroup as failures:
            raise first_error(failures) from None
        if step.silent:
            raise self._silence(step)
        if step.dropped:
            log.warning("%d of %d calls to the teacher were given up (last: %s)", step.dropped, step.calls, step.last)
        if looked != Usage():
            results[0] = replace(results[0], usage=results[0].usage + looked)
        return [results[index] for index in range(len(asked))]

    async def close(self) -> None:
        """Nothing stays open between gathers; the store belongs to the caller."""

    async def shown(self, prompt: Prompt) -> tuple[str, Any] | None:
        """The prompt as this teacher's model gets it (without `system`), and its tokenizer if it is at hand.

        Returns:
            None where neither the tokenizer nor the server tells.

        Raises:
            TeacherError: the server that would tell can't be reached.
        """
        chat = getattr(self.backend, "chat", None)
        if chat is not None:
            return chat.text(prompt.messages), chat.tokenizer
        async with self.backend.session() as session:
            text = await session.shown(prompt.messages) if isinstance(session, Shows) else None
        return None if text is None else (text, None)

    def keep_probe(self, record: Mapping[str, Any]) -> None:
        """Keep what a probe of this teacher found."""
        self._store.put_probe(self.fingerprint, record)

    @property
    def probe(self) -> dict[str, Any] | None:
        """What the last probe of this teacher found."""
        return self._store.probe(self.fingerprint)

    # ------------------------------------------------------------------ one query

    async def _answer(self, session: Session, step: Gathering, query: Query) -> Evidence:
        if isinstance(query, ScoreQuery):
            return await self._score(session, step, query)
        ask = self.manner.ask(query)
        keys = ask.keys(query.n)
        if not keys:
            return evidence(query, {}, Usage())
        async with self._locks[keys[0]]:  # equal queries are paid for once
            held = self._store.get_many(keys)
            got: dict[int, Draw | str] = {index: held[key] for index, key in enumerate(keys) if key in held}
            step.reused += len(got)
            usage = Usage(cached_calls=1 if len(got) == len(keys) else 0)
            warm = not self._config.warm_cache
            while missing := [index for index in range(query.n) if index not in got]:
                runs = list(spans(missing, self._most))
                async with asyncio.TaskGroup() as group:
                    sent = [
                        group.create_task(self._call(session, step, ask, keys, span))
                        for span in (runs if warm else runs[:1])
                    ]
                for task in sent:
                    outcomes, used = task.result()
                    got.update(outcomes)
                    usage += used
                warm = True
        return evidence(query, got, usage)

    async def _call(
        self, session: Session, step: Gathering, ask: Ask, keys: Sequence[str], span: Sequence[int]
    ) -> tuple[dict[int, Draw | str], Usage]:
        """One call for the draws of `span`; what came of them (at least one; all, if it was dropped), and its cost."""
        return await step.pay(
            self._ledger,
            self._most_usd(ask, len(span)),
            lambda: self._paid(session, step, ask, keys, span),
        )

    async def _paid(
        self, session: Session, step: Gathering, ask: Ask, keys: Sequence[str], span: Sequence[int]
    ) -> tuple[dict[int, Draw | str], Usage]:
        """The part of a call that is not given up once it has begun: ask, store, count."""
        seed = ask.seed + span[0] if self.seeded else None
        try:
            outcome = await session.draw(ask, len(span), seed)
        except RefusedRequest as refusal:
            with_it = len(span) > 1 if refusal.param == "n" else refusal.param == "seed" and seed is not None
            if refusal.param not in self._may_lose or not with_it:
                raise
            self._lose(refusal)
            return {}, Usage(calls=1)
        step.calls += 1
        if outcome.value is None:
            self._note_dropped(step, outcome)
            holes = {keys[index]: outcome.reason for index in span}
            self._store.keep({}, holes, self._meter.booking(ask, outcome, 0))
            return dict.fromkeys(span, outcome.reason), Usage(calls=outcome.attempts)
        draws = dict(zip(span, self._draws(outcome.value, ask, len(span)), strict=False))  # a server may give fewer
        self._brought = max(self._brought, len(draws))
        if len(draws) < len(span) or (self._most is not None and self._most < self._brought):
            self._most = self._brought  # a reply that is short for once teaches nothing
        return self._keep(keys, draws, self._meter.booking(ask, outcome, len(draws)))

    async def _score(self, session: Session, step: Gathering, query: ScoreQuery) -> TokenScores:
        """The scores of one response, from the store or by one call."""
        ask, chat = self.manner.ask(query), getattr(self.backend, "chat", None)
        if chat is None or not isinstance(session, Scoring):
            raise TeacherError(
                f"teacher at {self.backend.place} scores no given text; choose another method or teacher.type"
            )
        vocabulary: Vocabulary = chat.vocabulary
        (key,) = ask.keys()
        if reason := hole(ask, vocabulary):
            self._store.keep({}, {key: reason})
            return token_scores(query, reason, Usage(), vocabulary)
        async with self._locks[key]:
            held = {} if ask.whole else self._store.get_many([key])
            if key in held:
                step.reused += 1
                return token_scores(query, held[key], Usage(cached_calls=1), vocabulary)
            try:
                given = passage(ask, chat)
            except ConfigError:
                raise
            except ValueError as error:
                raise TeacherError(f"the chat template of the teacher refuses '{query.prompt.id}': {error}") from None
            kept, usage, whole = await step.pay(
                self._ledger, self._most_usd(ask, 1), lambda: self._paid_scores(session, step, ask, given, vocabulary)
            )
            return replace(token_scores(query, kept, usage, vocabulary), distributions=whole)

    async def _paid_scores(
        self, session: Scoring, step: Gathering, ask: ScoreAsk, given: Passage, vocabulary: Vocabulary
    ) -> tuple[Draw | str, Usage, Distributions | None]:
        """The part of a call for scores that is not given up once it has begun: ask, store, count."""
        (key,) = ask.keys()
        outcome = await session.score((*given.prompt_ids, *given.ids), len(given.prompt_ids), ask.top, ask.whole)
        step.calls += 1
        if outcome.value is None:
            self._note_dropped(step, outcome)
            self._store.keep({}, {key: outcome.reason}, self._meter.booking(ask, outcome, 0))
            return outcome.reason, Usage(calls=outcome.attempts), None
        draw, booking = draw_of(given, outcome.value, vocabulary), self._meter.booking(ask, outcome, 1)
        kept, usage = self._keep([key], {} if ask.whole else {0: draw}, booking)
        return kept.get(0, draw), usage, outcome.value.distributions

    def _keep(
        self, keys: Sequence[str], draws: Mapping[int, Draw], booking: Booking
    ) -> tuple[dict[int, Draw | str], Usage]:
        """Store what may be stored; what the store then holds is what counts."""
        lasting = {keys[index]: draw for index, draw in draws.items() if draw.rejected not in NEVER_STORED}
        holes = {keys[index]: draw.rejected for index, draw in draws.items() if draw.rejected in NEVER_STORED}
        reasons = {key: reason for key, reason in holes.items() if reason is not None}
        stored = self._store.keep(lasting, reasons, booking, self.fingerprint)
        self._ledger.note(booking)
        return {index: stored.get(keys[index], draw) for index, draw in draws.items()}, usage_of(booking)

    def _draws(self, completion: Completion, ask: Ask, most: int) -> list[Draw]:
        """The choices as draws, each with its share of the tokens; the shares add up to the call's usage."""
        choices, usage = completion.choices[:most], completion.usage or Usage()
        prompt, more_prompt = divmod(usage.prompt_tokens, len(choices))
        text, more_text = divmod(usage.completion_tokens, len(choices))
        return [
            judge(choice, ask, completion.model, prompt + (index < more_prompt), text + (index < more_text))
            for index, choice in enumerate(choices)
        ]

    def _note_dropped(self, step: Gathering, outcome: Outcome[Any]) -> None:
        if outcome.reason != "error":
            return
        step.dropped += 1
        step.last = outcome.detail
        if step.silent and step.dropped >= SILENT_CALLS:
            raise self._silence(step)

    def _silence(self, step: Gathering) -> TeacherError:
        return TeacherError(
            f"teacher at {self.backend.place} is unreachable: none of {step.calls} calls brought an answer "
            f"(last: {step.last}); check the server and teacher.base_url, then resume"
        )

    def _lose(self, refusal: RefusedRequest) -> None:
        """Go on without a field that the server refuses, where the config leaves it to us."""
        lost = self._most == 1 if refusal.param == "n" else not self.seeded
        if lost:  # another call was refused before this one, which was under way
            return
        log.warning("the teacher takes no '%s', going on without it (%s)", refusal.param, refusal)
        if refusal.param == "n":
            self._most = 1
        else:
            self.seeded = False

    # ------------------------------------------------------------------ money

    def _most_usd(self, ask: Ask | ScoreAsk, n: int) -> float:
        """The most that a call for n draws can cost; a server that gives fewer at once reads the prompt for each."""
        return self._meter.most(ask, n, prompts=1 if self._most is None or self._most >= n else n)

    def prober(self, session: Session) -> Callable[[Ask, int, int | None], Awaitable[Outcome[Completion]]]:
        """Asks the live teacher outside a gather: money is reserved and booked, nothing is stored."""

        async def draw(ask: Ask, n: int, seed: int | None) -> Outcome[Completion]:
            with await self._ledger.reserve(self._most_usd(ask, n)):
                try:
                    outcome = await session.draw(ask, n, seed if self.seeded else None)
                except RefusedRequest as refusal:
                    if refusal.param != "seed" or refusal.param not in self._may_lose or not self.seeded:
                        raise
                    self._lose(refusal)
                    outcome = await session.draw(ask, n, None)
                drawn = len(outcome.value.choices) if outcome.value else 0
                booking = replace(self._meter.booking(ask, outcome, drawn), purpose="probe")
                self._store.keep({}, booking=booking)
                self._ledger.note(booking)
                self.probed += usage_of(booking)
            return outcome

        return draw

    # ------------------------------------------------------------------ the manner

    def _use(self, rung: Rung) -> None:
        config = self._config
        assert rung in ("raw", "prefill", "instruct")
        self.capabilities: Capabilities = replace(self.backend.offers, continuation=rung)
        self.manner = Manner(
            self.fingerprint,
            rung,
            config.system,
            config.temperature,
            config.top_p,
            config.logprobs,
            config.thinking_tokens,
            self.backend.template,
            self.capabilities.vocabulary,
        )

    async def _settle(self, session: Session, queries: Sequence[Query]) -> Usage:
        """Before the first calls: with `auto` look for the rung, once per store; then record how this teacher is asked.

        Returns:
            What the look cost.
        """
        async with self._locks["settle"]:  # of several gathers one looks
            if self._settled:
                return Usage()
            used = Usage()
            rung: Rung | None = None if self._config.continuation == "auto" else self._config.continuation
            if rung is None:
                rung = self._store.teachers().get(self.fingerprint, {}).get("rung")
            if rung is None:
                rung = (self._store.probe(self.fingerprint) or {}).get("rung")
            asked = [query for query in queries if isinstance(query, ContinueQuery) and query.chunk.prefix]
            if rung is None and asked:
                before = self.probed
                rung, looks = await choose(self.prober(session), self.backend, self.manner, asked[0].prompt)
                used = self.probed - before
                if looks and not any(seen.literal for seen in looks):
                    log.warning("continuation: %s (%s)", rung, why_not(looks))
            if rung is not None:
                self._use(rung)
            known = settings_of(self.manner) | ({"rung": None} if rung is None else {})
            offered = {"score": self.capabilities.score, "topk": self.capabilities.topk}
            self._store.put_teacher(self.fingerprint, self.backend.record() | known | offered)
            self._settled = rung is not None
            return used
