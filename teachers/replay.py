"""A teacher that answers from a recorded store and never from a network: `type: replay`, `path: FILE`.

The same queries bring the same replies, scores and holes, with their reasons, as in the run that recorded the store; only the
usage differs, since nothing is called or paid. Whole distributions are not recorded, so that none can be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from omniopd.errors import ConfigError, StoreError
from omniopd.ledger import Ledger
from omniopd.registry import TEACHERS
from omniopd.settings import Settings
from omniopd.store import Draw, Store
from omniopd.types import Capabilities, Evidence, Heard, Queries, Query, ScoreQuery, Usage
from teachers import ladder
from teachers.asks import Manner, describe, evidence
from teachers.gathering import lists
from teachers.given import token_scores


class ReplayConfig(Settings):
    """Settings of `type: replay`. `fingerprint` picks the teacher where the store holds answers of several."""

    type: Literal["replay"] = "replay"
    path: str
    fingerprint: str | None = None


@TEACHERS.register("replay")
class ReplayTeacher:
    """A recorded teacher. It has the fingerprint of the one it repeats, so a replay computes the same keys.

    It does not stream: the recording answers at once.
    """

    Config = ReplayConfig
    streams: bool = False

    def __init__(self, config: ReplayConfig, store: Store | None = None, ledger: Ledger | None = None) -> None:
        """Open the recording; the run's own store and ledger are not used.

        Raises:
            StoreError: the file is missing or no store, or was recorded by another version.
            ConfigError: `fingerprint` is needed, or names no teacher of that store.
        """
        self._recording = Store(config.path, create=False)
        try:
            self.fingerprint, self._manner = self._recorded(config)
        except BaseException:
            self._recording.close()
            raise
        recorded = self._recording.teachers()[self.fingerprint]  # older recordings say nothing of scores, and hold none
        self.capabilities = Capabilities(
            continuation=self._manner.rung,
            score=recorded.get("score", False),
            topk=recorded.get("topk", 0),
            vocabulary=self._manner.vocabulary,
        )

    @classmethod
    def promises(cls, config: ReplayConfig) -> Capabilities:
        """What the recorded teacher offered.

        Raises:
            StoreError, ConfigError: as when the teacher is made.
        """
        teacher = cls(config)
        teacher._recording.close()
        return teacher.capabilities

    async def gather(self, queries: Queries, progress: Heard | None = None) -> list[Evidence]:
        """The recorded evidence for each query, in order.

        Raises:
            StoreError: a draw was never recorded.
        """
        asked = [query async for some in lists(queries) for query in some]
        found = []
        for query in asked:
            found.append(self._answer(query))
            if progress is not None:
                progress(len(found), len(asked))
        return found

    async def close(self) -> None:
        """Close the recording."""
        self._recording.close()

    def _answer(self, query: Query) -> Evidence:
        if isinstance(query, ScoreQuery):
            return self._scores(query)
        keys = self._manner.ask(query).keys(query.n)
        return evidence(query, self._outcomes(query, keys), Usage(cached_calls=1))

    def _scores(self, query: ScoreQuery) -> Evidence:
        if query.whole:
            raise StoreError(
                f"{self._recording.path}: whole distributions are never recorded; train with the live teacher"
            )
        kept = self._outcomes(query, self._manner.ask(query).keys())[0]
        return token_scores(query, kept, Usage(cached_calls=1), None)

    def _outcomes(self, query: Query, keys: Sequence[str]) -> dict[int, Draw | str]:
        draws = self._recording.get_many(keys)
        holes = self._recording.get_holes(key for key in keys if key not in draws)
        outcomes: dict[int, Draw | str] = {}
        for index, key in enumerate(keys):
            outcome = draws.get(key) or holes.get(key)
            if outcome is None:
                raise StoreError(
                    f"{self._recording.path}: draw {index + 1} of {query.n} was never recorded ({describe(query)}); "
                    "replay with the recorded run's student, seed and settings, or record anew with the live teacher"
                )
            outcomes[index] = outcome
        return outcomes

    def _recorded(self, config: ReplayConfig) -> tuple[str, Manner]:
        teachers = self._recording.teachers()
        if not teachers:
            raise StoreError(f"{config.path}: holds no recorded teacher; record a run into it first")
        known = ", ".join(f"'{fingerprint}'" for fingerprint in teachers)
        if config.fingerprint is None and len(teachers) > 1:
            raise ConfigError(f"teacher.fingerprint: {config.path} holds several teachers, name one: {known}")
        fingerprint = config.fingerprint or next(iter(teachers))
        if fingerprint not in teachers:
            raise ConfigError(f"teacher.fingerprint: '{fingerprint}' is not in {config.path}; known: {known}")
        settings = teachers[fingerprint]
        try:
            manner = Manner(
                # No rung was settled where nothing but whole answers was asked: none is needed.
                fingerprint,
                settings["rung"] or "instruct",
                settings["system"],
                settings["temperature"],
                settings["top_p"],
                settings["logprobs"],
                settings["thinking_tokens"],
                settings["chat_template"],
                settings.get("vocabulary", ""),
            )
            template = settings["template"]
        except KeyError as error:
            raise StoreError(f"{config.path}: teacher '{fingerprint}' lacks its {error}; record anew") from None
        if manner.rung == "instruct" and template != ladder.TEMPLATE_VERSION:
            raise StoreError(
                f"{config.path}: recorded with version {template} of the instruction, this program has version "
                f"{ladder.TEMPLATE_VERSION}; replay with the version that recorded it, or record anew"
            )
        return fingerprint, manner
