"""Write and learn the first N tokens only (ESR, arXiv 2605.27028).

On a long prefix of the student's the teacher is off its own distribution and drifts into completing text. The cut is made in
the rollout, not in the loss: writing, scoring and learning all get cheaper by T / N. No end is put where a text is cut, and
held-out answers are written whole. N may move from `start` to `tokens` in a line over some steps. `omniopd probe --decay`
shows after how many of the student's tokens the teacher begins to fail.

`where: last` and `random` are the control [ours]: the same number of learned tokens of rollouts that are written whole.
Of a `reduction` that is a mean, the gradient's size does not depend on N; of `sum_seqmean`, the published form, it shrinks
with N: don't compare gradient norms across the two.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omniopd.draft import Draft
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.sampling import named_seed
from omniopd.types import Evidence, Prompt, Writing

Where = Literal["first", "last", "random"]


class HorizonSettings(PartSettings):
    """How many tokens of a rollout are learned, and which."""

    name: Literal["horizon"] = "horizon"
    tokens: int | None = Field(default=100, ge=1, description="N, of the published sweep 50 to 200; null: all")
    start: int | None = Field(default=None, ge=1, description="N of the first step; null: the same throughout")
    steps: int = Field(default=0, ge=0, description="updates from `start` to `tokens`, in a line")
    where: Where = Field(default="first", description="last, random: as many of rollouts that are written whole")

    @model_validator(mode="after")
    def _a_line_has_two_ends(self) -> HorizonSettings:
        if (self.start is None) != (self.steps == 0) or (self.start is not None and self.tokens is None):
            raise ValueError(
                "start: a horizon that moves needs start, tokens and steps; set all three, or tokens alone"
            )
        return self

    @property
    def neutral(self) -> bool:
        return self.tokens is None


@PARTS.register("horizon")
class Horizon(Part):
    """A limit on what is written and learned."""

    Config = HorizonSettings
    slots = ("sampling", "schedule")
    place = Place.SAMPLE
    decides = False
    writes = frozenset({"horizon"})
    neutral: ClassVar = {"tokens": None}
    refuses: ClassVar = {
        "adaptive_window": "both own the length of rollouts; leave one out",
        "lookahead": "what it adds is for long rollouts, and it is off below a length; leave one out",
    }
    warns: ClassVar = {
        "fork_guidance": "the teacher's continuations may go beyond the horizon",
        "sign_gate": "rollouts that are cut have no verdict",
    }

    def length(self, step: int) -> int:
        """N at step 1, 2, ..."""
        last = self.config.tokens
        return line(self.config.start or last, last, self.config.steps, step - 1)

    def writings(self, prompts: Mapping[int, Prompt], evidence: Sequence[Evidence], step: int) -> dict[int, Writing]:
        """See `Part`."""
        if self.config.where != "first":
            return {}
        return {row: Writing(max_tokens=self.length(step)) for row in prompts}

    def apply(self, draft: Draft) -> None:
        """See `Part`."""
        limit, names = self.length(draft.step), draft.names()
        for row in draft.rows:
            seed = named_seed(self.seed, "horizon", draft.step, *names[row])
            draft.keep(row, some_of(draft.mask[row], limit, self.config.where, seed))
        cut = [rollout.finish == "length" and len(rollout) >= limit for rollout in draft.rollouts]
        draft.note(horizon=float(limit), horizon_cut_share=sum(cut) / len(cut) if cut else None)


def line(first: int, last: int, steps: int, updates: int) -> int:
    """From `first` to `last` over so many updates, rounded; `last` from then on."""
    return last if updates >= steps else round(first + (last - first) * updates / steps)


def some_of(mask: Tensor, count: int, where: Where, seed: int) -> Tensor:
    """At most `count` of the tokens [T] under the mask; of "first", those among the rollout's first `count`."""
    if where == "first":
        return mask & (torch.arange(len(mask)) < count)
    places = mask.nonzero()[:, 0].tolist()
    chosen = places[-count:] if where == "last" else random.Random(seed).sample(places, min(count, len(places)))
    kept = torch.zeros_like(mask)
    kept[chosen] = True
    return kept
