"""How a probe asks: whole draws, requests that are changed on their way, and scores of given tokens, each of them booked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from omniopd.types import Prompt, Usage
from teachers.asks import Ask, Choice
from teachers.backend import HttpSession
from teachers.client import ApiTeacher
from teachers.ladder import Rung
from teachers.rung import Unanswered
from teachers.scoring import Scorer, Scores, Scoring, scorer_of
from teachers.wire import Call, Completion, Outcome, Session

SHORT = 24  # tokens of a draw that is only compared with others
LONG = 96
MEND = "check the server, then probe again"


class Asker:
    """One teacher under questions, with a prompt of the run's own.

    Attributes:
        seconds: what each answered call took.
        manner: the config's, without log-probs: a question of their own asks for them.
        first: the first whole answer, for questions that need no call of their own.
        literal: the best rung that was seen to go on literally.
    """

    def __init__(self, teacher: ApiTeacher, session: Session, prompt: Prompt) -> None:
        self.teacher, self.session, self.prompt = teacher, session, prompt
        self.backend, self.manner = teacher.backend, replace(teacher.manner, logprobs=0)
        self.draw = teacher.prober(session)
        self.seconds: list[float] = []
        self.first = Completion(())
        self.literal: Rung | None = None

    def ask(self, tokens: int) -> Ask:
        """The prompt as a plain question, with room for so many tokens and for what the config adds for hidden thought."""
        return self.manner.render("answer", self.prompt, "", tokens, seed=1)

    def greedy(self, ask: Ask) -> Ask:
        """The same at temperature 0, where a temperature is sent."""
        return ask if ask.temperature is None else replace(ask, temperature=0.0)

    async def one(self, ask: Ask, n: int = 1, seed: int | None = None) -> Completion:
        """What one call brought.

        Raises:
            Unanswered: nothing.
            TeacherError: as `Session.draw`.
        """
        began = time.monotonic()
        outcome = await self.draw(ask, n, ask.seed if seed is None else seed)
        if outcome.value is None:
            raise Unanswered(outcome, MEND)
        self.seconds.append(time.monotonic() - began)
        return outcome.value

    async def text(self, ask: Ask, seed: int | None = None) -> str:
        """The text of one draw."""
        return (await self.one(ask, seed=seed)).choices[0].text

    async def texts(self, ask: Ask, seeds: Iterable[int]) -> list[str]:
        """A text for each seed, one after another: calls that meet in a server's batch may change one another's texts."""
        return [await self.text(ask, seed) for seed in seeds]

    async def altered(self, ask: Ask, change: Callable[[Call], Call]) -> Outcome[Completion] | None:
        """What a request brings that is changed on its way; None for a teacher that is not asked over HTTP.

        Raises:
            TeacherError: as `Session.draw`.
        """
        if not isinstance(self.session, HttpSession):
            return None
        return await self.teacher.prober(_Altered(self.session, change))(ask, 1, ask.seed)

    async def scores(self, ask: Ask, ids: Sequence[int]) -> Scores:
        """What the teacher's model says of given tokens, and the likeliest one at each place; `ask` holds them as text.

        Raises:
            Malformed: the reply holds no scores, or not those of these ids.
            Unanswered: there is no reply.
            TeacherError: as `Session.draw`.
        """
        scored = _Scored(self.session, scorer_of(self.backend), ids)
        outcome = await self.teacher.prober(scored)(ask, 1, None)
        if outcome.value is None:
            raise Unanswered(outcome, MEND)
        return scored.read()


@dataclass
class _Altered:
    """A session whose requests are changed on their way."""

    session: HttpSession
    change: Callable[[Call], Call]

    async def draw(self, ask: Ask, n: int, seed: int | None) -> Outcome[Completion]:
        """See `wire.Session`."""
        return await self.session.send(self.change(self.session.request(ask, n, seed)), ask)


@dataclass
class _Scored:
    """A session whose only request is one for scores, so that it is paid for as any.

    Over HTTP a reply without them is no fault that another try would mend: it is read when it is booked.
    """

    session: Session
    scorer: Scorer | None
    ids: Sequence[int]
    read: Callable[[], Scores] = field(init=False)

    async def draw(self, ask: Ask, n: int, seed: int | None) -> Outcome[Completion]:
        """See `wire.Session`."""
        booked = Completion((Choice("", "length"),), usage=Usage(prompt_tokens=len(self.ids), completion_tokens=1))
        if isinstance(self.session, HttpSession) and (scorer := self.scorer):

            def keep(payload: Any) -> Completion:
                self.read = lambda: scorer.read_scores(payload, self.ids, 1)
                return booked

            return await self.session.sender.send(scorer.score_call(self.ids, 1), keep)
        assert isinstance(self.session, Scoring), "asked only of what offers scores"
        outcome = await self.session.score(self.ids, 0, 1, False)
        if (scores := outcome.value) is None:
            return Outcome(outcome.attempts, None, outcome.reason, outcome.detail)
        self.read = lambda: scores
        return Outcome(outcome.attempts, booked)
