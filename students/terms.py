"""The terms of the loss: what each prediction of a step is multiplied with, and their sums over a slice of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omniopd.losses import Head, forward_kl, importance_ratio, reduction_scales, token_logp, token_nll
from omniopd.objective import Objective
from omniopd.types import Branch, Rollout, Signal, Target
from students.batches import Batch
from students.stale import Stale

TERMS = ("value_loss", "branch_loss", "anchor_loss", "divergence_loss")


@dataclass(frozen=True)
class Coefficients:
    """What every prediction of a step is multiplied with.

    Own tokens' -log p [R], their KL to the initial student [R], their divergence from the teacher [R], and branches' -log p
    [Q]. `stale` [R] says which own tokens' -log p is multiplied with their ratio as well.
    """

    value_R: Tensor
    anchor_R: Tensor
    divergence_R: Tensor
    branch_Q: Tensor
    stale: Stale | None = None


def coefficients(
    rollouts: Sequence[Rollout], signal: Signal, objective: Objective, stale: Stale | None = None
) -> Coefficients:
    """Values, weights, divergences and anchor of a step as flat coefficients, scaled by counts over the whole step."""
    value = _flat(signal.values_BT)
    audited = _flat(signal.mask_BT).bool()
    lengths = [len(r) for r in rollouts]
    if [len(v) for v in signal.values_BT] != lengths or [len(m) for m in signal.mask_BT] != lengths:
        raise ValueError(f"signal has {len(value)} tokens, rollouts have {sum(lengths)}, or they are spread otherwise")
    if signal.targets and len(signal.targets) != len(rollouts):
        raise ValueError(f"signal has {len(signal.targets)} targets, there are {len(rollouts)} rollouts")
    held = torch.ones_like(audited) if objective.anchor.where == "all" else ~audited
    aimed = [torch.full((n,), float(target is not None)) for n, target in zip(lengths, signal.targets, strict=False)]
    weights = [_branch_weights(b) for b in signal.branches]
    branch = torch.cat(weights) if weights else torch.zeros(0)
    if signal.weights_BT:
        aimed = [one * weight for one, weight in zip(aimed, signal.weights_BT, strict=True)]
    all_tokens = len(value) + round(float(branch.sum()))  # a merged reply counts as often as it was drawn
    value_scale, anchor_scale = reduction_scales(
        objective.reduction, int(audited.sum()), int(held.sum()), len(rollouts), all_tokens
    )
    if objective.reduction == "term_mean":
        branch_scale = 1 / float(branch.sum()) if len(branch) else 0.0
    else:
        branch_scale = value_scale
    return Coefficients(
        value_R=value.where(audited, torch.zeros(())) * value_scale,
        anchor_R=held.float() * (objective.anchor.beta * anchor_scale),
        divergence_R=audited * _flat(aimed) * value_scale if aimed else torch.zeros(len(value)),
        branch_Q=branch * (branch_scale * signal.branch_scale),
        stale=stale,
    )


def _branch_weights(branch: Branch) -> Tensor:
    """What multiplies -log p of a branch's learned tokens."""
    even = torch.full((len(branch.ids) - branch.context,), branch.weight)
    return even * torch.tensor(branch.weights) if branch.weights else even


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().float() for part in parts]) if parts else torch.zeros(0)


