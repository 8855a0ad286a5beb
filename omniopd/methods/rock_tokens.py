"""Rock Tokens (arXiv 2605.09253): plain distillation that learns less from some token types. See
`omniopd.parts.rock_tokens`, and `omniopd.rocks` for how they are found.

Controls: `selection: random` (other types with as many occurrences), `control: shuffled` (the weights at random places).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from omniopd.methods.opd import Opd, OpdConfig
from omniopd.objective import Objective, Parts
from omniopd.registry import METHODS


class RockTokensConfig(OpdConfig):
    """Plain distillation, sampled form, with one part."""

    name: Literal["rock_tokens"] = "rock_tokens"  # type: ignore[assignment]
    parts: Parts = Field(default=["rock_tokens"], validate_default=True)


@METHODS.register("rock_tokens")
class RockTokens(Opd):
    """Smaller weights for persistent high-loss token types."""

    Config: ClassVar[type[Objective]] = RockTokensConfig
    paper = "2605.09253"
    neutral: ClassVar = {"parts": [{"name": "rock_tokens", "weight": 1.0}]}
