"""TOPD (arXiv 2606.00305), a reconstruction: plain distillation, and the teacher's next words at true forks.

All of it is `omniopd.parts.fork_guidance`, which says what is known and what is ours: results are the reconstruction's. A
prototype in the first author's repository is not copied: its generation is missing, its margins carry no gradient, and with
three candidates its rule (mean + 2 standard deviations) can never fire. The guidance adds tokens that the teacher wrote, so
a comparison needs a control with as many.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from omniopd.methods.opd import Opd, OpdConfig
from omniopd.objective import Objective, Parts
from omniopd.registry import METHODS


class TopdConfig(OpdConfig):
    """Plain distillation, sampled form, with guidance at forks."""

    name: Literal["topd"] = "topd"  # type: ignore[assignment]
    parts: Parts = Field(default=["fork_guidance"], validate_default=True)


@METHODS.register("topd")
class Topd(Opd):
    """Near-future guidance at true forks."""

    Config: ClassVar[type[Objective]] = TopdConfig
    paper = "2606.00305"
    neutral: ClassVar = {"parts": [{"name": "fork_guidance", "scale": 0, "v_low": 1}]}
