"""SG-OPD (arXiv 2606.09304), a RECONSTRUCTION: sign-gated distillation with phased teacher sampling.

Known from the abstract [paper]: a right/wrong verifier is used twice. At the start some rollouts of a group are answers of
the teacher's that it accepted (`omniopd.parts.teacher_rollouts`); later it gates each token: the update is extrapolated
where the teacher pushes as the outcome says, interpolated where it pushes against (`omniopd.parts.sign_gate`). Coefficients
1.8 and 1.0 are [second-hand]; gate, schedule, reference and reductions are [ours], no code is known, and no published number
is one of this reconstruction.

The first phase needs text only; alone it is `parts: [teacher_rollouts]` on any method. Placebos: `control: shuffled` deals
verdicts to other rollouts, `sign_gate.placebo: random` the coefficients to other tokens.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from omniopd.methods.opd import Opd, OpdConfig
from omniopd.objective import Objective, Parts
from omniopd.registry import METHODS

PHASED = {"name": "teacher_rollouts", "share": 0.5, "steps": 20, "accept": "right", "tries": 4}
"""The first phase; its steps are 10-15% of the run's [ours]."""


class SgOpdConfig(OpdConfig):
    """Plain distillation, sampled form, with two parts."""

    name: Literal["sg_opd"] = "sg_opd"  # type: ignore[assignment]
    parts: Parts = Field(default=["sign_gate", PHASED], validate_default=True)


@METHODS.register("sg_opd")
class SgOpd(Opd):
    """The verifier says where to trust the teacher further."""

    Config: ClassVar[type[Objective]] = SgOpdConfig
    paper = "2606.09304"
    neutral: ClassVar = {
        "parts": [{"name": "sign_gate", "lam_hi": 1, "lam_lo": 1}, {"name": "teacher_rollouts", "share": 0}]
    }
