"""ADWIN (arXiv 2605.28396): a rollout window chosen by gradient alignment. See `omniopd.parts.adaptive_window`.

The authors' code is not known; base loss, candidates and threshold are [second-hand], the rest is a reconstruction. Not the
drift detector of the same name. At settings that always accept the shortest window (`rho: -1`) it is ESR with that N.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from omniopd.methods.opd import Opd, OpdConfig
from omniopd.objective import Objective, Parts
from omniopd.registry import METHODS


class AdwinConfig(OpdConfig):
    """Plain distillation, sampled form, with one part."""

    name: Literal["adwin"] = "adwin"  # type: ignore[assignment]
    parts: Parts = Field(default=["adaptive_window"], validate_default=True)


@METHODS.register("adwin")
class Adwin(Opd):
    """Rollouts as short as the gradient allows."""

    Config: ClassVar[type[Objective]] = AdwinConfig
    paper = "2605.28396"
    neutral: ClassVar = {"parts": [{"name": "adaptive_window", "rho": 2, "start": "full", "fallback": "full"}]}
