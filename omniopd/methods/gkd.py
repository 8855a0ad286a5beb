"""GKD (arXiv 2306.13649): generalised knowledge distillation, a mixture of the student's own rollouts and given text.

    L = (1 - lambda) E_{y given} D + lambda E_{y ~ p} D,      D = JSD_beta(q, p) token by token, no gradient through sampling

`lambda` is the share of rollouts that the student writes: `parts: [{name: teacher_rollouts, share: 1 - lambda, loss:
divergence}]`. The given text is the teacher's own answers (`seq_kd` in the released trainers), since prompts carry no worked
solutions. beta = lambda = 0.5 as in TRL and ms-swift [official code]; the mean is over all tokens of the step.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from omniopd.methods.opd import Opd, OpdConfig
from omniopd.objective import Objective, Parts
from omniopd.registry import METHODS


class GkdConfig(OpdConfig):
    """Plain distillation, dense form, with one part."""

    name: Literal["gkd"] = "gkd"  # type: ignore[assignment]
    form: Literal["sampled", "dense"] = "dense"
    divergence: Literal["reverse", "forward", "jsd"] = "jsd"
    parts: Parts = Field(default=[{"name": "teacher_rollouts", "loss": "divergence"}], validate_default=True)


@METHODS.register("gkd")
class Gkd(Opd):
    """Divergence on the student's own text and on the teacher's."""

    Config: ClassVar[type[Objective]] = GkdConfig
    paper = "2306.13649"
    neutral: ClassVar = {"divergence": "reverse", "parts": [{"name": "teacher_rollouts", "share": 0}]}
    plain: ClassVar = {"name": "opd", "form": "dense"}
