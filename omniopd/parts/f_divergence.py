"""Minimise any f-divergence by its exact advantage (OPD+, arXiv 2606.01039).

    D_f = E_{v~p}[f(u)],  u = q/p = exp(lr);    -grad D_f = E_p[w_f(u) grad log p],  w_f(u) = u f'(u) - f(u)

The usual practice stops the gradient of f(u) and keeps -f(u) alone, which for the forward KL points the other way; it is here
as the negative control (`stop_gradient`). A constant in w_f averages out only where every token counts that the present
weights have sampled. So w_f is centred to w_f(u) - w_f(1), which is made from lr by expm1 and logaddexp and gives 0 where
both sides agree [ours]; the paper does not. lr is clipped before u is formed [second-hand].

A token that the teacher finds impossible (lr = -inf) has no signal, with this part as without it, and is counted.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from omniopd.draft import Draft
from omniopd.errors import ConfigError
from omniopd.method import StudentText
from omniopd.objective import Objective
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.scored import ScoredObjective

Name = Literal["reverse_kl", "forward_kl", "jsd", "hellinger", "chi2", "total_variation"]
AT_ONE = {"reverse_kl": -1.0, "forward_kl": 1.0}  # w_f(1) where it is not 0
SELECTING = (Place.CUT, Place.DROP, Place.MASK, Place.WEIGHT)  # what counts depends on the tokens that were sampled


class FDivergenceSettings(PartSettings):
    """Which divergence, and how its advantage is kept in bounds."""

    name: Literal["f_divergence"] = "f_divergence"
    divergence: Name = Field(default="reverse_kl", description="of q from p, in Csiszar's form")
    center: bool = Field(default=True, description="subtract w_f(1) [ours]; false: as published")
    clip: float = Field(default=6.0, gt=0, description="bound on |lr| before u is formed, in nats; inf: none")
    stop_gradient: bool = Field(default=False, description="-f(u) alone, the usual practice: a negative control")

    @property
    def uncentred(self) -> bool:
        """Whether the advantage holds a constant."""
        return not self.center and not self.stop_gradient and self.divergence in AT_ONE

    @property
    def neutral(self) -> bool:
        return self.divergence == "reverse_kl" and not self.uncentred and math.isinf(self.clip)


@PARTS.register("f_divergence")
class FDivergence(Part):
    """The advantage whose expected policy gradient is that of the divergence."""

    Config = FDivergenceSettings
    slots = ("signal",)
    place = Place.TRANSFORM
    decides = False
    needs = frozenset({"score"})
    dense = False
    refuses: ClassVar = {"whiten": "whitening erases the difference between divergences; leave one out"}
    warns: ClassVar = {
        "lookahead": "forward_kl and chi2 are unbounded, the bonus is of order 1; keep f_divergence.clip"
    }
    neutral: ClassVar = {"divergence": "reverse_kl", "center": True, "clip": math.inf}

    def __init__(self, config: FDivergenceSettings, objective: Objective, text: StudentText, seed: int) -> None:
        super().__init__(config, objective, text, seed)
        if not isinstance(objective, ScoredObjective) or getattr(objective, "estimator", "k1") == "k3":
            raise ConfigError(
                "method.parts: 'f_divergence' is made from log-ratios, which this method's advantages are not; set "
                "method.name=opd and estimator: k1"
            )
        if config.uncentred:
            self.needs = self.needs | {"fresh"}
            others = [part.name for part in objective.parts if not getattr(part, "neutral", False)]
            kinds = {name: PARTS.get(name) for name in others}
            if bent := [name for name, one in kinds.items() if one.place in SELECTING or "blend" in one.writes]:
                raise ConfigError(
                    "method.parts: the constant of an uncentred 'f_divergence' averages out over all tokens that the student "
                    f"sampled only, and '{bent[0]}' leaves out or weighs some; set f_divergence.center=true"
                )

    def apply(self, draft: Draft) -> None:
        """See `Part`."""
        clipped, learned = 0, 0
        for row in draft.rows:
            if row in draft.likelihood:
                continue
            ratios, mask = draft.advantage[row], draft.mask[row]
            bounded = ratios.clamp(-self.config.clip, self.config.clip)
            clipped, learned = clipped + int((bounded != ratios)[mask].sum()), learned + int(mask.sum())
            draft.advantage[row] = self._advantage(bounded)
        draft.note(clip_share=clipped / learned if learned else None)

    def _advantage(self, ratios: Tensor) -> Tensor:
        if self.config.stop_gradient:
            return stopped(ratios, self.config.divergence)
        return exact(ratios, self.config.divergence, center=self.config.center)


def exact(lr: Tensor, divergence: Name, *, center: bool = True) -> Tensor:
    """`w_f(u)`, or `w_f(u) - w_f(1)`, of log-ratios of any shape; the centred one of the reverse KL is `lr` itself.

    All are finite at `lr = -inf` but that of the reverse KL.
    """
    if not center and divergence == "forward_kl":
        return lr.exp()
    value = {
        "reverse_kl": lambda: lr,
        "forward_kl": lr.expm1,
        "jsd": lambda: 0.5 * (torch.logaddexp(lr, torch.zeros_like(lr)) - math.log(2)),
        "hellinger": (lr / 2).expm1,
        "chi2": (2 * lr).expm1,
        "total_variation": lambda: 0.5 * lr.sign(),
    }[divergence]()
    return value if center or divergence not in AT_ONE else value + AT_ONE[divergence]


def stopped(lr: Tensor, divergence: Name) -> Tensor:
    """`-f(u)`: the weight of an estimator that stops the gradient of f."""
    u_ln_u = (lr * lr.exp()).where(lr > -torch.inf, torch.zeros_like(lr))
    ln_mean = torch.logaddexp(lr, torch.zeros_like(lr)) - math.log(2)  # ln((1 + u) / 2)
    return {
        "reverse_kl": lambda: lr,
        "forward_kl": lambda: -u_ln_u,
        "jsd": lambda: -0.5 * (u_ln_u - (1 + lr.exp()) * ln_mean),
        "hellinger": lambda: -((lr / 2).expm1() ** 2),
        "chi2": lambda: -(lr.expm1() ** 2),
        "total_variation": lambda: -0.5 * lr.expm1().abs(),
    }[divergence]()
