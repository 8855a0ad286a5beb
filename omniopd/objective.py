"""The objective's settings: how terms are averaged, and the anchor that holds what the teacher does not speak about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from omniopd.registry import PARTS
from omniopd.settings import Settings, tagged

if TYPE_CHECKING:
    Parts = list[Any]
else:
    Parts = list[tagged(PARTS)]
Reduction = Literal["term_mean", "sum_seqmean", "token_mean"]


class Anchor(Settings):
    """`beta * KL(initial student || student)`, exact over the vocabulary, on the response tokens named by `where`."""

    beta: float = Field(default=0.1, ge=0, description="weight of the term")
    where: Literal["unaudited", "all"] = Field(
        default="unaudited", description="tokens that the teacher did not speak about, or all of the response"
    )
    allow_none: bool = Field(default=False, description="say so if beta=0 is what you want")

    @model_validator(mode="after")
    def _deliberate(self) -> Anchor:
        if self.beta == 0 and not self.allow_none:
            raise ValueError(
                "beta=0 removes the anchor, without which students collapse; set beta above 0, or allow_none=true as well"
            )
        return self


class Objective(Settings):
    """Settings that every method shares; a method's `Config` extends this and says its `name`."""

    name: str = ""
    anchor: Anchor = Anchor()
    reduction: Reduction = Field(
        default="term_mean",
        description="term_mean: each term over its own tokens; sum_seqmean: sums per sequence; token_mean: over all tokens",
    )
    parts: Parts = Field(
        default=[],
        validate_default=True,
        description="what changes the signal on its way to the loss: names, or names with settings (docs/methods/README.md)",
    )
    control: Literal["none", "shuffled"] = Field(
        default="none",
        description="shuffled: what the parts decide is dealt out at random: verdicts and dropped rollouts over the step, "
        "masks, weights and bonuses inside each rollout",
    )
