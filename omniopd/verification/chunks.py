"""Which spans of a rollout the teacher is asked about, and such a span as text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby

from omniopd.types import Chunk, Rollout


def select_starts(entropy: Sequence[float], count: int, length: int) -> list[int]:
    """Starts of at most `count` chunks of `length` tokens at the peaks of entropy, ascending.

    Greedy by falling H_t: t is skipped where the chunk would run past the end (t + C > T) or overlap a chosen one
    (|t - u| < C). Of equal entropies the later wins. H_t belongs to the distribution that *produced* token t, so the
    chunk opens with the token that the student was least sure of.

    Source: arXiv 2606.01476, section 3.2.3 [second-hand]; order of ties and chunks that start at, rather than surround,
    the peak [second-hand].

    Args:
        entropy: [T], nats.
        count: M.
        length: C, in tokens.
    """
    ranked = sorted(range(len(entropy) - length + 1), key=lambda t: (-entropy[t], -t))
    chosen: list[int] = []
    for start in ranked:
        if len(chosen) == count:
            break
        if all(abs(start - other) >= length for other in chosen):
            chosen.append(start)
    return sorted(chosen)


def random_starts(total: int, count: int, length: int, seed: int | str) -> list[int]:
    """Chunk starts chosen blindly: the greedy choice over random numbers in the place of entropies. [paper: ablation]

    So it differs from `select_starts` in the ranking alone. The same seed gives the same starts.

    Args:
        total: T, in tokens.
    """
    rng = random.Random(seed)
    return select_starts([rng.random() for _ in range(total)], count, length)


def cut_chunk(rollout: Rollout, row: int, start: int, length: int) -> Chunk:
    """Tokens [start, start + length) of a rollout as a chunk, the text before them as its prefix.

    Text is cut after the last character that the tokens before `start` completed, so no prefix ends inside a
    character. White space at the end of the prefix moves to the front of the chunk's text, because chat servers refuse
    or swallow it [ours]: `prefix + text == rollout.text[:rollout.ends[start + length - 1]]`, character for character.
    """
    end = start + length
    if not 0 <= start < end <= len(rollout):
        raise ValueError(f"tokens [{start}, {end}) are not inside a response of {len(rollout)} tokens")
    prefix = rollout.text[: rollout.ends[start - 1] if start else 0].rstrip()
    return Chunk(
        row=row,
        start=start,
        end=end,
        prefix=prefix,
        text=rollout.text[len(prefix) : rollout.ends[end - 1]],
        ends=tuple(character - len(prefix) for character in rollout.ends[start:end]),
        closes=rollout.finish == "stop" and end == len(rollout),
    )


def thresholds(chunk: Chunk) -> tuple[int, ...]:
    """How many characters of the chunk's text a reply must share before it agrees with token j; never falling.

    A token that completes no character (a piece of an emoji, a token without text) is decided by the next one that
    does, because nothing is known of the teacher's pieces: the tokens of one character agree or disagree together
    [ours]. The end of text counts as one character after the last. Tokens at the chunk's end that nothing decides are
    left out, so the result is [<=C].
    """
    ends = list(chunk.ends)
    if chunk.closes:
        ends[-1] = len(chunk.text) + 1
    decided: list[int] = []
    for j in reversed(range(len(ends))):
        if ends[j] > (ends[j - 1] if j else 0):
            decided.append(ends[j])
        elif decided:
            decided.append(decided[-1])
    return tuple(reversed(decided))


def steps(chunk: Chunk) -> list[range]:
    """Tokens of the chunk, grouped into those that are decided together; most groups hold one token."""
    needed = thresholds(chunk)
    groups = (list(tokens) for _, tokens in groupby(range(len(needed)), key=lambda j: needed[j]))
    return [range(tokens[0], tokens[-1] + 1) for tokens in groups]
