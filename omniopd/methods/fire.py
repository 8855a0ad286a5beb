"""FiRe-OPD (arXiv 2606.02684): filter rollouts, then reweight tokens.

The rollouts that the teacher finds least likely are dropped (`omniopd.parts.trajectory_filter`); the tokens of the others
count more where the teacher is sure and the student is not (`omniopd.parts.entropy_weights`). Weights have mean 1, so only
the place of the supervision changes, not its amount. The PPO clip of the official code never acts in one update per batch.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from omniopd.methods.opd import Opd, OpdConfig
from omniopd.objective import Objective, Parts
from omniopd.registry import METHODS


class FireConfig(OpdConfig):
    """Plain distillation, sampled form, with two parts."""

    name: Literal["fire"] = "fire"  # type: ignore[assignment]
    parts: Parts = Field(default=["trajectory_filter", "entropy_weights"], validate_default=True)


@METHODS.register("fire")
class Fire(Opd):
    """Filter trajectories, then reweight tokens."""

    Config: ClassVar[type[Objective]] = FireConfig
    paper = "2606.02684"
    neutral: ClassVar = {
        "parts": [{"name": "trajectory_filter", "drop": 0}, {"name": "entropy_weights", "alpha": 0, "beta": 0}]
    }