@dataclass(frozen=True)
class Sites:
    """The predictions of a micro-batch, S of them: the own tokens of each of its rows, then the tokens of branches.

    `places` [S] say which of the batch's tokens, bin after bin, predicts; `ids` [S] what. The coefficients are [S] as well;
    `nll` is that of -log p. Texts of branches that agree share a site, which gets the sum of their coefficients. `pieces` are
    (first site, one past the last, target) of the rollouts that have a target.
    """

    places: Tensor
    ids: Tensor
    own: int  # how many of the sites are own tokens
    nll: Tensor
    anchor: Tensor
    divergence: Tensor
    pieces: list[tuple[int, int, Target]]
    stale: Stale | None = None

    def __len__(self) -> int:
        return len(self.places)

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Runs of sites whose logits a target needs at once."""
        return [(first + start, first + end) for first, _, target in self.pieces for start, end in target.blocks]

    def to(self, device: torch.device) -> Sites:
        """The same with its tensors there."""
        return replace(
            self,
            places=self.places.to(device),
            ids=self.ids.to(device),
            nll=self.nll.to(device),
            anchor=self.anchor.to(device),
            divergence=self.divergence.to(device),
            stale=self.stale and self.stale.to(device),
        )


def sites_of(batch: Batch, scaled: Coefficients, targets: Sequence[Target | None] = ()) -> Sites:
    """The predictions of a micro-batch, with their coefficients."""
    places, ids, numbers = batch.own_sites()
    pieces = []
    learned: list[tuple[tuple[int, int], int]] = []
    first = 0
    for row, (at, column) in zip(batch.rows, batch.places, strict=True):
        start = at * batch.width + column
        learned += [((start + i, token), n) for i, token, n in row.branch_sites]
        if row.own is not None:
            target = targets[row.own.rollout] if targets else None
            if target is not None:
                pieces.append((first, first + len(row.own.ids), target))
            first += len(row.own.ids)
    unique = {site: n for n, site in enumerate(dict.fromkeys(site for site, _ in learned))}
    branch = torch.zeros(len(unique)).index_add_(
        0,
        torch.tensor([unique[site] for site, _ in learned], dtype=torch.long),
        scaled.branch_Q[[n for _, n in learned]],
    )
    silent = torch.zeros(len(unique))
    return Sites(
        places=torch.cat([places, torch.tensor([place for place, _ in unique], dtype=torch.long)]),
        ids=torch.cat([ids, torch.tensor([token for _, token in unique], dtype=torch.long)]),
        own=len(numbers),
        nll=torch.cat([scaled.value_R[numbers], branch]),
        anchor=torch.cat([scaled.anchor_R[numbers], silent]),
        divergence=torch.cat([scaled.divergence_R[numbers], silent]),
        pieces=pieces,
        stale=scaled.stale and scaled.stale.at(numbers, len(unique)),
    )


class SliceLoss:
    """The loss of a slice of sites, all terms from the same logits (`omniopd.losses.LossOf`).

    The statistics are the terms in the order of `TERMS`, then the sum of the held tokens' KL. A term is computed at the
    sites only whose coefficient for it is not 0.
    """

    def __init__(self, sites: Sites, reference: Tensor | None = None, reference_head: Head | None = None) -> None:
        """`reference` [sites.own, E] are the initial student's last hidden states; None without anchor."""
        self.sites, self.reference, self.reference_head = sites, reference, reference_head
        self._ratios = None if sites.stale is None else torch.full_like(sites.nll, torch.nan)

    def __call__(self, logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        value, branch = self._likelihood(logits, at)
        anchor, kl = self._anchor(logits, at)
        terms = torch.stack([value, branch, anchor, self._divergence(logits, at)])
        return terms.sum(), torch.cat([terms.detach(), kl[None]])

    @property
    def ratios(self) -> Tensor:
        """The ratios [n] so far of the sites that older weights sampled, before truncation."""
        return self.sites.nll.new_zeros(0) if self._ratios is None else self._ratios[~self._ratios.isnan()]

    def _likelihood(self, logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        some = self.sites.nll[at].nonzero()[:, 0]
        if not len(some):
            return _zero(logits), _zero(logits)
        coefficient = self.sites.nll[at][some]
        logp = token_logp(_rows(logits, some), self.sites.ids[at][some])
        if (stale := self.sites.stale) is not None and self._ratios is not None:
            ratio = importance_ratio(logp, stale.logp[at][some])
            self._ratios[at.start + some] = ratio.to(
                self._ratios.dtype
            )  # the same again where a head is computed again
            coefficient = coefficient * stale.truncated(ratio)
        own = some < self.sites.own - at.start
        return token_nll(logp[own], coefficient[own]), token_nll(logp[~own], coefficient[~own])

    def _anchor(self, logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        """The term, and the plain sum of the KL."""
        some = self.sites.anchor[at].nonzero()[:, 0]
        if self.reference is None or self.reference_head is None or not len(some):
            return _zero(logits), _zero(logits)
        with torch.no_grad():
            ref_logits = self.reference_head(self.reference[at][some])
        kl = forward_kl(ref_logits, _rows(logits, some))
        return (self.sites.anchor[at][some] * kl).sum(), kl.detach().sum()

    def _divergence(self, logits: Tensor, at: slice) -> Tensor:
        parts = [_zero(logits)]
        for first, end, target in self.sites.pieces:
            start, stop = max(first, at.start), min(end, at.stop)
            coefficient = self.sites.divergence[start:stop]
            if start < stop and bool(coefficient.any()):
                here = slice(start - at.start, stop - at.start)
                parts.append(
                    (coefficient * target.divergence(logits[here], self.sites.ids[start:stop], start - first)).sum()
                )
        return torch.stack(parts).sum()


def _rows(logits: Tensor, some: Tensor) -> Tensor:
    return logits if len(some) == len(logits) else logits.index_select(0, some)


def _zero(logits: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
