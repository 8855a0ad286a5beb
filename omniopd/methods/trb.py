"""TRB (arXiv 2605.31159): trust-region behaviour blending, a warm-up of the sampler. See `omniopd.parts.behaviour_blend`.

The loss is plain: the reverse KL on the student's 16 likeliest tokens at the places that the blend visits [paper]; what
becomes of the other tokens is not said, so that they share one bucket [ours]. Budget and length of the warm-up are not
printed either: 0.02 nats and 50 steps [ours], inside the published sweeps {.001 ... .05} and {15, 25, 50}.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from omniopd.methods.opd import Opd, OpdConfig
from omniopd.objective import Objective, Parts
from omniopd.registry import METHODS


class TrbConfig(OpdConfig):
    """Plain distillation, dense form on few ids, with one part."""

    name: Literal["trb"] = "trb"  # type: ignore[assignment]
    form: Literal["sampled", "dense"] = "dense"
    support: Literal["full", "student", "teacher", "common"] = "student"
    k: int = Field(default=16, ge=1, description="ids of a support that is not full")
    parts: Parts = Field(default=["behaviour_blend"], validate_default=True)


@METHODS.register("trb")
class Trb(Opd):
    """Rollouts of a blend whose budget runs out."""

    Config: ClassVar[type[Objective]] = TrbConfig
    paper = "2605.31159"
    neutral: ClassVar = {"parts": [{"name": "behaviour_blend", "budget": 0}]}
    plain: ClassVar = {"name": "opd", "form": "dense", "support": "student", "k": 16}
