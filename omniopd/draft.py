"""A step's signal in the making: what parts change, and the one law by which it becomes the loss.

    A_t = m_t (g w_t f(lr_t) + b_t),      L = -(1/N) sum_t A_t log p(y_t) + further terms

m: mask; N: its sum over the step; w: the product of all soft weights, g among them; f: the advantage; b: bonuses. A mask
takes a token out of N, a weight of 0 leaves it in. Where the signal is a divergence D_t, `m_t w_t D_t / N` stands for the
advantage.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from omniopd.types import Branch, Evidence, Rollout, Signal, Target, TokenScores, asked_by

Verdict = Callable[[Rollout], bool | None]
"""Whether a rollout is right; None where that can't be told: it was cut, or the prompt has no reference."""


@dataclass
class Draft:
    """The signal of a method, and what parts make of it.

    Lists are [B]: one entry for each rollout of the step, of all processes. Tensors are [T] of that rollout, in float64 but
    for the mask.

    Attributes:
        scores: what the teacher gives each token, by row; rows of which it said nothing are missing.
        verdicts: [B], see `Verdict`.
        mask: where there is a signal.
        advantage: `f(lr)`, or whatever value the method put there.
        weight: None is 1 everywhere.
        bonus: None is 0 everywhere.
        targets: divergences; `divergence` [T] multiplies that of a row beside its weight, None is 1 everywhere.
        likelihood: rows whose advantage is a likelihood weight, not a log-ratio: transforms and position weights leave
            them alone.
        sum_w: divide by the sum of the soft weights instead of N, so that what one token loses the others gain.
        stats: numbers for the log.
    """

    step: int
    rollouts: Sequence[Rollout]
    evidence: Sequence[Evidence]
    scores: Mapping[int, TokenScores]
    signal: Signal
    verdicts: list[bool | None]
    mask: list[Tensor]
    advantage: list[Tensor]
    targets: list[Target | None]
    weight: list[Tensor | None]
    bonus: list[Tensor | None]
    divergence: list[Tensor | None]
    likelihood: set[int] = field(default_factory=set)
    sum_w: bool = False
    branches: list[Branch] = field(default_factory=list)
    branch_scale: float = 1.0
    stats: dict[str, float | None] = field(default_factory=dict)
    shuffle: random.Random | None = None  # deals decisions out at random: the control

    @classmethod
    def of(
        cls,
        signal: Signal,
        rollouts: Sequence[Rollout],
        evidence: Sequence[Evidence],
        step: int,
        verdict: Verdict,
        shuffle: random.Random | None = None,
    ) -> Draft:
        """The draft that `finish` gives back as it is."""
        scores = {one.query.row: one for one in asked_by(evidence) if isinstance(one, TokenScores) and one.ids}
        verdicts = [verdict(rollout) for rollout in rollouts]
        if shuffle is not None:
            known = [row for row, one in enumerate(verdicts) if one is not None]
            dealt = shuffle.sample([verdicts[row] for row in known], len(known))
            for row, one in zip(known, dealt, strict=True):
                verdicts[row] = one
        nothing: list[Tensor | None] = [None] * len(rollouts)
        return cls(
            step=step,
            rollouts=rollouts,
            evidence=evidence,
            scores=scores,
            signal=signal,
            verdicts=verdicts,
            mask=list(signal.mask_BT),
            advantage=[values.double() for values in signal.values_BT],
            targets=list(signal.targets) or [None] * len(rollouts),
            weight=list(nothing),
            bonus=list(nothing),
            divergence=list(nothing),
            branches=list(signal.branches),
            branch_scale=signal.branch_scale,
            stats=dict(signal.stats),
            shuffle=shuffle,
        )

    @property
    def tokens(self) -> int:
        """N, the tokens that are learned."""
        return sum(int(mask.sum()) for mask in self.mask)

    @property
    def spoken(self) -> int:
        """Tokens on which the teacher spoke, or that are learned without it."""
        either = sum(int((was | mask).sum()) for was, mask in zip(self.signal.mask_BT, self.mask, strict=True))
        unlearned = self.signal.spoken and self.signal.spoken - sum(int(mask.sum()) for mask in self.signal.mask_BT)
        return either + (unlearned or 0)

    @property
    def rows(self) -> list[int]:
        """Rollouts of which any token is learned."""
        return [row for row, mask in enumerate(self.mask) if bool(mask.any())]

    def groups(self) -> dict[str, list[int]]:
        """All rows by the id of their prompt, in the order of the step."""
        found: dict[str, list[int]] = {}
        for row, rollout in enumerate(self.rollouts):
            found.setdefault(rollout.prompt.id, []).append(row)
        return found

    def names(self) -> dict[int, tuple[str, int]]:
        """Every row as its prompt and its place there: a name for random draws and ties that no order of rows moves."""
        return {row: (id, place) for id, rows in self.groups().items() for place, row in enumerate(rows)}

    def facts(self, row: int, name: str) -> Tensor | None:
        """What a part measured of a rollout, [T]; None where it could not."""
        numbers = self.rollouts[row].facts.get(name)
        return None if numbers is None else torch.tensor(numbers, dtype=torch.float64)

    def kept(self, name: str) -> Tensor:
        """The same of all learned tokens of the step, row after row."""
        found = [(self.facts(row, name), self.mask[row]) for row in self.rows]
        parts = [numbers[mask] for numbers, mask in found if numbers is not None]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    # ------------------------------------------------------------------ what parts do

    def keep(self, row: int, mask: Tensor) -> None:
        """Learn only these of a rollout's tokens [T] bool."""
        if self.shuffle is not None:
            places = self.mask[row].nonzero()[:, 0]
            order = torch.tensor(self.shuffle.sample(range(len(places)), len(places)), dtype=torch.long)
            mask = mask.clone()
            mask[places] = mask[places[order]]
        self.mask[row] = self.mask[row] & mask

    def cut(self, lengths: Mapping[int, int]) -> None:
        """Learn only the first so many tokens of these rollouts.

        The control deals the lengths to other rollouts that are longer, the largest first, so that each finds one.
        """
        if self.shuffle is not None:
            shorter = {row: length for row, length in lengths.items() if length < len(self.mask[row])}
            lengths = self._dealt_lengths(shorter, self.shuffle)
        for row, length in lengths.items():
            self.mask[row] = self.mask[row] & (torch.arange(len(self.mask[row])) < length)

    def drop(self, rows: Sequence[int]) -> None:
        """Learn nothing of these rollouts. They are no holes: the teacher spoke about them."""
        if self.shuffle is not None:
            rows = self.shuffle.sample(self.rows, len([row for row in rows if bool(self.mask[row].any())]))
        for row in rows:
            self.mask[row] = torch.zeros_like(self.mask[row])

    def weigh(self, row: int, weight: Tensor) -> None:
        """Multiply a rollout's weights with these [T], which must be finite and not negative.

        Raises:
            ValueError: they are not.
        """
        if not bool((weight.isfinite() & (weight >= 0)).all()):
            raise ValueError(f"weights of row {row} are negative or not finite")
        weight = self.dealt(row, weight.double())
        before = self.weight[row]
        self.weight[row] = weight if before is None else before * weight

    def add(self, row: int, bonus: Tensor) -> None:
        """Add a bonus [T] to a rollout's advantage; soft weights do not scale it."""
        bonus = self.dealt(row, bonus.double())
        before = self.bonus[row]
        self.bonus[row] = bonus if before is None else before + bonus

    def branch(self, branches: Sequence[Branch], scale: float) -> None:
        """Add a term: `scale` times the mean of -log p over these branches' tokens, weighed by their own weights.

        Where there are branches already, whose term is a mean over *their* tokens, both keep their size (in the reduction
        term_mean): the weights of the new ones are brought to the old ones' worth.
        """
        new, old = _total(branches), _total(self.branches)
        if not new:
            return
        if old and self.branch_scale:
            worth = scale * old / (self.branch_scale * new)
            branches = [replace(branch, weight=branch.weight * worth) for branch in branches]
            scale += self.branch_scale
        self.branches = [*(self.branches if old and self.branch_scale else []), *branches]
        self.branch_scale = scale

    def note(self, **figures: float | None) -> None:
        """Numbers for the step's row of the log."""
        self.stats |= figures

    def _dealt_lengths(self, lengths: Mapping[int, int], shuffle: random.Random) -> dict[int, int]:
        dealt: dict[int, int] = {}
        for length in sorted(lengths.values(), reverse=True):
            longer = [row for row, mask in enumerate(self.mask) if len(mask) > length and row not in dealt]
            dealt[shuffle.choice(longer)] = length
        return dealt

    def dealt(self, row: int, numbers: Tensor) -> Tensor:
        """As they are; in the control, in random order over the rollout's learned tokens."""
        if self.shuffle is None:
            return numbers
        places = self.mask[row].nonzero()[:, 0]
        order = torch.tensor(self.shuffle.sample(range(len(places)), len(places)), dtype=torch.long)
        return numbers.index_copy(0, places, numbers[places[order]])

    # ------------------------------------------------------------------ the law

    def finish(self) -> Signal:
        """The signal, by the law above; what nothing has changed keeps its bits."""
        targets = tuple(self.targets) if any(target is not None for target in self.targets) else ()
        rows, scale = range(len(self.rollouts)), self._scale()
        return replace(
            self.signal,
            values_BT=tuple(self._value(row, scale) for row in rows),
            mask_BT=tuple(self.mask),
            targets=targets,
            weights_BT=tuple(self._divergence(row, scale) for row in rows) if self._bent(targets) else (),
            branches=tuple(self.branches),
            branch_scale=self.branch_scale,
            stats={**self.stats, **self._figures()},
            spoken=self.spoken,
        )

    def _scale(self) -> float:
        """N over the sum of the weights, where `sum_w` wants that; 1 where all of them are 0, as nothing is learned."""
        weights = self._weights() if self.sum_w else None
        return len(weights) / float(weights.sum()) if weights is not None and bool(weights.any()) else 1.0

    def _value(self, row: int, scale: float) -> Tensor:
        value, weight, bonus = self.advantage[row], self.weight[row], self.bonus[row]
        if weight is not None:
            value = value * weight
        if bonus is not None:
            value = value + bonus
        if scale != 1:
            value = value * scale
        return value.float().where(self.mask[row], torch.zeros(()))

    def _bent(self, targets: Sequence[Target | None]) -> bool:
        return bool(targets) and any(one is not None for one in [*self.weight, *self.divergence])

    def _divergence(self, row: int, scale: float) -> Tensor:
        one = torch.full((len(self.rollouts[row]),), scale, dtype=torch.float64)
        parts = [part for part in (self.weight[row], self.divergence[row]) if part is not None]
        return torch.stack([one, *parts]).prod(0).float()

    def _figures(self) -> dict[str, float | None]:
        """What the log says of masks and weights."""
        figures: dict[str, float | None] = {
            "kept_share": self.tokens / self.spoken if self.spoken else None,
            "kept_rollouts": float(len(self.rows)),
        }
        weights = self._weights()
        return figures if weights is None else figures | weight_figures(weights)

    def _weights(self) -> Tensor | None:
        """The soft weights [N] of all learned tokens; None where nothing has any."""
        if all(weight is None for weight in self.weight):
            return None
        ones = [torch.ones(len(mask), dtype=torch.float64) for mask in self.mask]
        each = [one if weight is None else weight for one, weight in zip(ones, self.weight, strict=True)]
        return torch.cat([weight[mask] for weight, mask in zip(each, self.mask, strict=True)])


def _total(branches: Sequence[Branch]) -> float:
    """What the weights of all learned tokens of branches add up to."""
    counts = (sum(branch.weights) if branch.weights else len(branch.ids) - branch.context for branch in branches)
    return math.fsum(branch.weight * count for branch, count in zip(branches, counts, strict=True))


def weight_figures(weights: Tensor) -> dict[str, float | None]:
    """Mean, extremes and effective share `(sum w)^2 / (N sum w^2)` of the soft weights [N] of a step."""
    names = ("weight_mean", "weight_min", "weight_max", "weight_zero_share", "effective_share")
    if not len(weights):
        return dict.fromkeys(names)
    squares = float((weights**2).sum())
    numbers = (
        float(weights.mean()),
        float(weights.min()),
        float(weights.max()),
        float((weights == 0).double().mean()),
        float(weights.sum()) ** 2 / (len(weights) * squares) if squares else 0.0,
    )
    return dict(zip(names, numbers, strict=True))
