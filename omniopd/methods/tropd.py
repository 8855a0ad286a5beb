"""TrOPD (arXiv 2606.01249): trust-region on-policy distillation.

A token is trusted with the acceptance probability of speculative decoding and keeps its advantage; an outlier gets a forward
KL on the teacher's likeliest tokens (`omniopd.parts.trust_region`). Rollouts begin with a piece of a teacher's answer that
shrinks to nothing (`omniopd.parts.teacher_prefix`), learned by its likelihood. No token is learned in two of the three ways.

The authors' baselines: `region: static` with `outlier: clip` or `mask`, with or without the prefix. Training code is not
released. Set the prefix's `tokens` to `student.max_new_tokens` and its `steps` to `train.steps`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from omniopd.methods.opd import Opd, OpdConfig
from omniopd.objective import Objective, Parts
from omniopd.registry import METHODS


class TropdConfig(OpdConfig):
    """Plain distillation, sampled form, with two parts."""

    name: Literal["tropd"] = "tropd"  # type: ignore[assignment]
    parts: Parts = Field(default=["trust_region", "teacher_prefix"], validate_default=True)


@METHODS.register("tropd")
class Tropd(Opd):
    """Trusted tokens by their log-ratio, outliers by a bounded gradient, given ones by their likelihood."""

    Config: ClassVar[type[Objective]] = TropdConfig
    paper = "2606.01249"
    neutral: ClassVar = {"parts": [{"name": "trust_region", "region": "off"}, {"name": "teacher_prefix", "tokens": 0}]}
