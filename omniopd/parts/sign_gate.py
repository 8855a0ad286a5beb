"""Extrapolate the advantage where the verifier agrees with the teacher, interpolate where it does not.

    A_t = r_t + (lam_t - 1)(log q(y_t) - log R(y_t)),      r_t = log q(y_t) - log p(y_t)
    lam_t = lam_hi where +r_t (right rollout) or -r_t (wrong one) is above 0, else lam_lo;
            1 where |r_t| < band or nobody knows whether the rollout is right

A RECONSTRUCTION of the gate of SG-OPD (arXiv 2606.09304), whose formula is not known to us: that a verifier's outcome
decides between extrapolation and interpolation is [paper], lam_hi = 1.8 and lam_lo = 1 are [second-hand], everything else is
[ours]. The line for A_t is G-OPD's (arXiv 2602.12125 [official code]); it adds exactly 0 at lam = 1, which the form with two
differences against R does not. R is the student that wrote ("old": A_t = lam_t r_t, no third model) or the untrained one
("init"), of which an agreeing token may at most lose its advantage, never turn it round.

Extrapolation also stretches what is extreme: join it with `trust_region`, whose regions and bounds come after the gate.
Between tokenizers (`dpca`, reference "old") a token's advantage is its part of its chunk's and has the chunk's sign, so that
gating the parts is gating the chunk; only the band is one of the part [ours].
"""

from __future__ import annotations

import random
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from omniopd.draft import Draft
from omniopd.method import Facts, StudentModel, StudentText
from omniopd.objective import Objective
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.sampling import named_seed
from omniopd.scored import nats
from omniopd.types import Rollout, TokenScores

INITIAL = "sign_gate.initial"


class SignGateSettings(PartSettings):
    """How strongly either verdict counts, and against what."""

    name: Literal["sign_gate"] = "sign_gate"
    lam_hi: float = Field(default=1.8, ge=0, description="where the verifier agrees with the teacher [second-hand]")
    lam_lo: float = Field(default=1.0, ge=0, description="where it does not [second-hand]; 0 leaves nothing of those")
    reference: Literal["old", "init"] = Field(
        default="old",
        description="R: the student that wrote the rollout, or the untrained one (a further forward pass)",
    )
    band: float = Field(default=0.01, ge=0, description="nats; a smaller |r| has no sign to go by [ours]")
    placebo: Literal["none", "random"] = Field(
        default="none",
        description="random: the same coefficients at random tokens of each rollout; control: shuffled deals verdicts",
    )

    @property
    def neutral(self) -> bool:
        return self.lam_hi == self.lam_lo == 1

    @property
    def keeps_initial(self) -> bool:
        return self.reference == "init"


@PARTS.register("sign_gate")
class SignGate(Part):
    """Trust the teacher further where the outcome bears it out."""

    Config = SignGateSettings
    slots = ("evidence", "signal", "credit")
    place = Place.TRANSFORM
    needs = frozenset({"score", "verify"})
    dense = False
    neutral: ClassVar = {"lam_hi": 1.0, "lam_lo": 1.0}

    def __init__(self, config: SignGateSettings, objective: Objective, text: StudentText, seed: int) -> None:
        super().__init__(config, objective, text, seed)
        self.keeps_initial = config.keeps_initial
        if config.keeps_initial:
            self.needs = self.needs | {"same tokenizer"}

    def measure(self, rollout: Rollout, scores: TokenScores | None, student: StudentModel) -> Facts:
        """What the untrained student gives each token, in nats."""
        if not self.config.keeps_initial or not len(rollout):
            return {}
        return {INITIAL: student.initial_logprobs([rollout])[0]}

    def apply(self, draft: Draft) -> None:
        """See `Part`."""
        agreed: dict[bool, list[Tensor]] = {True: [], False: []}
        unknown, names = 0, draft.names()
        for row in draft.rows:
            if row in draft.likelihood:
                continue
            right, ratio, mask = draft.verdicts[row], draft.advantage[row], draft.mask[row]
            away = self._away(draft, row)
            if right is None or away is None:
                unknown += 1
                continue
            agrees = agreement(ratio, right)
            agreed[right].append(agrees[mask])
            lam = coefficients(ratio, agrees, self.config.lam_hi, self.config.lam_lo, self.config.band)
            if self.config.placebo == "random":
                lam = self._anywhere(lam, mask, draft.step, names[row])
            draft.advantage[row] = gated(ratio, away, lam, agrees)
        draft.note(
            gate_agree_right=_share(agreed[True]), gate_agree_wrong=_share(agreed[False]), gate_unknown=float(unknown)
        )

    def _away(self, draft: Draft, row: int) -> Tensor | None:
        """`log q - log R` [T]; None where it is not known."""
        if self.config.reference == "old":
            return draft.advantage[row]
        initial = draft.facts(row, INITIAL)
        return None if initial is None or row not in draft.scores else nats(draft.scores[row].logprobs) - initial

    def _anywhere(self, lam: Tensor, mask: Tensor, step: int, name: tuple[str, int]) -> Tensor:
        """The coefficients of the learned tokens in random order."""
        places = mask.nonzero()[:, 0].tolist()
        order = random.Random(named_seed(self.seed, "sign_gate", step, *name)).sample(places, len(places))
        return lam.index_copy(0, torch.tensor(places, dtype=torch.long), lam[order])


def agreement(ratio: Tensor, right: bool) -> Tensor:
    """Where the teacher pushes as the outcome says, [T] bool: up in a right rollout, down in a wrong one."""
    return ratio > 0 if right else ratio < 0


def coefficients(ratio: Tensor, agrees: Tensor, hi: float, lo: float, band: float) -> Tensor:
    """lam_t [T] of log-ratios [T] in nats."""
    return torch.full_like(ratio, lo).masked_fill(agrees, hi).masked_fill(ratio.abs() < band, 1.0)


def gated(ratio: Tensor, away: Tensor, lam: Tensor, agrees: Tensor) -> Tensor:
    """`r + (lam - 1)(log q - log R)` [T]; where lam is 1 or R has no number, r to the last bit.

    Args:
        ratio: r [T] in nats.
        away: `log q - log R` [T] in nats.
        agrees: where the sign of r must not turn.
    """
    moved = ratio + (lam - 1) * away.where(away.isfinite(), torch.zeros_like(away))
    turned = agrees & (moved * ratio < 0)
    return moved.masked_fill(turned, 0.0)


def _share(parts: list[Tensor]) -> float | None:
    """The share of True among all; None of nothing."""
    joined = torch.cat(parts) if parts else torch.zeros(0)
    return float(joined.double().mean()) if len(joined) else None
