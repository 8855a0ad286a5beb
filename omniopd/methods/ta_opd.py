"""TA-OPD (arXiv 2605.26844): plain distillation on the most teachable tokens. See `omniopd.parts.teachability`.

Masking alone saves no forward pass. Controls: `control: shuffled` (as many tokens of each rollout at random),
`rank_by: disagreement`, `rank_by: incompatible`. Not the "Tail-Aware Top-k OPD" of arXiv 2608.14728.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from omniopd.methods.opd import Opd, OpdConfig
from omniopd.objective import Objective, Parts
from omniopd.registry import METHODS


class TaOpdConfig(OpdConfig):
    """Plain distillation, sampled form, with one part."""

    name: Literal["ta_opd"] = "ta_opd"  # type: ignore[assignment]
    parts: Parts = Field(default=["teachability"], validate_default=True)


@METHODS.register("ta_opd")
class TaOpd(Opd):
    """Token teachability selection."""

    Config: ClassVar[type[Objective]] = TaOpdConfig
    paper = "2605.26844"
    neutral: ClassVar = {"parts": [{"name": "teachability", "rho": 1.0}]}
