"""OPD+ (arXiv 2606.01039): plain distillation with the exact advantage of any f-divergence. See `omniopd.parts.f_divergence`.

As published: `parts: [{name: f_divergence, center: false}]`. The comparison to run is centred against uncentred, with
`stop_gradient: true` as the negative control.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from omniopd.methods.opd import Opd, OpdConfig
from omniopd.objective import Objective, Parts
from omniopd.registry import METHODS


class OpdPlusConfig(OpdConfig):
    """Plain distillation, sampled form, with one part."""

    name: Literal["opd_plus"] = "opd_plus"  # type: ignore[assignment]
    parts: Parts = Field(default=["f_divergence"], validate_default=True)


@METHODS.register("opd_plus")
class OpdPlus(Opd):
    """The exact advantage of an f-divergence."""

    Config: ClassVar[type[Objective]] = OpdPlusConfig
    paper = "2606.01039"
    neutral: ClassVar = {"parts": [{"name": "f_divergence", "divergence": "reverse_kl", "clip": math.inf}]}
