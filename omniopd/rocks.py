"""Rock tokens: token types whose loss stays high though they are frequent (arXiv 2605.09253, version 2).

    R(v) = mean_loss(v) Freq(v);    CCR(v) = kept(v) / Freq(v);    R_ctx(v) = R(v) CCR(v)                [second-hand]

An occurrence is persistent where its loss is in the upper fifth before training and after it; it is kept where enough of the
other persistent ones of its type have a similar context. Quantile, similarity, share, window and embedding are not published
[ours]. The released code's simple selection ranks by R alone and leaves out the most frequent types [official code].
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from omniopd.settings import Settings

NEAREST = 5  # types of about the same frequency, of which one is drawn


class TokenType(Settings):
    """What is known of a token type.

    Attributes:
        frequency: occurrences in the corpus.
        loss: their mean, in nats.
        recurrence: CCR; 1 where contexts are not looked at.
        knock_out: what the student's accuracy changes by if it may not write it; None: not tried.
    """

    id: int
    frequency: int
    loss: float
    recurrence: float = 1.0
    knock_out: float | None = None

    @property
    def score(self) -> float:
        """R_ctx, the share of the corpus' loss that recurs."""
        return self.loss * self.frequency * self.recurrence


class RockList(Settings):
    """All types of a corpus, as a JSON file: `vocabulary` is the tokenizer's digest, `checkpoint` the student's."""

    vocabulary: str
    checkpoint: str
    types: tuple[TokenType, ...]

    def save(self, path: Path) -> None:
        """Write the file; `model_validate_json` reads it."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def mine_rock_tokens(
    ids: Tensor,
    before: Tensor,
    after: Tensor,
    contexts: Tensor,
    quantile: float = 0.8,
    similarity: float = 0.8,
    share: float = 0.3,
) -> list[TokenType]:
    """All types that occur, by id, with their CCR. The loss is that after training.

    Args:
        ids: [O] of all occurrences; `before` and `after` [O], their losses in nats.
        contexts: [O, D], see `contexts_of`.
    """
    high = (before >= before.double().quantile(quantile)) & (after >= after.double().quantile(quantile))
    order = ids.argsort(stable=True)
    types, counts = ids[order].unique_consecutive(return_counts=True)
    return [
        TokenType(
            id=id,
            frequency=len(places),
            loss=float(after[places].double().mean()),
            recurrence=recurring(contexts[places[high[places]]], similarity, share) / len(places),
        )
        for id, places in zip(types.tolist(), order.split(counts.tolist()), strict=True)
    ]


def contexts_of(ids: Tensor, embedding: Tensor, window: int = 8) -> Tensor:
    """The mean input embedding [T, D] of up to `window` tokens on either side of each token, itself left out."""
    vectors = embedding[ids]
    sums = torch.cat([torch.zeros_like(vectors[:1]), vectors.cumsum(0)])
    at = torch.arange(len(ids))
    first, end = (at - window).clamp(min=0), (at + window + 1).clamp(max=len(ids))
    return (sums[end] - sums[first] - vectors) / (end - first - 1).clamp(min=1)[:, None]


def recurring(contexts: Tensor, similarity: float, share: float) -> int:
    """How many of the contexts [n, D] are similar, by their cosine, to at least that share of the others."""
    if len(contexts) < 2:
        return 0
    unit = normalize(contexts.double(), dim=-1)
    alike = (unit @ unit.T >= similarity).fill_diagonal_(False).sum(-1)
    return int((alike / (len(contexts) - 1) >= share).sum())


def heaviest(types: Sequence[TokenType], count: int, skip: int = 0) -> tuple[int, ...]:
    """The ids of highest score, at most `count`, of all but the `skip` most frequent types; ties by id."""
    rarer = sorted(types, key=lambda one: (-one.frequency, one.id))[skip:]
    ranked = sorted((one for one in rarer if one.score > 0), key=lambda one: (-one.score, one.id))
    return tuple(one.id for one in ranked[:count])


def matched_random(types: Sequence[TokenType], rocks: Collection[int], seed: int) -> tuple[int, ...]:
    """Other types with as many occurrences: for each rock, the commonest first, one of the nearest in frequency, then
    whatever fills the rest. Types that are not frequent enough together give less."""
    dealer, often = random.Random(seed), {one.id: one.frequency for one in types}
    pool = {id: often[id] for id in sorted(often) if id not in rocks}
    chosen: list[int] = []
    missing = 0
    for frequency in sorted((often[id] for id in rocks), reverse=True):
        missing += frequency
        if near := _nearest(pool, missing)[:NEAREST]:
            chosen.append(dealer.choice(near))
            missing -= pool.pop(chosen[-1])
    while near := _nearest(pool, missing):
        chosen.append(near[0])
        missing -= pool.pop(chosen[-1])
    return tuple(chosen)


def _nearest(pool: Mapping[int, int], missing: int) -> list[int]:
    """Ids by frequency, those first of which the fewest occurrences would still be missing; none that is too frequent."""
    return sorted((id for id in pool if pool[id] <= missing), key=lambda id: -pool[id])
