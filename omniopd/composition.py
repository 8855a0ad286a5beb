"""A method and its parts as one method: hooks joined, parts in the fixed order, misfits refused before anything is spent."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from omniopd.draft import Draft
from omniopd.errors import ConfigError
from omniopd.method import Check, Facts, Gradients, Method, StudentModel, StudentText
from omniopd.objective import Objective
from omniopd.part import Part
from omniopd.registry import METHODS, PARTS
from omniopd.sampling import named_seed
from omniopd.scored import Scored, score_query
from omniopd.types import (
    Capabilities,
    Evidence,
    Prompt,
    Query,
    Rollout,
    ScoreQuery,
    Signal,
    TokenScores,
    Writing,
    asked_by,
)


def compose(config: Objective, text: StudentText, seed: int, check: Check | None = None, group: int = 1) -> Method:
    """The method that a config names, with those of its parts that change anything.

    Args:
        check: the task's verifier.
        group: rollouts of each prompt.

    Raises:
        ConfigError: parts that can't be joined.
    """
    base: Method = METHODS.build(config, text, seed)
    active = [part for part in config.parts if not getattr(part, "neutral", False)]
    parts = [PARTS.build(part, config, text, seed) for part in active]
    parts.sort(key=lambda part: (part.place, part.config.name))
    method = Composed(base, parts) if parts else base
    method.check, method.group, base.group = check, group, group
    for part in [base, *parts]:
        part.check = check
    return method


def keeps_initial(config: Objective) -> bool:
    """Whether the initial student is kept for the method that a config names; told before there is any student."""
    active = [part for part in config.parts if not getattr(part, "neutral", False)]
    wanted = [getattr(part, "keeps_initial", PARTS.get(part.name).keeps_initial) for part in active]
    return METHODS.get(config.name).keeps_initial or any(wanted)


AUTHORS = frozenset({"text", "initial"})
"""What only one part may ask of the sampler: of two limits the lower one counts, but a rollout has one author."""


class Composed(Method):
    """A base method and the parts that change what it makes of the evidence."""

    Config: ClassVar[type[Objective]] = Objective

    def __init__(self, base: Method, parts: Sequence[Part]) -> None:
        super().__init__(base.objective, base.text, base.seed)
        self.base, self.parts = base, parts
        _check_joints(base, parts)
        self.top = max((part.top for part in parts), default=0)
        self.whole = any(part.whole for part in parts)
        self.scores = any("score" in part.needs or part.top or part.whole for part in parts)
        self._own_top = base.top if isinstance(base, Scored) else 0
        if isinstance(base, Scored):
            base.whole = base.whole or self.whole
            for part in parts:
                if part.top > base.top:
                    base.top, base.top_setting = part.top, f"k of method.parts '{part.config.name}'"
        each: list[Method | Part] = [base, *parts]
        self.needs = frozenset().union(*(one.needs for one in each))
        self.writes = frozenset().union(*(one.writes for one in each))
        self.on_policy, self.min_coverage = base.on_policy, base.min_coverage
        self.reads_entropy = any(one.reads_entropy for one in each)
        self.spares_right = self.objective.control == "none" and any(part.spares_right for part in parts)
        self.candidates = max(one.candidates for one in each)
        self.keeps_initial = any(one.keeps_initial for one in each)
        self.one_process = any(one.one_process for one in each)
        self.decides = any(one.decides for one in each)
        self._each = each

    def before(self, prompts: Mapping[int, Prompt], step: int) -> list[Query]:
        """See `Method`."""
        return [query for one in self._each for query in one.before(prompts, step)]

    def writings(self, prompts: Mapping[int, Prompt], evidence: Sequence[Evidence], step: int) -> dict[int, Writing]:
        """See `Method`. Of two limits the lower one counts; other wishes for one row must not meet."""
        joined: dict[int, Writing] = {}
        for one in self._each:
            for row, writing in one.writings(prompts, evidence, step).items():
                joined[row] = _both(joined.get(row, Writing()), writing)
        return joined

    def budget(self, step: int) -> float:
        """See `Method`."""
        return max(one.budget(step) for one in self._each)

    def ask(self, rollout: Rollout, row: int, step: int) -> list[Query]:
        """See `Method`; one query for scores, whoever reads them; none of any kind about a rollout that is spared."""
        if self.spares_right and self.verdict(rollout):
            return []
        queries = self.base.ask(rollout, row, step)
        if self.scores and len(rollout) and not any(isinstance(query, ScoreQuery) for query in queries):
            queries = [*queries, score_query(rollout, row, self.text.vocabulary, top=self.top, whole=self.whole)]
        return [*queries, *(query for part in self.parts for query in part.ask(rollout, row, step))]

    def again(self, rollouts: Mapping[int, Rollout], evidence: Sequence[Evidence], step: int) -> list[Query]:
        """See `Method`."""
        further = [query for part in self.parts for query in part.again(rollouts, evidence, step)]
        return [*self.base.again(rollouts, asked_by(evidence), step), *further]

    @property
    def asks_again(self) -> bool:
        """See `Method`."""
        return self.base.asks_again or any(type(part).again is not Part.again for part in self.parts)

    @property
    def measures(self) -> bool:
        """See `Method`."""
        return self.base.measures or any(type(part).measure is not Part.measure for part in self.parts)

    def measure(
        self, rollouts: Mapping[int, Rollout], evidence: Sequence[Evidence], student: StudentModel
    ) -> Mapping[int, Facts]:
        """See `Method`."""
        own = asked_by(evidence)
        scores = {one.query.row: one for one in own if isinstance(one, TokenScores) and one.ids}
        facts = {row: dict(found) for row, found in self.base.measure(rollouts, own, student).items()}
        for part in self.parts:
            for row, rollout in rollouts.items():
                heard = narrowed(scores[row], part.top) if row in scores else None
                if measured := part.measure(rollout, heard, student):
                    facts.setdefault(row, {}).update(measured)
        return facts

    def read(self, rollouts: Sequence[Rollout], evidence: Sequence[Evidence], step: int) -> Signal:
        """See `Method`."""
        own = [narrowed(one, self._own_top) if isinstance(one, TokenScores) else one for one in asked_by(evidence)]
        signal = self.base.read(rollouts, own, step)
        dealer = random.Random(named_seed(self.seed, "control", step)) if self.objective.control == "shuffled" else None
        draft = Draft.of(signal, rollouts, evidence, step, self.verdict, dealer)
        scores = draft.scores
        for part in self.parts:
            draft.scores = {row: narrowed(one, part.top) for row, one in scores.items()}
            part.apply(draft)
        return draft.finish()

    def after(
        self, rollouts: Sequence[Rollout], signal: Signal, step: int, gradients: Gradients
    ) -> Mapping[str, float]:
        """See `Method`."""
        figures: dict[str, float] = {}
        for one in self._each:
            figures |= one.after(rollouts, signal, step, gradients)
        return figures

    def state_dict(self) -> dict[str, Any]:
        """See `Method`."""
        return {name: one.state_dict() for name, one in self._named().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Method`."""
        for name, one in self._named().items():
            if name in state:
                one.load_state_dict(state[name])

    def _named(self) -> dict[str, Method | Part]:
        return {"base": self.base, **{part.config.name: part for part in self.parts}}

    def describe(self) -> str:
        """The base's words and the names of the parts."""
        return f"{self.base.describe()}; with {', '.join(part.config.name for part in self.parts)}"

    def lacking(self, offered: Capabilities) -> list[str]:
        """See `Method`."""
        few = [
            f"the {part.top} likeliest tokens of given text for method.parts '{part.config.name}' (it has {offered.topk})"
            for part in self.parts
            if part.top > offered.topk and not offered.logits and not isinstance(self.base, Scored)
        ]
        return list(dict.fromkeys([*self.base.lacking(offered), *super().lacking(offered), *few]))

    def cautions(self) -> list[str]:
        """See `Method`."""
        names = {part.config.name for part in self.parts}
        warned = [
            f"method.parts: {part.config.name} with {other}: {why}"
            for part in self.parts
            for other, why in part.warns.items()
            if other in names
        ]
        return [*self.base.cautions(), *(note for part in self.parts for note in part.cautions()), *warned]


