"""Learn less from token types whose loss stays high though they are frequent (Rock Tokens, arXiv 2605.09253).

    w_t = lambda where y_t is one of them, 1 elsewhere

The weight is that of *predicting* the token. The released code looks at the token that stands where the prediction is made,
and so weakens what follows a rock token; it also divides by the sum of the weights, so that what rocks lose the others gain
(`renormalise: sum_w`) [ours, from official code]. Windows around them are not weakened.

The list is a file (`omniopd.rocks`), or `source: online` [ours]: mined from the run's own first steps, which are plain
distillation, by the released simple selection: loss times frequency, the most frequent types left out. There are no losses
before and after training then, so that nothing tells persistent types from those that were not learned yet.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationError

from omniopd.draft import Draft
from omniopd.errors import ConfigError
from omniopd.measures import divergences
from omniopd.method import Facts, Gradients, StudentModel, StudentText
from omniopd.objective import Objective
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.rocks import RockList, TokenType, heaviest, matched_random
from omniopd.sampling import named_seed
from omniopd.scored import nats
from omniopd.targets.full import FullTarget
from omniopd.types import Rollout, Signal, TokenScores

LOSS = "rock_tokens.loss"
ONLINE = "online"
MOST_FREQUENT = 5  # types that the released selection leaves out [official code]
MATCHED = 0.95  # of the rocks' occurrences, which the random control should have
PILLAR = -0.01  # change of accuracy from which on the student can't do without a type [second-hand]

log = logging.getLogger(__name__)


class RockTokensSettings(PartSettings):
    """Which types, and how little they count."""

    name: Literal["rock_tokens"] = "rock_tokens"
    weight: float = Field(default=0.1, ge=0, le=1, description="lambda; 0 freezes them, which costs accuracy")
    source: str = Field(default=ONLINE, description="a JSON list, or online: mined from the run's first steps [ours]")
    types: int = Field(default=100, ge=1, description="types that are weakened, by R_ctx")
    skip: int | None = Field(
        default=None, ge=0, description="most frequent types that are no rocks; null: 5 online, 0 of a list"
    )
    mine_steps: int = Field(default=50, ge=1, description="online: steps of plain distillation that are mined [ours]")
    loss: Literal["exact", "sampled"] = Field(
        default="exact", description="online: the reverse KL at each token, or log p - log q of the token, from scores"
    )
    selection: Literal["rocks", "random"] = Field(
        default="rocks", description="random: other types with as many occurrences, a control"
    )
    renormalise: Literal["none", "sum_w"] = Field(
        default="none", description="sum_w: divide by the sum of all soft weights, as the released code does"
    )

    @property
    def neutral(self) -> bool:
        return self.weight == 1


@PARTS.register("rock_tokens")
class RockTokens(Part):
    """A smaller weight for some token types."""

    Config = RockTokensSettings
    slots = ("credit",)
    place = Place.WEIGHT
    warns: ClassVar = {
        "entropy_weights": "what the student can't do without is unrelated to entropy, and both may weaken it"
    }
    neutral: ClassVar = {"weight": 1.0}

    def __init__(self, config: RockTokensSettings, objective: Objective, text: StudentText, seed: int) -> None:
        super().__init__(config, objective, text, seed)
        self.online = config.source == ONLINE
        self.mined: dict[int, tuple[int, float]] = {}  # id: occurrences, their losses' sum
        self.pillars: tuple[int, ...] = ()
        self.rocks: frozenset[int] | None = None  # None while they are mined
        if self.online:
            self.needs = frozenset({"logits" if config.loss == "exact" else "score", "same tokenizer"})
            self.whole = config.loss == "exact"
        else:
            types = _read(Path(config.source), text.vocabulary.digest).types
            self.rocks = self._chosen(types)
            hurts = {one.id for one in types if one.knock_out is not None and one.knock_out <= PILLAR}
            self.pillars = tuple(sorted(hurts & self.rocks))

    def cautions(self) -> list[str]:
        """Types that the student can't do without."""
        if not self.pillars:
            return []
        named = ", ".join(map(str, self.pillars[:5]))
        return [
            f"rock_tokens: accuracy falls without {len(self.pillars)} of the listed types (ids {named}); raise weight"
        ]

    def measure(self, rollout: Rollout, scores: TokenScores | None, student: StudentModel) -> Facts:
        """See `Part`; only while types are mined."""
        if self.rocks is not None or scores is None or scores.ids != rollout.ids:
            return {}
        if self.config.loss == "sampled":
            return {LOSS: (nats(rollout.logprobs) - nats(scores.logprobs)).tolist()}
        if scores.distributions is None:
            return {}
        (own,) = student.distributions([rollout])
        return {LOSS: divergences(own, FullTarget(scores.distributions), rollout.ids).tolist()}

    def apply(self, draft: Draft) -> None:
        """See `Part`."""
        if not self.rocks:
            return
        found = learned = 0
        rocks = torch.tensor(sorted(self.rocks))
        for row in draft.rows:
            if row in draft.likelihood:
                continue
            here = torch.isin(torch.tensor(draft.rollouts[row].ids), rocks)
            draft.weigh(row, torch.ones(len(here), dtype=torch.float64).masked_fill(here, self.config.weight))
            found, learned = found + int((here & draft.mask[row]).sum()), learned + int(draft.mask[row].sum())
        draft.sum_w |= self.config.renormalise == "sum_w"
        draft.note(rock_share=found / learned if learned else None)

    def after(
        self, rollouts: Sequence[Rollout], signal: Signal, step: int, gradients: Gradients
    ) -> Mapping[str, float]:
        """Count the step's losses; behind the last step that is mined, choose."""
        if self.rocks is None:
            for rollout in rollouts:
                known = torch.tensor(rollout.facts.get(LOSS, ()), dtype=torch.float64)
                for place in known.isfinite().nonzero()[:, 0].tolist():
                    seen, total = self.mined.get(rollout.ids[place], (0, 0.0))
                    self.mined[rollout.ids[place]] = seen + 1, total + float(known[place])
            if step >= self.config.mine_steps:
                types = [
                    TokenType(id=id, frequency=seen, loss=total / seen) for id, (seen, total) in self.mined.items()
                ]
                self.rocks = self._chosen(types)
        return {"rock_types": float(len(self.rocks or ()))}

    def state_dict(self) -> dict[str, Any]:
        return {"mined": dict(self.mined), "rocks": None if self.rocks is None else sorted(self.rocks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mined = dict(state["mined"])
        self.rocks = None if state["rocks"] is None else frozenset(state["rocks"])

    def _chosen(self, types: Sequence[TokenType]) -> frozenset[int]:
        """The types that are weakened."""
        skip = self.config.skip if self.config.skip is not None else MOST_FREQUENT * self.online
        rocks = heaviest(types, self.config.types, skip)
        if not rocks:
            log.warning("rock_tokens: no token type is heavy enough, of %d that occur", len(types))
        if self.config.selection == "rocks":
            return frozenset(rocks)
        often = {one.id: one.frequency for one in types}
        drawn = matched_random(types, rocks, named_seed(self.seed, "rock_tokens"))
        hit = sum(often[id] for id in drawn) / max(1, sum(often[id] for id in rocks))
        if hit < MATCHED:
            log.warning("rock_tokens: the random types have %.0f%% of the rocks' occurrences; lower types", 100 * hit)
        return frozenset(drawn)


def _read(path: Path, vocabulary: str) -> RockList:
    """The list of a file.

    Raises:
        ConfigError: it can't be read, or belongs to another tokenizer.
    """
    where = f"method.parts: rock_tokens.source={path}"
    try:
        found = RockList.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}; name a list, or say online") from None
    except (ValidationError, UnicodeDecodeError):
        raise ConfigError(
            f"{where}: is no list of token types (see omniopd/rocks.py); mine one, or say online"
        ) from None
    if found.vocabulary != vocabulary:
        raise ConfigError(
            f"{where}: was made for another tokenizer ({found.vocabulary}) than the student's ({vocabulary}); mine a list "
            "with this student, or say online"
        )
    return found
