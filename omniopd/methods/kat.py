"""KAT (arXiv 2606.09471): plain distillation that ends a rollout where the KL has stayed low. See `omniopd.parts.kl_stop`.

Shorter texts may explain a part of any gain: compare with `control: shuffled`, the same cut lengths on random rollouts.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from omniopd.methods.opd import Opd, OpdConfig
from omniopd.objective import Objective, Parts
from omniopd.registry import METHODS


class KatConfig(OpdConfig):
    """Plain distillation, sampled form, with one part."""

    name: Literal["kat"] = "kat"  # type: ignore[assignment]
    parts: Parts = Field(default=["kl_stop"], validate_default=True)


@METHODS.register("kat")
class Kat(Opd):
    """Escape from the KL agreement trap."""

    Config: ClassVar[type[Objective]] = KatConfig
    paper = "2606.09471"
    neutral: ClassVar = {"parts": [{"name": "kl_stop", "threshold": -math.inf}]}
