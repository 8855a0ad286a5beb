"""Audited chunks with their verdicts, what a signal makes of them, and the placebo controls.

Chunks of one step are all C tokens long, so verdicts can change places.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean

from omniopd.errors import ConfigError
from omniopd.types import Chunk, Reply
from omniopd.verification.agreement import spoken, survival_counts
from omniopd.verification.text import comparable

Score = Callable[[Sequence[tuple[Chunk, Reply]]], Sequence[float]]
"""Similarities in [0, 1], one per pair; pairs come cut to equal length, as `comparable` returns them."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the teacher's valid replies say about one chunk.

    `scores` [n_eff] has one similarity per reply that could speak about at least one token; `survivors` [C+1] and
    `at_risk` [C] are as in `survival_counts`, over all of `replies`.
    """

    scores: tuple[float, ...]
    survivors: tuple[int, ...]
    at_risk: tuple[int, ...]
    replies: tuple[Reply, ...]

    @property
    def k(self) -> float:
        """The soft match count, `sum phi`."""
        return sum(self.scores)

    @property
    def n_eff(self) -> int:
        """How many replies count. An invalid reply leaves both k and N."""
        return len(self.scores)


@dataclass(frozen=True, slots=True)
class Audit:
    """A chunk, the student's log-probs of its tokens (`logp` [C], as sampled), and the verdict."""

    chunk: Chunk
    logp: tuple[float, ...]
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class ChunkSignal:
    """Numbers for one chunk's tokens: `values` and `mask` are [C]; a value outside the mask is 0 and means nothing.

    `targets` are texts to learn from after the chunk's prefix, with their weights.
    """

    values: tuple[float, ...]
    mask: tuple[bool, ...]
    targets: tuple[tuple[Reply, float], ...] = ()


def judge_all(chunks: Sequence[Chunk], replies: Sequence[Sequence[Reply]], score: Score) -> list[Verdict]:
    """Verdicts on chunks; `replies[i]` are the valid continuations of `chunks[i]`. The score is called once.

    A reply that the token limit cut inside the chunk's first token says nothing, and is not scored.

    Raises:
        ConfigError: the score function returned too few numbers, or one outside [0, 1].
    """
    rows = [
        [comparable(chunk, reply) for reply in said if spoken(chunk, reply)]
        for chunk, said in zip(chunks, replies, strict=True)
    ]
    scores = iter(_scored(score, [pair for row in rows for pair in row]))
    return [
        Verdict(tuple(islice(scores, len(row))), *survival_counts(chunk, said), tuple(said))
        for chunk, said, row in zip(chunks, replies, rows, strict=True)
    ]


def chance_floor(
    chunks: Sequence[Chunk], replies: Sequence[Sequence[Reply]], prompts: Sequence[str], score: Score, seed: int | str
) -> float | None:
    """Mean score of chunks against replies about *other* prompts: what unrelated text gets. None without such a pair.

    Args:
        prompts: the prompt's id of each chunk; each chunk meets one random reply of another prompt's.
    """
    rng = random.Random(seed)
    pairs = []
    for chunk, prompt in zip(chunks, prompts, strict=True):
        others = [said for said, asked in zip(replies, prompts, strict=True) if asked != prompt and said]
        if others:
            reply = rng.choice(rng.choice(others))
            pairs += [comparable(chunk, reply)] if spoken(chunk, reply) else []
    return fmean(_scored(score, pairs)) if pairs else None


def _scored(score: Score, pairs: list[tuple[Chunk, Reply]]) -> list[float]:
    if not pairs:
        return []
    scores = [float(value) for value in score(pairs)]
    if len(scores) != len(pairs):
        raise ConfigError(f"score: {len(pairs)} pairs gave {len(scores)} scores; return one number per pair")
    strange = next((value for value in scores if not 0.0 <= value <= 1.0), None)  # also catches nan
    if strange is not None:
        raise ConfigError(f"score: a pair got {strange}; scores must lie in [0, 1], so clip or rescale them")
    return scores


def shuffled(audits: Sequence[Audit], seed: int | str) -> list[Audit]:
    """The placebo: verdicts dealt out again over the chunks, none to its own where there are two or more. [ours]

    All verdicts stay, so the histogram of weights does too; what the teacher said about *this* chunk is gone.
    """
    order = list(range(len(audits)))
    random.Random(seed).shuffle(order)
    giver = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle through all, so nobody keeps his own
    return [replace(audit, verdict=audits[giver[i]].verdict) for i, audit in enumerate(audits)]


def constant_values(signals: Sequence[ChunkSignal], chunks: Sequence[Chunk]) -> list[ChunkSignal]:
    """The other placebo: every audited token gets the mean value, whose expected gradient is zero. [ours]

    Texts to learn from are replaced by the student's own chunk, at the same total weight.
    """
    audited = [v for signal in signals for v, on in zip(signal.values, signal.mask, strict=True) if on]
    mean = fmean(audited) if audited else 0.0
    return [
        replace(signal, values=tuple(mean if on else 0.0 for on in signal.mask), targets=_own(signal, chunk))
        for signal, chunk in zip(signals, chunks, strict=True)
    ]


def _own(signal: ChunkSignal, chunk: Chunk) -> tuple[tuple[Reply, float], ...]:
    weight = sum(weight for _, weight in signal.targets)
    return ((Reply(chunk.text, "stop" if chunk.closes else "length"), weight),) if signal.targets else ()
