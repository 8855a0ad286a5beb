"""A teacher that answers by a rule in Python: `type: scripted`, `rule: NAME`. In process, free, the same every time.

It is there to judge the demo's task without a model, and for tests. Its answers go through store and ledger as any teacher's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, field_validator

from omniopd.ledger import Price
from omniopd.registry import RULES, TEACHERS
from omniopd.types import Capabilities
from teachers.asks import Ask, Choice, digest
from teachers.client import ApiTeacher
from teachers.ladder import Rung
from teachers.rules import Rule
from teachers.wire import Completion, Outcome, TeacherConfig


class ScriptedConfig(TeacherConfig):
    """Settings of `type: scripted`; those of sampling mean nothing to a rule. It costs nothing unless a `price` is set."""

    type: Literal["scripted"] = "scripted"
    rule: str = Field(description="what it answers by: the name of a file in teachers/rules, or of an entry point")
    price: Price | None = Price()

    @field_validator("rule")
    @classmethod
    def _known(cls, name: str) -> str:
        RULES.get(name)
        return name

    @property
    def model(self) -> str:
        """What plans and prices call it."""
        return self.rule


class ScriptedBackend:
    """A `wire.Backend` that is a function."""

    rungs: tuple[Rung, ...] = ("instruct",)
    template: str = ""

    def __init__(self, config: ScriptedConfig) -> None:
        self.config = config
        self.rule: Rule = RULES.get(config.rule)()
        self.place = config.rule
        self.fingerprint = f"scripted/{config.fingerprint or config.rule}#{digest(self.record())[:16]}"

    @classmethod
    def promises(cls, config: ScriptedConfig) -> Capabilities:
        """Whole answers, and nothing else."""
        return Capabilities()

    @property
    def offers(self) -> Capabilities:
        """See `promises`."""
        return Capabilities()

    def record(self) -> dict[str, Any]:
        """What decides an answer."""
        config = self.config
        return {"type": config.type, "rule": config.rule, "version": self.rule.version, "system": config.system}

    @asynccontextmanager
    async def session(self) -> AsyncIterator[ScriptedSession]:
        """Nothing has to be opened."""
        yield ScriptedSession(self)


class ScriptedSession:
    """A `wire.Session` that calls the rule."""

    def __init__(self, backend: ScriptedBackend) -> None:
        self._backend = backend

    async def draw(self, ask: Ask, n: int, seed: int | None) -> Outcome[Completion]:
        """See `wire.Session`; tokens are estimated from the length of the texts, as of a server that tells none."""
        rule = self._backend.rule
        texts = [rule.answer(ask.messages, (seed or 0) + draw) for draw in range(n)]
        return Outcome(1, Completion(tuple(Choice(text, "stop") for text in texts), self._backend.place))


@TEACHERS.register("scripted")
class ScriptedTeacher(ApiTeacher):
    """A rule as a teacher. It goes on from no partial text."""

    Config = ScriptedConfig
    Backend = ScriptedBackend

    @classmethod
    def promises(cls, config: TeacherConfig) -> Capabilities:
        """See `ScriptedBackend.promises`, whatever rung is named."""
        return Capabilities()

    def _use(self, rung: Rung) -> None:
        super()._use(rung)
        self.capabilities = replace(self.capabilities, continuation=None)
