"""Several teachers in one run: `type: routed`. Each prompt goes to one of them, by a column of the data or by weights.

teacher:
  type: routed
  teachers: {maths: {type: vllm, ...}, prose: {type: anthropic, ...}}
  by: subject                     # a data column that holds the teacher's name, or
  weights: {maths: 3, prose: 1}   # shares; a prompt always goes to the same teacher
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

from pydantic import Field, model_validator

from omniopd.errors import ConfigError, DataError
from omniopd.ledger import Ledger
from omniopd.registry import TEACHERS
from omniopd.settings import Settings, tagged
from omniopd.store import Store
from omniopd.types import Capabilities, Evidence, Heard, Prompt, Queries, Teacher
from teachers.asks import digest
from teachers.gathering import gather_among

_WORST_LAST = ("raw", "prefill", "instruct", None)


class RoutedConfig(Settings):
    """Settings of `type: routed`. `default` takes prompts whose column names no teacher."""

    type: Literal["routed"] = "routed"
    teachers: dict[str, tagged(TEACHERS)] = Field(min_length=1)  # type: ignore[valid-type]
    by: str | None = None
    weights: dict[str, float] | None = None
    default: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> RoutedConfig:
        if (self.by is None) == (self.weights is None):
            raise ValueError("route `by` a data column or with `weights`, one of the two")
        named = [*(self.weights or {}), *([self.default] if self.default else [])]
        if strangers := [name for name in named if name not in self.teachers]:
            raise ValueError(f"'{strangers[0]}' is none of the teachers: {', '.join(self.teachers)}")
        weights = [*(self.weights or {}).values()]
        if self.weights is not None and not (all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0):
            raise ValueError("weights must not be negative, and one must be above 0")
        return self

    def route(self, prompt: Prompt) -> str:
        """The name of a prompt's teacher.

        Raises:
            DataError: its column names none, and there is no default.
        """
        if self.weights is not None:
            names = sorted(name for name, weight in self.weights.items() if weight)  # in whatever order they are given
            *ends, whole = accumulate(self.weights[name] for name in names)
            hashed = hashlib.sha256(prompt.id.encode("utf-8", "surrogatepass")).digest()
            return names[bisect_right(ends, int.from_bytes(hashed[:8], "big") / 2**64 * whole)]
        value: Any = prompt.extras.get(self.by or "")
        if isinstance(value, str) and value in self.teachers:
            return value
        if self.default is None:
            held = f"holds {repr(value)[:80]} in" if self.by in prompt.extras else "has no column"
            raise DataError(
                f"teacher.by: prompt {prompt.id} {held} '{self.by}'; it must name one of {', '.join(self.teachers)} "
                "(list the column in task.extras), or set teacher.default"
            )
        return self.default


@TEACHERS.register("routed")
class RoutedTeacher:
    """Asks each query's own teacher, all of them beside each other; evidence says which one answered.

    It streams: a teacher that does not is asked when its whole share is there.
    """

    Config = RoutedConfig
    streams: bool = True

    def __init__(self, config: RoutedConfig, store: Store, ledger: Ledger | None = None) -> None:
        """Make all teachers; they share the store and the ledger.

        Raises:
            ConfigError: one of them can't be made.
        """
        self._config = config
        self._parts: dict[str, Teacher] = {}
        for name, settings in config.teachers.items():
            try:
                self._parts[name] = TEACHERS.build(settings, store, ledger or Ledger(store))
            except ConfigError as error:
                raise ConfigError(f"teacher.teachers.{name}: {error}") from None
        routing = {"by": config.by, "weights": config.weights, "default": config.default}
        prints = {name: part.fingerprint for name, part in self._parts.items()}
        self.fingerprint = f"routed/{'+'.join(sorted(prints))}#{digest([prints, routing])[:16]}"

    @property
    def capabilities(self) -> Capabilities:
        """What every one of them offers."""
        return _common([part.capabilities for part in self._parts.values()])

    @classmethod
    def promises(cls, config: RoutedConfig) -> Capabilities:
        """What every one of them will offer, before they are made; see `ApiTeacher.promises`."""
        return _common([TEACHERS.get(part.type).promises(part) for part in config.teachers.values()])

    @property
    def parts(self) -> dict[str, tuple[Any, Teacher]]:
        """Each teacher's settings, and the teacher."""
        return {name: (self._config.teachers[name], part) for name, part in self._parts.items()}

    async def gather(self, queries: Queries, progress: Heard | None = None) -> list[Evidence]:
        """Evidence for each query, in the order in which they came.

        Raises:
            DataError: a prompt's column names no teacher, and there is no default.
            TeacherError: as the teachers do.
        """
        found = await gather_among(
            self._parts,
            lambda query: self._config.route(query.prompt),
            queries,
            progress,
            lambda name: f"teacher.teachers.{name}: ",
        )
        return [replace(evidence, teacher=name) for name, evidence in found]

    async def close(self) -> None:
        """Close all of them."""
        async with AsyncExitStack() as stack:
            for part in self._parts.values():
                stack.push_async_callback(part.close)


def _common(each: Sequence[Capabilities]) -> Capabilities:
    vocabularies = {one.vocabulary for one in each}
    return Capabilities(
        answer=all(one.answer for one in each),
        continuation=max((one.continuation for one in each), key=_WORST_LAST.index),
        score=all(one.score for one in each),
        topk=min(one.topk for one in each),
        logits=all(one.logits for one in each),
        hidden=all(one.hidden for one in each),
        gen_logprobs=min(one.gen_logprobs for one in each),
        vocabulary=vocabularies.pop() if len(vocabularies) == 1 else "",
    )
