"""On-policy distillation: the student writes, the teacher says of every token how likely it finds it.

The reference of every other method: neutral settings elsewhere are one of its two forms, bit for bit.

- sampled: `A_t = sg(log q(y_t) - log p(y_t))`, loss `- mean_t A_t log p(y_t)`: the reverse KL's policy gradient with
  discount 0, each token credited with its own log-ratio only
- dense: `mean_t D(p_t, q_t)` over the vocabulary, or a subset of it; no gradient through sampling. With the reverse KL its
  gradient is the sampled form's expected one

Source: GKD, arXiv 2306.13649 [paper] for the dense form; the sampled form after Thinking Machines' recipe, October 2025
[second-hand]; refusals, subset modes and defaults [ours].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omniopd.method import StudentText
from omniopd.objective import Objective
from omniopd.registry import METHODS
from omniopd.scored import GIVEN, MISSING, RETOKENIZED, Reading, Scored, ScoredObjective, finite, nats
from omniopd.targets.full import FullTarget
from omniopd.targets.subset import SubsetTarget, TopKTarget
from omniopd.types import Rollout, Target, TokenScores


class OpdConfig(ScoredObjective):
    """Which form, and how the difference between teacher and student is measured."""

    name: Literal["opd"] = "opd"
    form: Literal["sampled", "dense"] = Field(
        default="sampled", description="sampled: an advantage for each token written; dense: a divergence at its place"
    )
    estimator: Literal["k1", "k2", "k3"] = Field(
        default="k1",
        description="sampled: k1 log(p/q), k2 0.5 log(p/q)^2 (k1's gradient), k3 q/p - 1 - log(q/p) (the forward KL's)",
    )
    apply: Literal["advantage", "loss"] = Field(
        default="advantage", description="k1 is an advantage; k2, k3 and the dense form are losses, and default to it"
    )
    divergence: Literal["reverse", "forward", "jsd"] = Field(
        default="reverse", description="dense: KL(p||q), KL(q||p), or beta KL(q||m) + (1 - beta) KL(p||m)"
    )
    beta: float = Field(
        default=0.5, ge=0, le=1, description="jsd: the teacher's share of m; 0 and 1 are forward and reverse KL"
    )
    support: Literal["full", "student", "teacher", "common"] = Field(
        default="full", description="dense: the whole vocabulary, or the k likeliest ids of one side, or of both"
    )
    k: int = Field(default=64, ge=1, description="ids of a support that is not full")
    subset: Literal["tail_bucket", "partial_sg", "renorm", "partial"] = Field(
        default="tail_bucket", description="what becomes of the probability outside the support"
    )

    @model_validator(mode="before")
    @classmethod
    def _what_is_a_loss(cls, given: Any) -> Any:
        if isinstance(given, dict):
            form = given.get("form", cls.model_fields["form"].default)
            if form == "dense" or given.get("estimator") in ("k2", "k3"):
                return {"apply": "loss", **given}
        return given

    @model_validator(mode="after")
    def _carries_the_teacher(self) -> OpdConfig:
        if self.form == "dense" and self.apply == "advantage":
            raise ValueError(
                "apply: a KL over the vocabulary as an advantage does not depend on the token that was sampled, so its "
                "expected gradient is 0 (miles#2362); set apply: loss"
            )
        if self.form == "sampled" and self.estimator == "k1" and self.apply == "loss":
            raise ValueError(
                "apply: k1 as a loss is log p - log q, in whose gradient the teacher does not occur; set apply: advantage, "
                "or estimator: k2 for a loss with that gradient"
            )
        if self.form == "sampled" and self.estimator != "k1" and self.apply == "advantage":
            raise ValueError(
                f"apply: {self.estimator} is never negative, so as an advantage it pushes every token the same way; set "
                "apply: loss, or estimator: k1"
            )
        if self.support != "full" and self.subset == "renorm" and self.k == 1:
            raise ValueError(
                "k: one id renormalised has probability 1 on both sides, a loss of 0; raise k or change subset"
            )
        return self

    @model_validator(mode="after")
    def _every_setting_counts(self) -> OpdConfig:
        dense = self.form == "dense"
        read_with = {
            "estimator": (not dense, "form: sampled"),
            "divergence": (dense, "form: dense"),
            "support": (dense, "form: dense"),
            "beta": (dense and self.divergence == "jsd", "form: dense and divergence: jsd"),
            "k": (self.support != "full", "a support that is not full"),
            "subset": (self.support != "full", "a support that is not full"),
        }
        for name, (read, where) in read_with.items():
            if not read and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: is read with {where} only; set that, or leave {name} out")
        return self


@METHODS.register("opd")
class Opd(Scored):
    """The difference between teacher and student on the student's own tokens, as an advantage or as a divergence."""

    Config: ClassVar[type[Objective]] = OpdConfig
    needs = frozenset({"score", "same tokenizer"})  # of the default form
    paper = "2306.13649"
    neutral: ClassVar[Mapping[str, Any] | str] = {}

    def __init__(self, config: OpdConfig, text: StudentText, seed: int) -> None:
        super().__init__(config, text, seed)
        self.config = config
        by_teacher = config.support == "teacher"  # of what a server returns, only that can be read (trap R18)
        self.top = config.k if by_teacher else 0
        self.whole = config.form == "dense" and not by_teacher
        kind = "score" if config.form == "sampled" else "topk" if by_teacher else "logits"
        self.needs = frozenset({kind, "same tokenizer"})

    def cautions(self) -> list[str]:
        config, said = self.config, []
        if 0 < config.beta < 0.01 or 0.99 < config.beta < 1:
            said.append(
                f"method.beta={config.beta:g}: the JSD vanishes towards 0 and 1, where the full KLs are; take 0 or 1"
            )
        if config.subset == "partial":
            said.append(
                "method.subset=partial: is no divergence, its minimum is p = q/e on the support; prefer tail_bucket"
            )
        if config.support == "teacher" and config.subset in ("renorm", "partial") and config.divergence == "reverse":
            said.append(
                f"method.subset={config.subset}: nothing keeps the student's probability inside the teacher's support; "
                "prefer tail_bucket"
            )
        if config.support == "common" and config.subset == "renorm":
            said.append(
                "method.subset=renorm: common ids are often a single one, which teaches nothing; prefer tail_bucket"
            )
        return said

    def place(self, rollout: Rollout, scores: TokenScores) -> Reading:
        """The teacher's numbers, position by position: both sides have the same tokens."""
        if scores.ids != rollout.ids:
            return Reading.silent(len(rollout), RETOKENIZED)
        teacher = nats(scores.logprobs)
        spoke, holes = finite(teacher)
        drawn = torch.arange(len(rollout)) >= rollout.given
        known = spoke & drawn
        advantage = (teacher - nats(rollout.logprobs)).where(known, torch.zeros((), dtype=torch.float64))
        if self.config.form == "dense":
            return self._dense(scores, advantage[known])
        holes[GIVEN] = int((spoke & ~drawn).sum())
        return Reading(known, self._values(advantage), holes, log_ratios=advantage[known])

    def _values(self, advantage: Tensor) -> Tensor:
        """What multiplies -log p, so that the gradient is that of the estimator."""
        return advantage.expm1() if self.config.estimator == "k3" else advantage

    def _dense(self, scores: TokenScores, log_ratios: Tensor) -> Reading:
        tokens = len(scores.ids)
        target = self._target(scores)
        if target is None:
            return Reading.silent(tokens, MISSING)
        mask = torch.ones(tokens, dtype=torch.bool)
        if self.config.support == "teacher":
            mask = torch.tensor([bool(top) for top in scores.top])
        holes = {MISSING: tokens - int(mask.sum())}
        return Reading(mask, torch.zeros(tokens), holes, target, log_ratios)

    def _target(self, scores: TokenScores) -> Target | None:
        """The teacher's distributions as a target, if they came."""
        config = self.config
        if config.support == "teacher":
            return TopKTarget(scores.top, config.subset, config.divergence, config.beta) if scores.top else None
        if scores.distributions is None:
            return None
        if config.support == "full":
            return FullTarget(scores.distributions, config.divergence, config.beta)
        return SubsetTarget(
            scores.distributions, config.k, config.support, config.subset, config.divergence, config.beta
        )
