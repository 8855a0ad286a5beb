"""Where what a teacher says of one place lands: say something else there, and see which of the student's tokens notice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from omniopd.method import Method
from omniopd.types import Distributions, Evidence, Rollout, Signal, TokenScores
from omniopd.vocabulary import Vocabulary

PLACES = 12  # of each response that are tried, spread over it


def landing(method: Method, rollouts: Sequence[Rollout], evidence: Sequence[Evidence], head: Tensor) -> tuple[int, int]:
    """How many of the teacher's places move tokens that spell some of their bytes, and how many move others.

    A place may move the neighbours in its chunk as well, and what follows it, which is charged with its end. Where none of
    its own tokens has a signal nothing can be told.

    Args:
        head: [V, D], the weights of the student's output layer, for its size and its device.
    """
    scores = [found for found in evidence if isinstance(found, TokenScores) and found.ids]
    before = method.read(rollouts, scores, 1)
    landed = astray = 0
    for turn in range(PLACES):
        places = [turn * len(found.ids) // PLACES for found in scores]
        after = method.read(rollouts, [otherwise(one, at) for one, at in zip(scores, places, strict=True)], 1)
        for found, place in zip(scores, places, strict=True):
            row = found.query.row
            moved = _moved(before, after, row, rollouts[row], head)
            own = counterparts(found, place, rollouts[row], method.text.vocabulary)
            own = {token for token in own if before.mask_BT[row][token]}
            landed += bool(moved & own)
            astray += bool(moved) and bool(own) and not moved & own
    return landed, astray


def otherwise(scores: TokenScores, place: int) -> TokenScores:
    """The same scores but for one place."""

    def less(values: Sequence[float]) -> tuple[float, ...]:
        return tuple(value - 0.25 for value in values)

    logprobs = (*scores.logprobs[:place], *less(scores.logprobs[place : place + 1]), *scores.logprobs[place + 1 :])
    tops = tuple(
        {id: value - 0.25 for id, value in top.items()} if i == place else top for i, top in enumerate(scores.top)
    )
    opened = tuple(less(values) if i == place else values for i, values in enumerate(scores.openings))
    found = scores.distributions
    if found is not None:
        hidden = found.hidden.clone()
        hidden[place] = hidden[place] * 0.5 + 1
        found = Distributions(hidden, found.head)
    return replace(scores, logprobs=logprobs, top=tops, openings=opened, distributions=found)


def counterparts(scores: TokenScores, place: int, rollout: Rollout, vocabulary: Vocabulary) -> set[int]:
    """The student's tokens that spell bytes of the teacher's token at `place`, found by looking at every one.

    The end of the turn belongs to the end of the turn. Empty where it can't be told: inside text that a tokenizer changed.
    """
    if scores.ids == rollout.ids:
        return {place}
    ends = vocabulary.spell(rollout.ids).ends
    if scores.query.closes and place == len(scores.ids) - 1:
        return {len(ends) - 1}
    start, end = _span(scores.ends, place)
    spans = [_span(ends, token) for token in range(len(ends))]
    if start is None or end is None:
        return set()
    return {
        token for token, (a, b) in enumerate(spans) if a is not None and b is not None and max(a, start) < min(b, end)
    }


def _span(ends: Sequence[int | None], token: int) -> tuple[int | None, int | None]:
    return (ends[token - 1] if token else 0), ends[token]


def _moved(before: Signal, after: Signal, row: int, rollout: Rollout, head: Tensor) -> set[int]:
    heard = before.mask_BT[row] & after.mask_BT[row]
    apart = _said(before, row, rollout, head) != _said(after, row, rollout, head)
    return set((heard & apart).nonzero()[:, 0].tolist())


@torch.no_grad()
def _said(signal: Signal, row: int, rollout: Rollout, head: Tensor) -> Tensor:
    """[T], the value of each token, or its divergence from a student that is known."""
    target = signal.targets[row] if signal.targets else None
    if target is None:
        return signal.values_BT[row]
    places = torch.arange(len(rollout), device=head.device)[:, None]
    logits = torch.sin(0.3 * torch.arange(len(head), device=head.device) + places)
    return target.divergence(logits, torch.tensor(rollout.ids, device=head.device), 0).float().cpu()
