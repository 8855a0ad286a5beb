"""Believe the log-ratio where the teacher might have written the token too; elsewhere bound what it says.

    P_t = min(q(y_t) / p(y_t), 1),    M_t ~ Bernoulli(P_t)                        the acceptance of speculative decoding
    A_t = M_t lr_t                                                                trusted tokens
    D_t = (1 - M_t) sum_{v in top-k(q)} q_v (log q_v - log p_v)                   outliers: forward KL on the teacher's top k

TrOPD (arXiv 2606.01249 [paper]). The log-ratio of one sample dives without bound where the student picks what the teacher
finds nearly impossible; the forward KL has a gradient of norm 2 at most there. Its value is not bounded, and, a bare sum over
the top k, it may be negative. P is of the log-probs that wrote the rollout and carries no gradient. E_{y ~ p}[P] =
sum_v min(p_v, q_v), so the share of trusted tokens estimates 1 - TV(p, q) [ours].

[ours] `soft`: weights P and 1 - P in place of the coin, the same expectation without its noise; a token then adds at least
-1/e. `static`: an outlier is what lies at or below `tau`. The authors' baselines "clip" and "mask" are `region: static` with
`outlier: clip` (max(lr, tau); their text prints it inverted) and `outlier: mask` (an advantage of 0).

Where the teacher has another tokenizer (`clip` and `mask` alone, on a method such as `dpca`), a chunk of the same bytes is
trusted as one: P = min(exp(L_T - L_S), 1) of its two log-likelihoods, one coin for all of its tokens [ours].
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from omniopd.draft import Draft
from omniopd.method import StudentText
from omniopd.objective import Objective
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.sampling import named_seed
from omniopd.scored import chunk_ratios
from omniopd.targets.subset import TopKTarget

LITTLE = 0.2  # of the tokens trusted: the forward KL on most of them made training collapse [paper]
log = logging.getLogger(__name__)

Region = Literal["bernoulli", "soft", "static", "off"]


class TrustRegionSettings(PartSettings):
    """Which tokens are trusted, and what becomes of the others."""

    name: Literal["trust_region"] = "trust_region"
    region: Region = Field(
        default="bernoulli",
        description="bernoulli: a coin that falls with min(q/p, 1); soft: that as a weight; static: lr above tau; off: all",
    )
    outlier: Literal["fkl", "clip", "mask"] = Field(
        default="fkl",
        description="fkl: forward KL on the teacher's k likeliest tokens, which must be the student's as well; clip: max(lr, "
        "tau); mask: nothing",
    )
    k: int = Field(default=64, ge=1, description="fkl: likeliest tokens of the teacher")
    tau: float = Field(default=-3.0, le=0, description="static and clip: in nats [ours]")

    @property
    def neutral(self) -> bool:
        return self.region == "off"


@PARTS.register("trust_region")
class TrustRegion(Part):
    """Route each token by how believable its log-ratio is."""

    Config = TrustRegionSettings
    slots = ("evidence", "signal", "credit", "objective")
    place = Place.TRANSFORM
    needs = frozenset({"score"})
    dense = False
    warns: ClassVar[Mapping[str, str]] = {
        "whiten": "its mean is subtracted from outliers, too, which have no advantage; set whiten.center=false"
    }
    neutral: ClassVar = {"region": "off"}

    def __init__(self, config: TrustRegionSettings, objective: Objective, text: StudentText, seed: int) -> None:
        super().__init__(config, objective, text, seed)
        if config.outlier == "fkl":
            self.needs, self.top = frozenset({"topk", "same tokenizer"}), config.k

    def apply(self, draft: Draft) -> None:
        """See `Part`."""
        shares, unaimed, names = [], 0, draft.names()
        for row in draft.rows:
            if row in draft.likelihood or row not in draft.scores:
                continue
            ratio, first = chunk_ratios(draft.rollouts[row], draft.scores[row], self.text.vocabulary, self.objective)
            known = ~ratio.isnan()  # elsewhere there is nothing to believe or to doubt
            draft.mask[row] = mask = draft.mask[row] & known
            coins = _coins(len(mask), named_seed(self.seed, "trust_region", draft.step, *names[row]))[first]
            trusted = draft.dealt(row, trust(ratio.where(mask, 0.0), self.config.region, self.config.tau, coins))
            shares.append(trusted[mask])
            doubt = (1 - trusted).where(mask, 0.0)
            advantage = draft.advantage[row]
            draft.advantage[row] = advantage * trusted
            if self.config.outlier == "clip":
                draft.advantage[row] += doubt * advantage.clamp(min=self.config.tau)
            elif self.config.outlier == "fkl" and bool(doubt.any()):
                if draft.scores[row].top:
                    draft.targets[row] = TopKTarget(draft.scores[row].top, "partial", "forward")
                    draft.divergence[row] = doubt
                else:
                    unaimed += int(doubt.count_nonzero())
        share = float(torch.cat(shares).mean()) if shares else None
        if share is not None and share < LITTLE:
            log.warning("step %d: only %.0f%% of the tokens are in the trust region", draft.step, 100 * share)
        draft.note(trusted_share=share, outliers_unaimed=float(unaimed) if self.config.outlier == "fkl" else None)


def trust(ratio: Tensor, region: Region, tau: float, coins: Tensor) -> Tensor:
    """How far each token is trusted, [T] in 0 to 1; exactly 1 where the teacher finds it as likely as the student.

    Args:
        ratio: `log q - log p` [T] in nats.
        coins: [T] uniform in [0, 1), for `bernoulli`.
    """
    if region == "static":
        return (ratio > tau).to(ratio.dtype)
    accepted = ratio.clamp(max=0).exp()
    return (coins < accepted).to(ratio.dtype) if region == "bernoulli" else accepted


def _coins(tokens: int, seed: int) -> Tensor:
    """Uniform numbers [T] that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, generator=generator, dtype=torch.float64)
