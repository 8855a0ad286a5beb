"""Tell forks from false alarms by how both models go on, and guide the student at the forks (TOPD, arXiv 2606.00305).

A reconstruction [ours] of what third parties tell; loss, coefficient, thresholds and embedding are not documented.

1. Candidates are the places of highest -lr_t (or of the student's highest entropy, where a teacher returns text only).
2. From the prefix h before a candidate t the teacher writes a_1..a_K; the student wrote b = y_t..y_{t+K-1}.
3. D_t is the optimal transport cost between both, C_ij = 1 - cos(e(a_i), e(b_j)) + mu |i - j| / K, uniform marginals, e: the
   initial student's input embeddings (`omniopd.optimal_transport`); by Sinkhorn, or `exact` where both are as long.
4. t is a fork where D_t >= delta, a running percentile over all candidates, and D_t > 0; else it is a false alarm.
5. False alarms weigh v_low; 0 masks them. At forks the student learns the teacher's continuation:

    L = plain + lambda mean_forks sum_k omega_k * -log p(a_k | h, a_<k),    omega_k proportional to rho^k, summing to 1

Each a_k is a draw from q(. | h, a_<k): the term is a one-sample estimate of KL(q || p) along a, with its expected gradient.
Those soft targets themselves (along a, or along y aligned by transport) are not built: a branch has one target token at each
place. A candidate of which nothing valid came is neither fork nor false alarm. Where a text was cut, both are compared as far
as it goes, and where a rollout was cut, its branches end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from omniopd.branches import continuation_branch
from omniopd.draft import Draft
from omniopd.method import Gradients, StudentText
from omniopd.objective import Objective
from omniopd.optimal_transport import transport_cost
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.sampling import named_seed
from omniopd.scored import nats
from omniopd.types import Branch, Continuations, ContinueQuery, Evidence, Query, Rollout, Signal, TokenScores, asked_by
from omniopd.verification.chunks import cut_chunk

NAME: Literal["fork_guidance"] = "fork_guidance"


class ForkGuidanceSettings(PartSettings):
    """Where the teacher is asked to go on, what counts as a fork, and how much its words count there."""

    name: Literal["fork_guidance"] = NAME
    rank: Literal["loss", "entropy"] = Field(
        default="loss", description="candidates by -lr, or by the student's entropy, which needs no scores"
    )
    horizon: int = Field(default=50, ge=1, le=4096, description="K, tokens that are compared and learned")
    share: float = Field(default=0.1, gt=0, le=1, description="of a rollout's tokens that may be candidates")
    spacing: int = Field(default=8, ge=1, description="least distance of two candidates, in tokens")
    most: int = Field(
        default=4, ge=1, description="M, candidates of a rollout: at most M * K tokens of the teacher's for each"
    )
    mu: float = Field(default=0.1, ge=0, description="cost of transport over K places")
    eps: float = Field(default=0.05, ge=0.01, description="entropic regularisation of the transport (Sinkhorn)")
    exact: bool = Field(default=False, description="transport of texts of one length by exact assignment, without eps")
    percentile: float = Field(
        default=30.0, ge=0, le=100, description="of the candidates' costs: below it, false alarms"
    )
    window: int = Field(default=1000, ge=1, description="candidates that the percentile is taken over, the latest ones")
    scale: float = Field(default=0.5, ge=0, description="lambda, of the guidance at forks")
    rho: float = Field(default=0.97, gt=0, le=1, description="decay of the guidance from token to token")
    v_low: float = Field(default=0.0, ge=0, le=1, description="weight of a false alarm's token; 0 leaves it out")
    mode: str = Field(default="hard_tokens", description="what is learned at a fork: the teacher's tokens")

    @field_validator("mode")
    @classmethod
    def _built(cls, mode: str) -> str:
        if mode != "hard_tokens":
            raise ValueError(
                f"'{mode}' is not built: soft targets along the teacher's text (teacher_prefix) or the student's "
                "(ot_aligned) are left out; set hard_tokens"
            )
        return mode

    @property
    def neutral(self) -> bool:
        return self.scale == 0 and self.v_low == 1


@dataclass(frozen=True)
class Site:
    """A candidate: what the teacher wrote there, as a branch, and the cost of transport to what the student wrote."""

    row: int
    at: int
    branch: Branch
    cost: float


@PARTS.register(NAME)
class ForkGuidance(Part):
    """Leave false alarms out, and learn the teacher's next words at forks."""

    Config = ForkGuidanceSettings
    slots = ("audit", "evidence", "credit", "objective")
    place = Place.MASK
    warns: ClassVar = {
        "teachability": "both rank tokens of high loss; a fork keeps its guidance even where its own token is masked",
        "horizon": "the teacher's words go on past it, except where it cuts the rollout; set fork_guidance.horizon lower",
        "kl_stop": "candidates behind the place where it cuts were asked about in vain",
    }
    neutral: ClassVar = {"scale": 0.0, "v_low": 1.0}

    def __init__(self, config: ForkGuidanceSettings, objective: Objective, text: StudentText, seed: int) -> None:
        super().__init__(config, objective, text, seed)
        self.needs = frozenset({"continuation", "score"} if config.rank == "loss" else {"continuation"})
        self.reads_entropy = config.rank == "entropy"
        self.costs: list[float] = []  # of the latest candidates
        self._new: list[float] = []  # with those of the step that is read
        self._table = text.embeddings()  # [V, E], the initial student's

    def again(self, rollouts: Mapping[int, Rollout], evidence: Sequence[Evidence], step: int) -> list[Query]:
        """See `Part`: one continuation from each candidate, once."""
        if asked_by(evidence, NAME):
            return []
        scores = {one.query.row: one for one in asked_by(evidence) if isinstance(one, TokenScores) and one.ids}
        return [
            ContinueQuery(
                prompt=rollout.prompt,
                chunk=cut_chunk(rollout, row, at, min(self.config.horizon, len(rollout) - at)),
                n=1,
                max_tokens=self.config.horizon + 1,  # the last token of a text that was cut is not learned
                seed=named_seed(self.seed, NAME, step, row, at) % 2**31,
                by=NAME,
            )
            for row, rollout in sorted(rollouts.items())
            for at in self._candidates(rollout, scores.get(row))
        ]

    def apply(self, draft: Draft) -> None:
        """See `Part`."""
        asked = [one for one in asked_by(draft.evidence, NAME) if isinstance(one, Continuations)]
        found = [self._site(draft.rollouts[one.query.row], one) for one in asked]
        sites = sorted((site for site in found if site is not None), key=lambda site: (site.row, site.at))
        self._new = [*self.costs, *(site.cost for site in sites)][-self.config.window :]
        delta = percentile(self._new, self.config.percentile)
        live = [site for site in sites if bool(draft.mask[site.row][site.at]) and site.row not in draft.likelihood]
        forks = [site for site in live if site.cost >= delta and site.cost > 0]
        if draft.shuffle is not None:
            forks = draft.shuffle.sample(live, len(forks))
        if self.config.v_low < 1:
            self._lower(draft, [site for site in live if site not in forks])
        if self.config.scale:
            draft.branch([self._guidance(draft, site) for site in forks], self.config.scale)
        draft.note(
            fork_candidates=float(len(asked)),
            fork_holes=float(len(asked) - len(sites)),
            fork_cut=float(len(sites) - len(live)),
            forks=float(len(forks)),
            fork_cost=sum(site.cost for site in sites) / len(sites) if sites else None,
            fork_delta=delta if self._new else None,
            fork_tokens=float(sum(len(site.branch.ids) - site.branch.context for site in sites)),  # of the teacher's
            fork_tokens_cap=float(self.config.most * self.config.horizon * len(draft.rollouts)),
        )

    def after(
        self, rollouts: Sequence[Rollout], signal: Signal, step: int, gradients: Gradients
    ) -> Mapping[str, float]:
        """See `Part`."""
        self.costs = self._new
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"costs": list(self.costs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.costs = list(state["costs"])

    def cautions(self) -> list[str]:
        return ["method.parts: fork_guidance is a reconstruction of TOPD, whose loss and thresholds are not published"]

    def _candidates(self, rollout: Rollout, scores: TokenScores | None) -> list[int]:
        if self.config.rank == "entropy":
            ranked = nats(rollout.entropy)
        elif scores is None or scores.ids != rollout.ids:
            return []
        else:
            ranked = nats(rollout.logprobs) - nats(scores.logprobs)
        ranked[: rollout.given] = math.nan
        return candidates(ranked, self.config.share, self.config.spacing, self.config.most)

    def _site(self, rollout: Rollout, found: Continuations) -> Site | None:
        """The candidate with its cost; None where nothing came that can be compared."""
        chunk, horizon = found.query.chunk, self.config.horizon
        if not found.replies:
            return None
        branch = continuation_branch(rollout, chunk.row, chunk.prefix, found.replies[0], 1.0, self.text)
        if branch is None:
            return None
        branch = replace(branch, ids=branch.ids[: branch.context + horizon])
        start = next(t for t, end in enumerate(rollout.ends) if end > len(chunk.prefix) or t == chunk.start)
        own, theirs = rollout.ids[start : start + horizon], branch.ids[branch.context :]
        shorter = found.replies[0] if len(theirs) < len(own) else rollout
        if shorter.finish == "length":  # what would follow is unknown: both are compared as far as it goes
            own, theirs = own[: len(theirs)], theirs[: len(own)]
        config, sides = self.config, (self._embedded(theirs), self._embedded(own))
        cost = transport_cost(*sides, horizon, config.mu, config.eps, exact=config.exact)
        return Site(chunk.row, chunk.start, branch, cost)

    def _embedded(self, ids: Sequence[int]) -> Tensor:
        return self._table[torch.tensor(ids)].double()

    def _lower(self, draft: Draft, alarms: Sequence[Site]) -> None:
        """False alarms count less, or not at all."""
        for row in sorted({site.row for site in alarms}):
            at = torch.tensor([site.at for site in alarms if site.row == row])
            if self.config.v_low:
                weight = torch.ones(len(draft.rollouts[row]), dtype=torch.float64)
                draft.weigh(row, weight.index_fill(0, at, self.config.v_low))
            else:
                draft.keep(row, torch.ones(len(draft.rollouts[row]), dtype=torch.bool).index_fill(0, at, False))

    def _guidance(self, draft: Draft, site: Site) -> Branch:
        """The branch of a fork with its weights; no longer than a rollout that was cut goes on."""
        rollout, learned = draft.rollouts[site.row], draft.mask[site.row].nonzero()
        end = int(learned[-1]) + 1
        count = len(site.branch.ids) - site.branch.context
        if rollout.finish == "length" or end < len(rollout):
            count = min(count, end - site.at)
        ids = site.branch.ids[: site.branch.context + count]
        return replace(site.branch, ids=ids, weights=tuple(decayed(count, self.config.rho).tolist()))


def candidates(ranked: Tensor, share: float, spacing: int, most: int) -> list[int]:
    """At most `most` places of the largest numbers in [T], ascending; ties go to the earlier one.

    They are among the `share` T largest (rounded up), positive, and at least `spacing` apart. What is not finite is none.
    """
    fit = [t for t, value in enumerate(ranked.tolist()) if 0 < value < math.inf]
    best = sorted(fit, key=lambda t: (-float(ranked[t]), t))[: math.ceil(share * len(ranked))]
    chosen: list[int] = []
    for t in best:
        if len(chosen) < most and all(abs(t - other) >= spacing for other in chosen):
            chosen.append(t)
    return sorted(chosen)


def decayed(count: int, rho: float) -> Tensor:
    """omega [count]: proportional to rho^k, summing to 1."""
    powers = rho ** torch.arange(count, dtype=torch.float64)
    return powers / powers.sum()


def percentile(costs: Sequence[float], percent: float) -> float:
    """By linear interpolation; 0 of nothing."""
    return float(torch.tensor(costs, dtype=torch.float64).quantile(percent / 100)) if costs else 0.0
