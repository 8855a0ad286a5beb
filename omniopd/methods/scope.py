"""SCOPE (arXiv 2604.10688): right rollouts by likelihood, wrong ones by distillation, both weighed by perplexity.

    J = E_x[ sum_C w_S(i) sum_t -log p(y_t)  +  sum_W w_T(i) sum_t -sg(lr_t) log p(y_t) ]            [paper, eq. 6]

All of it is `omniopd.parts.correctness_router`. The loss adds up a rollout's tokens and weights of a branch add up to 1 per
prompt, so the reduction is `sum_seqmean`: eq. 6 over the rollouts of a prompt, a constant that Adam takes out again [ours].
The released code averages its two branches over different tokens; that is not copied. Controls: `control: shuffled` (the
verdicts of others), `placebo: random` (the weights of others of the same verdict), either direction turned by its word.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from omniopd.methods.opd import Opd, OpdConfig
from omniopd.objective import Objective, Parts, Reduction
from omniopd.registry import METHODS


class ScopeConfig(OpdConfig):
    """Plain distillation, sampled form, routed by verdict."""

    name: Literal["scope"] = "scope"  # type: ignore[assignment]
    reduction: Reduction = "sum_seqmean"
    parts: Parts = Field(default=["correctness_router"], validate_default=True)


@METHODS.register("scope")
class Scope(Opd):
    """Two paths by correctness."""

    Config: ClassVar[type[Objective]] = ScopeConfig
    paper = "2604.10688"
    neutral: ClassVar = "none in general: right rollouts learn by likelihood, whatever the settings are"
