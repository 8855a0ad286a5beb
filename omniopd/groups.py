"""Rewards of whole rollouts: compared within the group of one prompt, and laid on the rollouts' tokens.

A reward that is not known is None. It enters no mean and its rollout is masked: no verdict is never a reward of 0. Arithmetic
is in float64.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean, pstdev, stdev
from typing import Literal

import torch

from omniopd.types import Branch, Prompt, Rollout, Signal

Deviation = Literal["population", "sample"]
Compare = Callable[[Sequence[float]], list[float]]
"""Rewards [G] of a group, all of them known, as advantages [G]."""

LEAST_SPREAD = 1e-6  # below it the rewards of a group are equal: dividing by it would blow rounding up to unit variance


def centred(rewards: Sequence[float]) -> list[float]:
    """`r - mean(r)`; all equal (or one alone) gives zeros."""
    if max(rewards) - min(rewards) < LEAST_SPREAD:
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    return [reward - mean for reward in rewards]


def normalised(rewards: Sequence[float], deviation: Deviation = "population") -> list[float]:
    """`(r - mean(r)) / sd(r)`, the sd over n or n - 1; all equal (or one alone) gives zeros."""
    if max(rewards) - min(rewards) < LEAST_SPREAD:
        return [0.0] * len(rewards)
    sd = pstdev(rewards) if deviation == "population" else stdev(rewards)
    return [reward / sd for reward in centred(rewards)]


def normaliser(deviation: Deviation) -> Compare:
    """`normalised` with that deviation."""
    return partial(normalised, deviation=deviation)


def by_prompt(rows: Mapping[int, Rollout | Prompt]) -> dict[str, list[int]]:
    """Rows by the id of their prompt, both in the order of the step."""
    found: dict[str, list[int]] = {}
    for row, one in sorted(rows.items(), key=lambda item: item[0]):
        found.setdefault(one.prompt.id if isinstance(one, Rollout) else one.id, []).append(row)
    return found


def reward_signal(
    rollouts: Sequence[Rollout],
    rewards: Sequence[float | None],
    compare: Compare,
    branches: Sequence[Branch] = (),
    drops: Mapping[str, int] | None = None,
    rejects: Mapping[str, int] | None = None,
    stats: Mapping[str, float | None] | None = None,
) -> Signal:
    """Each rollout's advantage in its group, on every one of its tokens: `-log p` times it is GRPO's first step.

    Args:
        rewards: [B].
        branches: texts of the teacher's to learn from beside.
    """
    advantages: list[float | None] = [None] * len(rollouts)
    flat = 0
    for rows in by_prompt(dict(enumerate(rollouts))).values():
        known = {row: reward for row in rows if (reward := rewards[row]) is not None}
        if known:
            compared = compare(list(known.values()))
            flat += not any(compared)
            for row, advantage in zip(known, compared, strict=True):
                advantages[row] = advantage
    found = [reward for reward in rewards if reward is not None]
    return Signal(
        values_BT=tuple(torch.full((len(r),), a or 0.0) for r, a in zip(rollouts, advantages, strict=True)),
        mask_BT=tuple(torch.full((len(r),), a is not None) for r, a in zip(rollouts, advantages, strict=True)),
        branches=tuple(branches),
        drops=Counter(drops or {}),
        rejects=Counter(rejects or {}),
        stats={
            "reward_mean": fmean(found) if found else None,
            "reward_known": float(len(found)),
            "groups_without_contrast": float(flat),
            "branch_tokens": float(sum(len(branch.ids) for branch in branches)),
            **(stats or {}),
        },
    )


def dealt(names: Sequence[str], rng: random.Random) -> dict[str, str]:
    """For each name another one, each used once; of one name itself. The control that swaps what belongs to prompts."""
    order = rng.sample(names, len(names))
    return dict(zip(order, [*order[1:], *order[:1]], strict=True))
