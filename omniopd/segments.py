"""Gradients of the segments of responses: how well the first tokens point where all of them do.

Segment j are the tokens from edge j - 1 to edge j, the last one the rest. Of their gradients only inner products are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from omniopd.method import Gradients
from omniopd.types import Metric, Rollout, Signal


def segment_gram(
    gradients: Gradients,
    rollouts: Sequence[Rollout],
    signal: Signal,
    rows: Sequence[int],
    edges: Sequence[int],
    *,
    split: bool = False,
    metric: Metric = "identity",
) -> Tensor:
    """Inner products [K, K] of the gradients of K segments of some rollouts, as the signal has them.

    Args:
        rows: which rollouts; the others are not computed.
        edges: K - 1 numbers of tokens, ascending.
        split: multiply gradients of every other rollout with those of the rest, so that noise of one rollout meets none of
            its own.
    """
    spans = list(pairwise([0, *edges, max(len(rollouts[row]) for row in rows)]))
    probe = [rollout if row in rows else _emptied(rollout) for row, rollout in enumerate(rollouts)]
    halves = [rows[::2], rows[1::2]] if split else [rows]
    signals = [_segment(signal, probe, half, start, end) for half in halves for start, end in spans]
    gram = torch.tensor(gradients.gram(probe, signals, metric), dtype=torch.float64)
    if not split:
        return gram
    apart = gram[: len(spans), len(spans) :]
    return (apart + apart.T) / 2


def prefix_cosines(gram: Tensor) -> Tensor | None:
    """The cosine [K] of the first j segments' gradient with that of all K, from their inner products [K, K].

    0 where a prefix has no gradient; None where all together have none.
    """
    total, norms = gram.sum(), gram.cumsum(0).cumsum(1).diagonal()
    if not bool(total > 0):
        return None
    inner = gram.sum(1).cumsum(0)
    return torch.where(norms > 0, inner / (norms.clamp(min=0) * total).sqrt(), 0.0)


def null_cosine(lengths: Sequence[int], window: int) -> float:
    """What the cosine of the first `window` tokens is where the gradients of tokens are independent noise of mean 0."""
    return math.sqrt(sum(min(length, window) for length in lengths) / sum(lengths))


def _segment(signal: Signal, rollouts: Sequence[Rollout], rows: Sequence[int], start: int, end: int) -> Signal:
    """The signal of the tokens [start, end) of some rollouts; the rest is 0 under the mask.

    The mask is all tokens whatever the segment: so all segments have one normaliser, and none has an anchor.
    """
    inside = []
    for row, (rollout, mask) in enumerate(zip(rollouts, signal.mask_BT, strict=True)):
        places = torch.arange(len(rollout))
        inside.append(mask[: len(rollout)] & (places >= start) & (places < end) & (row in rows))
    pairs = zip(signal.values_BT, inside, strict=True)
    targets = [target if len(here) else None for target, here in zip(signal.targets, inside, strict=False)]
    return Signal(
        values_BT=tuple(value[: len(here)].where(here, torch.zeros(())) for value, here in pairs),
        mask_BT=tuple(torch.ones_like(here) for here in inside),
        targets=tuple(targets),
        weights_BT=tuple(here.float() for here in inside) if targets else (),
    )


def _emptied(rollout: Rollout) -> Rollout:
    """The rollout without its tokens."""
    return replace(rollout, ids=(), logprobs=(), entropy=(), ends=(), text="", given=0, facts={}, top=())
