"""GNDPO (arXiv 2606.09091): plain distillation with advantages whitened over the whole step. See `omniopd.parts.whiten`.

The authors' baseline has the same clamp without whitening: `parts: [{name: whiten, center: false, scale: false}]`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from omniopd.methods.opd import Opd, OpdConfig
from omniopd.objective import Objective, Parts
from omniopd.registry import METHODS


class GndpoConfig(OpdConfig):
    """Plain distillation, sampled form, with one part."""

    name: Literal["gndpo"] = "gndpo"  # type: ignore[assignment]
    parts: Parts = Field(default=["whiten"], validate_default=True)


@METHODS.register("gndpo")
class Gndpo(Opd):
    """Whitened advantages."""

    Config: ClassVar[type[Objective]] = GndpoConfig
    paper = "2606.09091"
    neutral: ClassVar = {"parts": [{"name": "whiten", "clip": float("inf"), "center": False, "scale": False}]}
