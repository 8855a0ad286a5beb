"""LGR (arXiv 2605.30833): plain distillation, and a bonus for tokens after which the teacher is confident.

All of it is `omniopd.parts.lookahead`, see there. The variant that rewards several candidates at a place, LGR(topk), is not
documented and not built. Published runs gained at 9k tokens and lost at 3k, so by default rollouts below 4k tokens are plain
distillation.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from omniopd.methods.opd import Opd, OpdConfig
from omniopd.objective import Objective, Parts
from omniopd.registry import METHODS


class LgrConfig(OpdConfig):
    """Plain distillation, sampled form, with a bonus."""

    name: Literal["lgr"] = "lgr"  # type: ignore[assignment]
    parts: Parts = Field(default=["lookahead"], validate_default=True)


@METHODS.register("lgr")
class Lgr(Opd):
    """Look ahead where the student is unsure."""

    Config: ClassVar[type[Objective]] = LgrConfig
    paper = "2605.30833"
    neutral: ClassVar = {"parts": [{"name": "lookahead", "gamma": 0}]}