def narrowed(scores: TokenScores, most: int) -> TokenScores:
    """With so many of the likeliest tokens at each place, since another reader may have asked for more; 0 reads none."""
    if not most or all(len(top) <= most for top in scores.top):
        return scores
    best = (sorted(top.items(), key=lambda one: -one[1])[:most] for top in scores.top)
    return replace(scores, top=tuple(map(dict, best)))


def _check_joints(base: Method, parts: Sequence[Part]) -> None:
    """Refuse what can't be joined."""
    names = [part.config.name for part in parts]
    for part in parts:
        name = part.config.name
        if names.count(name) > 1:
            raise ConfigError(f"method.parts: '{name}' stands there twice; join the two")
        for other, mend in part.refuses.items():
            if other in names:
                raise ConfigError(f"method.parts: '{name}' and '{other}' can't be joined: {mend}")
        if not part.dense and getattr(base.objective, "form", "") == "dense":
            raise ConfigError(
                f"method.parts: '{name}' changes the advantage of the token that was sampled, and form: dense has none; set "
                "form: sampled, or leave it out"
            )
    if len(authors := [part.config.name for part in parts if part.writes & AUTHORS]) > 1:
        raise ConfigError(
            f"method.parts: '{authors[0]}' and '{authors[1]}' both say who writes a rollout; leave one out"
        )


def _both(one: Writing, other: Writing) -> Writing:
    """Two parts' wishes for one row."""
    limits = [limit for limit in (one.max_tokens, other.max_tokens) if limit is not None]
    plain = Writing()
    asked = replace(one, max_tokens=None), replace(other, max_tokens=None)
    if plain not in asked and asked[0] != asked[1]:
        raise ConfigError("method.parts: the method and a part of it write the same rollout; leave the part out")
    chosen = asked[1] if asked[0] == plain else asked[0]
    return replace(chosen, max_tokens=min(limits, default=None))
