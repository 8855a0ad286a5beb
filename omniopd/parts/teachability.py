"""Learn only where teacher and student disagree within the student's reach (TA-OPD, arXiv 2605.26844).

    S, T: the K likeliest ids of student and teacher;  U = S + T
    D_t = KL(q_U || p_U), both normalised on U;    C_t = sum_{v in S} q_t(v)
    z~ = clip((z - Q05) / (Q95 - Q05), 0, 1) over the step, 0 where all are alike;    teachability = D~_t C~_t

The tokens of highest teachability are kept: `max(1, ceil(rho N))` of the step's N, the earlier of two equal ones (by prompt,
rollout and position, so that no order of rows moves it), and at least the best one of each rollout, which may exceed the
budget and is counted [ours; official code fills by another score]. The loss is divided by the kept tokens, so that rho does
not scale the learning rate.

Defects of the released code that are not copied: an id outside a model's own K counts as probability 1e-12, so that disjoint
supports differ by some 27 nats, and C counts the ids in both supports only; quantiles include tokens outside the mask. Where
the teacher tells its K likeliest ids only (`exact: false`), others count as 0 on its side alone, of which D stays finite, and
C is a lower bound; the log says `approximate` [ours].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omniopd.draft import Draft
from omniopd.measures import log_probs, pairs
from omniopd.method import Facts, StudentModel, StudentText
from omniopd.objective import Objective
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.types import Distributions, Rollout, TokenScores

D, C = "teachability.disagreement", "teachability.compatible"
DIGITS = 6  # of D and C: what differs by less than rounding is a tie, which order decides [ours]


class TeachabilitySettings(PartSettings):
    """How many tokens are kept, and by which score."""

    name: Literal["teachability"] = "teachability"
    rho: float = Field(default=0.05, gt=0, le=1, description="share of the step's tokens that is kept; 1: all")
    k: int = Field(default=16, ge=1, description="K, likeliest ids of each side")
    q_low: float = Field(default=0.05, ge=0, le=1, description="quantile that becomes 0")
    q_high: float = Field(default=0.95, ge=0, le=1, description="quantile that becomes 1")
    exact: bool = Field(default=True, description="by the teacher's whole distributions; false: by its K likeliest ids")
    fill: bool = Field(default=True, description="keep at least one token of each rollout")
    rank_by: Literal["teachable", "incompatible", "disagreement"] = Field(
        default="teachable", description="D C; as controls, D (1 - C) and D alone [ours]"
    )

    @model_validator(mode="after")
    def _ordered(self) -> TeachabilitySettings:
        if self.q_low >= self.q_high:
            raise ValueError(f"q_low: is not below q_high={self.q_high:g}; lower q_low")
        return self

    @property
    def neutral(self) -> bool:
        return self.rho == 1


@PARTS.register("teachability")
class Teachability(Part):
    """Keep the most teachable tokens of the step."""

    Config = TeachabilitySettings
    slots = ("credit",)
    place = Place.MASK
    refuses: ClassVar = {"adaptive_window": "its probe needs all tokens, which this one masks; leave one out"}
    warns: ClassVar = {
        "rock_tokens": "tokens that the student can't do without need not be teachable ones; watch kept_share",
        "fork_guidance": "both choose tokens of high loss; a fork must survive the mask to count",
    }
    neutral: ClassVar = {"rho": 1.0}

    def __init__(self, config: TeachabilitySettings, objective: Objective, text: StudentText, seed: int) -> None:
        super().__init__(config, objective, text, seed)
        self.needs = frozenset({"logits" if config.exact else "topk", "same tokenizer"})
        self.whole, self.top = config.exact, 0 if config.exact else config.k

    def measure(self, rollout: Rollout, scores: TokenScores | None, student: StudentModel) -> Facts:
        """See `Part`; nan where the teacher named no id."""
        if scores is None or scores.ids != rollout.ids:
            return {}
        (own,) = student.distributions([rollout])
        both = self._both(own, scores)
        found = [disagreement_and_reach(logp, logq, self.config.k) for logp, logq in both]
        if not found:
            return {}
        numbers = (torch.cat(parts).double().cpu().round(decimals=DIGITS) for parts in zip(*found, strict=True))
        return dict(zip((D, C), (part.tolist() for part in numbers), strict=True))

    def apply(self, draft: Draft) -> None:
        """See `Part`. Tokens of unknown score are left out and counted."""
        names = draft.names()
        rows = sorted((row for row in draft.rows if row not in draft.likelihood), key=lambda row: names[row])
        disagreement, reach = (self._known(draft, rows, name) for name in (D, C))
        scores = self._scores(torch.cat([*disagreement, torch.zeros(0)]), torch.cat([*reach, torch.zeros(0)]))
        by_row = scores.split([len(part) for part in disagreement])
        kept, filled = most_teachable(by_row, self.config.rho, fill=self.config.fill)
        for row, chosen in sorted(zip(rows, kept, strict=True), key=lambda one: one[0]):
            draft.keep(row, draft.mask[row].masked_scatter(draft.mask[row], chosen))
        draft.note(
            teachability_disagreement=_mean(torch.cat([*disagreement, torch.zeros(0)])),
            teachability_reach=_mean(torch.cat([*reach, torch.zeros(0)])),
            teachability_filled=float(filled),
            teachability_unknown=float(scores.isnan().sum()),
            approximate=None if self.config.exact else 1.0,
            **{f"teachability_kept_{tenth}": share for tenth, share in enumerate(by_tenth(kept))},
        )

    def _both(self, own: Distributions, scores: TokenScores) -> Iterator[tuple[Tensor, Tensor]]:
        """Log-probs [r, V] of both sides, slice by slice; -inf where the teacher did not name an id."""
        if self.config.exact:
            yield from pairs(own, scores.distributions) if scores.distributions is not None else ()
        elif scores.top:
            start = 0
            for logp in log_probs(own):
                yield logp, named(scores.top[start : start + len(logp)], logp)
                start += len(logp)

    def _known(self, draft: Draft, rows: Sequence[int], name: str) -> list[Tensor]:
        """A number of the learned tokens of each row; nan where it is unknown."""
        facts = [(row, draft.facts(row, name)) for row in rows]
        unknown = torch.full((1,), math.nan, dtype=torch.float64)
        return [(unknown.expand(len(draft.mask[row])) if f is None else f)[draft.mask[row]] for row, f in facts]

    def _scores(self, disagreement: Tensor, reach: Tensor) -> Tensor:
        d, c = (robust(z, self.config.q_low, self.config.q_high) for z in (disagreement, reach))
        return {"teachable": d * c, "incompatible": d * (1 - c), "disagreement": d}[self.config.rank_by]


def disagreement_and_reach(logp: Tensor, logq: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """D and C [r] of log-probs [r, V]; D is nan where `logq` is -inf everywhere: the teacher named nothing."""
    k = min(k, logp.shape[-1])
    own, theirs = logp.topk(k).indices, logq.topk(k).indices
    repeated = (theirs[..., :, None] == own[..., None, :]).any(-1) | (logq.gather(-1, theirs) == -torch.inf)
    outside = torch.cat([torch.zeros_like(repeated), repeated], -1)
    ids = torch.cat([own, theirs], -1)
    p, q = (side.gather(-1, ids).masked_fill(outside, -torch.inf) for side in (logp, logq))
    return kl_on(q, p), logq.gather(-1, own).exp().sum(-1)


def kl_on(logq: Tensor, logp: Tensor) -> Tensor:
    """`KL(q || p)` [...] of log-probs [..., U], both normalised on U."""
    logq, logp = logq.log_softmax(-1), logp.log_softmax(-1)
    return (logq.exp() * (logq - logp)).masked_fill(logq == -torch.inf, 0.0).sum(-1)


def named(top: Sequence[Mapping[int, float]], like: Tensor) -> Tensor:
    """The log-probs that a teacher named, [r, V] as `like`; -inf elsewhere."""
    logq = torch.full_like(like, -torch.inf)
    for row, known in enumerate(top):
        ids = torch.tensor(list(known), dtype=torch.long, device=like.device)
        logq[row, ids] = torch.tensor(list(known.values()), dtype=like.dtype, device=like.device)
    return logq.nan_to_num(nan=-torch.inf, neginf=-torch.inf)


def robust(z: Tensor, low: float, high: float) -> Tensor:
    """`clip((z - Q_low) / (Q_high - Q_low), 0, 1)` [N] in float64; 0 where the two quantiles are one, nan stays nan."""
    z, known = z.double(), z[z.isfinite()].double()
    bottom, top = (float(known.quantile(q)) if len(known) else 0.0 for q in (low, high))
    return ((z - bottom) / (top - bottom)).clamp(0, 1) if top > bottom else z.where(z.isnan(), torch.zeros_like(z))


def most_teachable(scores: Sequence[Tensor], rho: float, *, fill: bool) -> tuple[list[Tensor], int]:
    """Which tokens of each rollout are kept, as many bool tensors, and how many were kept only to fill.

    Args:
        scores: of each rollout's tokens, in the order that decides ties; nan is never kept.
    """
    flat = torch.cat([*scores, torch.zeros(0, dtype=torch.float64)])
    known = int((~flat.isnan()).sum())
    budget = max(1, math.ceil(round(rho * known, 9)))  # rounded: 0.07 * 100 is a little more than 7
    order = flat.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[order[: min(budget, known)]] = True
    kept, filled = list(chosen.split([len(part) for part in scores])), 0
    for mask, part in zip(kept, scores, strict=True):
        if fill and not bool(mask.any()) and not bool(part.isnan().all()):
            mask[part.nan_to_num(nan=-torch.inf).argmax()] = True
            filled += 1
    return kept, filled


def by_tenth(kept: Sequence[Tensor]) -> list[float | None]:
    """The kept share of each tenth of the rollouts' tokens, from their beginning to their end."""
    tenths = torch.cat([torch.arange(len(mask)) * 10 // max(1, len(mask)) for mask in kept] or [torch.zeros(0)])
    flat = torch.cat([*kept, torch.zeros(0, dtype=torch.bool)]).double()
    here = [flat[tenths == tenth] for tenth in range(10)]
    return [float(part.mean()) if len(part) else None for part in here]


def _mean(numbers: Tensor) -> float | None:
    known = numbers[numbers.isfinite()]
    return float(known.mean()) if len(known) else None
